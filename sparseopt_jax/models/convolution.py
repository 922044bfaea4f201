"""A convolution whose gradient is fast on CPUs as well as on accelerators.

XLA's CPU backend hands a convolution to its library only in the form of a
forward convolution, (b, h, w, c) by (kh, kw, c, f). The transposed ones of the
gradient become plain loops wherever they stand in a `lax.scan` or `while_loop`,
tens of times slower. So on a CPU both are written as forward convolutions here.

XLA also computes what stands before a convolution, batch normalisation and
ReLU, once more for each use of its result. An optimisation barrier before the
convolution keeps it at once, if the program is compiled with `BARRIER_OPTIONS`;
without them, the barrier does nothing.

On accelerators it is `jax.lax.conv_general_dilated` and its own gradient. Under
`jax.vmap` over networks, each with a kernel, XLA makes one grouped convolution
of all. On an H200 the gradients of kernels with 16 channels then take 1.6 to
3.4 times as long as a convolution for each network, and with 32 and 64 channels
.85 times. So kernels' gradients are computed one after the other, and all else
is grouped. TPUs were not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# For `jax.jit(..., compiler_options=...)` on a CPU: keeps barriers in place.
BARRIER_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

Padding = tuple[tuple[int, int], ...]
_FORM = ("NHWC", "HWIO", "NHWC")


def convolve(
  images: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **options: Any,
) -> jax.Array:
  """Convolves images; for `flax.linen.Conv(conv_general_dilated=convolve)`.

  Args:
    images: (b, h, w, c).
    kernel: (kh, kw, c, f).
    strides: Of height and width.
    padding: Zeros before and after height and width.
    **options: What else Flax gives, which must be its defaults: no dilation, no
      groups, no precision.

  Returns:
    (b, h', w', f), with h' = (h + before + after - kh) // stride + 1.

  Raises:
    ValueError: Another option, or padding by name.

  The gradient is by reverse mode, once: `jax.jvp` of a gradient works, and
  `jax.grad` of one does not.
  """
  for name in ("lhs_dilation", "rhs_dilation"):
    if any(each != 1 for each in options.get(name) or ()):
      raise ValueError(f"{name} must be 1, got {options[name]}")
  for name, default in (("feature_group_count", 1), ("precision", None)):
    if options.get(name, default) != default:
      raise ValueError(f"{name} must be {default}, got {options[name]}")
  if isinstance(padding, str):
    raise ValueError(f"padding must be pairs of numbers, got {padding!r}")
  return _convolve(images, kernel, tuple(strides), tuple(map(tuple, padding)))


def _plain(
  images: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, ...],
  padding: Padding,
  **dilation: Any,
) -> jax.Array:
  return lax.conv_general_dilated(
    images, kernel, strides, padding, dimension_numbers=_FORM, **dilation
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(
  images: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, ...],
  padding: Padding,
) -> jax.Array:
  return _plain(images, kernel, strides, padding)


def _forward(
  images: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, ...],
  padding: Padding,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  images = lax.platform_dependent(
    images, cpu=lax.optimization_barrier, default=lambda x: x
  )
  return _plain(images, kernel, strides, padding), (images, kernel)


def _backward(
  strides: tuple[int, ...],
  padding: Padding,
  kept: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, ...]:
  return lax.platform_dependent(
    *kept,
    gradient,
    cpu=functools.partial(_backward_as_forward, strides, padding),
    default=functools.partial(_backward_of_plain, strides, padding),
  )


_convolve.defvjp(_forward, _backward)


def _backward_of_plain(
  strides: tuple[int, ...],
  padding: Padding,
  images: jax.Array,
  kernel: jax.Array,
  gradient: jax.Array,
) -> tuple[jax.Array, ...]:
  """Gradients by images and kernel; the latter of one network at a time."""
  plain = functools.partial(_plain, strides=strides, padding=padding)

  def by_kernel(
    images: jax.Array, kernel: jax.Array, gradient: jax.Array
  ) -> jax.Array:
    forward = functools.partial(plain, images)
    return jax.linear_transpose(forward, kernel)(gradient)[0]

  # Not `sequential_vmap`: its loop was not timed.
  by_kernels = jax.custom_batching.custom_vmap(by_kernel)

  @by_kernels.def_vmap
  def one_by_one(
    count: int, mapped: list[bool], *arrays: jax.Array
  ) -> tuple[jax.Array, bool]:
    axes = [0 if each else None for each in mapped]
    if not mapped[1]:  # Not of networks, but of single examples, say.
      return jax.vmap(by_kernel, axes)(*arrays), True
    pairs = list(zip(arrays, mapped, strict=True))
    each = [
      by_kernels(*(x[index] if m else x for x, m in pairs))
      for index in range(count)
    ]
    return jnp.stack(each), True

  by_images = lambda images: plain(images, kernel)
  (image_gradient,) = jax.linear_transpose(by_images, images)(gradient)
  return image_gradient, by_kernels(images, kernel, gradient)


def _backward_as_forward(
  strides: tuple[int, ...],
  padding: Padding,
  images: jax.Array,
  kernel: jax.Array,
  gradient: jax.Array,
) -> tuple[jax.Array, ...]:
  """Gradients by images and kernel.

  With x the images, w the kernel, g the gradient and s the stride, along one
  axis padded by p before: y[i] = sum_k x[s i + k - p] w[k]. Then dx is g,
  spread out by s, convolved with the reversed w; dw is x convolved with g,
  spread out by s.
  """
  sizes = zip(
    kernel.shape[:2],
    images.shape[1:3],
    gradient.shape[1:3],
    strides,
    padding,
    strict=True,
  )
  image_padding, kernel_padding = [], []
  for k, n, m, stride, (before, _) in sizes:
    spread = (m - 1) * stride + 1
    image_padding.append((k - 1 - before, n + before - spread))
    kernel_padding.append((before, k - 1 + spread - n - before))
  reversed_kernel = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
  image_gradient = _plain(
    gradient,
    reversed_kernel,
    (1, 1),
    tuple(image_padding),
    lhs_dilation=strides,
  )
  # Channels take the place of the batch, and the batch that of the channels.
  kernel_gradient = _plain(
    jnp.transpose(images, (3, 1, 2, 0)),
    jnp.transpose(gradient, (1, 2, 0, 3)),
    (1, 1),
    tuple(kernel_padding),
    rhs_dilation=strides,
  )
  return image_gradient, jnp.transpose(kernel_gradient, (1, 2, 0, 3))
