"""Tests of the networks: sizes, names, dtypes and statistics."""

import subprocess
import sys

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt_jax import models


def _shapes(model, image_shape):
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  init = jax.eval_shape(
    lambda images: model.init(jax.random.key(0), images, train=False), images
  )
  return {
    collection: traverse_util.flatten_dict(tree, sep="/")
    for collection, tree in init.items()
  }


def _init(model, images):
  # Compiled, so that the persistent cache saves most of the time.
  init = jax.jit(lambda images: model.init(jax.random.key(0), images, False))
  return init(images)


def _apply(model, variables, images, **kwargs):
  apply = jax.jit(lambda *args: model.apply(*args, **kwargs))
  return apply(variables, images)


def _size(leaves):
  return sum(leaf.size for leaf in leaves.values())


# Counted by hand: a 3x3 stem, blocks of two 3x3 convolutions, a 1x1 convolution
# where the channels change, two numbers for each normalised channel.
def _cifar_size(blocks, width, channels, num_classes):
  size = 9 * channels * width + 2 * width
  previous = width
  for features in (width, 2 * width, 4 * width):
    for _ in range(blocks):
      size += 9 * previous * features + 9 * features**2 + 4 * features
      if previous != features:
        size += previous * features + 2 * features
      previous = features
  return size + (previous + 1) * num_classes


def test_resnet50_has_the_published_size():
  params = _shapes(models.create("resnet50", 1000), (224, 224, 3))["params"]
  assert _size(params) == 25_557_032
  assert params["Conv_0/kernel"].shape == (7, 7, 3, 64)
  assert params["BottleneckBlock_15/Conv_2/kernel"].shape == (1, 1, 512, 2048)
  assert params["Dense_0/kernel"].shape == (2048, 1000)
  assert sum(name.endswith("kernel") for name in params) == 54


@pytest.mark.parametrize(
  ("name", "blocks"), [("resnet8", 1), ("resnet20", 3), ("resnet56", 9)]
)
@pytest.mark.parametrize("image_shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("width", [8, 16])
def test_cifar_family(name, blocks, image_shape, width):
  model = models.create(name, 10, width=width)
  params = _shapes(model, image_shape)["params"]
  assert _size(params) == _cifar_size(blocks, width, image_shape[-1], 10)
  # 6n + 2 layers, and the shortcuts of the second and the third stage.
  kernels = [name for name in params if name.endswith("kernel")]
  assert len(kernels) == 6 * blocks + 2 + 2
  assert params["Conv_0/kernel"].shape[-1] == width
  assert f"BasicBlock_{blocks}/Conv_2/kernel" in params
  assert not any("Conv" in name and "bias" in name for name in params)


def test_shortcuts_of_three_by_three():
  one, three = (
    _shapes(models.create("resnet20", 10, shortcut_size=n), (32, 32, 3))
    for n in (1, 3)
  )
  assert three["params"]["BasicBlock_3/Conv_2/kernel"].shape == (3, 3, 16, 32)
  more = _size(three["params"]) - _size(one["params"])
  assert more == 8 * (16 * 32 + 32 * 64)
  with pytest.raises(ValueError, match="shortcut_size must be odd, got 2"):
    models.create("resnet20", 10, shortcut_size=2)


def test_published_size_of_resnet20():
  # 0.27 M in He et al., with shortcuts without parameters; option B adds
  # 16 * 32 + 32 * 64 weights and two numbers for each of 32 + 64 channels.
  params = _shapes(models.create("resnet20", 10), (32, 32, 3))["params"]
  assert _size(params) == 269_722 + 512 + 2048 + 192


@pytest.mark.parametrize("name", models.NAMES)
def test_every_name_makes_a_network(name):
  size = 224 if name == "resnet50" else 32
  model = models.create(name, 7)
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  logits, _ = jax.eval_shape(
    lambda images: model.init_with_output(
      jax.random.key(0), images, train=False
    ),
    images,
  )
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


def test_stages_halve_the_image():
  model = models.create("resnet8", 10)
  images = jnp.zeros((1, 28, 28, 1))
  variables = _init(model, images)
  _, state = _apply(
    model, variables, images, train=False, capture_intermediates=True
  )
  shapes = [
    state["intermediates"][f"BasicBlock_{i}"]["__call__"][0].shape
    for i in range(3)
  ]
  assert shapes == [(1, 28, 28, 16), (1, 14, 14, 32), (1, 7, 7, 64)]


def test_initialisation():
  model = models.create("resnet20", 10, width=32)
  images = jnp.zeros((1, 8, 8, 3))
  params = _init(model, images)["params"]
  for name, leaf in traverse_util.flatten_dict(params, sep="/").items():
    if "Conv" in name:
      fan_in = np.prod(leaf.shape[:-1])
      deviation = np.std(leaf) * np.sqrt(fan_in / 2)
      np.testing.assert_allclose(deviation, 1, atol=4 / np.sqrt(2 * leaf.size))
    elif name.endswith("scale"):
      np.testing.assert_array_equal(leaf, 1)


@pytest.mark.slow
def test_resnet50_blocks_start_as_their_shortcut():
  model = models.create("resnet50", 10, width=4)
  images = jnp.zeros((1, 32, 32, 3))
  params = _init(model, images)["params"]
  for name, leaf in traverse_util.flatten_dict(params, sep="/").items():
    if name.endswith("scale"):
      last = "Block" in name and "BatchNorm_2" in name
      np.testing.assert_array_equal(leaf, 0 if last else 1)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
  images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  exact = models.create("resnet8", 10, width=8)
  rough = models.create("resnet8", 10, width=8, dtype=jnp.bfloat16)
  variables = _init(rough, images)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
  logits, changed = _apply(
    rough,
    variables,
    images,
    train=True,
    mutable=["batch_stats", "intermediates"],
    capture_intermediates=True,
  )
  assert logits.dtype == jnp.float32
  conv = changed["intermediates"]["BasicBlock_0"]["Conv_0"]["__call__"][0]
  assert conv.dtype == jnp.bfloat16
  stats = jax.tree.leaves(changed["batch_stats"])
  assert {leaf.dtype.name for leaf in stats} == {"float32"}
  expected, _ = _apply(
    exact, variables, images, train=True, mutable=["batch_stats"]
  )
  np.testing.assert_allclose(logits, expected, atol=0.1)
  assert not np.array_equal(logits, expected)


def test_float64_reaches_the_logits():
  with jax.enable_x64(True):
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1), jnp.float64)
    model = models.create("resnet8", 10, width=8, dtype="float64")
    variables = jax.tree.map(
      lambda leaf: leaf.astype(jnp.float64), _init(model, images)
    )
    logits, state = _apply(
      model, variables, images, train=False, capture_intermediates=True
    )
  assert logits.dtype == np.float64
  features = np.asarray(state["intermediates"]["BasicBlock_2"]["__call__"][0])
  kernel = np.asarray(variables["params"]["Dense_0"]["kernel"])
  expected = features.mean((1, 2)) @ kernel  # The bias starts at zero.
  np.testing.assert_allclose(logits, expected, rtol=1e-12)


def test_batch_statistics():
  """New = 0.9 * old + 0.1 * that of the batch; epsilon is 1e-5."""
  model = models.create("resnet8", 10, width=8)
  images = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
  variables = _init(model, images)
  _, changed = _apply(
    model,
    variables,
    images,
    train=True,
    mutable=["batch_stats", "intermediates"],
    capture_intermediates=True,
  )
  conv = np.asarray(changed["intermediates"]["Conv_0"]["__call__"][0])
  norm = np.asarray(changed["intermediates"]["BatchNorm_0"]["__call__"][0])
  stats = changed["batch_stats"]["BatchNorm_0"]
  mean, variance = conv.mean((0, 1, 2)), conv.var((0, 1, 2))
  np.testing.assert_allclose(stats["mean"], 0.1 * mean, atol=1e-6)
  np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * variance, rtol=1e-5)
  expected = (conv - mean) / np.sqrt(variance + 1e-5)
  np.testing.assert_allclose(norm, expected, atol=1e-4)


def test_cross_replica_statistics_are_those_of_the_whole_batch():
  images = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
  alone = models.create("resnet8", 10, width=8)
  together = models.create("resnet8", 10, width=8, axis_name="devices")
  variables = _init(alone, images)

  def apply(model, images):
    return model.apply(variables, images, train=True, mutable=["batch_stats"])

  expected, stats = apply(alone, images)
  split = images.reshape(4, 2, 8, 8, 1)
  logits, mapped_stats = jax.pmap(
    lambda images: apply(together, images), axis_name="devices"
  )(split)
  np.testing.assert_allclose(logits.reshape(8, 10), expected, atol=1e-4)
  jax.tree.map(
    lambda mapped, leaf: np.testing.assert_allclose(
      mapped, np.broadcast_to(leaf, mapped.shape), atol=1e-5
    ),
    mapped_stats,
    stats,
  )
  drifting, _ = jax.pmap(lambda images: apply(alone, images))(split)
  assert np.abs(drifting.reshape(8, 10) - expected).max() > 1e-2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("resnet9", 10), "name must be one of resnet8, .*'resnet9'"),
    (("resnet8", 0), "num_classes must be positive, got 0"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    models.create(*arguments)


def test_bad_width():
  with pytest.raises(ValueError, match="width must be positive, got 0"):
    models.create("resnet8", 10, width=0)


def test_names_are_known_without_flax():
  code = (
    "import sys; from sparseopt_jax import models; models.NAMES; "
    "sys.exit('flax' in sys.modules)"
  )
  assert (
    subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
  )
