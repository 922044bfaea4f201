"""The whole training step: forward, backward, optimiser."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax import models
from sparseopt_jax.benchmarks import timing


def run(
  model: str,
  image_size: int,
  batch_size: int,
  sparsity: float,
  repeats: int,
  precision: str,
) -> dict[str, dict]:
  """Ratios of wall time to dense training, between mask updates.

  Args:
    model: A name of `sparseopt_jax.models`.
    image_size: Height and width of the images, which are noise.
    batch_size: Images in a step.
    sparsity: Fraction of zeros.
    repeats: Steps of each, in turn.
    precision: Dtype of the computation.
  """
  network = models.create(model, 100, dtype=precision)
  shape = (batch_size, image_size, image_size, 3)
  images = jax.random.normal(jax.random.key(0), shape)
  labels = jnp.arange(batch_size) % 100
  variables = network.init(jax.random.key(0), images[:1], train=False)

  def loss(params: Any, stats: Any) -> tuple[jax.Array, Any]:
    logits, changed = network.apply(
      {"params": params, "batch_stats": stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), changed["batch_stats"]

  def compiled(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    def step(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
      params, stats, opt_state = state
      gradients, stats = jax.grad(loss, has_aux=True)(params, stats)
      updates, opt_state = tx.update(gradients, opt_state, params)
      return optax.apply_updates(params, updates), stats, opt_state

    params, stats = jax.tree.map(
      jnp.copy, (variables["params"], variables["batch_stats"])
    )
    opt_state = jax.jit(tx.init)(params)
    if not isinstance(opt_state[0], optax.TraceState):
      params = sparseopt_jax.apply_masks(params, opt_state)
    return jax.jit(step, donate_argnums=0), (params, stats, opt_state)

  steps, states = {}, {}
  for name, tx in timing.optimizers(0.01, sparsity, 2**30).items():
    steps[name], states[name] = compiled(tx)
  times = timing.interleave(steps, states, repeats=repeats, calls=1)
  return timing.ratios(times, "plain", "wall")
