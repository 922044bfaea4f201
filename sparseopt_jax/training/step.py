"""One training step and one evaluation step, and loops of them.

All are pure functions of arrays. They serve one device under `jax.jit`
(`axis_name=None`), many under `jax.pmap` (`axis_name` given: gradients and
statistics are averaged over it before the update, so that all replicas stay
bit-identical), arrays that are sharded over a mesh (`axis_name=None` again: the
batch is then whole), and many networks by `jax.vmap` (`mapped`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import optax

from sparseopt_jax.data.dataset import Dataset
from sparseopt_jax.training.state import Sums
from sparseopt_jax.training.state import TrainState

Batch = dict[str, jax.Array]


class Examples(NamedTuple):
  """What the batches of one call are taken from.

  Attributes:
    image: uint8 (n, h, w, c).
    label: int32 (n,).
    rows: int32 (batches, b), the examples of each batch; None: the n examples
      are the only batch.
    valid: bool (batches, b), or (n,) without `rows`: which rows of a test batch
      count; None for training.
  """

  image: Any
  label: Any
  rows: Any = None
  valid: Any = None

  def batch(self, index: jax.Array | int) -> Batch:
    """Batch number `index`."""
    batch = {"image": self.image, "label": self.label}
    if self.rows is not None:
      rows = self.rows[index]
      batch = {k: jnp.take(x, rows, 0, mode="clip") for k, x in batch.items()}
    if self.valid is not None:
      batch["valid"] = self.valid if self.rows is None else self.valid[index]
    return batch


class Task(NamedTuple):
  """What a step needs to know that is not an array.

  Attributes:
    model: The network, `model.apply(variables, images, train=...)`.
    dataset: Augments and preprocesses images.
    tx: The optimiser.
    steps_per_epoch: Steps in an epoch.
    dtype: The dtype of the computation.
    label_smoothing: Probability mass that is spread over the classes.
    accumulate: Parts that each batch is worked through in.
    skip_nonfinite: Whether a step with NaN or infinity leaves the state alone.
    axis_name: The axis of devices that share a batch, or None.
    mapped: Whether states and metrics have a leading axis of networks.
    stops: Whether a loop of steps ends at one that is not finite.
  """

  model: nn.Module
  dataset: Dataset
  tx: optax.GradientTransformationExtraArgs
  steps_per_epoch: int
  dtype: DTypeLike = jnp.float32
  label_smoothing: float = 0.0
  accumulate: int = 1
  skip_nonfinite: bool = False
  axis_name: str | None = None
  mapped: bool = False
  stops: bool = True


class StepMetrics(NamedTuple):
  """What a step tells the host, averaged over the whole batch.

  Attributes:
    step: int32 [], steps done.
    loss: float32 [].
    accuracy: float32 [].
    finite: bool [], whether the loss, all gradients and the network after the
      step are finite.
  """

  step: jax.Array
  loss: jax.Array
  accuracy: jax.Array
  finite: jax.Array


def train_steps(
  task: Task,
  state: TrainState,
  examples: Examples,
  first: jax.Array,
  count: jax.Array,
  update_masks: bool | None = None,
) -> tuple[TrainState, StepMetrics]:
  """Takes several steps in one call.

  It may stop after a step that is not finite.

  Args:
    task: The static part.
    state: The state; donate it.
    examples: Where the batches come from; if `mapped`, each network has its own
      `rows`, (networks, batches, b).
    first: int32 [], number of the first batch.
    count: int32 [], how many steps, at least one.
    update_masks: Of each of the steps, as for `train_step`.

  Returns:
    The state after the last step, and that step's metrics.
  """

  def one(
    state: TrainState, rows: jax.Array | None, index: jax.Array
  ) -> tuple[TrainState, StepMetrics]:
    batch = examples._replace(rows=rows).batch(index)
    return train_step(task, state, batch, update_masks)

  step = jax.vmap(one, in_axes=(0, 0, None)) if task.mapped else one

  def goes_on(carry: tuple) -> jax.Array:
    done, _, metrics = carry
    sound = jnp.all(metrics.finite) | (not task.stops)
    return (done < count) & sound

  def body(carry: tuple) -> tuple:
    done, state, _ = carry
    return done + 1, *step(state, examples.rows, first + done)

  start = StepMetrics(
    step=state.step,
    loss=jnp.zeros_like(state.sums.loss),
    accuracy=jnp.zeros_like(state.sums.loss),
    finite=jnp.ones_like(state.step, dtype=bool),
  )
  _, state, metrics = lax.while_loop(
    goes_on, body, (jnp.int32(0), state, start)
  )
  return state, metrics


def train_step(
  task: Task,
  state: TrainState,
  batch: Batch,
  update_masks: bool | None = None,
) -> tuple[TrainState, StepMetrics]:
  """Takes one step of gradient descent.

  Args:
    task: The static part.
    state: The state; donate it.
    batch: `image` uint8 (b, h, w, c) and `label` int32 (b,), this device's
      share of the batch.
    update_masks: Whether this step updates the masks; None: the optimiser's
      count says so, on the device.

  Returns:
    The next state, and the step's metrics.
  """
  state = state._replace(sums=_sums_of_epoch(task, state))
  batch = _augment(task, state, batch)
  grads, batch_stats, sums = _gradient(task, state, batch)
  grads, batch_stats, sums = _over_devices(task, grads, batch_stats, sums)
  updates, opt_state = task.tx.update(
    grads, state.opt_state, state.params, update_masks=update_masks
  )
  new_state = state._replace(
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
    sums=jax.tree.map(jnp.add, state.sums, sums),
  )
  network = (new_state.params, batch_stats)
  finite = jnp.isfinite(sums.loss) & _all_finite((grads, network))
  if task.skip_nonfinite:
    new_state = _keep_if(finite, new_state, state)
  new_state = new_state._replace(step=state.step + 1)
  metrics = StepMetrics(
    step=new_state.step,
    loss=sums.loss / sums.examples,
    accuracy=sums.correct / sums.examples,
    finite=finite,
  )
  return new_state, metrics


def eval_steps(
  task: Task,
  variables: dict[str, Any],
  sums: Sums,
  examples: Examples,
  first: jax.Array,
  count: jax.Array,
) -> Sums:
  """Adds several test batches to the sums.

  Args:
    task: The static part.
    variables: `params` and `batch_stats`.
    sums: Sums so far.
    examples: Where the batches come from, the same for all networks.
    first: int32 [], number of the first batch.
    count: int32 [], how many batches.

  Returns:
    The sums with each example of these batches once.
  """
  step = functools.partial(eval_step, task)
  if task.mapped:
    step = jax.vmap(step, in_axes=(0, 0, None))
  body = lambda index, sums: step(variables, sums, examples.batch(index))
  return lax.fori_loop(first, first + count, body, sums)


def eval_step(
  task: Task, variables: dict[str, Any], sums: Sums, batch: Batch
) -> Sums:
  """Adds a test batch to the sums, each example with `valid` once."""
  images = task.dataset.preprocess(batch["image"], task.dtype)
  logits: Any = task.model.apply(variables, images, train=False)
  losses = _losses(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))
  found = _sums(losses, logits, batch["label"], batch["valid"])
  if task.axis_name is not None:
    found = lax.psum(found, task.axis_name)
  return jax.tree.map(jnp.add, sums, found)


def _sums_of_epoch(task: Task, state: TrainState) -> Sums:
  """The sums so far; those of the epoch before are done with."""
  starts = state.step % task.steps_per_epoch == 0
  return jax.tree.map(
    lambda x: jnp.where(starts, jnp.zeros_like(x), x), state.sums
  )


def _augment(task: Task, state: TrainState, batch: Batch) -> Batch:
  """Augments by the example's place in the whole batch, not by its device."""
  images = batch["image"]
  offset: jax.Array | int = 0
  if task.axis_name is not None:
    offset = lax.axis_index(task.axis_name) * images.shape[0]
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  return {**batch, "image": task.dataset.augment(key, images, offset)}


def _gradient(
  task: Task, state: TrainState, batch: Batch
) -> tuple[Any, Any, Sums]:
  """Mean gradient over the local batch, new statistics, and sums."""
  gradient = jax.grad(_loss, argnums=1, has_aux=True)
  if task.accumulate == 1:
    grads, (batch_stats, sums) = gradient(
      task, state.params, state.batch_stats, batch
    )
    return grads, batch_stats, sums

  def add_part(carry: Any, part: Batch) -> tuple[Any, None]:
    total, batch_stats, sums = carry
    grads, (batch_stats, part_sums) = gradient(
      task, state.params, batch_stats, part
    )
    total, sums = jax.tree.map(jnp.add, (total, sums), (grads, part_sums))
    return (total, batch_stats, sums), None

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  start = (zeros, state.batch_stats, Sums.zero())
  parts = jax.tree.map(lambda x: _split(x, task.accumulate), batch)
  (total, batch_stats, sums), _ = lax.scan(add_part, start, parts)
  grads = jax.tree.map(lambda g: g / task.accumulate, total)
  return grads, batch_stats, sums


def _split(x: jax.Array, parts: int) -> jax.Array:
  """(b, ...) to (parts, b / parts, ...).

  Part m holds rows m, m + parts, m + 2 parts, ...: the same rows of the whole
  batch however it is split over devices.
  """
  return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)


def _loss(
  task: Task, params: Any, batch_stats: Any, batch: Batch
) -> tuple[jax.Array, tuple[Any, Sums]]:
  images = task.dataset.preprocess(batch["image"], task.dtype)
  logits, changed = task.model.apply(
    {"params": params, "batch_stats": batch_stats},
    images,
    train=True,
    mutable=["batch_stats"],
  )
  one_hot = jax.nn.one_hot(batch["label"], logits.shape[-1])
  targets = optax.smooth_labels(one_hot, task.label_smoothing)
  losses = _losses(logits, targets)
  everyone = jnp.ones(losses.shape, bool)
  sums = _sums(losses, logits, batch["label"], everyone)
  return jnp.mean(losses), (changed["batch_stats"], sums)


def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  return optax.softmax_cross_entropy(
    logits.astype(dtype), targets.astype(dtype)
  )


def _sums(
  losses: jax.Array, logits: jax.Array, labels: jax.Array, valid: jax.Array
) -> Sums:
  hits = jnp.argmax(logits, axis=-1) == labels
  return Sums(
    loss=jnp.sum(losses, where=valid).astype(jnp.float32),
    correct=jnp.sum(hits, where=valid, dtype=jnp.int32),
    examples=jnp.sum(valid, dtype=jnp.int32),
  )


def _over_devices(
  task: Task, grads: Any, batch_stats: Any, sums: Sums
) -> tuple[Any, Any, Sums]:
  if task.axis_name is None:
    return grads, batch_stats, sums
  grads, batch_stats = lax.pmean((grads, batch_stats), task.axis_name)
  return grads, batch_stats, lax.psum(sums, task.axis_name)


def _all_finite(tree: Any) -> jax.Array:
  leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))


def _keep_if(
  finite: jax.Array, new_state: TrainState, state: TrainState
) -> TrainState:
  kept = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), new_state, state
  )
  skipped = jnp.where(finite, 0, 1)
  return kept._replace(nonfinite_steps=state.nonfinite_steps + skipped)
