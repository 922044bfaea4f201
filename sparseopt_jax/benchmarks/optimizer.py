"""The optimiser alone, on the parameter tree of ResNet-50."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax import models
from sparseopt_jax.benchmarks import timing


def parameters(name: str) -> Any:
  """Random parameters of a model of this package."""
  model = models.create(name, 1_000)
  images = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), images, train=False)["params"]
  )
  leaves = jax.tree.leaves(shapes)
  treedef: Any = jax.tree.structure(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return treedef.unflatten(
    [
      0.05 * jax.random.normal(key, leaf.shape)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
  )


def compiled_step(
  tx: optax.GradientTransformation, params: Any, gradients: Any
) -> tuple[Any, Any]:
  """A compiled step that donates (params, opt_state), and its first state."""

  def step(state: tuple[Any, Any], gradients: Any) -> tuple[Any, Any]:
    params, opt_state = state
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = jax.jit(tx.init)(params)
  params = jax.tree.map(jnp.copy, params)
  if not isinstance(opt_state[0], optax.TraceState):
    params = sparseopt_jax.apply_masks(params, opt_state)
  state = (params, opt_state)
  program = jax.jit(step, donate_argnums=0).lower(state, gradients).compile()
  return lambda state: program(state, gradients), state


def run(
  model: str, sparsity: float, repeats: int, calls: int, update_every: int
) -> dict[str, dict]:
  """Ratios of CPU time on a CPU, of wall time elsewhere, to plain SGD.

  Args:
    model: Whose parameters to optimise.
    sparsity: Fraction of zeros.
    repeats: Rounds of measurement.
    calls: Calls in a round.
    update_every: 1 times the mask update; a large number the normal step.
  """
  params = parameters(model)
  gradients = jax.tree.map(
    lambda p: jax.random.normal(jax.random.key(1), p.shape), params
  )
  steps, states = {}, {}
  for name, tx in timing.optimizers(0.1, sparsity, update_every).items():
    steps[name], states[name] = compiled_step(tx, params, gradients)
  times = timing.interleave(steps, states, repeats=repeats, calls=calls)
  clock = "cpu" if jax.default_backend() == "cpu" else "wall"
  return timing.ratios(times, "plain", clock)
