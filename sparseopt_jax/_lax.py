"""Operations that `jax.lax` does not have."""

from collections.abc import Callable, Sequence
import operator
from typing import Any

import jax
from jax import Array
from jax import lax
import jax.numpy as jnp
import numpy as np


def linear_index(shape: tuple[int, ...]) -> Array:
  """The row-major position of each element, modulo 2**32; uint32."""
  index = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    iota = lax.broadcasted_iota(jnp.uint32, shape, axis)
    index = index * np.uint32(size) + iota
  return index


def sums(arrays: Sequence[Array], axes: Sequence[int]) -> list[Array]:
  """The sum of each of some arrays of one shape, over ``axes``; int32.

  One variadic reduction reads its operands once for all sums. XLA on a CPU
  turns a sum of one array, which is what remains if only one sum is used, into
  a tree of sums, with four bytes of memory for each element; over the last axis
  that takes several times longer too.

  Args:
    arrays: Bools, which are counted, or int32.
    axes: What to sum over.
  """
  operands = tuple(array.astype(jnp.int32) for array in arrays)
  return lax.reduce(operands, (np.int32(0),) * len(operands), _add, axes)


# At module level, since JAX traces a function that it knows only once.
_add = lambda a, b: tuple(map(operator.add, a, b))


def once(
  predicate: Any, body: Callable[..., Any], operand: Any, *args: Any
) -> Any:
  """Applies ``body`` if ``predicate``, in the operand's own buffers.

  A loop of at most one round. Unlike ``lax.cond`` it updates its operand in
  place, and under ``vmap`` it runs only if an instance needs it. No loop where
  the predicate is known: while tracing, or in a call that is not jitted.

  Args:
    predicate: A bool, traced or not.
    body: Takes the operand and ``args``, and returns the operand's structure.
    operand: A pytree of arrays.
    *args: Pytrees of arrays that stay as they are.
  """
  is_known = not isinstance(predicate, jax.core.Tracer)
  if is_known:
    # Compiled as the loop below would be, in a call that is not jitted too.
    return jax.jit(body)(operand, *args) if predicate else operand
  is_left = lambda carry: carry[0]
  turn = lambda carry: (jnp.zeros_like(carry[0]), body(carry[1], *args))
  return lax.while_loop(is_left, turn, (predicate, operand))[1]
