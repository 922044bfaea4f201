"""Exact selection of the n largest scores of each layer, without sorting.

`draw`, `keep_largest`, `pick_largest` and `drop_and_grow` take all layers of a
network.

A score is mapped to an unsigned integer, its key, that orders the same way. The
n-th largest key of a layer is searched between two bounds: each pass counts the
keys at or above three thresholds, which leaves a quarter of the interval, and
the search ends as soon as some threshold has exactly n keys above it.

Arrays are laid out as a `_packing.Block`; its layers search in one loop. The
passes are elementwise up to their reduction to a number, so they give the same
on one device and on many.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax import _lax
from sparseopt_jax import _packing
from sparseopt_jax._packing import Block

_MAX_ORDER = (1 << 31) - 1
_ZERO_KEY = 2


def random_order(words: tuple[Array, Array], position: Array) -> Array:
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


def magnitude_bits(values: Array) -> Array:
  """Unsigned integers in the order of the floats' magnitudes; 0 for zeros.

  Unlike arithmetic, which may take denormals for 0, they tell all floats apart.
  """
  unsigned = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
  low_bits = jnp.asarray((1 << (8 * unsigned.itemsize - 1)) - 1, unsigned)
  return lax.bitcast_convert_type(values, unsigned) & low_bits


class _Interval(NamedTuple):
  """Where the n-th largest key of each layer lies; each of shape (slots,)."""

  low: Array  # at least n keys reach it
  high: Array  # fewer than n keys reach it
  reach_low: Array  # how many do; int32
  reach_high: Array  # how many do; int32


def _search(block: Block, keys: Any, n: Array, limit: Any) -> _Interval:
  """Narrows to where exactly ``n`` keys reach low, or only low's ties remain.

  Args:
    block: The layers.
    keys: Gives unsigned keys up to ``limit``, anew in each pass.
    n: int32 of shape (slots,).
    limit: The largest key there can be.
  """

  def is_open(interval: _Interval) -> Array:
    low, high, reach_low, _ = interval
    return jnp.any((high - low > 1) & (reach_low != n))

  def narrow(interval: _Interval) -> _Interval:
    low, high, reach_low, reach_high = interval
    step = jnp.maximum((high - low) >> 2, 1)
    quarters = 1 + lax.broadcasted_iota(low.dtype, (n.size, 3), 1)
    tried = low[:, None] + step[:, None] * quarters
    key, of_rows = keys(), block.spread(tried)
    counts = block.counts([key >= of_rows[..., i] for i in range(3)])
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
  low, none = jnp.zeros(n.shape, limit.dtype), jnp.zeros_like(n)
  start = _Interval(low, low + (limit + 2), block.rooms, none)
  return lax.while_loop(is_open, narrow, start)


def _select(
  block: Block, values: Array, eligible: Array, n: Array, is_backward: bool
) -> tuple[Array, Array, _Interval]:
  """The ``n`` of largest magnitude (or smallest), of equal ones the first.

  Returns them with their keys, in the order of magnitude or against it: 0 is
  not eligible, 1 is NaN, 2 is zero (or infinity), and so on.
  """
  # In float32 or wider, which is exact, so the order stays.
  values = values.astype(_lax.wide_dtype(values.dtype))
  bits = magnitude_bits(values)
  top = magnitude_bits(jnp.asarray(jnp.inf, values.dtype))
  rank = jnp.where(bits > top, 1, (top - bits if is_backward else bits) + 2)
  key = jnp.where(eligible, rank, 0)
  found = _search(block, lambda: key, n, top + 2)
  low = block.spread(found.low)
  end = block.spread(block.rooms.astype(jnp.uint32))
  ties = lambda: jnp.where(key == low, end - block.position(), 0)
  # All keys reach 0, so the search of a layer without ties ends at once.
  tied = found.reach_low > n
  wanted = jnp.where(tied, n - found.reach_high, block.rooms)
  most = np.uint32(min(math.prod(block.shape), 1 << 31))
  last = block.spread(_search(block, ties, wanted, most).low)
  return (key > low) | ((key == low) & (ties() >= last)), key, found


def smallest(block: Block, values: Array, eligible: Array, n: Array) -> Array:
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
  return _select(block, values, eligible, n, is_backward=True)[0]


def largest(
  block: Block, values: Array, eligible: Array, n: Array, words: Array
) -> Array:
  """Selects the ``n`` eligible floats of largest magnitude in each layer.

  As `smallest`, but ties among zeros are broken at random.

  Args:
    block: The layers.
    values: Floats.
    eligible: Bools.
    n: int32 of shape (slots,), at most the number of eligible values.
    words: uint32 of shape (slots, 2), the random state.

  Returns:
    Bools, exactly ``n`` of a layer true.
  """
  chosen, key, found = _select(block, values, eligible, n, is_backward=False)
  short = (found.low == _ZERO_KEY) & (found.reach_low > n)

  def choose_zeros() -> Array:
    zeros = (key == _ZERO_KEY) & block.spread(short)
    wanted = jnp.where(short, n - found.reach_high, 0)
    return jnp.where(zeros, at_random(block, zeros, wanted, words), chosen)

  return lax.cond(jnp.any(short), choose_zeros, lambda: chosen)


def at_random(block: Block, eligible: Array, n: Array, words: Array) -> Array:
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


# --- All layers of a network --------------------------------------------------


def call_key(key: Array, count: Array) -> Array:
  """The random state of one call; uint32 of shape (2,), as ``key``.

  Args:
    key: uint32 of shape (2,).
    count: The call of ``update``, from 1 on; 0 for ``init``.
  """
  # random_order takes 31 bits of a word; the last of an int seed is kept here.
  first = key[0] ^ ((key[1] >> 31) << 30)
  mixed = random_order((first, key[1]), count.astype(jnp.uint32))
  return jnp.stack([mixed, key[1]])


def _layer_words(key: Array, shapes: Any, stacked: Any) -> Array:
  """The random state of each layer; uint32 of shape (layers, 2)."""
  # jax.random would take as long to compile as the rest of the selection.
  pairs = zip(shapes, stacked, strict=True)
  layers = sum(math.prod(shape[:axes]) for shape, axes in pairs)
  return random_order((key[0], key[1]), _lax.linear_index((layers, 2)))


# Compiled as a whole: outside of jit, init would compile one operation after
# the other. Tracing init again, as a wrapper does, finds it done.
@functools.partial(jax.jit, static_argnames=("shapes", "stacked"))
def draw(key: Array, counts: Array, shapes: Any, stacked: Any) -> list[Array]:
  """Random masks, all equally likely.

  Args:
    key: uint32 of shape (2,).
    counts: The number of active weights of each layer; int32.
    shapes: Of the leaves.
    stacked: How many leading axes of each leaf enumerate layers.
  """
  # Else XLA would evaluate masks that do not depend on arguments, slowly.
  key = call_key(lax.optimization_barrier(key), jnp.uint32(0))
  words = _layer_words(key, shapes, stacked)

  def one(block: Block) -> Array:
    n, random = block.take(counts), block.take(words)
    return at_random(block, block.is_layer(), n, random)

  return _packing.by_block(one, shapes, stacked)


def keep_largest(
  values: Any, masks: Any, counts: Array, stacked: Any
) -> list[Array]:
  """The masks without their weights of smallest magnitude.

  Of equal magnitudes those of lowest row-major index go first.

  Args:
    values: The weights, leaf by leaf.
    masks: Where they are active.
    counts: The number of weights of each layer to keep, of fewer all; int32.
    stacked: How many leading axes of each leaf enumerate layers.
  """

  def one(block: Block, values: Array, mask: Array) -> Array:
    active, _ = block.counts([mask, ~mask])
    excess = jnp.maximum(active - block.take(counts), 0)
    return mask & ~smallest(block, values, mask, excess)

  shapes = [x.shape for x in values]
  return _packing.by_block(one, shapes, stacked, values, masks)


def pick_largest(
  values: Any, counts: Array, stacked: Any, key: Array
) -> list[Array]:
  """Masks of the weights of largest magnitude, as `largest` selects them.

  Args:
    values: Floats, leaf by leaf.
    counts: The number of weights of each layer to pick; int32.
    stacked: How many leading axes of each leaf enumerate layers.
    key: uint32 of shape (2,), fresh for the call.
  """
  shapes = [x.shape for x in values]
  words = _layer_words(key, shapes, stacked)

  def one(block: Block, values: Array) -> Array:
    n, random = block.take(counts), block.take(words)
    return largest(block, values, block.is_layer(), n, random)

  return _packing.by_block(one, shapes, stacked, values)


def drop_and_grow(
  layers: Any, drop: Any, grow: Any, num_dropped: Any, key: Array
) -> list[Array]:
  """The masks of layers that drop active weights and grow as many others.

  Args:
    layers: What has a ``mask`` and says how many of its axes are ``stacked``.
    drop: For each, scores of which the active ones of smallest magnitude go.
    grow: For each, scores of which the inactive ones of largest magnitude come,
      those just dropped among them; None for random growth.
    num_dropped: From the number of active weights of some layers, in an int32
      array, to how many of them are dropped.
    key: uint32 of shape (2,), fresh for the call.
  """
  masks, stacked = [x.mask for x in layers], [x.stacked for x in layers]
  shapes = [mask.shape for mask in masks]
  words = _layer_words(key, shapes, stacked)

  def one(block: Block, mask: Array, drop: Array, *grow: Array) -> Array:
    active, _ = block.counts([mask, ~mask])
    n, random = num_dropped(active), block.take(words)
    kept = mask & ~smallest(block, drop, mask, n)
    free = ~kept & block.is_layer()
    if not grow:
      return kept | at_random(block, free, n, random)
    return kept | largest(block, grow[0], free, n, random)

  columns = [masks, drop] if grow is None else [masks, drop, grow]
  return _packing.by_block(one, shapes, stacked, *columns)
