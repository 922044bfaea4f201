"""The state of the link: a byte of status for each weight, and what follows.

Its trees have entries for some leaves of the parameters only, here called the
sparse ones; the helpers look them up and put them back.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _leaves

# Bits of a weight's status.
ACTIVE = 1  # in the mask
EXPLORED = 2  # has been in the mask at some time
CHANGED = 4  # dropped or grown by the last mask update


class SparseOptState(NamedTuple):
  """State of :func:`sparseopt_jax.sparseopt`.

  Trees have the structure of the parameters, with ``optax.MaskedNode()`` in the
  place of leaves that have no such entry. Per-neuron arrays keep the rank of
  their leaf, with length 1 on the input axes.
  """

  # shape=(), dtype=jnp.int32; calls of update so far
  count: jax.Array  # type: ignore[assignment]
  # shape=(), dtype=jnp.int32; the count, if the last call updated the masks
  updated_at: jax.Array
  skipped: jax.Array  # shape=(), dtype=jnp.int32; mask updates given up
  key: jax.Array  # shape=(2,), dtype=jnp.uint32; from the seed
  status: (
    optax.Params
  )  # leaf shape, dtype=jnp.uint8; ACTIVE | EXPLORED | CHANGED
  fan_in: optax.Params  # per neuron, dtype=jnp.int32
  correction: optax.Params  # per neuron, dtype=jnp.float32; factors
  gradient_sum: optax.Params  # leaf shape; RigL with accumulate > 1


class SettledState(SparseOptState):
  """A state that has made the mask update of the call under way.

  ``keep_params_sparse`` passes it to the link, which then corrects the gradient
  and leaves the state as it is.
  """


def has_bits(status: jax.Array, bits: int) -> jax.Array:
  return (status & np.uint8(bits)) != 0


def just_updated(state: SparseOptState) -> jax.Array:
  # Where it is never set, the compiler sees that the first part is false.
  return (state.updated_at >= 0) & (state.updated_at == state.count)


def settled_bits(fresh: jax.Array) -> jax.Array:
  """What `is_settled` has to look at; ``fresh`` says that masks are new."""
  return jnp.where(fresh, np.uint8(ACTIVE | CHANGED), np.uint8(ACTIVE))


def is_settled(status: jax.Array, bits: jax.Array) -> jax.Array:
  """Active, and not changed where ``bits`` ask for that."""
  return (status & bits) == ACTIVE


def _flatten(status: Any) -> tuple[list, Any]:
  """Leaves, MaskedNode among them, and the structure of the parameters."""
  return jax.tree.flatten(status, is_leaf=_leaves.is_masked_node)


def sparse_only(status: Any, tree: Any) -> list:
  """The entries of ``tree`` at the sparse leaves."""
  flags, treedef = _flatten(status)
  pairs = zip(flags, treedef.flatten_up_to(tree), strict=True)
  return [x for flag, x in pairs if not _leaves.is_masked_node(flag)]


def put_sparse(tree: Any, status: Any, values: Sequence[Any]) -> Any:
  """``tree`` with other entries at the sparse leaves, where it has one."""
  flags, treedef = _flatten(status)
  rest = iter(values)
  new = [f if _leaves.is_masked_node(f) else next(rest) for f in flags]
  pairs = zip(treedef.flatten_up_to(tree), new, strict=True)
  return treedef.unflatten(
    [old if _leaves.is_masked_node(old) else value for old, value in pairs]
  )


def once(
  predicate: jax.Array | bool, body: Callable[[Any], Any], operand: Any
) -> Any:
  """Applies ``body`` if ``predicate``, in the operand's own buffers.

  A loop of at most one round. Unlike ``lax.cond`` it updates its operand in
  place, and under ``vmap`` it runs only if an instance needs it. No loop where
  the predicate is known while tracing.
  """
  if isinstance(predicate, bool):
    # Compiled as the loop below would be, in a call that is not jitted too.
    return jax.jit(body)(operand) if predicate else operand
  return lax.while_loop(
    lambda carry: carry[0],
    lambda carry: (jnp.zeros_like(carry[0]), body(carry[1])),
    (predicate, operand),
  )[1]
