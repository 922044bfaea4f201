"""The whole training step: forward, backward, optimiser."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax import models
from sparseopt_jax.benchmarks import timing

_NEVER = 2**30


def _first_state(tx: optax.GradientTransformation, variables: Any) -> tuple:
  """Parameters, batch statistics and optimiser state, to be donated."""
  params, stats = jax.tree.map(
    jnp.copy, (variables["params"], variables["batch_stats"])
  )
  opt_state = jax.jit(tx.init)(params)
  if not isinstance(opt_state[0], optax.TraceState):
    params = sparseopt_jax.apply_masks(params, opt_state)
  return params, stats, opt_state


def _step(
  network: Any, tx: optax.GradientTransformation, state: tuple, batch: tuple
) -> tuple:
  params, stats, opt_state = state
  images, labels = batch

  def loss(params: Any) -> tuple[jax.Array, Any]:
    logits, changed = network.apply(
      {"params": params, "batch_stats": stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), changed["batch_stats"]

  gradients, stats = jax.grad(loss, has_aux=True)(params)
  updates, opt_state = tx.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), stats, opt_state


def _optimizers(sparsity: float) -> dict[str, optax.GradientTransformation]:
  """Between mask updates, and with a mask update in each step."""
  found = timing.optimizers(0.01, sparsity, _NEVER)
  often = timing.optimizers(0.01, sparsity, 1)
  found |= {f"{name}, mask update": often[name] for name in ("SET", "RigL")}
  return found


def run(
  model: str,
  image_size: int,
  batch_size: int,
  sparsity: float,
  repeats: int,
  precision: str,
) -> dict[str, dict]:
  """Ratios of wall time to dense training.

  The rows SET and RigL are of steps between mask updates; `amortised_ratio`
  adds a hundredth of a mask update.

  Args:
    model: A name of `sparseopt_jax.models`.
    image_size: Height and width of the images, which are noise.
    batch_size: Images in a step.
    sparsity: Fraction of zeros.
    repeats: Rounds of five steps of each, in turn.
    precision: Dtype of the computation.
  """
  network = models.create(model, 1_000, dtype=precision)
  shape = (batch_size, image_size, image_size, 3)
  images = jax.random.normal(jax.random.key(0), shape, jnp.dtype(precision))
  batch = (images, jnp.arange(batch_size) % 1_000)
  variables = jax.jit(lambda x: network.init(jax.random.key(0), x, train=False))
  first = variables(images[:1])
  steps, states = {}, {}
  for name, tx in _optimizers(sparsity).items():
    step = lambda state, batch, tx=tx: _step(network, tx, state, batch)
    states[name] = _first_state(tx, first)
    lowered = jax.jit(step, donate_argnums=0).lower(states[name], batch)
    program = lowered.compile()
    steps[name] = lambda state, program=program: program(state, batch)
  # Several steps at a time, as in training: an accelerator gets its next step
  # while it works on one.
  times = timing.interleave(steps, states, repeats=repeats, calls=5)
  rows = timing.ratios(times, "plain", "wall")
  for row in rows.values():
    row["images_per_second"] = 1e3 * batch_size / row["milliseconds"]
  for name in ("SET", "RigL"):
    extra = rows[f"{name}, mask update"]["ratio"] - rows[name]["ratio"]
    for row in (rows[name], rows[f"{name}, told"]):
      row["amortised_ratio"] = row["ratio"] + extra / 100
  return rows
