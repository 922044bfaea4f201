"""HAM, hyperbolic aware minimization, around a base optimiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# The exponent of a step lies between these.
_MAX_EXPONENT = 5.0


class HamState(NamedTuple):
  """State of `ham`."""

  # shape=(), dtype=jnp.int32; steps so far
  count: jax.Array  # type: ignore[assignment]
  inner_state: optax.OptState  # of the base optimiser


def _hyperbolic_step(
  gradient: jax.Array,
  update: jax.Array,
  param: jax.Array,
  rate: jax.Array,
  alpha: float,
  beta: float,
) -> jax.Array:
  """What to add to a weight so that it makes both steps; the update's dtype."""
  wide = np.promote_types(update.dtype, np.float32)
  stepped = param.astype(wide) + update.astype(wide)
  growth = alpha * jnp.sign(stepped) * gradient.astype(wide) + beta
  exponent = -jnp.asarray(rate, wide) * growth
  exponent = jnp.clip(exponent, -_MAX_EXPONENT, _MAX_EXPONENT)
  # w exp(x) - w = w expm1(x) keeps digits. A weight at 0 stays there, also at a
  # gradient that is not finite.
  step = jnp.where(stepped == 0, 0, stepped * jnp.expm1(exponent))
  return (update.astype(wide) + step).astype(update.dtype)


def ham(
  inner: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  alpha: float = 200.0,
  beta: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
  r"""Hyperbolic Aware Minimization: a multiplicative step after the base step.

  .. math::

    w \leftarrow w \, \exp\left(
      -\eta \left(\alpha \, \mathrm{sign}(w) \, g + \beta\right)\right),

  where :math:`w` is the weight after the step of the base optimiser, :math:`g`
  the gradient that the base optimiser was given, and :math:`\eta` the learning
  rate. The exponent is clamped to :math:`[-5, 5]`. Only leaves with two or more
  axes make the step, and a weight at 0 stays there.

  Inside :func:`sparseopt_jax.sparsify`, :math:`g` is masked and corrected.

  Args:
    inner: The base optimiser, learning rate and sign included.
    learning_rate: :math:`\eta`, or a schedule; as a rule that of ``inner``.
    alpha: :math:`\alpha`, the weight of the gradient.
    beta: :math:`\beta`, the rate at which weights shrink. The paper takes 1e-3,
      and 16e-3 on CIFAR-100.

  Returns:
    A ``GradientTransformationExtraArgs`` with a `HamState`. Its ``update``
    needs ``params``.

  References:
    Jacobs et al., `Hyperbolic Aware Minimization: Implicit Bias for Sparsity
    <https://arxiv.org/abs/2506.02630>`_, 2026
  """
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> HamState:
    return HamState(jnp.zeros([], jnp.int32), inner.init(params))

  def update_fn(
    updates: optax.Updates,
    state: HamState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, HamState]:
    rate = learning_rate
    if callable(learning_rate):
      rate = learning_rate(state.count)
    base_updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )

    def one(gradient: Any, update: jax.Array, param: jax.Array) -> jax.Array:
      if jnp.ndim(param) < 2:
        return update
      return _hyperbolic_step(gradient, update, param, rate, alpha, beta)

    new_updates = jax.tree.map(one, updates, base_updates, params)
    return new_updates, HamState(optax.safe_increment(state.count), inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
