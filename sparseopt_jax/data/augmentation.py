"""Random crop, flip and normalisation of a batch, inside the jitted step."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def crop_and_flip(
  key: jax.Array,
  images: jax.Array,
  pad: int,
  flip: bool,
  offset: jax.Array | int = 0,
) -> jax.Array:
  """Shifts each image by up to `pad` pixels and mirrors half of them.

  Each image is padded with `pad` black pixels on every side, then cropped to
  its old size at a uniformly random place. Image i draws from
  `fold_in(key, offset + i)`: its randomness does not depend on how the batch is
  split over devices.

  Args:
    key: A random key.
    images: (b, h, w, c), any dtype.
    pad: Width of the border in pixels; 0: no crop.
    flip: Whether to mirror left and right with probability 1/2.
    offset: Position of `images[0]` in the whole batch.

  Returns:
    The batch, with the shape and dtype of `images`.
  """
  if not pad and not flip:
    return images

  def augment(index: jax.Array, image: jax.Array) -> jax.Array:
    crop_key, flip_key = jax.random.split(jax.random.fold_in(key, index))
    if pad:
      row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
      padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
      image = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
    if flip:
      mirror = jax.random.bernoulli(flip_key)
      image = jnp.where(mirror, image[:, ::-1], image)
    return image

  return jax.vmap(augment)(jnp.arange(images.shape[0]) + offset, images)


def normalize(
  images: jax.Array,
  mean: Sequence[float],
  std: Sequence[float],
  dtype: DTypeLike,
) -> jax.Array:
  """(x / 255 - mean) / std for each channel, in float32, then cast to `dtype`.

  Args:
    images: uint8 (b, h, w, c).
    mean: One number for each channel, for pixels in [0, 1].
    std: Likewise.
    dtype: The dtype of the result.

  Returns:
    (b, h, w, c).
  """
  shape = (1, 1, 1, len(mean))
  mean_array = jnp.asarray(mean, jnp.float32).reshape(shape)
  std_array = jnp.asarray(std, jnp.float32).reshape(shape)
  pixels = images.astype(jnp.float32) / 255
  return ((pixels - mean_array) / std_array).astype(dtype)
