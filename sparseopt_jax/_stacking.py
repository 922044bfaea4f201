"""Layers of one shape in one array, so that programs stay small."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


class Stacking:
  """Puts layers that share a kind, such as their shape, on a new first axis."""

  def __init__(self, kinds: Sequence[Hashable]):
    groups: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
      groups.setdefault(kind, []).append(i)
    self.groups = list(groups.values())

  def stack(self, layers: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.stack([layers[i] for i in group]) for group in self.groups]

  def unstack(self, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    layers: dict[int, jax.Array] = {}
    for group, stack in zip(self.groups, stacks, strict=True):
      layers.update(zip(group, stack, strict=True))
    return [layers[i] for i in range(len(layers))]

  def order(self, per_layer: Sequence[Any]) -> list[Any]:
    """Values of the layers in the order in which the stacks have them."""
    return [per_layer[i] for group in self.groups for i in group]
