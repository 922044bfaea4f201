"""How a grown weight starts under Adam: the ways, the jump, the training.

A grown weight starts with a second moment of 0, while Adam corrects for such a
start only at the beginning of training. So its first steps are too large. Other
ways to start:

- layer mean: the second moment is the mean over the layer's other active
  weights, the first one 0.
- SMET: each weight corrects its moments by its own number of steps, and its
  first steps are ramped up (Xiao et al., https://arxiv.org/abs/2606.00888).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax.studies import regrowth_tasks

ZERO, LAYER_MEAN, SMET = WAYS = ("zero", "layer mean", "SMET")
TOPOLOGIES = {"RigL": sparseopt_jax.RigL, "SET": sparseopt_jax.SET}
# Steps over which SMET ramps up a grown weight; the paper says "short".
RAMP = 10
WEIGHT_DECAY = 0.01

# What Optax calls the second moments of the optimisers below.
_SECOND_MOMENTS = ("nu", "sum_of_squares")
_GROWN, _OLD = 2, 3  # in `SparseOptState.explored`


class _SmetState(NamedTuple):
  count: Any  # per weight, int32; steps since its first gradient
  mu: Any
  nu: Any


def scale_by_smet(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam with a count of steps for each weight, and a ramp after its start.

  The count is a slot like any other: `sparsify` sets it to 0 where a weight
  grows. It starts with the first gradient that is not 0, so the zero gradient
  of the mask update does not count.
  """

  def init(params: optax.Params) -> _SmetState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    count = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params)
    return _SmetState(count, zeros, zeros)

  def update(
    updates: optax.Updates, state: _SmetState, params: Any = None
  ) -> tuple[optax.Updates, _SmetState]:
    del params
    has_begun = lambda n, g: jnp.where((n > 0) | (g != 0), n + 1, 0)
    count = jax.tree.map(has_begun, state.count, updates)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment(updates, state.nu, b2, 2)

    def step(n: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
      n = jnp.maximum(n, 1).astype(m.dtype)
      scaled = m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + eps)
      return scaled * jnp.minimum(n / RAMP, 1)

    return jax.tree.map(step, count, mu, nu), _SmetState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def smet(rate: Any, weight_decay: float = 0.0) -> optax.GradientTransformation:
  """`optax.adamw` with the links of SMET."""
  return optax.chain(
    scale_by_smet(),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(rate),
  )


def start_at_layer_mean(
  tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """`sparsify(...)`, but grown weights start at the layer's second moment."""

  def update(
    updates: optax.Updates,
    state: Any,
    params: Any = None,
    *,
    update_masks: bool,
  ) -> tuple[optax.Updates, Any]:
    updates, state = tx.update(
      updates, state, params, update_masks=update_masks
    )
    if not update_masks:
      return updates, state
    inner = state.inner
    for name in _SECOND_MOMENTS:
      slots = optax.tree.get(inner, name)
      if slots is not None:
        fill = functools.partial(_layer_mean, state.link.updated)
        explored = state.link.explored
        slots = jax.tree.map(fill, explored, slots, is_leaf=_is_dense)
        inner = optax.tree.set(inner, **{name: slots})
    return updates, state._replace(inner=inner)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _is_dense(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _layer_mean(updated: jax.Array, explored: Any, slot: Any) -> Any:
  if _is_dense(explored):
    return slot
  mean = jnp.mean(slot, where=explored == _OLD)
  return jnp.where(updated & (explored == _GROWN), mean, slot)


def sparsify(
  way: str, inner: optax.GradientTransformation, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """The wrapper with one of `WAYS`; for SMET, `inner` has to be `smet`."""
  tx = sparseopt_jax.sparsify(inner, corrected=False, **options)
  return start_at_layer_mean(tx) if way == LAYER_MEAN else tx


_RATE = 1e-3
# By optimiser: those that `jump` compares, with the ways that apply.
OPTIMIZERS = {
  "adam": (lambda: optax.adam(_RATE), WAYS),
  "adamw": (lambda: optax.adamw(_RATE, weight_decay=WEIGHT_DECAY), WAYS),
  "nadam": (lambda: optax.nadam(_RATE), (ZERO, LAYER_MEAN)),
  "adagrad": (lambda: optax.adagrad(_RATE), (ZERO, LAYER_MEAN)),
  "rmsprop": (lambda: optax.rmsprop(_RATE), (ZERO, LAYER_MEAN)),
  "SGD, momentum": (lambda: optax.sgd(_RATE, momentum=0.9), (ZERO,)),
}


def jump(
  name: str, way: str, seeds: int, width: int, step: int, ages: int
) -> jax.Array:
  """How large the steps of grown weights are, relative to those of old ones.

  Gradients are noise. One mask update drops and grows 30 % of a square layer's
  active weights, 10 % of all.

  Args:
    name: One of `OPTIMIZERS`.
    way: One of `WAYS` that applies to it.
    seeds: Number of layers.
    width: Of the layer.
    step: The mask update's; as many steps come before it.
    ages: Steps after it.

  Returns:
    float32 (seeds, ages): mean magnitude of the grown weights' steps over that
    of the weights that were active before and stayed.
  """
  make, _ = OPTIMIZERS[name]
  inner = make() if way != SMET else smet(_RATE, _decay_of(name))

  def one(key: jax.Array) -> jax.Array:
    topology = sparseopt_jax.SET(step + 1, step, lambda count: 0.3)
    tx = sparsify(way, inner, sparsity=0.9, topology=topology, seed=key)
    params = {"kernel": jax.random.normal(key, (width, width)) / 10}
    state = tx.init(params)
    params = sparseopt_jax.apply_masks(params, state)

    def call(update_masks: bool, carry: Any, i: jax.Array) -> Any:
      params, state = carry
      noise = jax.random.normal(jax.random.fold_in(key, i), (width, width))
      updates, state = tx.update(
        {"kernel": noise}, state, params, update_masks=update_masks
      )
      size, explored = jnp.abs(updates["kernel"]), state.link.explored["kernel"]
      mean = lambda mark: jnp.mean(size, where=explored == mark)
      ratio = mean(_GROWN) / mean(_OLD)
      return (optax.apply_updates(params, updates), state), ratio

    carry = params, state
    carry, _ = _scan(functools.partial(call, False), carry, 0, step)
    carry, _ = call(True, carry, jnp.int32(step))
    _, found = _scan(functools.partial(call, False), carry, step + 1, ages)
    return found

  return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds))


def _decay_of(name: str) -> float:
  return WEIGHT_DECAY if name == "adamw" else 0.0


def _scan(function: Any, carry: Any, start: Any, length: int) -> Any:
  return jax.lax.scan(function, carry, start + jnp.arange(length))


# Steps around a mask update of which the loss is kept. In step 0 the gradient
# was taken before it; in step 2 the grown weights have made a step.
AROUND = range(-4, 21)
BEFORE, AFTER = range(-4, 1), range(2, 7)


@functools.partial(jax.jit, static_argnums=range(4))
def train(
  task: regrowth_tasks.Task,
  topology: str,
  way: str,
  seeds: int,
  rate: Any,
  data: Any,
) -> dict[str, jax.Array]:
  """Trains all seeds of a cell in one program.

  Ways differ in nothing else: a seed has the same first weights, first masks
  and batches in each.

  Args:
    task: What to train.
    topology: One of `TOPOLOGIES`.
    way: One of `WAYS`.
    seeds: Networks, of seeds 0, 1, ...
    rate: Peak of the learning rate.
    data: What `task.load` gave.

  Returns:
    An entry for each seed: `test_loss` and `test_accuracy` at the end, float32
    (seeds,); `around`, the training loss in the steps `AROUND` a mask update
    over its mean `BEFORE`, geometric mean over the mask updates, float32
    (seeds, 25).
  """
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  one = functools.partial(_train_one, task, topology, way, rate, data)
  return jax.vmap(one)(keys)


def _train_one(
  task: regrowth_tasks.Task,
  topology: str,
  way: str,
  rate: Any,
  data: Any,
  key: jax.Array,
) -> dict[str, jax.Array]:
  steps, every = task.steps, task.update_every
  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
  if task.is_constant:
    shape = optax.constant_schedule(1.0)
  inner = (smet if way == SMET else optax.adamw)(
    lambda count: rate * shape(count), weight_decay=WEIGHT_DECAY
  )
  changes = TOPOLOGIES[topology](3 * steps // 4, every)
  options = {"sparsity": task.sparsity, "topology": changes, "seed": key}
  tx = sparsify(way, inner, **options)
  params = task.init(key)
  state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, state)

  def step(update_masks: bool, carry: Any, i: Any) -> Any:
    params, state = carry
    batch = task.batch(jax.random.fold_in(key, i), data)
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    updates, state = tx.update(grads, state, params, update_masks=update_masks)
    return (optax.apply_updates(params, updates), state), loss

  plain = functools.partial(step, False)

  def update_and_go_on(carry: Any, at: jax.Array) -> Any:
    carry, first = step(True, carry, at)
    carry, rest = _scan(plain, carry, at + 1, every - 1)
    return carry, jnp.append(first, rest)

  due = [i for i in range(steps) if changes.is_due(i)]
  end = due[-1] + every
  carry, first = _scan(plain, (params, state), 0, every)
  carry, losses = jax.lax.scan(update_and_go_on, carry, jnp.array(due))
  (params, _), _ = _scan(plain, carry, end, steps - end)
  losses = jnp.concatenate([first, losses.reshape(-1)])
  loss, accuracy = task.evaluate(params, data)
  around = _around(losses, jnp.array(due))
  return {"test_loss": loss, "test_accuracy": accuracy, "around": around}


def _around(losses: jax.Array, due: jax.Array) -> jax.Array:
  at = lambda steps: due[:, None] + jnp.array(steps)[None]
  log = lambda steps: jnp.log(losses[at(steps)])
  before = jnp.log(jnp.mean(jnp.exp(log(BEFORE)), axis=1, keepdims=True))
  return jnp.exp(jnp.mean(log(AROUND) - before, axis=0))
