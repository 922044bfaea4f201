"""Exact selection of the n largest scores of each layer, without sorting.

A score is mapped to an unsigned integer, its key, that orders the same way. The
n-th largest key of a layer is searched between two bounds: each pass counts the
keys at or above three thresholds, which leaves a quarter of the interval, and
the search ends as soon as some threshold has exactly n keys above it.

Arrays are laid out as a `_blocks.Block`; its layers search in one loop. The
passes are elementwise up to their reduction to a number, so they give the same
on one device and on many.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax import _blocks
from sparseopt_jax import _correction

_MAX_ORDER = (1 << 31) - 1
_ZERO_KEY = 2


def random_order(
  words: tuple[jax.Array, jax.Array], position: jax.Array
) -> jax.Array:
  """A pseudo-random uint32 below 2**31, another one for each position.

  The finaliser of MurmurHash3 in 31 bits, keyed twice: a bijection of the
  position. ``jax.random.bits`` on a CPU costs some fifty times as much and
  would be most of a mask update.

  Args:
    words: Two uint32, fresh for each layer and use.
    position: uint32 below 2**31.
  """
  low = np.uint32(_MAX_ORDER)
  bits = position
  for word in words:
    bits ^= word & low
    bits = ((bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)) & low
    bits = ((bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)) & low
    bits ^= bits >> 16
  return bits


def _magnitude(value: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The bits of |value|, in its order but for NaN; and those of infinity."""
  # In float32 or wider, which is exact, so the order stays.
  value = value.astype(_correction.wide_dtype(value.dtype))
  unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
  infinity = jnp.asarray(jnp.inf, value.dtype)
  bits = lax.bitcast_convert_type(value, unsigned)
  low = jnp.asarray((1 << (8 * unsigned.itemsize - 1)) - 1, unsigned)
  return bits & low, lax.bitcast_convert_type(infinity, unsigned)


def _large_key(value: jax.Array, eligible: jax.Array) -> jax.Array:
  """In the order of |value|: 0 not eligible, 1 NaN, 2 zero, ..., infinity."""
  bits, infinity = _magnitude(value)
  key = jnp.where(bits > infinity, jnp.ones_like(bits), bits + _ZERO_KEY)
  return jnp.where(eligible, key, 0)


def _small_key(value: jax.Array, eligible: jax.Array) -> jax.Array:
  """Against the order of |value|: 0 not eligible, 1 NaN, 2 infinity, ..."""
  bits, infinity = _magnitude(value)
  key = jnp.where(bits > infinity, jnp.ones_like(bits), infinity - bits + 2)
  return jnp.where(eligible, key, 0)


def _max_key(dtype: jnp.dtype) -> jax.Array:
  """The key of infinity in `_large_key`, of zero in `_small_key`."""
  infinity = jnp.asarray(jnp.inf, _correction.wide_dtype(dtype))
  return _magnitude(infinity)[1] + _ZERO_KEY


class _Interval(NamedTuple):
  """Where the n-th largest key of each layer lies; each of shape (slots,)."""

  low: jax.Array  # at least n keys reach it
  high: jax.Array  # fewer than n keys reach it
  reach_low: jax.Array  # how many do; int32
  reach_high: jax.Array  # how many do; int32


def _search(
  block: _blocks.Block,
  keys: Callable[[], jax.Array],
  n: jax.Array,
  limit: jax.Array | np.uint32,
) -> _Interval:
  """Narrows to where exactly ``n`` keys reach low, or only low's ties remain.

  Args:
    block: The layers.
    keys: Gives unsigned keys up to ``limit``, anew in each pass.
    n: int32 of shape (slots,).
    limit: The largest key there can be.
  """

  def is_open(interval: _Interval) -> jax.Array:
    low, high, reach_low, _ = interval
    return jnp.any((high - low > 1) & (reach_low != n))

  def narrow(interval: _Interval) -> _Interval:
    low, high, reach_low, reach_high = interval
    step = jnp.maximum((high - low) >> 2, 1)
    quarters = 1 + lax.broadcasted_iota(low.dtype, (n.size, 3), 1)
    tried = low[:, None] + step[:, None] * quarters
    key, of_rows = keys(), block.spread(tried)
    counts = block.count([key >= of_rows[..., i] for i in range(3)])
    pairs = [(tried[:, i], counts[i]) for i in range(3)]
    for threshold, reached in pairs:
      low = jnp.where(reached >= n, threshold, low)
      reach_low = jnp.where(reached >= n, reached, reach_low)
    for threshold, reached in reversed(pairs):
      nearer = (reached < n) & (threshold < high)
      high = jnp.where(nearer, threshold, high)
      reach_high = jnp.where(nearer, reached, reach_high)
    return _Interval(low, high, reach_low, reach_high)

  # All keys reach 0, and none is above the limit: where n is 0, low may have to
  # go as far as limit + 1.
  start = _Interval(
    low=jnp.zeros(n.shape, limit.dtype),
    high=jnp.full(n.shape, limit + 2),
    reach_low=block.sizes,
    reach_high=jnp.zeros(n.shape, jnp.int32),
  )
  return lax.while_loop(is_open, narrow, start)


def _select(
  block: _blocks.Block, key: jax.Array, n: jax.Array, limit: jax.Array
) -> tuple[jax.Array, _Interval]:
  """The ``n`` largest keys of each layer, of equal ones the first."""
  found = _search(block, lambda: key, n, limit)
  low = block.spread(found.low)
  end = block.spread(block.sizes.astype(jnp.uint32))

  def ties() -> jax.Array:
    return jnp.where(key == low, end - block.position(), 0)

  # All keys reach 0, so the search of a layer without ties ends at once.
  tied = found.reach_low > n
  wanted = jnp.where(tied, n - found.reach_high, block.sizes)
  most = np.uint32(math.prod(block.shape))
  last = block.spread(_search(block, ties, wanted, most).low)
  return (key > low) | ((key == low) & (ties() >= last)), found


def smallest(
  block: _blocks.Block, values: jax.Array, eligible: jax.Array, n: jax.Array
) -> jax.Array:
  """Selects the ``n`` eligible floats of smallest magnitude in each layer.

  Ties go to the lowest row-major index; NaN comes last.

  Args:
    block: The layers.
    values: Floats.
    eligible: Bools.
    n: int32 of shape (slots,), at most the number of eligible values.

  Returns:
    Bools, exactly ``n`` of a layer true.
  """
  key = _small_key(values, eligible)
  return _select(block, key, n, _max_key(values.dtype))[0]


def largest(
  block: _blocks.Block,
  values: jax.Array,
  eligible: jax.Array,
  n: jax.Array,
  words: jax.Array,
) -> jax.Array:
  """Selects the ``n`` eligible floats of largest magnitude in each layer.

  Ties go to the lowest row-major index, but among zeros they are broken at
  random; NaN comes last.

  Args:
    block: The layers.
    values: Floats.
    eligible: Bools.
    n: int32 of shape (slots,), at most the number of eligible values.
    words: uint32 of shape (slots, 2), the random state.

  Returns:
    Bools, exactly ``n`` of a layer true.
  """
  key = _large_key(values, eligible)
  chosen, found = _select(block, key, n, _max_key(values.dtype))
  short = (found.low == _ZERO_KEY) & (found.reach_low > n)

  def choose_zeros() -> jax.Array:
    zeros = (key == _ZERO_KEY) & block.spread(short)
    wanted = jnp.where(short, n - found.reach_high, 0)
    return jnp.where(zeros, at_random(block, zeros, wanted, words), chosen)

  return lax.cond(jnp.any(short), choose_zeros, lambda: chosen)


def at_random(
  block: _blocks.Block, eligible: jax.Array, n: jax.Array, words: jax.Array
) -> jax.Array:
  """Selects ``n`` eligible weights of each layer, all equally likely.

  Args:
    block: The layers.
    eligible: Bools.
    n: int32 of shape (slots,), at most the number of eligible weights.
    words: uint32 of shape (slots, 2), the random state.

  Returns:
    Bools, exactly ``n`` of a layer true.
  """
  of_rows = block.spread(words)
  state = (of_rows[..., 0], of_rows[..., 1])
  order = random_order(state, block.position()) + 1
  key = jnp.where(eligible, order, 0)
  # No two keys are equal, so the search ends with exactly n above low.
  found = _search(block, lambda: key, n, np.uint32(_MAX_ORDER + 1))
  return key >= block.spread(found.low)
