"""The optimiser alone, on the parameters of a network."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax import models
from sparseopt_jax.benchmarks import timing


def problem(name: str) -> tuple[Any, Any]:
  """Random parameters and gradients of a network."""
  model = models.create(name, 1_000)
  images = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), images, train=False)["params"]
  )
  leaves = jax.tree.leaves(shapes)
  treedef: Any = jax.tree.structure(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  draw = jax.jit(jax.random.normal, static_argnums=1)
  pairs = list(zip(keys, leaves, strict=True))
  params = [0.05 * draw(key, leaf.shape) for key, leaf in pairs]
  gradients = [draw(jax.random.fold_in(k, 1), leaf.shape) for k, leaf in pairs]
  return treedef.unflatten(params), treedef.unflatten(gradients)


def first_state(tx: optax.GradientTransformation, params: Any) -> tuple:
  """Parameters and optimiser state, to be donated."""
  opt_state = jax.jit(tx.init)(params)
  params = jax.tree.map(jnp.copy, params)
  if not isinstance(opt_state[0], optax.TraceState):
    params = sparseopt_jax.apply_masks(params, opt_state)
  return params, opt_state


def lowered_step(
  tx: optax.GradientTransformation, state: tuple, gradients: Any
) -> Any:
  """A step from and to (params, opt_state), which it takes over."""

  def step(state: tuple[Any, Any], gradients: Any) -> tuple[Any, Any]:
    params, opt_state = state
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return jax.jit(step, donate_argnums=0).lower(state, gradients)


def run(
  model: str, sparsity: float, repeats: int, calls: int, update_every: int
) -> dict[str, dict]:
  """Ratios to plain SGD.

  Args:
    model: Whose parameters to optimise.
    sparsity: Fraction of zeros.
    repeats: Rounds of measurement.
    calls: Calls in a round.
    update_every: 1 times the mask update; a large number the normal step.
  """
  params, gradients = problem(model)
  steps, states = {}, {}
  for name, tx in timing.optimizers(sparsity, update_every).items():
    states[name] = first_state(tx, params)
    program = lowered_step(tx, states[name], gradients).compile()
    steps[name] = lambda state, run=program: run(state, gradients)
  times = timing.interleave(steps, states, repeats=repeats, calls=calls)
  return timing.ratios(times, "plain", timing.clock())
