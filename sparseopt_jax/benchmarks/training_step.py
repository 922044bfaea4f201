"""The whole training step: forward, backward, optimiser."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax import models
from sparseopt_jax.benchmarks import optimizer
from sparseopt_jax.benchmarks import timing


def _step(
  network: Any, tx: optax.GradientTransformation, state: tuple, batch: tuple
) -> tuple:
  (params, opt_state), stats = state
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
  return (optax.apply_updates(params, updates), opt_state), stats


def run(args: argparse.Namespace) -> dict[str, dict]:
  """Ratios of wall time to dense training.

  The rows SET and RigL are of steps between mask updates; `amortised_ratio`
  adds a hundredth of a mask update.

  Args:
    args: Of the command. Images are noise; a round has five steps of each.
  """
  network = models.create(args.model, 1_000, dtype=args.precision)
  shape = (args.batch_size, args.image_size, args.image_size, 3)
  images = jax.random.normal(jax.random.key(0), shape, args.precision)
  batch = (images, jnp.arange(args.batch_size) % 1_000)
  variables = jax.jit(lambda x: network.init(jax.random.key(0), x, train=False))
  first = variables(images[:1])
  steps, states = {}, {}
  every = timing.optimizers(args.sparsity, timing.NEVER, ("SET", "RigL"))
  for name, tx in every.items():
    step = lambda state, batch, tx=tx: _step(network, tx, state, batch)
    stats = jax.tree.map(jnp.copy, first["batch_stats"])
    states[name] = optimizer.first_state(tx, first["params"]), stats
    lowered = jax.jit(step, donate_argnums=0).lower(states[name], batch)
    program = lowered.compile()
    steps[name] = lambda state, program=program: program(state, batch)
  # Several steps at a time, as in training: an accelerator gets its next step
  # while it works on one.
  times = timing.interleave(steps, states, repeats=args.repeats, calls=5)
  rows = timing.ratios(times, "plain", "wall")
  for row in rows.values():
    row["images_per_second"] = 1e3 * args.batch_size / row["milliseconds"]
  for name in ("SET", "RigL"):
    extra = rows[f"{name}, mask update"]["ratio"] - rows[name]["ratio"]
    for row in (rows[name], rows[f"{name}, told"]):
      row["amortised_ratio"] = row["ratio"] + extra / 100
  return rows
