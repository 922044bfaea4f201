"""Networks with batch normalisation, by name.

This module loads Flax only when a network is made, so that a command can check
a name first.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
  from jax.typing import DTypeLike

  from sparseopt_jax.models.perceptron import Perceptron
  from sparseopt_jax.models.resnet import ResNet

# Blocks in each of the three stages of the CIFAR family: depth 6n + 2.
_BLOCKS = {
  "resnet8": 1,
  "resnet14": 2,
  "resnet20": 3,
  "resnet32": 5,
  "resnet44": 7,
  "resnet56": 9,
  "resnet110": 18,
}
NAMES = (*_BLOCKS, "resnet50", "perceptron")


def create(
  name: str,
  num_classes: int,
  *,
  width: int | None = None,
  shortcut_size: int = 1,
  dtype: DTypeLike = "float32",
  axis_name: str | None = None,
) -> ResNet | Perceptron:
  """Makes a network from its name.

  Args:
    name: One of `NAMES`: resnet8 to resnet110 for small images (CIFAR,
      Fashion-MNIST, digits), resnet50 for ImageNet; perceptron with one hidden
      layer for small images.
    num_classes: Number of classes.
    width: Channels of the first stage, by default 16 for small images and 64
      for resnet50; hidden neurons of the perceptron, by default 256.
    shortcut_size: Height and width of the kernels in the shortcuts where the
      shape changes; odd.
    dtype: What to compute in. Parameters and batch statistics are float32 in
      any case, the logits at least float32.
    axis_name: The mapped axis (of `pmap` or `vmap`) over which batch
      normalisation takes its statistics; None: each replica takes its own.

  Returns:
    A Flax module; its `apply` takes images (b, h, w, c) and `train`.

  Raises:
    ValueError: An unknown `name`, or a number that is not positive.

  Examples:
    >>> import jax
    >>> from sparseopt_jax import models
    >>> model = models.create("resnet8", num_classes=10)
    >>> images = jax.numpy.zeros((2, 8, 8, 1))
    >>> init = jax.jit(model.init, static_argnames="train")
    >>> variables = init(jax.random.key(0), images, train=False)
    >>> apply = jax.jit(model.apply, static_argnames="train")
    >>> apply(variables, images, train=False).shape
    (2, 10)
  """
  if name not in NAMES:
    raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
  if num_classes < 1:
    raise ValueError(f"num_classes must be positive, got {num_classes}")
  if width is not None and width < 1:
    raise ValueError(f"width must be positive, got {width}")
  if shortcut_size < 1 or shortcut_size % 2 == 0:
    raise ValueError(f"shortcut_size must be odd, got {shortcut_size}")
  if name == "perceptron":
    from sparseopt_jax.models.perceptron import Perceptron

    return Perceptron(num_classes, width or 256, dtype, axis_name)
  from sparseopt_jax.models import resnet

  if name == "resnet50":
    return resnet.ResNet(
      stage_sizes=(3, 4, 6, 3),
      block=resnet.BottleneckBlock,
      num_classes=num_classes,
      width=width or 64,
      large_images=True,
      dtype=dtype,
      axis_name=axis_name,
      shortcut_size=shortcut_size,
    )
  return resnet.ResNet(
    stage_sizes=(_BLOCKS[name],) * 3,
    block=resnet.BasicBlock,
    num_classes=num_classes,
    width=width or 16,
    large_images=False,
    dtype=dtype,
    axis_name=axis_name,
    shortcut_size=shortcut_size,
  )
