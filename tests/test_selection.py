"""The exact selection against a stable sort, for every kind of float."""

import functools
import math
import types

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import oracle
import pytest

import sparseopt_jax
from sparseopt_jax import _packing
from sparseopt_jax import _selection

SHAPES = [(3, 2, 4), (1,), (5, 7), (2, 2, 3, 5)]
DTYPES = ["float32", "bfloat16", "float16"]
KEY = np.array([3, 5], np.uint32)
# Ties, both zeros, the ends of each range, infinities, NaN.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8]


@functools.partial(jax.jit, static_argnames=("name", "stacked"))
def select(name, layers, eligible, n, key, stacked=None):
  """A selection over all layers, in whatever blocks they come."""

  def function(block, allowed, values):
    wanted = block.take(n)
    allowed &= block.is_layer()
    if name == "at_random":
      return _selection.at_random(block, allowed, wanted, key)
    key_of_largest = key if name == "largest" else None
    return _selection.select(block, values, allowed, wanted, key_of_largest)

  shapes = [layer.shape for layer in layers]
  stacked = stacked or (0,) * len(shapes)
  columns = [jnp.asarray(x) for x in eligible], [jnp.asarray(x) for x in layers]
  return _packing.by_block(function, shapes, stacked, *columns)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [0.0, np.inf])
def test_none_of_a_layer_that_fills_its_block(dtype, rows, value):
  """The keys are the largest there are, in the order of values and of ties."""
  with jax.enable_x64(dtype == "float64"):
    layers = [jnp.full((rows, 4096), value, dtype)]
    eligible = [jnp.ones((rows, 4096), bool)]
    n = np.zeros(1, np.int32)
    for name in ("smallest", "largest", "at_random"):
      (chosen,) = select(name, layers, eligible, n, KEY)
      assert not np.any(chosen)


def _layers(seed, dtype, shapes=SHAPES):
  """Few values, so that ties abound, and special ones among them."""
  rng = np.random.default_rng(seed)
  special = np.array([*SPECIAL, *rng.normal(size=8)])
  with np.errstate(over="ignore"):
    return [rng.choice(special, shape).astype(dtype) for shape in shapes]


def _eligible(seed, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return [rng.random(shape) < rng.choice([0.3, 0.9]) for shape in shapes]


def _assert_largest(chosen, values, eligible, n):
  """Random among zeros only, and as many as are left for them."""
  magnitude = np.abs(np.asarray(values).astype(np.float64))
  nonzero = eligible & (magnitude > 0)
  sure = min(n, int(nonzero.sum()))
  zeros = eligible & (magnitude == 0)
  if n <= nonzero.sum():
    np.testing.assert_array_equal(chosen, oracle.largest(magnitude, n, nonzero))
    return
  # NaN comes after the zeros.
  numbers = nonzero & ~np.isnan(magnitude)
  from_zeros = min(n - int(numbers.sum()), int(zeros.sum()))
  assert chosen[numbers].all()
  assert (chosen & zeros).sum() == from_zeros
  assert sure <= chosen.sum() == n


def _check(dtype, seed, fraction, run=select):
  layers, eligible = _layers(seed, dtype), _eligible(seed + 1)
  n = np.array([math.floor(fraction * e.sum()) for e in eligible], np.int32)
  got = {
    name: [np.asarray(x) for x in run(name, layers, eligible, n, KEY)]
    for name in ("smallest", "largest", "at_random")
  }
  for i, (values, allowed) in enumerate(zip(layers, eligible, strict=True)):
    drop = oracle.drop(values, allowed, n[i])
    np.testing.assert_array_equal(got["smallest"][i], drop)
    _assert_largest(got["largest"][i], values, allowed, n[i])
    assert (got["at_random"][i] <= allowed).all()
    assert got["at_random"][i].sum() == n[i]
  return got


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stable_sort(dtype, fraction):
  for seed in range(4):
    _check(jnp.dtype(dtype), seed, fraction)


def test_float64():
  with jax.enable_x64(True):
    for fraction in (0.0, 0.4, 1.0):
      _check(np.float64, 0, fraction)
    # Equal in float32.
    close = np.array([[1 + 2**-40, 1.0, 1 + 2**-30]])
    chosen = select(
      "smallest",
      [close],
      [np.ones((1, 3), bool)],
      np.array([2], np.int32),
      KEY,
    )
    np.testing.assert_array_equal(chosen[0], [[True, True, False]])


def test_layers_of_several_dtypes():
  """In one block, each by its own values."""
  kinds = [jnp.bfloat16, np.float32, np.float16, jnp.bfloat16]
  layers = [
    layer.astype(kind)
    for layer, kind in zip(_layers(5, np.float32), kinds, strict=True)
  ]
  eligible = _eligible(6)
  n = np.array([e.sum() // 2 for e in eligible], np.int32)
  for name in ("smallest", "largest"):
    got = select(name, layers, eligible, n, KEY)
    rows = zip(got, layers, eligible, n, strict=True)
    for chosen, values, allowed, k in rows:
      if name == "largest":
        _assert_largest(np.asarray(chosen), values, allowed, k)
      else:
        expected = oracle.drop(values, allowed, k)
        np.testing.assert_array_equal(chosen, expected)
  # Equal in bfloat16 and float16.
  close = np.array([[1 + 2**-12, 1.0, 1 + 2**-11]], np.float32)
  layers = [close, close.astype(jnp.bfloat16), close.astype(np.float16)]
  eligible, n = [np.ones((1, 3), bool)] * 3, np.ones(3, np.int32)
  got = select("smallest", layers, eligible, n, KEY)
  np.testing.assert_array_equal(got[0], [[False, True, False]])
  for chosen in got[1:]:
    np.testing.assert_array_equal(chosen, [[True, False, False]])


def _traced_anew():
  """`select` as a function that JAX has not seen with other sizes of blocks."""
  anew = lambda *args: select.__wrapped__(*args)
  return jax.jit(anew, static_argnums=(0, 5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
# One layer each, one packed layer, two, three groups of several, one group.
@pytest.mark.parametrize("large", [0, 2, 36, 60, 10**6])
def test_blocks_of_any_size_select_the_same(large, dtype, monkeypatch):
  with jax.enable_x64(dtype == np.float64):
    expected = [_check(dtype, 7, fraction) for fraction in (0.0, 0.5)]
    monkeypatch.setattr(_packing, "_LARGE", large)
    monkeypatch.setattr(_packing, "_ROW", 4)
    run = _traced_anew()
    got = [_check(dtype, 7, fraction, run) for fraction in (0.0, 0.5)]
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_fewer_layers_than_blocks_of_the_least_size(monkeypatch):
  monkeypatch.setattr(_packing, "_LARGE", 2)
  monkeypatch.setattr(_packing, "_ROW", 4)
  run = _traced_anew()
  layers, eligible = [np.array([3.0, 2.0])], [np.array([True, True])]
  got = run("smallest", layers, eligible, np.array([1], np.int32), KEY)
  np.testing.assert_array_equal(got[0], [False, True])


def test_memory_is_that_of_the_weights_however_many_the_layers(monkeypatch):
  """A wide leaf of SRigL stacks thousands of neurons, a row for each."""
  monkeypatch.setattr(_packing, "_LARGE", 2)

  def needed(number, size):
    layers = [jax.ShapeDtypeStruct((number, size), np.float32)]
    eligible = [np.ones((number, size), bool)]
    n = np.zeros(number, np.int32)
    lowered = _traced_anew().lower("largest", layers, eligible, n, KEY, (1,))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert needed(4096, 16) < 2 * needed(16, 4096)


# Stacked along no axis, one, two, and by one layer only.
STACKS = [(5, 7), (3, 4, 6), (2, 3, 2, 5), (1, 9, 2)]
STACKED = (0, 1, 2, 1)
UNSTACKED = [(5, 7), *[(4, 6)] * 3, *[(2, 5)] * 6, (9, 2)]


def _unstack(leaves):
  """The layers one by one."""
  return [
    layer
    for leaf, axes in zip(leaves, STACKED, strict=True)
    for layer in leaf.reshape(-1, *leaf.shape[axes:])
  ]


# All layers packed, in several groups, some leaves alone, each of them alone.
@pytest.mark.parametrize("large", [10**6, 50, 36, 0])
def test_stacked_layers_are_layers_of_their_own(large, monkeypatch):
  """The choice is that of the same layers unstacked."""
  monkeypatch.setattr(_packing, "_LARGE", large)
  monkeypatch.setattr(_packing, "_ROW", 4)
  run = _traced_anew()
  stacks = _layers(8, np.float32, STACKS)
  allowed = _eligible(9, STACKS)
  layers, eligible = _unstack(stacks), _unstack(allowed)
  assert [layer.shape for layer in layers] == UNSTACKED
  rng = np.random.default_rng(10)
  fractions = rng.choice([0, 0.3, 0.7, 1], len(layers))
  n = [
    math.floor(f * e.sum()) for f, e in zip(fractions, eligible, strict=True)
  ]
  n = np.array(n, np.int32)
  key = rng.integers(0, 2**32, 2, np.uint32)
  for name in ("smallest", "largest", "at_random"):
    got = _unstack(run(name, stacks, allowed, n, key, STACKED))
    expected = run(name, layers, eligible, n, key, (0,) * len(layers))
    columns = zip(got, expected, layers, eligible, n, strict=True)
    for chosen, alone, values, mask, k in columns:
      np.testing.assert_array_equal(chosen, alone)
      chosen = np.asarray(chosen)
      if name == "smallest":
        np.testing.assert_array_equal(chosen, oracle.drop(values, mask, k))
      elif name == "largest":
        _assert_largest(chosen, values, mask, k)
      else:
        assert (chosen <= mask).all()
        assert chosen.sum() == k


# All leaves packed, and two of four alone.
@pytest.mark.parametrize("large", [10**6, 36])
def test_stacked_layers_in_all_that_trains(large, monkeypatch):
  """First masks, pruning and mask updates, against the layers unstacked."""
  monkeypatch.setattr(_packing, "_LARGE", large)
  monkeypatch.setattr(_packing, "_ROW", 4)
  columns = [
    _eligible(12, STACKS),
    _layers(11, np.float32, STACKS),
    _layers(13, np.float32, STACKS),
  ]
  counts = jnp.arange(len(UNSTACKED), dtype=jnp.int32)
  topologies = [
    sparseopt_jax.RigL(9, drop_fraction=lambda count: 0.5),
    sparseopt_jax.SET(9, drop_fraction=lambda count: 0.5),
  ]

  def run(stacked, *columns):
    layers = _as_layers(columns, stacked)
    shapes = tuple(layer.mask.shape for layer in layers)
    weights = [layer.weight for layer in layers]
    key, now = jnp.array([3, 5], jnp.uint32), jnp.int32(3)
    # `draw` would remember blocks of other sizes.
    first = _selection.draw.__wrapped__(key, counts, shapes, stacked)
    every = [jnp.ones_like(layer.mask) for layer in layers]
    pruned = _selection.keep_largest(weights, every, counts, stacked)
    return [
      first,
      pruned,
      *(t.update_masks(layers, now, key) for t in topologies),
    ]

  run = jax.jit(run, static_argnums=0)
  alone = list(map(_unstack, columns))
  stacks, layers = run(STACKED, *columns), run((0,) * len(UNSTACKED), *alone)
  active = [mask.sum() for mask in alone[0]]
  for got, expected, n in zip(
    stacks, layers, [counts, counts, active, active], strict=True
  ):
    for a, b, k in zip(_unstack(got), expected, n, strict=True):
      np.testing.assert_array_equal(a, b)
      assert b.sum() == k
  assert np.any(layers[2][1] != alone[0][1])


def _as_layers(columns, stacked):
  """What a topology looks at."""
  arrays = [list(map(jnp.asarray, column)) for column in columns]
  return [
    types.SimpleNamespace(
      mask=mask, weight=weight, gradient=gradient, stacked=axes
    )
    for mask, weight, gradient, axes in zip(*arrays, stacked, strict=True)
  ]


def test_a_layer_over_many_rows():
  rng = np.random.default_rng(0)
  shapes = [(130, 97), (64, 128)]
  layers = [rng.normal(size=s).astype(np.float32) for s in shapes]
  layers[0][rng.random(shapes[0]) < 0.5] = 0.25
  eligible = [np.ones(s, bool) for s in shapes]
  n = np.array([5_000, 100], np.int32)
  got = select("smallest", layers, eligible, n, KEY)
  for chosen, values, allowed, k in zip(got, layers, eligible, n, strict=True):
    order = np.argsort(np.abs(values).ravel(), kind="stable")
    expected = np.zeros(values.size, bool)
    expected[order[:k]] = True
    np.testing.assert_array_equal(np.ravel(chosen), expected)
    assert allowed.all()


def test_vmap():
  layers, eligible = _layers(3, np.float32), _eligible(4)
  n = np.array([e.sum() // 2 for e in eligible], np.int32)
  keys = np.stack([KEY, KEY + 1])
  for name in ("largest", "at_random"):
    run = functools.partial(select, name)
    several = jax.vmap(run, (None, None, None, 0))(layers, eligible, n, keys)
    for i in range(2):
      one = run(layers, eligible, n, keys[i])
      for a, b in zip(several, one, strict=True):
        np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("large", [1, 10**6])
def test_sharded(large, monkeypatch):
  """Alone with its axes and packed with others."""
  monkeypatch.setattr(_packing, "_LARGE", large)
  rng = np.random.default_rng(0)
  layer = rng.integers(-9, 10, (16, 24)).astype(np.float32)
  layers, eligible = [layer, layer[:4]], [layer != 3, layer[:4] != 2]
  n = np.array([100, 20], np.int32)
  mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
  for name in ("smallest", "largest", "at_random"):
    run = functools.partial(_traced_anew(), name)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "x")))
    there = run([place(x) for x in layers], eligible, n, KEY)
    here = run(layers, eligible, n, KEY)
    for a, b in zip(there, here, strict=True):
      np.testing.assert_array_equal(a, b)


def test_random_choices_are_even_and_differ():
  """Each of 24 weights is drawn about as often, and so is each pair."""
  eligible = [np.ones((4, 6), bool)]
  n = np.array([6], np.int32)
  keys = np.random.default_rng(0).integers(0, 2**32, (4000, 2), np.uint32)
  run = functools.partial(select, "at_random", eligible, eligible, n)
  drawn = np.asarray(jax.vmap(run)(jnp.array(keys))[0]).reshape(4000, 24)
  together = drawn.astype(float).T @ drawn
  alone = np.diag(together) / 4000
  pairs = together[~np.eye(24, dtype=bool)] / 4000
  deviation = lambda p: 4.5 * math.sqrt(p * (1 - p) / 4000)
  assert np.abs(alone - 6 / 24).max() < deviation(6 / 24)
  both = 6 / 24 * 5 / 23
  assert np.abs(pairs - both).max() < deviation(both)


def test_random_order_is_a_bijection():
  position = jnp.arange(1 << 16, dtype=jnp.uint32)
  words = (jnp.uint32(1), jnp.uint32(2))
  order = np.asarray(_selection.random_order(words, position))
  assert len(np.unique(order)) == len(order)
  assert order.max() < 2**31


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
  st.lists(
    st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)),
    min_size=12,
    max_size=12,
  ),
  st.lists(st.booleans(), min_size=12, max_size=12),
  st.floats(0, 1),
)
def test_whatever_hypothesis_thinks_of(values, eligible, fraction):
  values = np.array(values, np.float32).reshape(3, 4)
  eligible = np.array(eligible).reshape(3, 4)
  n = math.floor(fraction * eligible.sum())
  arguments = ([values], [eligible], np.array([n], np.int32))
  smallest = np.asarray(select("smallest", *arguments, KEY)[0])
  np.testing.assert_array_equal(smallest, oracle.drop(values, eligible, n))
  largest = np.asarray(select("largest", *arguments, KEY)[0])
  _assert_largest(largest, values, eligible, n)
