"""The whole state of a network: what a step changes and a checkpoint holds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax


class Sums(NamedTuple):
  """Running sums over examples, on the device.

  Attributes:
    loss: float32 [], sum of the loss.
    correct: int32 [], examples whose largest logit is the label's.
    examples: int32 [], how many examples.
  """

  loss: jax.Array
  correct: jax.Array
  examples: jax.Array

  @classmethod
  def zero(cls) -> Sums:
    """Sums over nothing."""
    return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0))

  def means(self) -> tuple[float, float]:
    """Mean loss and accuracy, on the host; NaN over no example."""
    loss, correct, examples = (x.item() for x in jax.device_get(self))
    if not examples:
      return math.nan, math.nan
    return loss / examples, correct / examples


class TrainState(NamedTuple):
  """All that the next step depends on, beside the data.

  Batch number `step` of the data, and the random numbers of a step, follow from
  `step` and `key` alone, so that a checkpoint of this state is enough to go on
  bit for bit.

  Attributes:
    step: int32 [], steps done.
    key: uint32 [2], key data of the network; never changes.
    params: The network's parameters.
    batch_stats: Running statistics of batch normalisation.
    opt_state: The optimiser's state, masks included.
    sums: Sums over the training steps of the epoch so far.
    nonfinite_steps: int32 [], steps left out for NaN or infinity.
  """

  step: jax.Array
  key: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  sums: Sums
  nonfinite_steps: jax.Array


def variables(state: TrainState) -> dict[str, Any]:
  """What the network is applied with."""
  return {"params": state.params, "batch_stats": state.batch_stats}


def create(
  seed: jax.Array,
  variables: dict[str, Any],
  tx: optax.GradientTransformationExtraArgs,
) -> TrainState:
  """Starts a network from freshly initialised variables.

  Args:
    seed: uint32 [], seed of the network's random numbers.
    variables: `params` and `batch_stats`.
    tx: The optimiser. Where it holds masks, the parameters start masked.

  Returns:
    The state before step 0.
  """
  params = variables["params"]
  opt_state = tx.init(params)
  if has_masks(opt_state):
    params = sparseopt_jax.apply_masks(params, opt_state)
  return TrainState(
    step=jnp.int32(0),
    key=jax.random.key_data(jax.random.key(seed)),
    params=params,
    batch_stats=variables["batch_stats"],
    opt_state=opt_state,
    sums=Sums.zero(),
    nonfinite_steps=jnp.int32(0),
  )


def has_masks(opt_state: Any) -> bool:
  """Whether an optimiser state holds a `SparseOptState`."""

  def is_sparse(node: Any) -> bool:
    return isinstance(node, sparseopt_jax.SparseOptState)

  leaves = jax.tree.leaves(opt_state, is_leaf=is_sparse)
  return any(map(is_sparse, leaves))
