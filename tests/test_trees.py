"""Trees of parameters as the libraries make them, and their neuron axes."""

import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax

RIGL = sparseopt_jax.RigL(100, update_every=2, drop_fraction=0.5)
KEY = jax.random.key(0)


def _sgd(
  topology: Any = sparseopt_jax.Static(),  # noqa: B008
  learning_rate: float = 0.1,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  inner = optax.chain(
    optax.add_decayed_weights(1e-2), optax.sgd(learning_rate, momentum=0.9)
  )
  return sparseopt_jax.sparsify(inner, 0.5, topology, corrected=True, **options)


def _noise(seed: int, tree: Any) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree
  )


def _train(tx: Any, params: Any, steps: int = 4) -> tuple:
  """Through one mask update; returns parameters, masks before and after."""

  @jax.jit
  def step(gradients, opt_state, params):
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  before = sparseopt_jax.get_masks(opt_state)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(steps):
    params, opt_state = step(_noise(i, params), opt_state, params)
  return params, before, sparseopt_jax.get_masks(opt_state)


def _paths(tree: Any) -> list[str]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
  ]


def _assert_sparse_training(params: Any, expected_paths: list[str]) -> None:
  new, before, after = _train(_sgd(RIGL), params)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  assert _paths(after) == expected_paths
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  for old_mask, new_mask in pairs:
    assert old_mask.sum() == new_mask.sum()
  masks = jax.tree.leaves(after, is_leaf=lambda x: x == optax.MaskedNode())
  for mask, leaf in zip(masks, jax.tree.leaves(new), strict=True):
    if not isinstance(mask, optax.MaskedNode):
      assert not np.any(leaf[~mask])
  changes = [
    bool((old_mask != new_mask).any())
    for old_mask, new_mask in zip(
      jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    )
  ]
  assert any(changes)


# --- Containers ---------------------------------------------------------------


class _Pair(NamedTuple):
  kernel: jax.Array
  bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Layer:
  """As an Equinox module: the neuron axis first, some leaves None."""

  weight: jax.Array
  bias: jax.Array | None


def _array(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), "f4")


@pytest.mark.parametrize(
  ("params", "expected_paths"),
  [
    ({"a": {"kernel": _array(6, 4), "bias": _array(4)}}, ["a/kernel"]),
    ((_array(6, 4), _array(4), (_array(4, 5),)), ["0", "2/0"]),
    ([_Pair(_array(6, 4), _array(4))], ["0/kernel"]),
    (_array(6, 4), [""]),
    ({"net": _Layer(_array(6, 4), None), "none": None}, ["net/weight"]),
    ({3: _array(6, 4), 5: _array(4)}, ["3"]),
  ],
  ids=["dict", "tuple", "namedtuple", "array", "dataclass", "int keys"],
)
def test_containers(params, expected_paths):
  _assert_sparse_training(params, expected_paths)


def test_linen_frozen_dict():
  module = nn.Dense(4)
  params = nn.FrozenDict(module.init(KEY, jnp.ones((1, 6)))["params"])
  _assert_sparse_training(params, ["kernel"])


def test_linen_partitioned_boxes():
  """Leaves in boxes of metadata, as models for many devices have them."""
  module = nn.Dense(
    4,
    kernel_init=nn.with_partitioning(
      nn.initializers.lecun_normal(), (None, "m")
    ),
  )
  params = module.init(KEY, jnp.ones((1, 6)))["params"]
  assert isinstance(params["kernel"], nn.Partitioned)
  _assert_sparse_training(params, ["kernel/value"])
  # A rule, a table and given masks know the leaf by its name without the box.
  seen = []
  tx = _sgd(sparse=lambda path, leaf: seen.append(path) or path == "kernel")
  opt_state = tx.init(params)
  assert set(seen) == {"kernel", "bias"}
  assert "\nkernel " in sparseopt_jax.sparsity_table(opt_state)
  mask = np.eye(6, 4, dtype=bool)
  opt_state = _sgd(masks={"kernel": mask}).init(params)
  (got,) = jax.tree.leaves(sparseopt_jax.get_masks(opt_state))
  np.testing.assert_array_equal(got, mask)


# --- NNX ----------------------------------------------------------------------


class _Net(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.conv = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.embed = nnx.Embed(7, 4, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, images, words):
    x = nnx.relu(self.norm(self.conv(images))).mean((1, 2))
    return self.head(x + self.embed(words))


def _nnx_loss(net, images, words):
  return (net(images, words) ** 2).sum()


def _nnx_training(tx, steps=4):
  net = _Net()
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  params = nnx.state(net, nnx.Param)
  old_masks = sparseopt_jax.get_masks(optimizer.opt_state)
  nnx.update(net, sparseopt_jax.apply_masks(params, optimizer.opt_state))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), "f4")
  words = jnp.arange(5)

  @nnx.jit
  def step(net, optimizer):
    gradients = nnx.grad(_nnx_loss)(net, images, words)
    optimizer.update(net, gradients)

  for _ in range(steps):
    step(net, optimizer)
  return net, optimizer.opt_state, old_masks


def test_nnx_optimizer():
  seen = []

  def sparse(path, leaf):
    seen.append(path)
    return path.endswith("kernel")

  tx = _sgd(RIGL, learning_rate=1e-3, sparse=sparse)
  net, opt_state, old_masks = _nnx_training(tx)
  assert {"conv/kernel", "head/kernel", "embed/embedding"} <= set(seen)
  masks = sparseopt_jax.get_masks(opt_state)
  for name in ("conv", "head"):
    kernel = np.asarray(getattr(net, name).kernel[...])
    mask = np.asarray(masks[name]["kernel"][...])
    old_mask = np.asarray(old_masks[name]["kernel"][...])
    assert mask.shape == kernel.shape
    assert mask.sum() == old_mask.sum()
    assert not kernel[~mask].any()
    assert kernel[mask & old_mask].all()
  metrics = sparseopt_jax.sparsity_metrics(opt_state)
  assert float(metrics["sparsity"]) == pytest.approx(0.5, abs=0.02)
  assert float(metrics["mask_change"]) > 0
  assert "conv/kernel" in sparseopt_jax.sparsity_table(opt_state)


def test_nnx_defaults_leave_embeddings_and_norms_dense():
  params = nnx.state(_Net(), nnx.Param)
  opt_state = _sgd().init(params)
  masks = sparseopt_jax.get_masks(opt_state)
  shapes = sorted(mask.shape for mask in jax.tree.leaves(masks))
  assert shapes == [(3, 3, 2, 4), (4, 3)]


# --- Layers and their neuron axes ---------------------------------------------


class _ConvTranspose(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.ConvTranspose(4, (3, 3), transpose_kernel=True, use_bias=False)(x)


LAYERS = {
  "Dense": (nn.Dense(4, use_bias=False), (1, 6), -1, (4,)),
  "Conv 1d": (nn.Conv(4, (3,), use_bias=False), (1, 8, 2), -1, (4,)),
  "Conv 2d": (nn.Conv(4, (3, 3), use_bias=False), (1, 8, 8, 2), -1, (4,)),
  "Conv 3d": (nn.Conv(4, (3, 3, 3), use_bias=False), (1, 4, 4, 4, 2), -1, (4,)),
  "depthwise Conv": (
    nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False),
    (1, 8, 8, 6),
    -1,
    (6,),
  ),
  "grouped Conv": (
    nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False),
    (1, 8, 8, 4),
    -1,
    (6,),
  ),
  "ConvTranspose": (
    nn.ConvTranspose(4, (3, 3), use_bias=False),
    (1, 8, 8, 2),
    -1,
    (4,),
  ),
  "ConvTranspose with transposed kernel": (
    _ConvTranspose(),
    (1, 8, 8, 2),
    -2,
    (4,),
  ),
  "DenseGeneral": (
    nn.DenseGeneral((2, 3), use_bias=False),
    (1, 8),
    (-2, -1),
    (2, 3),
  ),
  "Equinox Linear": ({"weight": _array(4, 6)}, None, 0, (4,)),
  "Equinox Conv": ({"weight": _array(4, 2, 3, 3)}, None, 0, (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_corrected_per_neuron(name):
  layer, input_shape, axis, neurons = LAYERS[name]
  params = layer
  if input_shape is not None:
    params = layer.init(KEY, jnp.ones(input_shape))["params"]
  tx = sparseopt_jax.sparseopt(0.6, corrected=True, output_axis=axis)
  opt_state = tx.init(params)
  (mask,) = jax.tree.leaves(sparseopt_jax.get_masks(opt_state))
  assert sparseopt_jax.neuron_sparsity(mask, axis).shape == neurons
  params = sparseopt_jax.apply_masks(params, opt_state)
  gradients = _noise(0, params)
  updates, _ = tx.update(gradients, opt_state, params)
  (update,), (gradient,) = map(jax.tree.leaves, (updates, gradients))
  expected = oracle.correct(gradient, mask, axis)
  np.testing.assert_allclose(update, expected, rtol=1e-6)
  angle = float(sparseopt_jax.sparsity_metrics(opt_state)["skew_angle"])
  assert angle == pytest.approx(oracle.skew_angle(mask, axis), rel=1e-4)


def test_an_axis_for_each_leaf():
  """Transposed kernels, heads and plain layers in one network."""
  params = {
    "up": {"kernel": _array(3, 3, 4, 2)},
    "query": {"kernel": _array(8, 2, 3)},
    "out": {"kernel": _array(2, 3, 8)},
    "dense": {"kernel": _array(6, 5)},
  }
  axes = {"up/kernel": -2, "query/kernel": (1, 2)}
  axis_of = lambda path, leaf: axes.get(path, -1)
  tx = sparseopt_jax.sparseopt(0.5, corrected=True, output_axis=axis_of)
  state = tx.init(params)
  shapes = [factor.shape for factor in state.factors]
  names = [path.removesuffix("/kernel") for path in _paths(params)]
  assert dict(zip(names, shapes, strict=True)) == {
    "up": (1, 1, 4, 1),
    "query": (1, 2, 3),
    "out": (1, 1, 8),
    "dense": (1, 5),
  }
  gradients = _noise(1, params)
  updates, _ = tx.update(gradients, state, params)
  masks = sparseopt_jax.get_masks(state)
  for name in params:
    expected = oracle.correct(
      gradients[name]["kernel"],
      masks[name]["kernel"],
      axes.get(f"{name}/kernel", -1),
    )
    np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-6)


def _attention(kind):
  if kind == "linen":
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    return module.init(KEY, jnp.ones((1, 5, 6)))["params"]
  module = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
  return nnx.state(module, nnx.Param)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_the_neurons_of_flax_attention(kind):
  """Two heads of three features from six inputs, and back."""
  params = _attention(kind)
  state = sparseopt_jax.sparseopt(0.5, corrected=True).init(params)
  masks = sparseopt_jax.get_masks(state)
  names = [path.split("/")[0] for path in _paths(masks)]
  neurons = {"query": (2, 3), "key": (2, 3), "value": (2, 3), "out": (6,)}
  assert sorted(names) == sorted(neurons)
  for factor, name in zip(state.factors, names, strict=True):
    axes = (-2, -1) if len(neurons[name]) == 2 else -1
    assert factor.size == np.prod(neurons[name])
    mask = np.asarray(jax.tree.leaves(masks[name]["kernel"])[0])
    expected = oracle.factors(mask, axes)
    np.testing.assert_allclose(np.ravel(factor), np.ravel(expected), rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "shape", "stacked", "axis", "expected"),
  [
    ("query/kernel", (8, 2, 3), 0, None, (1, 2, 3)),
    ("att/key/kernel", (4, 8, 2, 3), 1, None, (4, 1, 2, 3)),
    # Who names an axis gets it.
    ("query/kernel", (8, 2, 3), 0, -1, (1, 1, 3)),
    # Heads in one axis, two-dimensional convolutions, and other names.
    ("query/kernel", (8, 6), 0, None, (1, 6)),
    ("query/kernel", (4, 8, 6), 1, None, (4, 1, 6)),
    ("query/kernel", (3, 3, 8, 6), 0, None, (1, 1, 1, 6)),
    ("Conv_0/kernel", (3, 8, 6), 0, None, (1, 1, 6)),
    ("my_query/kernel", (3, 8, 6), 0, None, (1, 1, 6)),
    ("out/kernel", (2, 3, 8), 0, None, (1, 1, 8)),
  ],
)
def test_axes_by_default(name, shape, stacked, axis, expected):
  params: Any = jnp.ones(shape)
  for key in reversed(name.split("/")):
    params = {key: params}
  link = sparseopt_jax.sparseopt(
    0.5, corrected=True, output_axis=axis, stacked=stacked
  )
  assert [x.shape for x in link.init(params).factors] == [expected]


def test_layers_of_one_shape_but_different_axes():
  """They share the selection of a mask update, not their factors."""
  params = {"a": _array(6, 6), "b": _array(6, 6)}
  tx = _sgd(RIGL, output_axis=lambda path, leaf: 0 if path == "a" else -1)
  opt_state = tx.init(params)
  update = jax.jit(tx.update)
  for i in range(4):
    _, opt_state = update(_noise(i, params), opt_state, params)
  masks = sparseopt_jax.get_masks(opt_state)
  factors = zip(opt_state.link.factors, ("a", "b"), (0, -1), strict=True)
  for factor, name, axis in factors:
    expected = oracle.factors(masks[name], axis)
    np.testing.assert_allclose(np.ravel(factor), expected, rtol=1e-6)


# --- Dtypes -------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exact_zeros_in_every_pair_of_dtypes(dtype, slots):
  params = {"a": _array(6, 4).astype(dtype), "b": _array(4, 5)}
  inner = optax.chain(
    optax.add_decayed_weights(1e-2),
    optax.sgd(0.1, momentum=0.9, accumulator_dtype=slots),
  )
  tx = sparseopt_jax.sparsify(inner, 0.5, RIGL, corrected=True)
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  opt_state = tx.init(params)
  expected = dtypes(opt_state)
  update = jax.jit(tx.update)
  new = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(4):
    updates, opt_state = update(_noise(i, params), opt_state, new)
    new = optax.apply_updates(new, updates)
    masks = sparseopt_jax.get_masks(opt_state)
    for name in params:
      assert not np.any(new[name][~masks[name]])
  assert dtypes(opt_state) == expected
  assert dtypes(new) == dtypes(params)


# --- Leaves that cannot be sparse, and rules for leaves -----------------------


def test_empty_leaves_and_scalars_stay_dense():
  params = {"a": _array(6, 4), "e": {"kernel": jnp.zeros((0, 3))}, "t": 1.0}
  opt_state = _sgd(RIGL).init(params)
  assert _paths(sparseopt_jax.get_masks(opt_state)) == ["a"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Embedding:
  """As Equinox's table: its class tells what it is, and no name need to."""

  weight: jax.Array


# By path, whether the leaf is sparse by default.
DEFAULTS = {
  "Dense_0/kernel": ((6, 4), True),
  "net/w": ((6, 4), True),
  "heads/query/kernel": ((8, 2, 3), True),
  "Conv_0/kernel": ((3, 3, 2, 4), True),
  # Patches: a convolution, whatever it is called.
  "embedding/kernel": ((4, 4, 3, 8), True),
  "patch_embed/weight": ((8, 3, 4, 4), True),
  "patch_embedding/weight": ((8, 3, 4, 4), True),
  # At most one axis longer than 1.
  "instance_norm/w": ((1, 1, 1, 8), False),
  "depth/kernel": ((1, 8), False),
  "Dense_0/bias": ((4,), False),
  # Shifts and scales.
  "attention/bias": ((2, 3), False),
  "norm/scale": ((4, 6), False),
  "batch_norm/offset": ((1, 1, 1, 8), False),
  "group_norm/offset": ((2, 8), False),
  # Tables.
  "Embed_0/embedding": ((7, 4), False),
  "embed/embeddings": ((7, 4), False),
  "Transformer/posembed_input/pos_embedding": ((1, 9, 8), False),
  "rel_embedding": ((2, 9), False),
  "vit/cls": ((2, 1, 8), False),
  "MAPHead_0/probe": ((2, 1, 8), False),
  "wte/weight": ((7, 4), False),
  "token_embedding/weight": ((7, 4), False),
}


@pytest.mark.parametrize("path", DEFAULTS)
def test_kernels_are_sparse_by_default(path):
  shape, is_sparse = DEFAULTS[path]
  params: Any = jnp.ones(shape)
  for name in reversed(path.split("/")):
    params = {name: params}
  params = {"always": {"kernel": jnp.ones((4, 4))}, "of": params}
  masks = sparseopt_jax.get_masks(_sgd().init(params))
  expected = ["always/kernel"] + [f"of/{path}"] * is_sparse
  assert _paths(masks) == expected


@pytest.mark.parametrize("name", ["words", "lookup", "weight"])
def test_tables_are_known_by_their_class(name):
  params = {
    "net": {name: Embedding(_array(7, 4)), "out": _Layer(_array(5, 4), None)}
  }
  _assert_sparse_training(params, ["net/out/weight"])
  # Unless somebody wants them.
  opt_state = _sgd(sparse=lambda path, leaf: True).init(params)
  masks = sparseopt_jax.get_masks(opt_state)
  assert len(jax.tree.leaves(masks)) == 2


def test_axes_that_stack_layers_make_no_kernel():
  params = {"scanned": {"w": _array(3, 6), "kernel": _array(3, 6, 4)}}
  masks = sparseopt_jax.get_masks(_sgd(stacked=1).init(params))
  assert _paths(masks) == ["scanned/kernel"]


@pytest.mark.parametrize("value", [True, np.True_])
def test_rules_may_be_prefixes_as_for_optax_masked(value):
  params = {
    "net": {"a": {"kernel": _array(6, 4)}, "b": {"kernel": _array(4, 4)}},
    "head": {"kernel": _array(4, 3), "bias": _array(3)},
  }
  everything = {
    "net": {"a": {"kernel": True}, "b": {"kernel": True}},
    "head": {"kernel": False, "bias": False},
  }
  prefix = {"net": value, "head": False}
  for name in ("sparse", "corrected"):
    got, expected = (
      sparseopt_jax.sparseopt(0.5, **{"corrected": True, name: rule})
      for rule in (prefix, everything)
    )
    got, expected = got.init(params), expected.init(params)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_false_of_numpy_turns_the_correction_off():
  params = {"a": _array(6, 4)}
  state = sparseopt_jax.sparseopt(0.5, corrected=np.False_).init(params)
  assert [factor.dtype for factor in state.factors] == [jnp.bool_]


# --- Strict promotion ---------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "topology",
  [
    sparseopt_jax.Static(),
    sparseopt_jax.SET(100, 2),
    sparseopt_jax.RigL(100, 2, grow_from="corrected"),
    sparseopt_jax.SRigL(100, 2),
    sparseopt_jax.Magnitude(0, 4, 2),
  ],
  ids=["static", "set", "rigl", "srigl", "magnitude"],
)
def test_strict_dtype_promotion(dtype, topology):
  params = {"a": _array(6, 4).astype(dtype), "b": _array(4).astype(dtype)}
  tx = _sgd(topology)
  expected = _train(tx, params)
  with jax.numpy_dtype_promotion("strict"):
    got = _train(tx, params)
    opt_state = tx.init(params)
    sparseopt_jax.sparsity_metrics(opt_state)
    sparseopt_jax.masks_checksum(opt_state)
    sparseopt_jax.correct(params["a"], got[2]["a"])
    sparseopt_jax.magnitude_masks(params, 0.5)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
  "topology",
  [
    sparseopt_jax.SET(100, 2),
    sparseopt_jax.RigL(100, 2),
    sparseopt_jax.SRigL(100, 2),
    sparseopt_jax.Magnitude(0, 4, 2),
  ],
)
def test_strict_dtype_promotion_with_64_bit_types(topology):
  params = {"a": _array(6, 4).astype(np.float32), "b": np.ones(4, np.float32)}
  tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, topology, corrected=True)
  expected = _train(tx, params)
  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    got = _train(tx, params)
    sparseopt_jax.magnitude_masks(params, 0.5)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Module:
  """Callable, as an Equinox module is, and a tree of its leaves."""

  weight: Any
  bias: Any

  def __call__(self, x):
    return self.weight @ x + self.bias


def test_a_rule_may_be_a_callable_tree():
  params = _Module(_array(6, 4), _array(6))
  rule = jax.tree.map(lambda leaf: leaf.ndim == 2, params)
  link = sparseopt_jax.sparseopt(
    0.5, sparse=rule, corrected=rule, output_axis=0
  )
  assert _paths(sparseopt_jax.get_masks(link.init(params))) == ["weight"]
