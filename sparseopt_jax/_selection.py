"""Exact selection of the n largest scores of each layer, without sorting.

A score is mapped to an unsigned integer, its key, that orders the same way. The
n-th largest key of a layer is searched between two bounds: each pass counts the
keys at or above three thresholds, which leaves a quarter of the interval, and
the search ends as soon as some threshold has exactly n keys above it. Layers of
one shape come stacked in one array and all search in one loop: a small program.

The passes are elementwise up to their reduction to scalars and keep the axes of
the weights, so sharded arrays stay where they are and give the same result.
"""

from collections.abc import Callable, Sequence
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

_MAX_ORDER = (1 << 31) - 1
_ZERO_KEY = 2


def linear_index(shape: tuple[int, ...]) -> jax.Array:
  """The row-major position of each element; uint32."""
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = jnp.uint32(math.prod(shape[axis + 1 :]))
    index += stride * lax.broadcasted_iota(jnp.uint32, shape, axis)
  return index


def random_order(word: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A pseudo-random uint32 below 2**31 for each element, all of them different.

  The finaliser of MurmurHash3 in 31 bits, keyed twice: a bijection of the
  position. ``jax.random.bits`` on a CPU costs some fifty times as much and
  would be most of a mask update.

  Args:
    word: uint32 of shape (2,), fresh for each layer and use.
    shape: The shape of the result, of fewer than 2**31 elements.
  """
  low = jnp.uint32(_MAX_ORDER)
  bits = linear_index(shape)
  for i in range(2):
    bits ^= word[i] & low
    bits = ((bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)) & low
    bits = ((bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)) & low
    bits ^= bits >> 16
  return bits


def _magnitude(value: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The bits of |value|, in its order but for NaN; and those of infinity."""
  unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
  infinity = jnp.asarray(jnp.inf, value.dtype)
  bits = lax.bitcast_convert_type(value, unsigned)
  low = jnp.asarray((1 << (8 * unsigned.itemsize - 1)) - 1, unsigned)
  return bits & low, lax.bitcast_convert_type(infinity, unsigned)


def _large_key(value: jax.Array, eligible: jax.Array) -> jax.Array:
  """In the order of |value|: 0 not eligible, 1 NaN, 2 zero, ..., infinity."""
  bits, infinity = _magnitude(value)
  key = jnp.where(bits > infinity, jnp.ones_like(bits), bits + _ZERO_KEY)
  return jnp.where(eligible, key, jnp.zeros_like(bits))


def _small_key(value: jax.Array, eligible: jax.Array) -> jax.Array:
  """Against the order of |value|: 0 not eligible, 1 NaN, 2 infinity, ..."""
  bits, infinity = _magnitude(value)
  key = jnp.where(bits > infinity, jnp.ones_like(bits), infinity - bits + 2)
  return jnp.where(eligible, key, jnp.zeros_like(bits))


def _stored(arrays: list[jax.Array]) -> list[jax.Array]:
  """Keeps XLA from computing these anew wherever they are used."""
  return lax.optimization_barrier(arrays)


def count(
  conditions: Sequence[jax.Array], axes: Sequence[int]
) -> list[jax.Array]:
  """How often each of some bool arrays of one shape is true, over ``axes``.

  One variadic reduction reads its operands once for all conditions. On a CPU it
  is vectorised, while XLA turns a sum of one array into a tree of sums that
  takes several times longer.
  """

  def add(a: tuple, b: tuple) -> tuple:
    return tuple(x + y for x, y in zip(a, b, strict=True))

  ones = tuple(condition.astype(jnp.int32) for condition in conditions)
  return lax.reduce(ones, (jnp.int32(0),) * len(ones), add, axes)


def _rows(stacks: Sequence[jax.Array], values: jax.Array) -> list[jax.Array]:
  """Per-layer values, cut up and shaped to broadcast against each stack."""
  parts, start = [], 0
  for stack in stacks:
    part = values[start : start + len(stack)]
    parts.append(jnp.expand_dims(part, range(1, stack.ndim)))
    start += len(stack)
  return parts


class _Interval(NamedTuple):
  """Where the n-th largest key of each layer lies; each of shape (layers,)."""

  low: jax.Array  # at least n keys reach it
  high: jax.Array  # fewer than n keys reach it
  reach_low: jax.Array  # how many do; int32
  reach_high: jax.Array  # how many do; int32


def _search(stacks: Sequence[jax.Array], n: jax.Array, limit: int) -> _Interval:
  """Narrows to where exactly ``n`` keys reach low, or only low's ties remain.

  Args:
    stacks: Unsigned keys up to ``limit``.
    n: int32 of shape (layers,).
    limit: The largest key there can be.
  """

  def reach(threshold: jax.Array) -> list[jax.Array]:
    rows = _rows(stacks, threshold)
    return [stack >= row for stack, row in zip(stacks, rows, strict=True)]

  def is_open(interval: _Interval) -> jax.Array:
    low, high, reach_low, _ = interval
    return jnp.any((high - low > 1) & (reach_low != n))

  def narrow(interval: _Interval) -> _Interval:
    low, high, reach_low, reach_high = interval
    step = jnp.maximum((high - low) >> 2, 1)
    tried = [low + step, low + 2 * step, low + 3 * step]
    columns = [
      count(conditions, range(1, conditions[0].ndim))
      for conditions in zip(*map(reach, tried), strict=True)
    ]
    counts = [jnp.concatenate(c) for c in zip(*columns, strict=True)]
    for threshold, reached in zip(tried, counts, strict=True):
      low = jnp.where(reached >= n, threshold, low)
      reach_low = jnp.where(reached >= n, reached, reach_low)
    for threshold, reached in zip(tried[::-1], counts[::-1], strict=True):
      nearer = (reached < n) & (threshold < high)
      high = jnp.where(nearer, threshold, high)
      reach_high = jnp.where(nearer, reached, reach_high)
    return _Interval(low, high, reach_low, reach_high)

  sizes = [math.prod(s.shape[1:]) for s in stacks for _ in range(len(s))]
  start = _Interval(
    low=jnp.zeros(n.shape, stacks[0].dtype),
    high=jnp.full(n.shape, limit + 1, stacks[0].dtype),
    reach_low=jnp.array(sizes, jnp.int32),
    reach_high=jnp.zeros(n.shape, jnp.int32),
  )
  return lax.while_loop(is_open, narrow, start)


def _select(
  keys: Sequence[jax.Array],
  n: jax.Array,
  limit: int,
  ties: Callable[[Sequence[jax.Array]], Sequence[jax.Array]],
  max_tie: int,
) -> list[jax.Array]:
  """The ``n`` largest keys of each layer; among equal ones the largest ties.

  Args:
    keys: Unsigned, 0 where not eligible.
    n: int32 of shape (layers,).
    limit: The largest key there can be.
    ties: Gives tie keys in the shapes of ``keys``, from the key that the ties
      of each layer have in common; from 1 to ``max_tie``, all different within
      a layer.
    max_tie: The largest tie key there can be.
  """
  found = _search(keys, n, limit)
  tied = found.reach_low > n
  low = _rows(keys, found.low)

  def break_ties() -> jax.Array:
    tie_keys = [
      jnp.where(key == bound, tie, jnp.zeros_like(tie))
      for key, bound, tie in zip(keys, low, ties(low), strict=True)
    ]
    sizes = [math.prod(key.shape[1:]) for key in keys for _ in range(len(key))]
    # All keys reach 0, so the search of a layer without ties ends at once.
    wanted = jnp.where(tied, n - found.reach_high, jnp.array(sizes, jnp.int32))
    return _search(tie_keys, wanted, max_tie).low

  no_ties = lambda: jnp.zeros(n.shape, jnp.uint32)
  lowest = _rows(keys, lax.cond(jnp.any(tied), break_ties, no_ties))
  return _stored(
    [
      (key > bound) | ((key == bound) & (tie >= last))
      for key, bound, tie, last in zip(
        keys, low, ties(low), lowest, strict=True
      )
    ]
  )


def _widest(values: Sequence[jax.Array]) -> list[jax.Array]:
  """In one dtype, float32 or wider; exact, so the order stays."""
  dtype = jnp.result_type(jnp.float32, *values)
  return [value.astype(dtype) for value in values]


def _max_key(dtype: jnp.dtype) -> int:
  """The key of infinity in `_large_key`, of zero in `_small_key`."""
  info = jnp.finfo(dtype)
  return (((1 << info.nexp) - 1) << info.nmant) + _ZERO_KEY


def _first_come(stack: jax.Array) -> jax.Array:
  """Tie keys that favour the lowest index; of shape (1, ...)."""
  shape = stack.shape[1:]
  last = jnp.uint32(math.prod(shape))
  return jnp.expand_dims(last - linear_index(shape), 0)


def _random_orders(
  stacks: Sequence[jax.Array], words: jax.Array
) -> list[jax.Array]:
  """`random_order` of each layer, plus 1."""
  orders, start = [], 0
  for stack in stacks:
    part = words[start : start + len(stack)]
    order = jax.vmap(lambda word, s=stack: random_order(word, s.shape[1:]))
    orders.append(order(part) + 1)
    start += len(stack)
  return orders


def smallest(
  values: Sequence[jax.Array], eligible: Sequence[jax.Array], n: jax.Array
) -> list[jax.Array]:
  """Selects the ``n`` eligible floats of smallest magnitude in each layer.

  Ties go to the lowest row-major index; NaN comes last.

  Args:
    values: Floats. Each array stacks layers of one shape on its first axis.
    eligible: Bools in the shapes of the values.
    n: int32 of shape (layers,), at most the number of eligible values.

  Returns:
    Bools in the shapes of the values, exactly ``n`` of a layer true.
  """
  values = _widest(values)
  keys = _stored(list(map(_small_key, values, eligible)))

  def ties(bounds: Sequence[jax.Array]) -> list[jax.Array]:
    del bounds
    return [jnp.broadcast_to(_first_come(key), key.shape) for key in keys]

  max_tie = max(math.prod(value.shape[1:]) for value in values)
  return _select(keys, n, _max_key(values[0].dtype), ties, max_tie)


def largest(
  values: Sequence[jax.Array],
  eligible: Sequence[jax.Array],
  n: jax.Array,
  words: jax.Array,
) -> list[jax.Array]:
  """Selects the ``n`` eligible floats of largest magnitude in each layer.

  Ties go to the lowest row-major index, but among zeros they are broken at
  random; NaN comes last.

  Args:
    values: Floats. Each array stacks layers of one shape on its first axis.
    eligible: Bools in the shapes of the values.
    n: int32 of shape (layers,), at most the number of eligible values.
    words: uint32 of shape (layers, 2), the random state.

  Returns:
    Bools in the shapes of the values, exactly ``n`` of a layer true.
  """
  values = _widest(values)
  keys = _stored(list(map(_large_key, values, eligible)))

  def ties(bounds: Sequence[jax.Array]) -> list[jax.Array]:
    return [
      jnp.where(bound == _ZERO_KEY, at_random, _first_come(key))
      for key, bound, at_random in zip(
        keys, bounds, _random_orders(keys, words), strict=True
      )
    ]

  max_key = _max_key(values[0].dtype)
  return _select(keys, n, max_key, ties, _MAX_ORDER + 1)


def at_random(
  eligible: Sequence[jax.Array], n: jax.Array, words: jax.Array
) -> list[jax.Array]:
  """Selects ``n`` eligible weights of each layer, all equally likely.

  Args:
    eligible: Bools. Each array stacks layers of one shape on its first axis.
    n: int32 of shape (layers,), at most the number of eligible weights.
    words: uint32 of shape (layers, 2), the random state.

  Returns:
    Bools in the shapes of ``eligible``, exactly ``n`` of a layer true.
  """
  orders = _random_orders(eligible, words)
  keys = _stored(
    [
      jnp.where(e, order, jnp.zeros_like(order))
      for e, order in zip(eligible, orders, strict=True)
    ]
  )
  # No two keys are equal, so the search ends with exactly n above low.
  low = _search(keys, n, _MAX_ORDER + 1).low
  rows = _rows(keys, low)
  return _stored([key >= row for key, row in zip(keys, rows, strict=True)])
