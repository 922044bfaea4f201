"""Tests of the search for the normalisation that follows a kernel."""

import dataclasses

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import optax
import pytest

import sparseopt_jax
from sparseopt_jax import inspection
from sparseopt_jax import models

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
VECTORS = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def _norm(**kwargs):
  return nn.BatchNorm(use_running_average=True, **kwargs)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["resnet8", "resnet50"])
def test_resnets(name, dtype, train):
  model = models.create(name, 10, dtype=dtype)
  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  kinds = inspection.normalizations(model, images, train=train)
  assert kinds.pop("Dense_0/kernel") == "none"
  assert len(kinds) == {"resnet8": 9, "resnet50": 53}[name]
  assert set(kinds.values()) == {"batch_norm"}


def test_cross_replica_batch_norm_as_in_evaluation():
  model = models.create("resnet8", 10, axis_name="devices")
  kinds = inspection.normalizations(model, IMAGES, train=False)
  assert list(kinds.values()).count("batch_norm") == 9


class PreActivationBlock(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x):
    y = nn.relu(_norm()(x))
    shortcut = x
    if x.shape[-1] != self.features:
      shortcut = nn.Conv(self.features, (1, 1), use_bias=False)(y)
    y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
    y = nn.relu(_norm()(y))
    y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
    return shortcut + y


class PreActivationResNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), use_bias=False)(x)
    for features in (4, 8):
      x = PreActivationBlock(features)(x)
    x = nn.relu(_norm()(x))
    return nn.Dense(10)(x.mean((1, 2)))


def test_pre_activation_resnet():
  """The stem feeds batch norm, but the first shortcut's addition too."""
  assert inspection.normalizations(PreActivationResNet(), IMAGES) == {
    "Conv_0/kernel": "none",
    "PreActivationBlock_0/Conv_0/kernel": "batch_norm",
    "PreActivationBlock_0/Conv_1/kernel": "none",
    "PreActivationBlock_1/Conv_0/kernel": "none",
    "PreActivationBlock_1/Conv_1/kernel": "batch_norm",
    "PreActivationBlock_1/Conv_2/kernel": "none",
    "Dense_0/kernel": "none",
  }


class DenseNet(nn.Module):
  """Each layer's input is the concatenation of all outputs before it."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), use_bias=False)(x)
    for _ in range(3):
      y = nn.relu(_norm()(x))
      y = nn.Conv(16, (1, 1), use_bias=False)(y)
      y = nn.relu(_norm()(y))
      y = nn.Conv(4, (3, 3), use_bias=False)(y)
      x = jnp.concatenate([x, y], axis=-1)
    x = nn.relu(_norm()(x))
    return nn.Dense(10)(x.mean((1, 2)))


def test_densenet():
  """All ways of every output lead to batch norm, by concatenations only."""
  kinds = inspection.normalizations(DenseNet(), IMAGES)
  assert kinds.pop("Dense_0/kernel") == "none"
  assert kinds == {f"Conv_{i}/kernel": "batch_norm" for i in range(7)}


@pytest.mark.parametrize(
  ("norm", "kind"),
  [
    (nn.LayerNorm(), "layer_norm"),
    (nn.GroupNorm(num_groups=2), "group_norm"),
    (_norm(), "batch_norm"),
    (nn.RMSNorm(), "none"),
    (nn.InstanceNorm(), "none"),
  ],
)
def test_mlp(norm, kind):
  module = nn.Sequential([nn.Dense(8), norm, nn.relu, nn.Dense(3)])
  images = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
  assert inspection.normalizations(module, images) == {
    "layers_0/kernel": kind,
    "layers_3/kernel": "none",
  }


class OneLayer(nn.Module):
  """A layer, something, batch norm, and one more layer."""

  between: object
  layer: nn.Module = nn.Conv(8, (3, 3))

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(_norm()(self.between(self.layer(x))))


def _with_parameter(operation):
  class Apply(nn.Module):
    @nn.compact
    def __call__(self, x):
      shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
      return operation(x, self.param("p", nn.initializers.ones, shape))

  return Apply()


@pytest.mark.parametrize(
  "between",
  [
    lambda x: x,
    lambda x: x.reshape(2, -1, 8),
    lambda x: x.transpose(0, 2, 1, 3),
    lambda x: x.astype(jnp.bfloat16),
    lambda x: x[:, 1:, ::-1],
    lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=-1),
    lambda x: jnp.squeeze(jnp.expand_dims(x, 1), 1),
    lambda x: 0.5 * (x - 3) / 7,
    lambda x: jax.jit(lambda x: x.reshape(2, 64, 8))(x),
    lambda x: jax.checkpoint(lambda x: x + 1)(x),
    lambda x: checkpoint_name(x, "mine"),
    _with_parameter(lambda x, p: x * p),
    _with_parameter(lambda x, p: x + p),
    nn.Dropout(0.5, deterministic=True),
  ],
)
def test_what_may_come_in_between(between):
  """The convolution has a bias, too."""
  kinds = inspection.normalizations(OneLayer(between), IMAGES)
  assert kinds["layer/kernel"] == "batch_norm"


@pytest.mark.parametrize(
  "between",
  [
    nn.relu,
    nn.silu,
    lambda x: nn.max_pool(x, (2, 2)),
    lambda x: nn.avg_pool(x, (2, 2)),
    lambda x: x + x.mean(-1, keepdims=True),
    lambda x: x * jax.nn.sigmoid(x),
    lambda x: 1 / x,
    lambda x: jax.lax.cond(True, lambda x: x, lambda x: -x, x),
    nn.Dropout(0.5, deterministic=False),
    nn.Dense(8),
  ],
)
def test_what_comes_first_itself(between):
  kinds = inspection.normalizations(OneLayer(between), IMAGES)
  assert kinds["layer/kernel"] == "none"


def test_dense_then_relu_then_batch_norm():
  module = nn.Sequential([nn.Dense(8), nn.relu, _norm()])
  kinds = inspection.normalizations(module, VECTORS)
  assert kinds == {"layers_0/kernel": "none"}


@pytest.mark.parametrize(
  "layer",
  [
    nn.Conv(8, (3, 3), use_bias=False),
    nn.Conv(9, (3, 3), feature_group_count=3),
    nn.ConvTranspose(8, (3, 3), (2, 2)),
    nn.Dense(8),
    nn.DenseGeneral((2, 4), axis=(-2, -1)),
    nn.remat(nn.Conv)(8, (3, 3)),
    nn.jit(nn.Conv)(8, (3, 3)),
    nn.WeightNorm(nn.Conv(8, (3, 3))),
  ],
)
def test_kinds_of_layers(layer):
  module = OneLayer(lambda x: x, layer)
  kinds = inspection.normalizations(module, IMAGES)
  del kinds["Dense_0/kernel"]
  ((path, kind),) = kinds.items()
  assert path.endswith("kernel")
  assert kind == "batch_norm"


class Branches(nn.Module):
  """One output goes into two normalisations, or out as well."""

  norms: tuple[nn.Module, ...]
  returned: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8)(x)
    results = [norm(x) for norm in self.norms]
    return (*results, x) if self.returned else results


@pytest.mark.parametrize(
  ("module", "kind"),
  [
    (Branches((_norm(), _norm())), "batch_norm"),
    (Branches((_norm(), nn.LayerNorm())), "none"),
    (Branches((_norm(),), returned=True), "none"),
    (Branches(()), "none"),
  ],
)
def test_all_ways_must_agree(module, kind):
  kinds = inspection.normalizations(module, VECTORS)
  assert kinds == {"Dense_0/kernel": kind}


class Shared(nn.Module):
  """The same layer twice: before batch norm and at the end."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(6)
    return layer(_norm()(layer(x)))


def test_a_kernel_that_is_used_twice():
  kinds = inspection.normalizations(Shared(), VECTORS)
  assert kinds == {"Dense_0/kernel": "none"}


class Layers(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x = _norm()(nn.Dense(6)(x))
    return nn.Dense(6)(x), None


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      Layers,
      variable_axes={"params": 0, "batch_stats": 0},
      split_rngs={"params": True},
      length=3,
    )()
    return _norm()(layers(x, None)[0])


def test_scan():
  """What is carried on goes into the next round's first layer."""
  kinds = inspection.normalizations(Scanned(), VECTORS)
  (name,) = {path.split("/")[0] for path in kinds}
  assert kinds == {
    f"{name}/Dense_0/kernel": "batch_norm",
    f"{name}/Dense_1/kernel": "none",
  }


class MyBatchNorm(nn.BatchNorm):
  """A subclass is a batch norm as well."""


class WithKeyword(nn.Module):
  @nn.compact
  def __call__(self, x, *, scale, train):
    x = nn.Dense(4)(x) * scale
    return MyBatchNorm()(x=x, use_running_average=not train)


def test_arguments():
  kinds = inspection.normalizations(
    WithKeyword(), x=jnp.zeros((4, 6)), scale=2.0, train=True
  )
  assert kinds == {"Dense_0/kernel": "batch_norm"}
  # A scale that is an input differs between examples, for all that is known.
  kinds = inspection.normalizations(
    WithKeyword(), jnp.zeros((4, 6)), scale=jnp.ones((4, 1)), train=True
  )
  assert kinds == {"Dense_0/kernel": "none"}


def test_attention_feeds_no_normalisation_of_its_own():
  module = nn.MultiHeadDotProductAttention(num_heads=2)
  kinds = inspection.normalizations(
    module, jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
  )
  assert kinds == {
    f"{name}/kernel": "none" for name in ("query", "key", "value", "out")
  }


def test_partitioned_parameters():
  kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
  module = nn.Sequential([nn.Dense(8, kernel_init=kernel_init), _norm()])
  kinds = inspection.normalizations(module, VECTORS)
  assert kinds == {"layers_0/kernel": "batch_norm"}


@pytest.mark.parametrize("search", ["normalizations", "batch_normalized"])
def test_not_a_module(search):
  with pytest.raises(TypeError, match=r"module must be a Flax module.*; got 3"):
    getattr(inspection, search)(3, VECTORS)


def test_batch_normalized_chooses_what_is_corrected():
  model = PreActivationResNet()
  corrected = inspection.batch_normalized(model, IMAGES)
  kinds = inspection.normalizations(model, IMAGES)
  params = model.init(jax.random.key(0), jnp.zeros(IMAGES.shape))["params"]
  tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, corrected=corrected)
  table = sparseopt_jax.sparsity_table(tx.init(params))
  is_corrected = {
    words[0]: words[-1] for words in map(str.split, table.split("\n")[1:-1])
  }
  assert is_corrected == {
    path: "yes" if kind == "batch_norm" else "no"
    for path, kind in kinds.items()
  }
  assert set(is_corrected.values()) == {"yes", "no"}


def test_batch_normalized_as_a_value():
  """Equal, hashable, and with a text that can be read and run."""
  module = nn.Sequential([nn.Dense(8), _norm(), nn.Dense(3)])
  one, other = (inspection.batch_normalized(module, VECTORS) for _ in "ab")
  assert one == other
  assert hash(one) == hash(other)
  assert repr(one) == "BatchNormalized(paths=('layers_0/kernel',))"
  leaf = jnp.zeros((6, 8))
  assert one("layers_0/kernel", leaf)
  assert not one("layers_2/kernel", leaf)
  with pytest.raises(dataclasses.FrozenInstanceError):
    one.paths = ()


def test_batch_normalized_with_keyword_arguments():
  module = WithKeyword()
  corrected = inspection.batch_normalized(
    module, x=jnp.zeros((4, 6)), scale=2.0, train=True
  )
  assert corrected.paths == ("Dense_0/kernel",)


def test_nothing_feeds_batch_norm():
  module = nn.Dense(8)
  corrected = inspection.batch_normalized(module, VECTORS)
  assert corrected.paths == ()
  params = module.init(jax.random.key(0), jnp.zeros(VECTORS.shape))["params"]
  tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, corrected=corrected)
  with pytest.raises(ValueError, match=r"corrected.*BatchNormalized"):
    tx.init(params)
