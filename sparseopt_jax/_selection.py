"""Exact selection of the n largest scores of each layer, without sorting.

A score is mapped to an unsigned integer that orders the same way. The n-th
largest key of a layer is then found two bits at a time, from the top: each pass
over the layer counts the keys at or above three thresholds. That is sixteen
passes for 32 bits, whatever the scores are. All layers search in the same loop,
so the program has one reduction per layer and no more.

The passes are elementwise and reduce to scalars. They keep the shape of the
weights, so sharded arrays stay where they are and give the same result.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

_BITS_PER_PASS = 2
Keys = Callable[[], Sequence[jax.Array]]


def linear_index(shape: tuple[int, ...]) -> jax.Array:
  """The row-major position of each element; uint32."""
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = jnp.uint32(math.prod(shape[axis + 1 :]))
    index += stride * lax.broadcasted_iota(jnp.uint32, shape, axis)
  return index


def random_order(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A pseudo-random uint32 for each element, a function of key and position.

  The finaliser of MurmurHash3, keyed twice. It is a bijection of the position,
  so no two elements are equal; and it costs a small part of what
  :func:`jax.random.bits` costs on a CPU, where that would be most of a mask
  update.

  Args:
    key: uint32 of shape (2,), fresh for each layer and use.
    shape: The shape of the result.
  """
  bits = linear_index(shape)
  for word in key:
    bits ^= word
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits ^= bits >> 16
  return bits


def nonzero(score: jax.Array) -> jax.Array:
  """Where a float is not +-0; by its bits, since denormals may be flushed."""
  bits = lax.bitcast_convert_type(score, _uint_like(score.dtype))
  return (bits << 1) != 0


def _uint_like(dtype: jnp.dtype) -> jnp.dtype:
  return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def _float_key(score: jax.Array) -> jax.Array:
  """Unsigned key in the order of the floats: NaN = 1, then -inf to inf."""
  bits = lax.bitcast_convert_type(score, _uint_like(score.dtype))
  sign = jnp.asarray(1 << (8 * bits.dtype.itemsize - 1), bits.dtype)
  infinity = lax.bitcast_convert_type(
    jnp.asarray(jnp.inf, score.dtype), bits.dtype
  )
  magnitude = bits & ~sign
  negative = (bits >= sign) & (magnitude != 0)
  ordered = jnp.where(negative, ~bits, magnitude | sign)
  return jnp.where(magnitude > infinity, jnp.ones_like(bits), ordered)


def _key(score: jax.Array, eligible: jax.Array) -> jax.Array:
  """Key of at least 1 where eligible, 0 elsewhere."""
  if jnp.issubdtype(score.dtype, jnp.floating):
    key = _float_key(score)
  else:
    key = (score >> 1) + 1
  return jnp.where(eligible, key, jnp.zeros_like(key))


def _counts(keys: Keys, thresholds: Sequence[jax.Array]) -> jax.Array:
  """How many keys of each layer reach each threshold; (thresholds, layers).

  One variadic reduction reads a layer once for all thresholds, and is the form
  that XLA vectorises on a CPU: a plain sum of bools takes several times longer.
  """

  def add(a: tuple, b: tuple) -> tuple:
    return tuple(x + y for x, y in zip(a, b, strict=True))

  rows = []
  for i, key in enumerate(keys()):
    reached = tuple((key >= t[i]).astype(jnp.int32) for t in thresholds)
    zeros = (jnp.int32(0),) * len(reached)
    rows.append(jnp.stack(lax.reduce(reached, zeros, add, range(key.ndim))))
  return jnp.stack(rows, axis=1)


def _nth_largest(keys: Keys, n: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The largest threshold of each layer that at least ``n`` keys reach."""
  digits = range(1, 1 << _BITS_PER_PASS)
  bits = 8 * jnp.dtype(dtype).itemsize

  def one_pass(i: jax.Array, found: jax.Array) -> jax.Array:
    shift = jnp.asarray(bits - _BITS_PER_PASS * (i + 1), dtype)
    tried = [found + (jnp.asarray(digit, dtype) << shift) for digit in digits]
    enough = _counts(keys, tried) >= n[None, :]
    return found + (jnp.sum(enough, axis=0, dtype=dtype) << shift)

  passes = bits // _BITS_PER_PASS
  return lax.fori_loop(0, passes, one_pass, jnp.zeros(n.shape, dtype))


def largest(
  scores: Sequence[jax.Array], eligible: Sequence[jax.Array], n: jax.Array
) -> list[jax.Array]:
  """Selects the ``n`` largest eligible scores of each layer.

  Ties go to the lowest row-major index; -0 equals 0; NaN comes last.

  Args:
    scores: One array a layer, all floats or all uint32 (of which the lowest bit
      is not looked at).
    eligible: Bools in the shapes of the scores.
    n: int32 of shape (layers,), at most the number of eligible scores.

  Returns:
    Bools in the shapes of the scores, exactly ``n`` of a layer true.
  """
  if not scores:
    return []
  wide = jnp.result_type(jnp.float32, *scores)
  if jnp.issubdtype(scores[0].dtype, jnp.floating):
    scores = [score.astype(wide) for score in scores]
  dtype = _uint_like(scores[0].dtype)

  # Called inside the loops, so that keys are computed on the fly, not stored.
  def keys() -> list[jax.Array]:
    return [_key(s, e) for s, e in zip(scores, eligible, strict=True)]

  bound = _nth_largest(keys, n, dtype)

  def tied_keys() -> list[jax.Array]:
    return [
      jnp.where(key == bound[i], ~linear_index(key.shape), jnp.uint32(0))
      for i, key in enumerate(keys())
    ]

  above, reached = _counts(keys, [bound + 1, bound])
  last = lax.cond(
    jnp.any(reached > n),
    functools.partial(_nth_largest, tied_keys, n - above, jnp.uint32),
    lambda: jnp.zeros(n.shape, jnp.uint32),
  )
  return [
    (key > bound[i])
    | ((key == bound[i]) & (~linear_index(key.shape) >= last[i]))
    for i, key in enumerate(keys())
  ]
