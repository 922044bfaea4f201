"""What a user with a strict type checker writes; `test_typing.py` checks it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import sparseopt_jax

Params = dict[str, jax.Array]


class GrowByMean(sparseopt_jax.RigL):
  """RigL that grows by a running mean of the gradient."""

  def init(self, layer: sparseopt_jax.Layer) -> jax.Array:
    return jnp.zeros_like(layer.weight)

  def observe(self, layer: sparseopt_jax.Layer, count: jax.Array) -> jax.Array:
    mean: jax.Array = 0.9 * layer.state + 0.1 * layer.gradient
    return mean

  def grow_scores(self, layer: sparseopt_jax.Layer) -> jax.Array:
    state: jax.Array = layer.state
    return state


class Rotate(sparseopt_jax.Topology):
  """In every tenth call, each layer moves its mask by one place."""

  def is_due(self, count: Any) -> Any:
    return (count > 0) & (count % 10 == 0)

  def update_masks(self, layers: Any, count: jax.Array, key: jax.Array) -> Any:
    return [jnp.roll(layer.mask, 1) for layer in layers]


def is_kernel(path: str, leaf: jax.Array) -> bool:
  """A rule, as `sparse`, `corrected` and `stacked` take them."""
  return path.endswith("kernel") and leaf.ndim > 1


def train(params: Params, grads: Params) -> tuple[Params, str]:
  """Wraps an optimiser, takes a step, and looks at the masks."""
  tx = sparseopt_jax.sparsify(
    optax.sgd(0.1, momentum=0.9),
    0.9,
    GrowByMean(update_until=100),
    corrected=is_kernel,
    distribution={"head/*": 0.5},
    seed=jax.random.key(0),
  )
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  updates, opt_state = tx.update(grads, opt_state, params, update_masks=True)
  params = optax.apply_updates(params, updates)
  masks: Params = sparseopt_jax.get_masks(opt_state)
  figures: dict[str, jax.Array] = sparseopt_jax.sparsity_metrics(opt_state)
  table: str = sparseopt_jax.sparsity_table(opt_state)
  return params, f"{table}\n{figures['sparsity']} {len(masks)}"


def link() -> optax.GradientTransformation:
  """The bare link in a chain."""
  rotating = sparseopt_jax.sparseopt(0.9, Rotate(), corrected=False)
  static = sparseopt_jax.sparseopt(
    0.5, sparseopt_jax.Static(), corrected=True, distribution="uniform"
  )
  return optax.chain(rotating, static, optax.sgd(0.1))


def numbers() -> tuple[dict[str, float], jax.Array]:
  """Functions of one layer."""
  densities = sparseopt_jax.erk({"a/kernel": (3, 4)}, 0.5)
  return densities, sparseopt_jax.neuron_sparsity(jnp.ones((3, 4), bool))


def wrong() -> None:
  """A checker that finds nothing here has not seen the package's types."""
  sparseopt_jax.RigL(update_until="soon")  # type: ignore[arg-type]
  sparseopt_jax.sparseopt(0.9)  # type: ignore[call-arg]
