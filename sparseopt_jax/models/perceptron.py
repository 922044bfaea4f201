"""A perceptron with one hidden layer and batch normalisation."""

from __future__ import annotations

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Perceptron(nn.Module):
  """Dense, batch normalisation, ReLU, dense.

  Attributes:
    num_classes: Number of classes.
    width: Hidden neurons.
    dtype: What to compute in; parameters, batch statistics, classifier and
      logits are at least float32.
    axis_name: Mapped axis of the batch statistics, or None.
  """

  num_classes: int
  width: int
  dtype: DTypeLike = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Logits (b, num_classes) of images (b, h, w, c); see `ResNet`."""
    x = images.reshape(images.shape[0], -1)
    init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    x = nn.Dense(
      self.width, use_bias=False, dtype=self.dtype, kernel_init=init
    )(x)
    x = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      dtype=self.dtype,
      axis_name=self.axis_name,
    )(x)
    x = nn.relu(x).astype(jnp.promote_types(self.dtype, jnp.float32))
    return nn.Dense(self.num_classes)(x)
