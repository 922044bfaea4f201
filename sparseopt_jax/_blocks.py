"""Layers in blocks of rows, which one small program works through in turn.

XLA compiles an operation anew for every shape it meets, and memory that a
program has not used before is slow on a CPU. So small layers are packed into a
few blocks of equal shape, each layer from the start of a row on; a block reuses
the program and the memory of the one before. A large layer makes up a block of
its own and keeps its axes, so that it can stay sharded.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]

_ROW = 4096
# The number of weights of a block, and of the smallest large layer.
_LARGE = 1 << 22


def linear_index(shape: Shape) -> jax.Array:
  """The row-major position of each element; uint32."""
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = jnp.uint32(math.prod(shape[axis + 1 :]))
    index += stride * lax.broadcasted_iota(jnp.uint32, shape, axis)
  return index


def counts(
  conditions: Sequence[jax.Array], axes: Sequence[int]
) -> list[jax.Array]:
  """How often each of some bool arrays of one shape is true, over ``axes``.

  One variadic reduction reads its operands once for all conditions. On a CPU it
  is vectorised, while XLA turns a sum of one array, which is what remains if
  only one count is used, into a tree of sums that takes several times longer.
  """
  return _sums([c.astype(jnp.int32) for c in conditions], axes)


def _sums(values: Sequence[jax.Array], axes: Sequence[int]) -> list[jax.Array]:
  def add(a: tuple, b: tuple) -> tuple:
    return tuple(x + y for x, y in zip(a, b, strict=True))

  return lax.reduce(tuple(values), (jnp.int32(0),) * len(values), add, axes)


class Block:
  """One or more layers as an array whose first axis runs over rows.

  A value for each layer is an array of shape (slots,), in the order of
  ``layers``; the slots at the end may be empty, without a row.

  Attributes:
    layers: Which layers these are, among all.
    slots: The number of layers that there is room for.
    shape: Of the array.
  """

  def __init__(
    self, layers: Sequence[int], shapes: Sequence[Shape], rows: int, slots: int
  ):
    """Lays out layers one below the other.

    Args:
      layers: Which layers, among all.
      shapes: The shapes of all layers.
      rows: The number of rows; 0 for a single layer that keeps its axes.
      slots: The number of layers that there is room for.
    """
    self.layers = list(layers)
    self.slots = slots
    self._shapes = [shapes[i] for i in layers]
    self._whole = rows == 0
    row = self._shapes[0] if self._whole else (_ROW,)
    heights = [1] if self._whole else [_height(s) for s in self._shapes]
    heights[-1] += max(rows, 1) - sum(heights)
    self._starts = np.cumsum([0, *heights])
    self._slot_of_row = np.repeat(np.arange(len(heights)), heights)
    self.shape = (len(self._slot_of_row), *row)
    self.inner_axes = range(1, len(self.shape))

  def take(self, per_layer: Sequence[Any]) -> list:
    """The entries of these layers, out of all."""
    return [per_layer[i] for i in self.layers]

  def take_array(self, per_layer: jax.Array) -> jax.Array:
    """The same with an array; empty slots get just any entry."""
    empty = [0] * (self.slots - len(self.layers))
    return per_layer[np.array([*self.layers, *empty])]

  def pack(self, layers: Sequence[jax.Array], fill: float) -> jax.Array:
    """These layers, out of all, in one array with ``fill`` for padding."""
    mine = self.take(layers)
    if self._whole:
      return jnp.expand_dims(mine[0], 0)
    pieces = []
    for layer, rows in zip(mine, np.diff(self._starts), strict=True):
      # Whole rows need no copy of their own.
      flat, whole = layer.reshape(-1), layer.size // _ROW * _ROW
      rest = (0, int(rows) * _ROW - layer.size)
      pieces.append(flat[:whole].reshape(-1, _ROW))
      tail = jnp.pad(flat[whole:], rest, constant_values=fill)
      pieces.append(tail.reshape(-1, _ROW))
    return jnp.concatenate([piece for piece in pieces if piece.size])

  def starts(self) -> list[jax.Array]:
    """Where each layer starts in the flattened array.

    As a result of ``lax.cond`` they are unknown to the compiler, which then
    needs one program to unpack all layers of a shape.
    """
    return [jnp.int32(start * _ROW) for start in self._starts[:-1]]

  def unpack(
    self, array: jax.Array, starts: Sequence[jax.Array]
  ) -> list[jax.Array]:
    """The layers in their own shapes."""
    if self._whole:
      return [array[0]]
    flat = array.reshape(-1)
    return [
      lax.dynamic_slice(flat, (start,), (math.prod(shape),)).reshape(shape)
      for start, shape in zip(starts, self._shapes, strict=True)
    ]

  def spread(self, per_slot: jax.Array) -> jax.Array:
    """A value of each layer, shaped to broadcast against the array."""
    return jnp.expand_dims(per_slot[self._slot_of_row], self.inner_axes)

  def count(self, conditions: Sequence[jax.Array]) -> list[jax.Array]:
    """`counts` in each layer; of shape (slots,)."""
    slots = jnp.arange(self.slots)[:, None]
    mine = slots == jnp.array(self._slot_of_row)[None]
    per_row = counts(conditions, self.inner_axes)
    return _sums([jnp.where(mine, c[None], 0) for c in per_row], [1])

  def sizes(self) -> np.ndarray:
    """The number of elements in each slot, padding included; int32."""
    heights = np.bincount(self._slot_of_row, minlength=self.slots)
    return (heights * math.prod(self.shape[1:])).astype(np.int32)

  def padding(self) -> np.ndarray:
    """The number of elements in each slot that belong to no layer; int32."""
    real = [math.prod(shape) for shape in self._shapes]
    real += [0] * (self.slots - len(real))
    return self.sizes() - np.array(real, np.int32)

  def position(self) -> jax.Array:
    """The row-major position of each element in its layer; uint32."""
    rows = np.arange(self.shape[0]) - self._starts[self._slot_of_row]
    first = jnp.array(rows * math.prod(self.shape[1:]), jnp.uint32)
    index = jnp.expand_dims(linear_index(self.shape[1:]), 0)
    return jnp.expand_dims(first, self.inner_axes) + index

  def is_layer(self) -> jax.Array:
    """False for padding."""
    real = jnp.array(self.sizes() - self.padding(), jnp.uint32)
    return self.position() < self.spread(real)


def _height(shape: Shape) -> int:
  return -(-math.prod(shape) // _ROW)


def _plan(shapes: Sequence[Shape]) -> list[Block]:
  """Blocks that hold each layer once; those of small layers are alike."""
  large = [i for i, s in enumerate(shapes) if math.prod(s) > _LARGE]
  heights = {i: _height(s) for i, s in enumerate(shapes) if i not in large}
  groups: list[list[int]] = [
    [] for _ in range(-(-sum(heights.values()) * _ROW // _LARGE))
  ]
  total = lambda group: sum(heights[i] for i in group)
  for i in sorted(heights, key=lambda i: -heights[i]):
    min(groups, key=total).append(i)
  rows = max(map(total, groups), default=0)
  slots = max(map(len, groups), default=0)
  return [Block([i], shapes, 0, 1) for i in large] + [
    Block(group, shapes, rows, slots) for group in groups
  ]


def block_by_block(
  shapes: Sequence[Shape],
  function: Callable[[Block], tuple[jax.Array, Sequence[jax.Array]]],
) -> list[jax.Array]:
  """Unpacks what ``function`` gives for each block: an array and its starts."""
  layers: dict[int, jax.Array] = {}
  for block in _plan(shapes):
    unpacked = block.unpack(*function(block))
    layers.update(zip(block.layers, unpacked, strict=True))
  return [layers[i] for i in range(len(shapes))]
