"""Removes what is dead for good from a trained residual network.

A channel inside a block is dead if its neuron has no weight, and useless if no
neuron after it has one for it. What a dead channel gives is a constant, by its
batch norm and the ReLU behind it. Where that is 0, or where only a 1x1
convolution reads it, so that the next batch norm can take the constant over,
the channel goes and the network computes the same up to rounding. A larger
convolution with padding turns a constant other than 0 into another one at the
borders, so such a channel stays. So do the channels between blocks, to which a
shortcut adds.
"""

from __future__ import annotations

import re

import numpy as np

Arrays = dict[str, np.ndarray]

_EPSILON = 1e-5  # Of batch norm, in `models.resnet`.
_BLOCK = r"params/((?:Basic|Bottleneck)Block_\d+)/Conv_0/kernel"


def shrink(variables: Arrays, masks: Arrays) -> tuple[Arrays, Arrays]:
  """Removes channels of blocks that are dead or useless.

  Args:
    variables: {path: array}, such as "params/BasicBlock_0/Conv_0/kernel" and
      "batch_stats/BasicBlock_0/BatchNorm_0/mean".
    masks: {path in `params`: bool array} of the sparse kernels.

  Returns:
    Both without these channels; at least one is left in each place.
  """
  flat = dict(variables) | {f"masks/{k}": mask for k, mask in masks.items()}
  for block, number in _hidden(flat).items():
    # Each that goes can leave others dead or useless, before it and behind it.
    while any(_shrink_one(flat, block, i) for i in range(number)):
      pass
  found = {k.removeprefix("masks/"): flat.pop(k) for k in _masks_of(flat)}
  return flat, found


def hidden(variables: Arrays) -> list[list[int]]:
  """The number of channels inside each block, in the order of the blocks."""
  return [
    [variables[f"params/{block}/Conv_{i}/kernel"].shape[-1] for i in range(n)]
    for block, n in _hidden(variables).items()
  ]


def _masks_of(flat: Arrays) -> list[str]:
  return [name for name in flat if name.startswith("masks/")]


def _hidden(variables: Arrays) -> dict[str, int]:
  """Of how many convolutions in each block nothing but the next one reads."""
  blocks = [match[1] for x in variables if (match := re.fullmatch(_BLOCK, x))]
  blocks.sort(key=lambda block: int(block.rpartition("_")[2]))
  return {block: 1 if block.startswith("Basic") else 2 for block in blocks}


def _shrink_one(flat: Arrays, block: str, i: int) -> bool:
  """Removes channels of one convolution; whether there were any."""
  after = flat[f"params/{block}/Conv_{i + 1}/kernel"]
  is_read = after.any(axis=(0, 1, 3))
  is_dead = ~flat[f"params/{block}/Conv_{i}/kernel"].any(axis=(0, 1, 2))
  given = np.where(is_dead, _constant(flat, f"{block}/BatchNorm_{i}"), 0)
  is_exact = (given == 0) | (after.shape[:2] == (1, 1))
  stays = is_read & ~(is_dead & is_exact)
  if not stays.any():
    stays[0] = True  # No convolution is without any.
  if stays.all():
    return False
  mean = f"batch_stats/{block}/BatchNorm_{i + 1}/mean"
  taken_over = np.where(stays, 0, given) @ after.sum(axis=(0, 1), dtype=float)
  flat[mean] = (flat[mean] - taken_over).astype(flat[mean].dtype)
  for name in list(flat):
    if re.fullmatch(rf"\w+/{block}/(Conv|BatchNorm)_{i}/\w+", name):
      flat[name] = flat[name][..., stays]
    if re.fullmatch(rf"\w+/{block}/Conv_{i + 1}/kernel", name):
      flat[name] = flat[name][:, :, stays]
  return True


def _constant(flat: Arrays, norm: str) -> np.ndarray:
  """What batch norm and ReLU make of zeros, in float64."""
  mean, var = (flat[f"batch_stats/{norm}/{x}"] for x in ("mean", "var"))
  scale, bias = (flat[f"params/{norm}/{x}"] for x in ("scale", "bias"))
  deviation = np.sqrt(var.astype(float) + _EPSILON)
  return np.maximum(bias - mean * scale / deviation, 0)
