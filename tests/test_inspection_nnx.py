"""NNX modules, and those of the bridge: normalisations and operations."""

import functools
import threading

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax
from sparseopt_jax import flops
from sparseopt_jax import inspection

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
VECTORS = jax.ShapeDtypeStruct((4, 6), jnp.float32)


class Net(nnx.Module):
  """One layer, something, batch norm, and one more layer."""

  def __init__(self, layer, between=lambda x: x, norm=None, features=8):
    self.layer, self.between = layer, between
    self.norm = norm or nnx.BatchNorm(features, rngs=nnx.Rngs(0))
    self.head = nnx.Linear(features, 2, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.head(self.norm(self.between(self.layer(x))))


def _linear(inputs=6, outputs=8):
  return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0))


def _conv(**kwargs):
  return nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0), **kwargs)


# --- Normalisations -----------------------------------------------------------


class MyBatchNorm(nnx.BatchNorm):
  """A subclass is a batch norm as well."""


class ReluBatchNorm(nnx.BatchNorm):
  """Unless something comes first."""

  def __call__(self, x):
    return super().__call__(nnx.relu(x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
  ("norm", "kind"),
  [
    (nnx.BatchNorm, "batch_norm"),
    (MyBatchNorm, "batch_norm"),
    (ReluBatchNorm, "none"),
    (nnx.LayerNorm, "layer_norm"),
    (functools.partial(nnx.GroupNorm, num_groups=2), "group_norm"),
    (nnx.RMSNorm, "none"),
    (nnx.InstanceNorm, "none"),
  ],
)
def test_norms(norm, kind, train):
  net = Net(_conv(), norm=norm(8, rngs=nnx.Rngs(0)))
  net.set_attributes(use_running_average=not train, raise_if_not_found=False)
  kinds = inspection.normalizations(net, IMAGES)
  assert kinds == {"layer/kernel": kind, "head/kernel": "none"}


@pytest.mark.parametrize(
  "layer",
  [
    _conv(),
    _conv(use_bias=False, strides=2, param_dtype=jnp.bfloat16),
    nnx.Conv(3, 9, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0)),
    nnx.ConvTranspose(3, 8, (3, 3), (2, 2), rngs=nnx.Rngs(0)),
    _linear(3),
    nnx.Einsum("bhwc,cd->bhwd", (3, 8), (8,), rngs=nnx.Rngs(0)),
    nnx.Sequential(_linear(3)),
  ],
)
def test_kinds_of_layers(layer):
  features = layer(jnp.zeros(IMAGES.shape)).shape[-1]
  kinds = inspection.normalizations(Net(layer, features=features), IMAGES)
  assert kinds.pop("head/kernel") == "none"
  ((path, kind),) = kinds.items()
  assert path.startswith("layer/")
  assert path.endswith("kernel")
  assert kind == "batch_norm"


@pytest.mark.parametrize(
  ("between", "kind"),
  [
    (lambda x: x.reshape(2, -1, 8), "batch_norm"),
    (lambda x: x.transpose(0, 2, 1, 3), "batch_norm"),
    (lambda x: 0.5 * (x - 3) / 7, "batch_norm"),
    (lambda x: jnp.concatenate([x[..., 4:], x[..., :4]], -1), "batch_norm"),
    (nnx.Dropout(0.5, deterministic=True), "batch_norm"),
    (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "none"),
    (nnx.relu, "none"),
    (lambda x: nnx.max_pool(x, (2, 2)), "none"),
    (lambda x: x + x.mean(-1, keepdims=True), "none"),
    (_linear(8), "none"),
  ],
)
def test_what_may_come_in_between(between, kind):
  kinds = inspection.normalizations(Net(_conv(), between), IMAGES)
  assert kinds["layer/kernel"] == kind


class Branches(nnx.Module):
  """One output goes into several normalisations, or out as well."""

  def __init__(self, norms, returned=False):
    self.layer, self.returned = _linear(), returned
    self.norms = nnx.List(norm(8, rngs=nnx.Rngs(0)) for norm in norms)

  def __call__(self, x):
    x = self.layer(x)
    results = [norm(x) for norm in self.norms]
    return [*results, x] if self.returned else results


@pytest.mark.parametrize(
  ("module", "kind"),
  [
    (Branches([nnx.BatchNorm, nnx.BatchNorm]), "batch_norm"),
    (Branches([nnx.BatchNorm, nnx.LayerNorm]), "none"),
    (Branches([nnx.BatchNorm], returned=True), "none"),
    (Branches([]), "none"),
  ],
)
def test_all_ways_must_agree(module, kind):
  kinds = inspection.normalizations(module, VECTORS)
  assert kinds == {"layer/kernel": kind}


class DenseBlock(nnx.Module):
  """Batch norm of a concatenation; one part may go elsewhere, too."""

  def __init__(self, shortcut):
    self.a, self.b, self.shortcut = _linear(), _linear(8), shortcut
    self.norm = nnx.BatchNorm(16, rngs=nnx.Rngs(0))

  def __call__(self, x):
    a = self.a(x)
    b = self.b(nnx.relu(a) if self.shortcut else jnp.ones_like(a) * x[:, :1])
    return self.norm(jnp.concatenate([a, b], axis=-1))


def test_a_concatenation_before_batch_norm():
  kinds = inspection.normalizations(DenseBlock(shortcut=False), VECTORS)
  assert kinds == {"a/kernel": "batch_norm", "b/kernel": "batch_norm"}
  kinds = inspection.normalizations(DenseBlock(shortcut=True), VECTORS)
  assert kinds == {"a/kernel": "none", "b/kernel": "batch_norm"}


class PreActivationBlock(nnx.Module):
  """The first layer's output is the residual stream; the second's is not."""

  def __init__(self, rngs):
    conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
    self.stem, self.conv1, self.conv2 = conv(3, 4), conv(4, 4), conv(4, 4)
    self.norm1, self.norm2 = (nnx.BatchNorm(4, rngs=rngs) for _ in "12")

  def __call__(self, x):
    x = self.stem(x)
    y = self.conv1(nnx.relu(self.norm1(x)))
    return x + self.conv2(nnx.relu(self.norm2(y)))


def test_pre_activation():
  kinds = inspection.normalizations(PreActivationBlock(nnx.Rngs(0)), IMAGES)
  assert kinds == {
    "stem/kernel": "none",
    "conv1/kernel": "batch_norm",
    "conv2/kernel": "none",
  }


class Shared(nnx.Module):
  """One layer under two names, before batch norm and perhaps at the end."""

  def __init__(self, again):
    self.first = self.second = _linear(6, 6)
    self.norm, self.again = nnx.BatchNorm(6, rngs=nnx.Rngs(0)), again

  def __call__(self, x):
    x = self.norm(self.second(self.norm(self.first(x))))
    return self.second(x) if self.again else x


@pytest.mark.parametrize("again", [False, True])
def test_a_shared_module_has_one_path(again):
  """That of its state: the optimiser sees one leaf."""
  module = Shared(again)
  kind = "none" if again else "batch_norm"
  kinds = inspection.normalizations(module, VECTORS)
  assert kinds == {"first/kernel": kind}
  state = nnx.to_flat_state(nnx.state(module, nnx.Param))
  assert ("first", "kernel") in dict(state)
  assert ("second", "kernel") not in dict(state)


# --- Transformations ----------------------------------------------------------


class Jitted(Net):
  @nnx.jit
  def __call__(self, x):
    return super().__call__(x)


class Rematerialized(Net):
  @nnx.remat
  def __call__(self, x):
    return super().__call__(x)


@pytest.mark.parametrize("module", [Jitted, Rematerialized])
def test_a_module_that_was_called_before(module):
  """The trace that is cached knows nothing of norms."""
  net, inputs = module(_linear()), jnp.ones(VECTORS.shape)
  before = net(inputs)
  assert inspection.normalizations(net, inputs) == {
    "layer/kernel": "batch_norm",
    "head/kernel": "none",
  }
  np.testing.assert_array_equal(net(inputs), before)


class Stacked(nnx.Module):
  """Three blocks, stacked in each leaf; outputs are repeated to six inputs."""

  def __init__(self):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
      norm = nnx.BatchNorm(6, rngs=rngs)
      return Net(nnx.Linear(6, 6, rngs=rngs), norm=norm, features=6)

    self.blocks = create(nnx.Rngs(0))
    self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

  def __call__(self, x):
    @nnx.scan
    def run(x, block):
      return jnp.tile(block(x), 3), None

    return self.norm(run(x, self.blocks)[0])


def test_stacked_blocks():
  """What is carried on goes into the next round's first layer."""
  net = Stacked()
  kinds = inspection.normalizations(net, VECTORS)
  assert kinds == {
    "blocks/layer/kernel": "batch_norm",
    "blocks/head/kernel": "none",
  }
  count = 3 * 2 * 4 * (6 * 6 + 6 * 2)
  assert flops.forward_flops(net, VECTORS) == count


def test_an_abstract_module():
  net = nnx.eval_shape(lambda: Net(_linear()))
  kinds = inspection.normalizations(net, VECTORS)
  assert kinds == {"layer/kernel": "batch_norm", "head/kernel": "none"}
  assert flops.forward_flops(net, VECTORS) == 2 * 4 * (6 * 8 + 8 * 2)


def test_nothing_is_changed():
  """Neither the module nor the classes of Flax, also where a call fails."""
  norms = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm)
  methods = [norm.__call__ for norm in norms]
  net = Net(_linear())
  before = jax.tree.map(jnp.copy, nnx.state(net))
  inspection.normalizations(net, jnp.ones(VECTORS.shape))
  jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)
  with pytest.raises(TypeError, match="dot_general"):
    inspection.normalizations(net, jnp.ones((4, 7)))
  assert [norm.__call__ for norm in norms] == methods


def test_two_threads():
  """The first to end must not take the other one's marks away."""
  method, kinds, is_inside = nnx.BatchNorm.__call__, {}, threading.Event()

  class First(Net):
    def __call__(self, x):
      other.start()
      is_inside.wait(0.5)  # In vain, if the other one waits for its turn.
      return super().__call__(x)

  class Other(Net):
    def __call__(self, x):
      is_inside.set()
      first.join(10)
      return super().__call__(x)

  def inspect(net):
    kinds[type(net)] = inspection.normalizations(net, VECTORS)["layer/kernel"]

  first, other = (
    threading.Thread(target=inspect, args=(net(_linear()),))
    for net in (First, Other)
  )
  first.start()
  first.join()
  other.join()
  assert kinds == {First: "batch_norm", Other: "batch_norm"}
  assert nnx.BatchNorm.__call__ is method


# --- The bridge ---------------------------------------------------------------


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x)))
    return nn.Dense(8)(x)


class LinenAround(nn.Module):
  """A linen module around one of NNX, before batch norm of linen."""

  @nn.compact
  def __call__(self, x):
    x = nnx.bridge.to_linen(nnx.Linear, 6, 8, name="first")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
    return nnx.bridge.to_linen(Block, name="second")(x)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.layer = nnx.Linear(8, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.layer(x))))


class NnxAround(nnx.Module):
  """An NNX module around one of linen, before batch norm of NNX."""

  def __init__(self):
    inputs = jnp.zeros(VECTORS.shape)
    linen = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0))
    self.linen, self.block = linen.lazy_init(inputs), Block(nnx.Rngs(0))
    self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.block(nnx.relu(self.norm(self.linen(x))))


def test_nnx_in_linen():
  net = LinenAround()
  kinds = inspection.normalizations(net, VECTORS)
  assert kinds == {
    "first/kernel": "batch_norm",
    "second/layer/kernel": "batch_norm",
    "second/head/kernel": "none",
  }
  count = 2 * 4 * (6 * 8 + 8 * 8 + 8 * 3)
  assert flops.forward_flops(net, VECTORS) == count
  params = net.init(jax.random.key(0), jnp.ones(VECTORS.shape))["params"]
  _assert_corrects(kinds, net, params)


def test_linen_in_nnx():
  net = NnxAround()
  kinds = inspection.normalizations(net, VECTORS)
  assert kinds == {
    "linen/Dense_0/kernel": "batch_norm",
    "linen/Dense_1/kernel": "batch_norm",
    "block/layer/kernel": "batch_norm",
    "block/head/kernel": "none",
  }
  count = 2 * 4 * (6 * 8 + 8 * 8 + 8 * 8 + 8 * 3)
  assert flops.forward_flops(net, VECTORS) == count
  _assert_corrects(kinds, net, nnx.state(net, nnx.Param))


def test_linen_that_nnx_trains():
  """As in training, where the bridge must be asked for new statistics."""
  net = nnx.bridge.ToNNX(
    nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False)]),
    rngs=nnx.Rngs(0),
  ).lazy_init(jnp.zeros(VECTORS.shape))
  kinds = inspection.normalizations(net, VECTORS, mutable=["batch_stats"])
  assert kinds == {"layers_0/kernel": "batch_norm"}


def _assert_corrects(kinds, net, params):
  """The optimiser corrects the leaves that have these paths."""
  corrected = inspection.batch_normalized(net, VECTORS)
  tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, corrected=corrected)
  lines = sparseopt_jax.sparsity_table(tx.init(params)).split("\n")[1:-1]
  is_corrected = {line.split()[0]: line.split()[-1] for line in lines}
  assert is_corrected == {
    path: "yes" if kind == "batch_norm" else "no"
    for path, kind in kinds.items()
  }


# --- Operations ---------------------------------------------------------------

# Layers and images, with the multiplications and additions counted by hand.
LAYERS = [
  (_linear(5, 7), (3, 4, 5), 2 * 12 * 5 * 7),
  (nnx.LinearGeneral(5, (2, 3), rngs=nnx.Rngs(0)), (4, 5), 2 * 4 * 5 * 6),
  (_conv(), (2, 10, 10, 3), 2 * 200 * 9 * 3 * 8),
  (_conv(strides=2), (2, 10, 10, 3), 2 * 50 * 9 * 3 * 8),
  (
    nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)),
    (1, 10, 10, 4),
    2 * 100 * 9 * 8,
  ),
  (
    nnx.ConvTranspose(4, 8, (2, 2), (2, 2), rngs=nnx.Rngs(0)),
    (1, 5, 5, 4),
    2 * 25 * 4 * 4 * 8,
  ),
]


@pytest.mark.parametrize(("layer", "shape", "count"), LAYERS)
def test_layers_by_hand(layer, shape, count):
  inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
  assert flops.forward_flops(layer, inputs) == count
  half = {"kernel": 0.5}
  assert flops.forward_flops(layer, inputs, densities=half) == count / 2


def test_attention_by_hand():
  """Four kernels of 6 x 6, and two products of positions with positions."""
  module = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
  inputs = jax.ShapeDtypeStruct((1, 5, 6), jnp.float32)
  kernels = [f"{name}/kernel" for name in ("query", "key", "value", "out")]
  assert inspection.normalizations(module, inputs) == dict.fromkeys(
    kernels, "none"
  )
  scores = flops.forward_flops(
    module, inputs, densities=dict.fromkeys(kernels, 0.0)
  )
  assert scores == 2 * 2 * 5 * 5 * 6
  assert flops.forward_flops(module, inputs) == scores + 4 * 2 * 5 * 6 * 6


def test_training_operations():
  """Dense 24 forward; RigL needs them once in four steps."""
  net, inputs = _linear(3, 4), jnp.zeros((1, 3))
  dense = flops.forward_flops(net, inputs)
  sparse = flops.forward_flops(net, inputs, densities={"kernel": 0.25})
  rigl = sparseopt_jax.RigL(10, update_every=3)
  assert (dense, sparse) == (24, 6)
  got = flops.training_flops(sparse, dense, rigl)
  assert got == (3 * 3 * 6 + 2 * 6 + 24) / 4


def test_unknown_densities():
  with pytest.raises(ValueError, match=r"densities .*\['layer'\]"):
    flops.forward_flops(_linear(), VECTORS, densities={"layer": 0.5})
