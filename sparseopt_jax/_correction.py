"""The correction of SparseOpt for the weights of one layer.

Batch normalisation divides the output of neuron :math:`i` by its standard
deviation, which is proportional to :math:`\\sqrt{1 - s_i}`, where :math:`s_i`
is the neuron's sparsity. Its gradient is amplified by the inverse. The
correction multiplies it by

.. math::

  \\frac{\\sqrt{1 - s_i}}{\\sqrt{1 - s_{avg}}}
  = \\sqrt{\\frac{f_i \\, n_{out}}{nnz}}

with fan-in :math:`f_i` (the active weights of neuron :math:`i`), the number
of neurons :math:`n_{out}` and the layer's active weights
:math:`nnz = \\sum_i f_i`. Here per-neuron values keep the rank of the weights,
with length 1 on every axis that is not a neuron axis, so that they broadcast.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax import _lax
from sparseopt_jax._numbers import check, check_type, is_int

Axes = int | tuple[int, ...]


def input_axes(ndim: int, output_axis: Axes, path: str = "mask") -> tuple:
  """The axes of a layer that ``output_axis`` does not name, ascending."""
  named = output_axis if isinstance(output_axis, tuple) else (output_axis,)
  is_axes = named and all(map(is_int, named))
  check_type(is_axes, "output_axis must be an int or a tuple of ints", named)
  outputs = {axis % ndim for axis in named if -ndim <= axis < ndim}
  rule = f"output_axis must name different ones of the {ndim} axes of {path!r}"
  check(len(outputs) == len(named), rule, output_axis)
  return tuple(axis for axis in range(ndim) if axis not in outputs)


# Traced once for each shape and not for each layer.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def factors(
  mask: jax.Array, axes: tuple, stacked: int = 0, corrected: bool = True
) -> jax.Array:
  """sqrt(f_i n_out / nnz) of each neuron, in float32.

  Counts stay integers until the last step: equal fan-ins give exactly 1.

  Args:
    mask: Bools.
    axes: The inputs of a neuron lie along these.
    stacked: How many leading axes enumerate layers.
    corrected: If not, only whether each neuron has an active weight; bools.
  """
  fan_in, rest = _lax.sums([mask, ~mask], axes)
  neuron_axes = range(stacked, fan_in.ndim)
  nnz, all_rest = _lax.sums([fan_in, rest], neuron_axes)
  # This adds 0. Were the active weights all that is used, counting them would
  # be slow.
  nnz = jnp.expand_dims(nnz + jnp.minimum(all_rest, 0), neuron_axes)
  share = fan_in * math.prod(fan_in.shape[stacked:])
  ratio = share.astype(jnp.float32) / jnp.maximum(nnz, 1).astype(jnp.float32)
  # Division is not correctly rounded on every accelerator.
  factor = jnp.where((share == nnz) & (nnz > 0), 1.0, jnp.sqrt(ratio))
  factor = jnp.expand_dims(factor, axes)
  return factor if corrected else factor > 0


def rescale(gradient: jax.Array, factor: jax.Array) -> jax.Array:
  """Multiplies in float32 or wider; returns the gradient's own dtype.

  Factors that are bools are those of a layer that is not corrected.
  """
  if factor.dtype == jnp.bool_:
    return gradient
  # JAX's own promotion refuses this where it is set to "strict".
  wide = np.promote_types(gradient.dtype, np.float32)
  return (gradient.astype(wide) * factor.astype(wide)).astype(gradient.dtype)


def _as_mask(mask: jax.Array) -> jax.Array:
  mask = jnp.asarray(mask)
  check_type(mask.dtype == jnp.bool_, "mask must hold bools", mask.dtype)
  check(mask.ndim, "mask must have an axis and be no scalar", mask)
  return mask


def neuron_sparsity(mask: jax.Array, output_axis: Axes = -1) -> jax.Array:
  r"""The sparsity of each neuron, :math:`s_i = 1 - f_i / N`.

  :math:`f_i` counts the active incoming weights of neuron :math:`i` and
  :math:`N` is the dense fan-in, the same for every neuron of a layer.

  Args:
    mask: Bools in the shape of the weights, true where a weight is active.
    output_axis: The neuron axis, or several of them: -1 for Flax's ``Dense``
      and ``Conv``, 0 for Equinox.

  Returns:
    float32 in [0, 1], in the shape of the neuron axes in ascending order,
    ``(n_out,)`` for one.

  Raises:
    TypeError: If the mask is not of bools, or the axis not an int.
    ValueError: If the mask has no such axis, or an axis is named twice.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> mask = jnp.array([[True, False], [True, False], [True, True]])
    >>> print(sparseopt_jax.neuron_sparsity(mask))
    [0.        0.6666667]

  .. seealso:: :func:`sparseopt_jax.correct`
  """
  mask = _as_mask(mask)
  axes = input_axes(mask.ndim, output_axis)
  fan_in = jnp.sum(mask, axis=axes, dtype=jnp.int32)
  dense = math.prod(mask.shape[axis] for axis in axes)
  return (dense - fan_in).astype(jnp.float32) / max(dense, 1)


def correct(
  gradient: jax.Array, mask: jax.Array, output_axis: Axes = -1
) -> jax.Array:
  r"""Undoes the gradient skew of batch normalisation in one layer.

  .. math::

    \tilde g = \frac{1}{\sqrt{1 - s_{avg}}} D g, \qquad
    D = \mathrm{diag}\left(\sqrt{1 - s_i}\right),

  where :math:`s_i` is the sparsity of neuron :math:`i`
  (:func:`sparseopt_jax.neuron_sparsity`) and :math:`s_{avg}` its mean over the
  neurons. :math:`D` scales all incoming weights of a neuron alike.

  Equal fan-ins, a mask of ones among them, give the gradient back bit for bit
  (but for denormals, which XLA on a CPU takes for 0). A layer without any
  active weight gives zeros.

  Args:
    gradient: The gradient with respect to the weights of one layer.
    mask: Bools in the shape of the gradient, true where a weight is active.
    output_axis: The neuron axis, or several of them: -1 for Flax's ``Dense``
      and ``Conv``, 0 for Equinox.

  Returns:
    The corrected gradient in the gradient's shape and dtype, exactly 0 outside
    the mask.

  Raises:
    TypeError: If the gradient is not of floats, the mask not of bools, or the
      axis not an int.
    ValueError: If shapes differ, the mask has no such axis, or an axis is named
      twice.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> mask = jnp.array([[True, True], [True, False]])
    >>> print(sparseopt_jax.correct(jnp.ones((2, 2)), mask))
    [[1.1547005 0.8164966]
     [1.1547005 0.       ]]

  References:
    Adnan et al., `SparseOpt: Addressing Normalization-induced Gradient Skew in
    Sparse Training <https://arxiv.org/abs/2605.27541>`_, 2026
  """
  gradient, mask = jnp.asarray(gradient), _as_mask(mask)
  is_float = jnp.issubdtype(gradient.dtype, jnp.floating)
  check_type(is_float, "gradient must hold floats", gradient.dtype)
  rule = f"mask must have the gradient's shape {gradient.shape}"
  check(gradient.shape == mask.shape, rule, mask.shape)
  factor = factors(mask, input_axes(mask.ndim, output_axis))
  scaled = rescale(gradient, factor)
  return jnp.where(mask, scaled, jnp.zeros_like(scaled))
