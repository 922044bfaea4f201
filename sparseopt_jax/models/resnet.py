"""Residual networks of He et al., with batch norm right after each convolution.

The parts are named by Flax, in the order of their calls: `Conv_0`,
`BasicBlock_0/Conv_0`, ..., `Dense_0`. A block's shortcut convolution, where it
has one, comes last.

References:
  He et al., "Deep residual learning for image recognition", 2016.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import itertools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparseopt_jax.models import convolution


def _conv(
  features: int, size: int, stride: int = 1, *, dtype: DTypeLike
) -> nn.Conv:
  """A convolution without bias, which batch norm would cancel.

  He initialisation by fan-in, that of the dense kernel also where the kernel
  gets sparse: with the scale of each neuron's own fan-in the gradients would be
  even from the start, and SparseOpt would over-correct.
  """
  margin = (size - 1) // 2
  return nn.Conv(
    features,
    (size, size),
    (stride, stride),
    padding=((margin, margin), (margin, margin)),
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    conv_general_dilated=convolution.convolve,
  )


def _norm(
  train: bool,
  dtype: DTypeLike,
  axis_name: str | None,
  scale_init: nn.initializers.Initializer = nn.initializers.ones,
) -> nn.BatchNorm:
  """Batch norm; its statistics are float32 whatever the dtype."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    axis_name=axis_name,
    scale_init=scale_init,
  )


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut.

  Where the shape changes, the shortcut is a convolution, of 1x1 in option B.

  Attributes:
    features: Channels of both convolutions.
    stride: Stride of the first convolution and of the shortcut.
    dtype: What to compute in.
    axis_name: Mapped axis of the batch statistics, or None.
    hidden: Channels of the first convolution, if others.
    shortcut_size: Height and width of the shortcut's kernel.
  """

  features: int
  stride: int
  dtype: DTypeLike
  axis_name: str | None
  hidden: Sequence[int] | None = None
  shortcut_size: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(b, h, w, c) -> (b, h / stride, w / stride, features)."""
    (hidden,) = self.hidden or [self.features]
    y = _conv(hidden, 3, self.stride, dtype=self.dtype)(x)
    y = nn.relu(_norm(train, self.dtype, self.axis_name)(y))
    y = _conv(self.features, 3, dtype=self.dtype)(y)
    y = _norm(train, self.dtype, self.axis_name)(y)
    if x.shape != y.shape:
      size = self.shortcut_size
      x = _conv(self.features, size, self.stride, dtype=self.dtype)(x)
      x = _norm(train, self.dtype, self.axis_name)(x)
    return nn.relu(x + y)


class BottleneckBlock(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut, as in ResNet-50 "v1.5".

  The stride is in the 3x3 convolution. The last batch norm's scale starts at
  zero, so that the block starts as its shortcut (Goyal et al., 2017);
  `BasicBlock` does not do this.

  Attributes:
    features: Channels of the 3x3 convolution; the block's output has 4 times
      as many.
    stride: Stride of the 3x3 convolution and of the shortcut.
    dtype: What to compute in.
    axis_name: Mapped axis of the batch statistics, or None.
    hidden: Channels of the first two convolutions, if others.
    shortcut_size: Height and width of the shortcut's kernel.
  """

  features: int
  stride: int
  dtype: DTypeLike
  axis_name: str | None
  hidden: Sequence[int] | None = None
  shortcut_size: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(b, h, w, c) -> (b, h / stride, w / stride, 4 * features)."""
    first, second = self.hidden or [self.features] * 2
    y = _conv(first, 1, dtype=self.dtype)(x)
    y = nn.relu(_norm(train, self.dtype, self.axis_name)(y))
    y = _conv(second, 3, self.stride, dtype=self.dtype)(y)
    y = nn.relu(_norm(train, self.dtype, self.axis_name)(y))
    y = _conv(4 * self.features, 1, dtype=self.dtype)(y)
    zeros = nn.initializers.zeros
    y = _norm(train, self.dtype, self.axis_name, scale_init=zeros)(y)
    if x.shape != y.shape:
      size = self.shortcut_size
      x = _conv(4 * self.features, size, self.stride, dtype=self.dtype)(x)
      x = _norm(train, self.dtype, self.axis_name)(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """A residual network; `sparseopt_jax.models.create` makes the usual ones.

  Attributes:
    stage_sizes: Number of blocks in each stage. Every stage but the first
      halves the image and doubles the channels.
    block: `BasicBlock` or `BottleneckBlock`.
    num_classes: Number of classes.
    width: Channels (`features`) of the first stage.
    large_images: Whether to begin with ImageNet's 7x7 convolution of stride 2
      and 3x3 max pooling of stride 2, or with a 3x3 convolution.
    dtype: What to compute in; parameters and batch statistics are float32, and
      so are the mean over positions, the classifier and the logits, unless
      `dtype` is wider.
    axis_name: Mapped axis of the batch statistics, or None.
    hidden: Channels inside each block, if others than `features`, as in a
      network that dead channels were removed from.
    shortcut_size: Height and width of the shortcuts' kernels.
  """

  stage_sizes: Sequence[int]
  block: type[BasicBlock] | type[BottleneckBlock]
  num_classes: int
  width: int
  large_images: bool
  dtype: DTypeLike = jnp.float32
  axis_name: str | None = None
  hidden: Sequence[Sequence[int]] | None = None
  shortcut_size: int = 1

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Computes logits.

    Args:
      images: (b, h, w, c), normalised.
      train: Whether batch norm takes the batch's statistics (and updates the
        collection `batch_stats`) or the running ones.

    Returns:
      Logits, (b, num_classes), of at least float32.
    """
    if self.large_images:
      x = _conv(self.width, 7, 2, dtype=self.dtype)(images)
    else:
      x = _conv(self.width, 3, dtype=self.dtype)(images)
    x = nn.relu(_norm(train, self.dtype, self.axis_name)(x))
    if self.large_images:
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    hidden: Iterator[Sequence[int] | None]
    hidden = iter(self.hidden or itertools.repeat(None))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        stride = 2 if stage and not index else 1
        features = self.width * 2**stage
        options = self.dtype, self.axis_name, next(hidden), self.shortcut_size
        x = self.block(features, stride, *options)(x, train)
    x = x.astype(jnp.promote_types(self.dtype, jnp.float32)).mean(axis=(1, 2))
    # No ReLU follows, so Flax's own initialisation: variance 1 / fan-in.
    return nn.Dense(self.num_classes)(x)
