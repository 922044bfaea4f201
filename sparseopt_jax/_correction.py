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

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Axes = int | tuple[int, ...]


def is_int(value: Any) -> bool:
  """Whether it is a Python or NumPy integer, and not a bool."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_scalar(value: Any) -> bool:
  """Whether it is a real number, in an array or not, and not a bool."""
  if isinstance(value, jax.Array | np.ndarray):
    kinds = (jnp.floating, jnp.integer)
    return value.shape == () and any(
      jnp.issubdtype(value.dtype, kind) for kind in kinds
    )
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_axes(output_axis: Axes) -> tuple[int, ...]:
  """The neuron axes as a tuple."""
  named = output_axis if isinstance(output_axis, tuple) else (output_axis,)
  if not named or not all(map(is_int, named)):
    raise TypeError(
      f"output_axis must be an int or a tuple of ints; got {output_axis!r}."
    )
  return named


def input_axes(
  ndim: int, output_axis: Axes, path: str | None = None
) -> tuple[int, ...]:
  """The axes that ``output_axis`` does not name, in ascending order."""
  named = check_axes(output_axis)
  where = "" if path is None else f" for {path!r}"
  if not all(-ndim <= axis < ndim for axis in named):
    raise ValueError(
      f"output_axis must name axes of an array with {ndim} of them; got "
      f"{output_axis!r}{where}."
    )
  outputs = {axis % ndim for axis in named}
  if len(outputs) < len(named):
    raise ValueError(
      f"output_axis must name each axis once of an array with {ndim} of them; "
      f"got {output_axis!r}{where}."
    )
  return tuple(axis for axis in range(ndim) if axis not in outputs)


def scale_from_fan_in(fan_in: jax.Array, nnz: jax.Array) -> jax.Array:
  """sqrt(f_i n_out / nnz) in float32, with ``nnz`` the sum of all fan-ins.

  Counts stay integers until the last step: equal fan-ins give exactly 1.
  """
  share = fan_in * fan_in.size
  ratio = share.astype(jnp.float32) / jnp.maximum(nnz, 1).astype(jnp.float32)
  # Division is not correctly rounded on every accelerator.
  return jnp.where((share == nnz) & (nnz > 0), 1.0, jnp.sqrt(ratio))


def wide_dtype(dtype: Any) -> np.dtype:
  """The dtype of floats itself, or float32 if that is wider.

  By NumPy's promotion, since JAX's refuses this where it is set to "strict".
  """
  return np.promote_types(dtype, np.float32)


def rescale(gradient: jax.Array, scale: jax.Array) -> jax.Array:
  """Multiplies in float32 or wider; returns the gradient's own dtype."""
  wide = wide_dtype(gradient.dtype)
  return (gradient.astype(wide) * scale.astype(wide)).astype(gradient.dtype)


def _check_mask(mask: jax.Array) -> jax.Array:
  mask = jnp.asarray(mask)
  if mask.dtype != jnp.bool_:
    raise TypeError(f"mask must be an array of bools; got dtype {mask.dtype}.")
  if mask.ndim == 0:
    raise ValueError("mask must have at least one axis; got a scalar.")
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
    float32 in [0, 1], in the shape of the neuron axes in ascending order:
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
  mask = _check_mask(mask)
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
  gradient, mask = jnp.asarray(gradient), _check_mask(mask)
  if not jnp.issubdtype(gradient.dtype, jnp.floating):
    raise TypeError(
      f"gradient must be an array of floats; got dtype {gradient.dtype}."
    )
  if gradient.shape != mask.shape:
    raise ValueError(
      f"mask must have the gradient's shape {gradient.shape}; got {mask.shape}."
    )
  axes = input_axes(mask.ndim, output_axis)
  fan_in = jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)
  scale = scale_from_fan_in(fan_in, jnp.sum(fan_in, dtype=fan_in.dtype))
  scaled = rescale(gradient, scale)
  return jnp.where(mask, scaled, jnp.zeros_like(scaled))
