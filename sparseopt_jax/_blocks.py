"""Layers in blocks of rows, which one small program works through in turn.

XLA compiles an operation anew for every shape it meets, and memory that a
program has not used before is slow on a CPU. So small layers are packed into a
few blocks of equal shape, each layer from the start of a row on, and a loop
takes one block after the other. A large layer makes up a block of its own and
keeps its axes, so that it can stay sharded.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]

_ROW = 4096
# The most weights of a small layer; a block of small ones has about as many.
_LARGE = 1 << 22


def linear_index(shape: Shape) -> jax.Array:
  """The row-major position of each element; uint32."""
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = np.uint32(math.prod(shape[axis + 1 :]))
    index += stride * lax.broadcasted_iota(jnp.uint32, shape, axis)
  return index


def counts(
  conditions: Sequence[jax.Array], axes: Sequence[int]
) -> list[jax.Array]:
  """How often each of some bool arrays of one shape is true, over ``axes``."""
  return sums([c.astype(jnp.int32) for c in conditions], axes)


def sums(values: Sequence[jax.Array], axes: Sequence[int]) -> list[jax.Array]:
  """The sum of each of some int32 arrays of one shape, over ``axes``.

  One variadic reduction reads its operands once for all sums. XLA on a CPU
  turns a sum of one array, which is what remains if only one sum is used, into
  a tree of sums, with four bytes of memory for each element; over the last axis
  that takes several times longer too.
  """
  return lax.reduce(tuple(values), (np.int32(0),) * len(values), _add, axes)


# At module level, since JAX traces a function that it knows only once.
def _add(a: tuple, b: tuple) -> tuple:
  return tuple(x + y for x, y in zip(a, b, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """One or more layers as an array whose first axis runs over rows.

  Each layer has a slot for its values; the last slots may be empty, without a
  row. `take` fills those with zeros.

  Attributes:
    shape: Of the array.
    layers: Which layers these are, among all; int32 of shape (slots,).
    sizes: The number of elements in each slot, padding included; likewise.
    padding: The number of those that belong to no layer; likewise.
    slots_of_rows: The slot that each row belongs to; int32 of shape (rows,).
    starts: The position of each row in its layer; uint32 of shape (rows,).
  """

  shape: Shape
  layers: jax.Array
  sizes: jax.Array
  padding: jax.Array
  slots_of_rows: jax.Array
  starts: jax.Array

  def take(self, per_layer: jax.Array) -> jax.Array:
    """What each of these layers has, out of all; along the first axis."""
    taken = _look_up(per_layer, self.layers)
    real = jnp.expand_dims(self.sizes > 0, range(1, taken.ndim))
    return jnp.where(real, taken, 0)

  def spread(self, per_slot: jax.Array) -> jax.Array:
    """A value of each layer, shaped to broadcast against the array."""
    return self._along_rows(_look_up(per_slot, self.slots_of_rows))

  def count(self, conditions: Sequence[jax.Array]) -> list[jax.Array]:
    """`counts` in each layer; of shape (slots,)."""
    slots = jnp.arange(self.sizes.size, dtype=jnp.int32)[:, None]
    mine = slots == self.slots_of_rows[None]
    per_row = counts(conditions, range(1, len(self.shape)))
    return sums([jnp.where(mine, c[None], 0) for c in per_row], [1])

  def position(self) -> jax.Array:
    """The row-major position of each element in its layer; uint32."""
    index = jnp.expand_dims(linear_index(self.shape[1:]), 0)
    return self._along_rows(self.starts) + index

  def is_layer(self) -> jax.Array:
    """False for padding."""
    real = (self.sizes - self.padding).astype(jnp.uint32)
    return self.position() < self.spread(real)

  def _along_rows(self, per_row: jax.Array) -> jax.Array:
    return jnp.expand_dims(per_row, range(1, len(self.shape)))


def _look_up(table: jax.Array, index: jax.Array) -> jax.Array:
  """Entries of a table; without programs for indices that do not occur."""
  return table.at[index].get(
    mode="promise_in_bounds", wrap_negative_indices=False
  )


# A value for each element of each layer, and one for padding.
Column = tuple[Sequence[jax.Array], float]


def block_by_block(
  shapes: Sequence[Shape],
  function: Callable[..., jax.Array],
  *columns: Column,
) -> list[jax.Array]:
  """Applies a function of blocks to layers.

  Args:
    shapes: Of the layers.
    function: Takes a block and, for each column, the array of its layers;
      returns bools or uint8 of the block's shape.
    *columns: What the function works on.

  Returns:
    What it gives for each layer.
  """
  columns = tuple(
    ([jnp.asarray(layer) for layer in layers], fill) for layers, fill in columns
  )
  found: dict[int, jax.Array] = {}
  for i in [i for i, s in enumerate(shapes) if math.prod(s) > _LARGE]:
    arrays = [jnp.expand_dims(layers[i], 0) for layers, _ in columns]
    found[i] = function(_alone(i, shapes[i]), *arrays)[0]
  small = [i for i in range(len(shapes)) if i not in found]
  if small:
    found |= _in_groups(small, shapes, function, columns)
  return [found[i] for i in range(len(shapes))]


def _alone(layer: int, shape: Shape) -> Block:
  """A block of one layer as it is."""
  zero = jnp.zeros(1, jnp.int32)
  size = zero + math.prod(shape)
  start = zero.astype(jnp.uint32)
  return Block((1, *shape), zero + layer, size, zero, zero, start)


def _in_groups(
  small: Sequence[int],
  shapes: Sequence[Shape],
  function: Callable[..., jax.Array],
  columns: Sequence[Column],
) -> dict[int, jax.Array]:
  """`block_by_block` for some of the layers, in blocks that are all alike."""
  groups = _groups({i: _height(shapes[i]) for i in small})
  heights = [[_height(shapes[i]) for i in group] for group in groups]
  rows = max(map(sum, heights))
  for of_group in heights:
    of_group[-1] += rows - sum(of_group)
  slots = max(map(len, groups))
  dtypes = [_common_dtype([layers[i] for i in small]) for layers, _ in columns]
  packers, tables = [], []
  for group, of_group in zip(groups, heights, strict=True):
    pieces = [_pieces(group, rows, column) for column in columns]
    packers.append(functools.partial(_pack, pieces, dtypes))
    tables.append(_table(group, of_group, shapes, slots))

  def one(turn: tuple[jax.Array, ...]) -> jax.Array:
    number, *fields = turn
    arrays = lax.switch(number, packers)
    return function(Block((rows, _ROW), *fields), *arrays)

  numbers = np.arange(len(groups), dtype=np.int32)
  fields = [np.stack(field) for field in zip(*tables, strict=True)]
  packed = lax.map(one, (numbers, *fields))
  return _unpack(packed.reshape(-1, _ROW), groups, rows, shapes)


def _common_dtype(layers: Sequence[jax.Array]) -> np.dtype:
  """One that holds the values of all exactly; they are floats, or all alike."""
  dtypes = {layer.dtype for layer in layers}
  if len(dtypes) == 1:
    return dtypes.pop()
  return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def _groups(heights: dict[int, int]) -> list[list[int]]:
  """Layers in groups of about the same number of rows, none of them empty."""
  number = -(-sum(heights.values()) * _ROW // _LARGE)
  number = max(1, min(number, len(heights)))
  groups: list[list[int]] = [[] for _ in range(number)]
  rows = lambda group: sum(heights[i] for i in group)
  for i in sorted(heights, key=lambda i: -heights[i]):
    min(groups, key=rows).append(i)
  return groups


def _height(shape: Shape) -> int:
  return -(-math.prod(shape) // _ROW)


def _table(
  group: Sequence[int],
  heights: Sequence[int],
  shapes: Sequence[Shape],
  slots: int,
) -> tuple[np.ndarray, ...]:
  """The arrays of a `Block`."""
  empty = [0] * (slots - len(group))
  layers = np.array([*group, *empty], np.int32)
  sizes = np.array([*heights, *empty], np.int32) * _ROW
  real = [math.prod(shapes[i]) for i in group]
  padding = sizes - np.array([*real, *empty], np.int32)
  slots_of_rows = np.repeat(np.arange(len(group), dtype=np.int32), heights)
  starts = [np.arange(height, dtype=np.uint32) * _ROW for height in heights]
  return layers, sizes, padding, slots_of_rows, np.concatenate(starts)


def _pieces(group: Sequence[int], rows: int, column: Column) -> list[jax.Array]:
  """The layers of a group, and their padding, as arrays of ``rows`` in all.

  Made before the loop over the groups. What the loop finds ready it copies
  without a program of its own; a reshape in front of the copy would have to be
  compiled with it, for each group anew.
  """
  layers, fill = column
  pieces = []
  for i in group:
    flat = layers[i].reshape(-1)
    padding = (0, _height(layers[i].shape) * _ROW - flat.size)
    padded = jnp.pad(flat, padding, constant_values=fill)
    pieces.append(padded.reshape(-1, _ROW))
  rest = rows - sum(map(len, pieces))
  if rest:
    pieces.append(jnp.full((rest, _ROW), fill, pieces[-1].dtype))
  return pieces


def _pack(
  pieces: Sequence[Sequence[jax.Array]], dtypes: Sequence[np.dtype]
) -> list[jax.Array]:
  """A group as one array for each column."""
  return [
    jnp.concatenate([piece.astype(dtype) for piece in of_column])
    for of_column, dtype in zip(pieces, dtypes, strict=True)
  ]


def _unpack(
  packed: jax.Array,
  groups: Sequence[Sequence[int]],
  rows: int,
  shapes: Sequence[Shape],
) -> dict[int, jax.Array]:
  """The layers in their own shapes, out of groups of so many rows."""
  assert packed.dtype in (jnp.bool_, jnp.uint8)
  known: dict[int, np.int32] = {}
  for number, group in enumerate(groups):
    heights = [_height(shapes[i]) for i in group]
    starts = np.cumsum([number * rows, *heights[:-1]], dtype=np.int32)
    known |= dict(zip(group, starts, strict=True))
  # No value is negative, so these are the starts as they are. But the compiler
  # does not know them, and then needs one program for all layers of a shape.
  starts = lax.cond(
    packed[0, 0].astype(jnp.int32) >= 0,
    lambda: known,
    lambda: dict.fromkeys(known, np.int32(0)),
  )
  found = {}
  for i, start in starts.items():
    mine = lax.dynamic_slice_in_dim(packed, start, _height(shapes[i]))
    flat = mine.reshape(-1)[: math.prod(shapes[i])]
    found[i] = flat.reshape(shapes[i])
  return found
