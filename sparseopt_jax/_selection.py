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
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax import _packing
from sparseopt_jax._packing import Block

_MAX_ORDER = (1 << 31) - 1


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
    limit: The largest key there can be; of one layer or of all.
  """
  is_open = lambda interval: jnp.any(
    (interval.high - interval.low > 1) & (interval.reach_low != n)
  )

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
  all_keys = block.rooms.astype(jnp.int32)
  start = _Interval(low, low + (limit + 2), all_keys, none)
  return lax.while_loop(is_open, narrow, start)


def select(
  block: Block, values: Array, eligible: Array, n: Array, key: Any = None
) -> Array:
  """Selects the ``n`` of smallest magnitude in each layer; with a key, largest.

  Ties go to the lowest row-major index, but among the largest those of zeros
  are broken at random; NaN comes last.

  Args:
    block: The layers.
    values: Floats.
    eligible: Bools.
    n: int32 of shape (slots,), at most the number of eligible values.
    key: For the largest; as for `at_random`.

  Returns:
    Bools, exactly ``n`` of a layer true.
  """
  # In float32 or wider, which is exact, so the order stays.
  values = values.astype(np.promote_types(values.dtype, np.float32))
  bits = magnitude_bits(values)
  top = magnitude_bits(jnp.asarray(jnp.inf, values.dtype))
  # 0 is not eligible, 1 is NaN, 2 is zero (or infinity), and so on.
  rank = jnp.where(bits > top, 1, (top - bits if key is None else bits) + 2)
  rank = jnp.where(eligible, rank, 0)
  found = _search(block, lambda: rank, n, top + 2)
  low, end = block.spread(found.low), block.spread(block.rooms)
  in_order = lambda: end - block.position()
  order, limit = in_order, block.rooms
  if key is not None:
    are_zeros = found.low == 2
    limit = jnp.where(are_zeros, np.uint32(_MAX_ORDER + 1), limit)
    order = lambda: jnp.where(
      block.spread(are_zeros), _random_keys(block, key), in_order()
    )
  ties = lambda: jnp.where(rank == low, order(), 0)
  # All keys reach 0, so the search of a layer without ties ends at once.
  tied = found.reach_low > n
  wanted = jnp.where(tied, n - found.reach_high, block.rooms.astype(jnp.int32))
  last = block.spread(_search(block, ties, wanted, limit).low)
  return (rank > low) | ((rank == low) & (ties() >= last))


def _random_keys(block: Block, key: Array) -> Array:
  """Other numbers for each element of a layer; uint32 from 1 to 2**31."""
  # jax.random would take as long to compile as the rest of the selection.
  numbers = 2 * block.layers[:, None] + np.arange(2, dtype=np.uint32)[None]
  words = block.spread(random_order((key[0], key[1]), numbers))
  return random_order((words[..., 0], words[..., 1]), block.position()) + 1


def at_random(block: Block, eligible: Array, n: Array, key: Array) -> Array:
  """Selects ``n`` eligible weights of each layer, all equally likely.

  Args:
    block: The layers.
    eligible: Bools.
    n: int32 of shape (slots,), at most the number of eligible weights.
    key: uint32 of shape (2,), fresh for the call.

  Returns:
    Bools, exactly ``n`` of a layer true.
  """
  keys = jnp.where(eligible, _random_keys(block, key), 0)
  # No two keys are equal, so the search ends with exactly n above low.
  found = _search(block, lambda: keys, n, np.uint32(_MAX_ORDER + 1))
  return keys >= block.spread(found.low)


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
  one = lambda block: at_random(
    block, block.is_layer(), block.take(counts), key
  )
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
    return mask & ~select(block, values, mask, excess)

  shapes = [x.shape for x in values]
  return _packing.by_block(one, shapes, stacked, values, masks)


def pick_largest(
  values: Any, counts: Array, stacked: Any, key: Array
) -> list[Array]:
  """Masks of the weights of largest magnitude, of zeros those at random.

  Args:
    values: Floats, leaf by leaf.
    counts: The number of weights of each layer to pick; int32.
    stacked: How many leading axes of each leaf enumerate layers.
    key: uint32 of shape (2,), fresh for the call.
  """

  def one(block: Block, values: Array) -> Array:
    return select(block, values, block.is_layer(), block.take(counts), key)

  shapes = [x.shape for x in values]
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

  def one(block: Block, mask: Array, drop: Array, *grow: Array) -> Array:
    active, _ = block.counts([mask, ~mask])
    n = num_dropped(active)
    kept = mask & ~select(block, drop, mask, n)
    free = ~kept & block.is_layer()
    if not grow:
      return kept | at_random(block, free, n, key)
    return kept | select(block, grow[0], free, n, key)

  masks, stacked = [x.mask for x in layers], [x.stacked for x in layers]
  columns = [masks, drop] if grow is None else [masks, drop, grow]
  shapes = [mask.shape for mask in masks]
  return _packing.by_block(one, shapes, stacked, *columns)
