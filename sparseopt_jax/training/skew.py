r"""Measures the gradient skew of batch normalisation along training.

Batch normalisation makes the relative update :math:`\lVert g_i \rVert / \lVert
w_i \rVert` of neuron :math:`i` go with a power of its density :math:`1 - s_i`:
-1/2 where the weights of all neurons have the same variance, 0 where nothing is
skewed. The power is the slope of a least-squares line through the logarithms,
over the neurons of a layer. :math:`g_i` is the gradient of a batch before
SparseOpt; after it the slope is 1/2 larger.

A neuron in front of batch normalisation is scale invariant: the gradient of
:math:`w_i` is :math:`\hat g_i / \lVert w_i \rVert`, where :math:`\hat g_i`
depends on the direction alone and is orthogonal to it. A multiplier :math:`m_i`
of the gradient lets SGD add :math:`\eta^2 m_i^2 \lVert \hat g_i \rVert^2 /
\lVert w_i \rVert^2` to :math:`\lVert w_i \rVert^2` in each step. Once that has
outgrown the first weights, or weight decay after the correction balances it,
:math:`\lVert w_i \rVert` goes with the root of :math:`m_i \lVert \hat g_i
\rVert`, and :math:`m_i` no longer shows in the relative update. So if masks
stand still and :math:`\hat g_i` is otherwise the same, SparseOpt, with
:math:`m_i^2 \sim 1 - s_i`, adds 1/4 to the slope of the weights' size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparseopt_jax
from sparseopt_jax import _paths
from sparseopt_jax import _state
from sparseopt_jax.metrics import on_host

# Batch normalisation takes one of a neuron's directions off its gradient. Where
# it has fewer inputs than these, that alone would make a slope.
LEAST_FAN_IN = 5
# What rounding makes of equal fan-ins is below.
_LEAST_VARIANCE = 1e-6


class SkewState(NamedTuple):
  """What `measured` remembers.

  Attributes:
    inner: The optimiser's state.
    step: int32 [], steps so far.
    updated: bool [], whether the last step updated the masks.
    moments: In the parameters' structure, float32 (3, 2) for each layer that is
      measured and MaskedNode for all else: sums over steps of an epoch of the
      covariance of x and y, and of the variance of x. The steps are all, those
      that update the masks (the gradient is one of before), and those right
      after them.
  """

  inner: Any
  step: jax.Array
  updated: jax.Array
  moments: Any


def measured(
  tx: optax.GradientTransformationExtraArgs,
  paths: Collection[str],
  steps_per_epoch: int,
) -> optax.GradientTransformationExtraArgs:
  """The same optimiser, which measures the skew of the gradients it is given.

  Args:
    tx: From `sparsify`.
    paths: Kernels to measure, with neurons along the last axis. Those without
      a mask are left out.
    steps_per_epoch: After so many steps the sums start anew.

  Returns:
    An optimiser with the same updates, whose state is a `SkewState`.
  """

  def init_fn(params: Any) -> SkewState:
    inner = tx.init(params)
    moments = jax.tree_util.tree_map_with_path(
      lambda path, mask: (
        jnp.zeros((3, 2), jnp.float32)
        if _paths.name(path) in paths
        else optax.MaskedNode()
      ),
      sparseopt_jax.get_masks(inner),
    )
    return SkewState(inner, jnp.int32(0), jnp.bool_(False), moments)

  def update_fn(
    updates: Any, state: SkewState, params: Any = None, **extra: Any
  ) -> tuple[Any, SkewState]:
    masks = sparseopt_jax.get_masks(state.inner)
    new_updates, inner = tx.update(updates, state.inner, params, **extra)
    (link,) = _state.find_states(inner)
    counted = jnp.stack([jnp.bool_(True), link.updated, state.updated])
    starts = state.step % steps_per_epoch == 0

    def add(before: Any, *layer: Any) -> Any:
      if _paths.is_masked_node(before):
        return before
      before = jnp.where(starts, 0.0, before)
      return before + jnp.where(counted[:, None], _moments(*layer), 0.0)

    moments = jax.tree.map(
      add,
      state.moments,
      masks,
      updates,
      params,
      is_leaf=_paths.is_masked_node,
    )
    step = optax.safe_increment(state.step)
    return new_updates, SkewState(inner, step, link.updated, moments)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def figures(state: SkewState, params: Any) -> dict[str, Any]:
  """The slopes of the epoch so far, on the host.

  Args:
    state: From `measured`.
    params: The parameters.

  Returns:
    `skew_slope`, `skew_slope_before` and `skew_slope_after` a mask update: one
    slope over all layers, each with an intercept of its own. `weight_slope`:
    that of the root mean square of a neuron's weights, now. `layers`: the
    slope of the skew over all steps of each. None where there was nothing to
    measure.
  """
  moments = {
    path: np.asarray(jax.device_get(each), np.float64)
    for path, each in _paths.by_name(state.moments).items()
  }
  names = ("skew_slope", "skew_slope_before", "skew_slope_after")
  total = sum(moments.values(), np.zeros((3, 2)))
  masks = _paths.by_name(sparseopt_jax.get_masks(state.inner))
  weights = _paths.by_name(params)
  # Relative to a vector of ones, whose norm is the root of the fan-in.
  sizes = [
    _moments_of(on_host(masks[path]), on_host(weights[path]), 1.0)
    for path in moments
  ]
  return {
    **dict(zip(names, map(_slope, total), strict=True)),
    "weight_slope": _slope(sum(map(np.asarray, sizes), np.zeros(2))),
    "layers": {path: _slope(each[0]) for path, each in moments.items()},
  }


def _moments(mask: jax.Array, gradient: Any, weight: Any) -> jax.Array:
  """Covariance with and variance of the log fan-in, sums over neurons."""
  axes = tuple(range(mask.ndim - 1))
  square = lambda x: jnp.sum(jnp.where(mask, x, 0.0) ** 2, axes)
  fan_in, up, down = jnp.sum(mask, axes), square(gradient), square(weight)
  valid = (fan_in >= LEAST_FAN_IN) & (up > 0) & (down > 0)
  log = lambda x: jnp.log(jnp.where(valid, x, 1))
  x, y = log(fan_in), (log(up) - log(down)) / 2
  mean = jnp.sum(x, where=valid) / jnp.maximum(jnp.sum(valid), 1)
  x = jnp.where(valid, x - mean, 0.0)
  return jnp.stack([jnp.sum(x * y), jnp.sum(x * x)]).astype(jnp.float32)


_moments_of = jax.jit(_moments)


def _slope(moments: np.ndarray) -> float | None:
  covariance, variance = moments
  return float(covariance / variance) if variance > _LEAST_VARIANCE else None
