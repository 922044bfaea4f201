"""Networks without their dead channels: what goes, and that all else stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt_jax import export
from sparseopt_jax import models
from sparseopt_jax import shrink
from sparseopt_jax.models import resnet

BASIC, BOTTLENECK = "BasicBlock_1", "BottleneckBlock_1"
INFO = {
  "model": "resnet8",
  "width": 8,
  "shortcut_size": 1,
  "precision": "float32",
}
INFO |= {"num_classes": 10}


def _model(kind):
  if kind is resnet.BasicBlock:
    return models.create("resnet8", 10, width=8)
  return resnet.ResNet((1, 1), kind, 10, width=8, large_images=False)


def _variables(module, seed=0):
  """All random, so that no batch norm gives 0 by chance."""
  images = jnp.zeros((1, 8, 8, 3))
  shapes = jax.eval_shape(
    lambda key: module.init(key, images, train=False), jax.random.key(0)
  )
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  found = export._flatten(jax.tree.map(draw, shapes))
  for path in found:
    if path.endswith("/var"):
      found[path] = np.abs(found[path]) + np.float32(0.5)
  return found


def _kill(flat, block, i, channels, sign):
  """Takes neurons all weights; batch norm gives a constant of that sign."""
  flat[f"params/{block}/Conv_{i}/kernel"][..., channels] = 0
  flat[f"params/{block}/BatchNorm_{i}/bias"][channels] = 2 * sign
  flat[f"batch_stats/{block}/BatchNorm_{i}/mean"][channels] = 0.1


def _shrunk(module, flat):
  """The smaller network, after a check that it computes the same."""
  masks = {
    path.removeprefix("params/"): leaf != 0
    for path, leaf in flat.items()
    if path.endswith("kernel")
  }
  given = {path: leaf.copy() for path, leaf in flat.items()}
  smaller, smaller_masks = shrink.shrink(flat, masks)
  for path, leaf in given.items():
    np.testing.assert_array_equal(flat[path], leaf)  # Not in place.
  assert smaller_masks.keys() == masks.keys()
  for path, mask in smaller_masks.items():
    np.testing.assert_array_equal(mask, smaller[f"params/{path}"] != 0)
  images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
  expected = module.apply(export._nest(flat), images, train=False)
  other = module.clone(hidden=shrink.hidden(smaller))
  got = other.apply(export._nest(smaller), images, train=False)
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
  return smaller


def test_nothing_is_dead():
  module = _model(resnet.BasicBlock)
  flat = _variables(module)
  smaller = _shrunk(module, flat)
  assert shrink.hidden(flat) == [[8], [16], [32]]
  for path, leaf in flat.items():
    np.testing.assert_array_equal(smaller[path], leaf)


def test_dead_channels_of_a_basic_block():
  """Those that give 0 go; the others stay, since the borders are padded."""
  module = _model(resnet.BasicBlock)
  flat = _variables(module)
  _kill(flat, BASIC, 0, [2, 5, 11], -1)
  _kill(flat, BASIC, 0, [3], +1)
  flat[f"params/{BASIC}/Conv_1/kernel"][:, :, 7] = 0  # Nobody reads it.
  smaller = _shrunk(module, flat)
  assert shrink.hidden(smaller) == [[8], [12], [32]]
  stays = [i for i in range(16) if i not in (2, 5, 7, 11)]
  path = f"params/{BASIC}/Conv_0/kernel"
  np.testing.assert_array_equal(smaller[path], flat[path][..., stays])


def test_dead_channels_of_a_bottleneck():
  """Before the 1x1 convolution a constant goes into the next batch norm."""
  module = _model(resnet.BottleneckBlock)
  flat = _variables(module)
  _kill(flat, BOTTLENECK, 0, [1], -1)
  _kill(flat, BOTTLENECK, 0, [2], +1)
  _kill(flat, BOTTLENECK, 1, [0, 4], +1)
  _kill(flat, BOTTLENECK, 1, [9], -1)
  smaller = _shrunk(module, flat)
  assert shrink.hidden(smaller) == [[8, 8], [15, 13]]
  mean = f"batch_stats/{BOTTLENECK}/BatchNorm_2/mean"
  assert np.all(smaller[mean] != flat[mean])


def test_what_goes_leaves_others_dead_or_useless():
  module = _model(resnet.BottleneckBlock)
  flat = _variables(module)
  # Channel 3 of the second alone reads 5 of the first, and it is read by none.
  flat[f"params/{BOTTLENECK}/Conv_1/kernel"][:, :, 5, :3] = 0
  flat[f"params/{BOTTLENECK}/Conv_1/kernel"][:, :, 5, 4:] = 0
  flat[f"params/{BOTTLENECK}/Conv_2/kernel"][:, :, 3] = 0
  # Channel 6 of the second reads 7 of the first alone, which gives 0.
  _kill(flat, BOTTLENECK, 0, [7], -1)
  flat[f"params/{BOTTLENECK}/Conv_1/kernel"][:, :, :7, 6] = 0
  flat[f"params/{BOTTLENECK}/Conv_1/kernel"][:, :, 8:, 6] = 0
  assert shrink.hidden(_shrunk(module, flat)) == [[8, 8], [14, 14]]


def test_one_channel_is_left_where_all_are_dead():
  module = _model(resnet.BottleneckBlock)
  flat = _variables(module)
  _kill(flat, BOTTLENECK, 0, range(16), -1)
  _kill(flat, BOTTLENECK, 1, range(16), +1)
  assert shrink.hidden(_shrunk(module, flat)) == [[8, 8], [1, 1]]


def test_channels_that_a_shortcut_adds_to_stay():
  module = _model(resnet.BasicBlock)
  flat = _variables(module)
  _kill(flat, BASIC, 1, [0, 1], -1)
  assert shrink.hidden(_shrunk(module, flat)) == [[8], [16], [32]]


def test_a_smaller_network_is_saved_and_loaded(tmp_path):
  module = _model(resnet.BasicBlock)
  flat = _variables(module)
  _kill(flat, BASIC, 0, [2, 5], -1)
  smaller = _shrunk(module, flat)
  info = {**INFO, "hidden": shrink.hidden(smaller)}
  export.save(tmp_path / "model", export._nest(smaller), {}, info)
  model = export.load(tmp_path / "model")
  images = jax.random.normal(jax.random.key(2), (3, 8, 8, 3))
  got = model.module.apply(model.variables, images, train=False)
  expected = module.apply(export._nest(flat), images, train=False)
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("i", [0, 1])
def test_the_constant_is_that_of_the_module(i):
  """Against Flax's own batch norm, of zeros."""
  from flax import linen as nn

  flat = _variables(_model(resnet.BottleneckBlock))
  norm = f"{BOTTLENECK}/BatchNorm_{i}"
  variables = {
    kind: {x: flat[f"{kind}/{norm}/{x}"] for x in names}
    for kind, names in {
      "params": ("scale", "bias"),
      "batch_stats": ("mean", "var"),
    }.items()
  }
  module = nn.BatchNorm(use_running_average=True)
  expected = nn.relu(module.apply(variables, jnp.zeros((1, 16))))[0]
  got = shrink._constant(flat, norm)
  assert (got > 0).any()
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
