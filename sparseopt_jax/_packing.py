"""Layers in blocks of rows, which one small program works through in turn.

XLA compiles an operation anew for every shape it meets, and memory that a
program has not used before is slow on a CPU. So small leaves are packed into a
few blocks of equal shape, each layer from the start of a row on, and a loop
takes one block after the other. A large leaf makes up a block of its own, with
a row for each layer stacked in it, and keeps its axes, so that it can stay
sharded.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

from jax import Array
from jax import lax
from jax import ops
import jax.numpy as jnp
import numpy as np

from sparseopt_jax import _lax

Shape = tuple[int, ...]

_ROW = 4096
# The most weights of a small leaf; a block of small ones has about as many.
_LARGE = 1 << 22


class Block(NamedTuple):
  """One or more layers as an array whose first axis runs over rows.

  Each layer has a slot for its values; the last slots may be empty, without a
  row. What stands behind a layer in its last row belongs to none.
  """

  shape: Shape  # of the array
  layers: Array  # (slots,), uint32; which layers these are, among all
  sizes: Array  # (slots,), uint32; the weights of each
  rooms: Array  # (slots,), uint32; its elements, with those behind it
  slots: Array  # (rows,), uint32; the slot that each row belongs to
  starts: Array  # (rows,), uint32; the position of each row in its layer

  def take(self, per_layer: Array) -> Array:
    """What these layers have, out of all; along the first axis."""
    return per_layer.at[self.layers].get(mode="promise_in_bounds")

  def spread(self, per_slot: Array) -> Array:
    """A value of each layer, shaped to broadcast against the array."""
    per_row = per_slot.at[self.slots].get(mode="promise_in_bounds")
    return jnp.expand_dims(per_row, range(1, len(self.shape)))

  def counts(self, conditions: Sequence[Array]) -> list[Array]:
    """How often each of some bool arrays is true in each layer; (slots,)."""
    per_row = _lax.sums(conditions, range(1, len(self.shape)))
    per_layer = ops.segment_sum(
      jnp.stack(per_row, axis=1),
      self.slots,
      num_segments=self.sizes.size,
      indices_are_sorted=True,
    )
    return list(jnp.unstack(per_layer, axis=1))

  def position(self) -> Array:
    """The row-major position of each element in its layer; uint32."""
    starts = jnp.expand_dims(self.starts, range(1, len(self.shape)))
    return starts + _lax.linear_index(self.shape[1:])[None]

  def is_layer(self) -> Array:
    """False behind a layer."""
    return self.position() < self.spread(self.sizes)


class _Leaf(NamedTuple):
  """Layers of one size, stacked in an array; each begins a row."""

  shape: Shape  # of the layers, behind an axis that enumerates them
  first: int  # the number of the first of them, among all
  size: int  # the weights of one
  width: int  # of a row
  height: int  # the rows of one
  rows: int  # of all of them


def by_block(
  function: Callable[..., Array], shapes: Any, stacked: Any, *columns: Any
) -> list[Array]:
  """Applies a function of blocks to layers.

  Args:
    function: Takes a `Block` and, for each column, the array of its layers,
      with zeros behind them; returns bools of the block's shape.
    shapes: Of the leaves.
    stacked: How many leading axes of each leaf enumerate layers.
    *columns: What the function works on: lists of arrays, one for each leaf.

  Returns:
    What it gives for each leaf.
  """
  found, small, first = {}, {}, 0
  for i, (shape, axes) in enumerate(zip(shapes, stacked, strict=True)):
    number, size = math.prod(shape[:axes]), math.prod(shape[axes:])
    is_small = number * size <= _LARGE
    width = _ROW if is_small else size
    height = -(-size // width)
    whole = (number, *shape[axes:])
    leaf = _Leaf(whole, first, size, width, height, number * height)
    first += number
    if is_small:
      small[i] = leaf
    else:
      arrays = [column[i].reshape(whole) for column in columns]
      table = map(jnp.asarray, _table([leaf], number, number))
      found[i] = function(Block(whole, *table), *arrays)
  if small:
    found |= _in_groups(function, small, columns)
  return [found[i].reshape(shape) for i, shape in enumerate(shapes)]


def _in_groups(function: Any, leaves: dict[int, _Leaf], columns: Any) -> dict:
  """`by_block` for some of the leaves, in blocks that are all alike."""
  groups = _groups(leaves)
  rows = max(sum(leaves[i].rows for i in group) for group in groups)
  slots = max(sum(leaves[i].shape[0] for i in group) for group in groups)
  pieces = [_pieces(column, leaves, groups, rows) for column in columns]
  concatenate = lambda k: [jnp.concatenate(column[k]) for column in pieces]
  packers = [functools.partial(concatenate, k) for k in range(len(groups))]

  def one(turn: tuple[Array, ...]) -> Array:
    number, *table = turn
    block = Block((rows, _ROW), *table)
    return function(block, *lax.switch(number, packers))

  numbers = np.arange(len(groups), dtype=np.int32)
  tables = [_table([leaves[i] for i in group], rows, slots) for group in groups]
  fields = [np.stack(field) for field in zip(*tables, strict=True)]
  packed = lax.map(one, (numbers, *fields)).reshape(-1, _ROW)
  tops: dict[int, np.int32] = {}
  for number, group in enumerate(groups):
    heights = np.cumsum([number * rows, *(leaves[i].rows for i in group)])
    tops |= dict(zip(group, heights.astype(np.int32), strict=False))
  # No bool is negative, so these are the tops as they are. But the compiler
  # does not know them, and then needs one program for all leaves of a shape.
  is_known = packed[0, 0].astype(jnp.int32) >= 0
  none = dict.fromkeys(tops, np.int32(0))
  found = lax.cond(is_known, lambda: tops, lambda: none)
  for i, leaf in leaves.items():
    mine = lax.dynamic_slice_in_dim(packed, found[i], leaf.rows)
    found[i] = mine.reshape(leaf.shape[0], -1)[:, : leaf.size]
  return found


def _groups(leaves: dict[int, _Leaf]) -> list[list[int]]:
  """Leaves in groups of about the same number of rows, none of them empty."""
  rows = lambda group: sum(leaves[i].rows for i in group)
  number = -(-rows(leaves) * _ROW // _LARGE)
  groups: list[list[int]] = [[] for _ in range(min(number, len(leaves)))]
  for i in sorted(leaves, key=lambda i: -leaves[i].rows):
    min(groups, key=rows).append(i)
  return groups


def _pieces(column: Any, leaves: Any, groups: Any, rows: int) -> list[list]:
  """For each group, arrays of ``rows`` in all.

  Made before the loop over the groups. What the loop finds ready it copies
  without a program of its own; a reshape in front of the copy would have to be
  compiled with it, for each group anew.
  """
  # One that holds the values of all exactly; they are floats, or all alike.
  dtypes = {column[i].dtype for i in leaves}
  wide = functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))
  dtype = wide if len(dtypes) > 1 else dtypes.pop()
  found: list[list[Array]] = []
  for group in groups:
    found.append([])
    for i in group:
      flat = column[i].astype(dtype).reshape(-1, leaves[i].size)
      behind = (0, leaves[i].height * _ROW - leaves[i].size)
      found[-1].append(jnp.pad(flat, ((0, 0), behind)).reshape(-1, _ROW))
    rest = rows - sum(map(len, found[-1]))
    found[-1].append(jnp.zeros((rest, _ROW), dtype))
  return found


def _table(leaves: Sequence[_Leaf], rows: int, slots: int) -> list[np.ndarray]:
  """The arrays of a `Block`; the last layer gets the rows that are left."""
  numbers = [leaf.shape[0] for leaf in leaves]
  layers = [leaf.first + np.arange(leaf.shape[0]) for leaf in leaves]
  sizes = np.repeat([leaf.size for leaf in leaves], numbers)
  heights = np.repeat([leaf.height for leaf in leaves], numbers)
  heights[-1] += rows - heights.sum()
  tops = np.repeat(np.cumsum(heights) - heights, heights)
  width = leaves[0].width
  per_slot = np.concatenate(layers), sizes, heights * width
  table = [np.pad(column, (0, slots - len(sizes))) for column in per_slot]
  table += [np.repeat(np.arange(len(sizes)), heights)]
  table += [(np.arange(rows) - tops) * width]
  return [column.astype(np.uint32) for column in table]
