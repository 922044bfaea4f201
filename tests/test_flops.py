"""Tests of the operation counts against published figures and by hand."""

import functools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import pytest

from sparseopt_jax import _distributions
from sparseopt_jax import _topology
from sparseopt_jax import flops
from sparseopt_jax import inspection
from sparseopt_jax import models


class WideBlock(nn.Module):
  """A pre-activation block of a wide residual network."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, self.features, use_bias=False)
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    y = nn.relu(norm()(x))
    shortcut = x
    if x.shape[-1] != self.features:
      shortcut = conv((1, 1), strides=self.stride)(y)
    y = nn.relu(norm()(conv((3, 3), strides=self.stride)(y)))
    return shortcut + conv((3, 3))(y)


class WideResNet(nn.Module):
  """WRN-22-2: three stages of three blocks."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(16, (3, 3), use_bias=False)(x)
    for stage, features in enumerate((32, 64, 128)):
      for block in range(3):
        x = WideBlock(features, 2 if stage and not block else 1)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
    return nn.Dense(10)(x.mean((1, 2)))


@functools.cache
def _network(name):
  """The module, its input, its keyword arguments and its kernels' shapes."""
  if name == "resnet50":
    module, size, kwargs = models.create(name, 1000), 224, {"train": False}
  else:
    module, size, kwargs = WideResNet(), 32, {}
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  params = jax.eval_shape(
    lambda image: module.init(jax.random.key(0), image, **kwargs), image
  )["params"]
  shapes = {
    path: leaf.shape
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
    if path.endswith("kernel")
  }
  return module, image, kwargs, shapes


def _forward(name, distribution, sparsity):
  module, image, kwargs, shapes = _network(name)
  if distribution == "erk":
    densities = _distributions.erk(shapes, sparsity)
  else:
    stemless = {k: v for k, v in shapes.items() if k != "Conv_0/kernel"}
    densities = _distributions.uniform(stemless, sparsity)
  return flops.forward_flops(module, image, densities=densities, **kwargs)


@functools.cache
def _dense(name):
  module, image, kwargs, _ = _network(name)
  return flops.forward_flops(module, image, **kwargs)


def test_resnet50_dense():
  """RigL, table 2: 8.2e9 for one image of 224 x 224 pixels."""
  assert _dense("resnet50") == pytest.approx(8.18e9, abs=0.005e9)


@pytest.mark.parametrize(
  ("distribution", "sparsity", "inference", "training"),
  [
    ("uniform", 0.8, 0.223, 0.226),
    ("uniform", 0.9, 0.126, 0.129),
    ("uniform", 0.95, 0.077, 0.080),
    ("uniform", 0.965, 0.063, 0.066),
    ("erk", 0.8, 0.414, 0.416),
    ("erk", 0.9, 0.242, 0.244),
    ("erk", 0.95, 0.122, 0.125),
    ("erk", 0.965, 0.085, 0.088),
  ],
)
def test_resnet50_sparse(distribution, sparsity, inference, training):
  dense = _dense("resnet50")
  sparse = _forward("resnet50", distribution, sparsity)
  assert round(sparse / dense, 3) == inference
  rigl = _topology.RigL(update_until=25_000, update_every=100)
  cost = flops.training_flops(sparse, dense, rigl)
  assert round(cost / (3 * dense), 3) == training


@pytest.mark.parametrize(
  ("distribution", "ratio"), [("uniform", 0.202), ("erk", 0.352)]
)
def test_wide_resnet(distribution, ratio):
  sparse = _forward("wrn", distribution, 0.8)
  assert round(sparse / _dense("wrn"), 3) == ratio


# Layers and images, with the multiplications and additions counted by hand.
LAYERS = [
  (nn.Dense(7), (3, 5), 2 * 3 * 5 * 7),
  (nn.Dense(7), (3, 4, 5), 2 * 12 * 5 * 7),
  (nn.Conv(8, (3, 3)), (2, 10, 10, 4), 2 * 200 * 9 * 4 * 8),
  (nn.Conv(8, (3, 3), 2), (2, 10, 10, 4), 2 * 50 * 9 * 4 * 8),
  (nn.Conv(8, (3,), padding="VALID"), (2, 10, 4), 2 * 16 * 3 * 4 * 8),
  (nn.Conv(8, (3, 3, 3)), (1, 5, 5, 5, 4), 2 * 125 * 27 * 4 * 8),
  (nn.Conv(8, (3, 3), feature_group_count=4), (1, 10, 10, 4), 200 * 9 * 8),
  (nn.ConvTranspose(8, (2, 2), (2, 2)), (1, 5, 5, 4), 2 * 25 * 4 * 4 * 8),
  (nn.DenseGeneral((2, 3), axis=(-2, -1)), (6, 4, 5), 2 * 6 * 20 * 6),
]


@pytest.mark.parametrize(("layer", "shape", "count"), LAYERS)
def test_layers_by_hand(layer, shape, count):
  inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
  assert flops.forward_flops(layer, inputs) == count
  half = {"kernel": 0.5}
  assert flops.forward_flops(layer, inputs, densities=half) == count / 2


def test_only_named_kernels_are_sparse():
  module = nn.Sequential([nn.Dense(20), nn.relu, nn.Dense(3)])
  densities = {"layers_0/kernel": 0.1}
  count = flops.forward_flops(module, jnp.zeros((1, 10)), densities=densities)
  assert count == pytest.approx(0.1 * 2 * 200 + 2 * 60)


def test_attention_scores_are_dense():
  """Four kernels of 6 x 6, and two products of positions with positions."""
  module = nn.MultiHeadDotProductAttention(num_heads=2)
  inputs = jax.ShapeDtypeStruct((1, 5, 6), jnp.float32)
  kernels = [f"{name}/kernel" for name in ("query", "key", "value", "out")]
  none = flops.forward_flops(
    module, inputs, densities=dict.fromkeys(kernels, 0.0)
  )
  assert none == 2 * 2 * 5 * 5 * 6
  assert flops.forward_flops(module, inputs) == none + 4 * 2 * 5 * 6 * 6


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      lambda module, x, _: (nn.Dense(6, name="layer", parent=module)(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=4,
    )
    return layers(self, x, None)[0]


def test_scan_counts_every_round():
  inputs = jnp.zeros((1, 6))
  assert flops.forward_flops(Scanned(), inputs) == 4 * 2 * 36


def test_recurrent_products_count():
  """The carry starts as zeros, but depends on the inputs from then on."""
  module = nn.RNN(nn.LSTMCell(4))
  inputs = jnp.zeros((1, 5, 3))
  # Four gates of 4 neurons, each with 3 inputs and 4 recurrent ones.
  macs = 5 * 4 * 4 * (3 + 4)
  assert flops.forward_flops(module, inputs) == 2 * macs
  densities = {f"cell/h{gate}/kernel": 0.25 for gate in "ifgo"}
  sparse = 5 * 4 * 4 * (3 + 4 * 0.25)
  assert flops.forward_flops(module, inputs, densities=densities) == 2 * sparse
  kinds = inspection.normalizations(module, inputs)
  assert kinds == {
    f"cell/{x}{gate}/kernel": "none" for x in "ih" for gate in "ifgo"
  }


def test_training_by_hand():
  """f_S = 1, f_D = 10: three times f_S, and one dense gradient in four."""
  static, set_ = _topology.Static(), _topology.SET(update_until=10)
  assert flops.training_flops(1.0, 10.0, static) == 3
  assert flops.training_flops(1.0, 10.0, set_) == 3
  assert flops.training_flops(10.0, 10.0, static) == 30
  rigl = _topology.RigL(update_until=10, update_every=3)
  assert flops.training_flops(1.0, 10.0, rigl) == (3 * 3 + 2 + 10) / 4
  srigl = _topology.SRigL(update_until=10, update_every=3)
  assert flops.training_flops(1.0, 10.0, srigl) == (3 * 3 + 2 + 10) / 4
  assert flops.training_flops(1.0, 10.0, _topology.Magnitude(0, 10)) == 3
  # Nothing is saved where nothing is sparse.
  assert flops.training_flops(10.0, 10.0, rigl) == 30


def test_training_with_a_topology_of_ones_own():
  """A subclass of RigL needs the dense gradient, others do not."""

  class Mine(_topology.RigL):
    """Costs what RigL costs."""

  class Rotate(_topology.Topology):
    """Looks at masks alone."""

    def is_due(self, count):
      return count % 3 == 0

    def update_masks(self, layers, count, key):
      return [jnp.roll(layer.mask, 1) for layer in layers]

  mine = Mine(update_until=10, update_every=3)
  assert flops.training_flops(1.0, 10.0, mine) == (3 * 3 + 2 + 10) / 4
  assert flops.training_flops(1.0, 10.0, Rotate()) == 3


@pytest.mark.parametrize(
  ("densities", "message"),
  [
    ({"bias": 0.5}, r"densities has paths that are no kernels: \['bias'\]"),
    ({"kernel": 1.5}, r"densities must be in \[0, 1\], got 1.5 for 'kernel'"),
  ],
)
def test_bad_densities(densities, message):
  with pytest.raises(ValueError, match=message):
    flops.forward_flops(nn.Dense(2), jnp.zeros((1, 3)), densities=densities)


def test_bad_types():
  with pytest.raises(TypeError, match=r"module must be a Flax module.*; got 3"):
    flops.forward_flops(3, jnp.zeros((1, 3)))
  with pytest.raises(TypeError, match=r"topology must be .* got 'rigl'"):
    flops.training_flops(1.0, 2.0, "rigl")
  with pytest.raises(TypeError, match=r"topology must be .* got .*RigL"):
    flops.training_flops(1.0, 2.0, _topology.RigL)
