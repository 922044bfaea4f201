"""How masks change during training: static masks, SET and RigL.

A mask update drops the active weights of smallest magnitude and grows as many
inactive ones, so that the number of active weights of each layer stays what it
was.
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax import _blocks
from sparseopt_jax import _correction
from sparseopt_jax import _selection

# Calls are counted in int32.
_MAX_COUNT = 2**31 - 1


def _check_integer(name: str, value: int, least: int) -> None:
  if not _correction.is_int(value):
    raise TypeError(f"{name} must be an int; got {value!r}.")
  if not least <= value <= _MAX_COUNT:
    raise ValueError(f"{name} must lie in [{least}, 2**31 - 1]; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Static:
  """Static sparse training: the same masks from start to end.

  Examples:

    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparseopt(0.9, sparseopt_jax.Static())
  """


@dataclasses.dataclass(frozen=True)
class _Dynamic:
  """When masks are updated and how much of them changes."""

  update_until: int
  update_every: int = 100
  drop_fraction: float | optax.Schedule = 0.3

  def __post_init__(self) -> None:
    _check_integer("update_until", self.update_until, 0)
    _check_integer("update_every", self.update_every, 1)
    if callable(self.drop_fraction):
      return
    if isinstance(self.drop_fraction, bool) or not isinstance(
      self.drop_fraction, numbers.Real
    ):
      raise TypeError(
        "drop_fraction must be a float or a schedule; got "
        f"{self.drop_fraction!r}."
      )
    if not 0.0 <= float(self.drop_fraction) <= 1.0:
      raise ValueError(
        f"drop_fraction must lie in [0, 1]; got {self.drop_fraction!r}."
      )

  def is_due(self, count: Any) -> Any:
    """Whether the call with this 0-based count updates the masks.

    Args:
      count: An int, or an array.

    Returns:
      A bool, or an array of bools.
    """
    multiple = (count > 0) & (count % self.update_every == 0)
    return multiple & (count < self.update_until)

  def fraction(self, count: jax.Array) -> jax.Array:
    """The fraction of active weights to drop; float32 in [0, 1]."""
    if callable(self.drop_fraction):
      given = self.drop_fraction(count)
      if not _correction.is_scalar(given):
        raise TypeError(
          f"drop_fraction must be a schedule of a scalar; got {given!r}."
        )
      fraction = jnp.asarray(given, jnp.float32)
    else:
      # Not beyond T, where the cosine rises again.
      count = jnp.minimum(count, self.update_until)
      angle = jnp.float32(math.pi) * count.astype(jnp.float32)
      angle /= jnp.float32(max(self.update_until, 1))
      fraction = jnp.float32(self.drop_fraction) / 2 * (1 + jnp.cos(angle))
    return jnp.clip(fraction, 0.0, 1.0)

  def drop_counts(self, count: jax.Array, nnz: jax.Array) -> jax.Array:
    """floor(f * nnz), the product in float32; int32, at most nnz."""
    product = self.fraction(count) * nnz.astype(jnp.float32)
    return jnp.minimum(jnp.floor(product).astype(jnp.int32), nnz)


@dataclasses.dataclass(frozen=True)
class SET(_Dynamic):
  r"""Sparse Evolutionary Training: drop by magnitude, grow at random.

  On every call whose 0-based count :math:`t` is a positive multiple of
  ``update_every`` and below ``update_until``, each sparse layer drops its

  .. math::

    n = \lfloor f(t) \, nnz \rfloor, \qquad
    f(t) = \frac{\alpha}{2} \left(1 + \cos\frac{\pi t}{T}\right)

  active weights of smallest :math:`|w|` and grows :math:`n` of the inactive
  ones, those just dropped among them, chosen uniformly at random. Grown weights
  start at 0. Products and :math:`f` are in float32.

  Attributes:
    update_until: :math:`T`, in calls; no update from this call on.
    update_every: Calls between two mask updates.
    drop_fraction: :math:`\alpha` in [0, 1], or an Optax schedule that gives
      :math:`f(t)` itself, a scalar; it is clipped to [0, 1].

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range.

  Examples:

    >>> import sparseopt_jax
    >>> topology = sparseopt_jax.SET(update_until=30_000)
    >>> tx = sparseopt_jax.sparseopt(0.9, topology)

  References:
    Mocanu et al., `Scalable training of artificial neural networks with
    adaptive sparse connectivity inspired by network science
    <https://arxiv.org/abs/1707.04780>`_, 2018
  """


@dataclasses.dataclass(frozen=True)
class RigL(_Dynamic):
  r"""RigL: drop by magnitude, grow where the dense gradient is largest.

  As :class:`sparseopt_jax.SET`, but of the inactive weights those of largest
  :math:`|\partial L / \partial w|` are grown. Ties, in drop and in growth, go
  to the lowest row-major index. Where fewer inactive weights than needed have a
  nonzero gradient, the rest is grown at random.

  The gradients passed to ``update`` have to be dense: differentiate the loss at
  the masked parameters, and do not multiply by the mask inside the loss.

  Attributes:
    update_until: The end of the mask updates, in calls.
    update_every: Calls between two mask updates.
    drop_fraction: :math:`\alpha` in [0, 1], or an Optax schedule that gives
      :math:`f(t)` itself, a scalar; it is clipped to [0, 1].
    grow_from: ``'raw'`` takes the gradient as it comes, ``'corrected'``
      rescales it as the weights' own gradient is, which explores less.
    accumulate: Growth scores come from the mean gradient of this many calls,
      the mask update's own the last of them. More than 1 stores one more float
      for each weight.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range.

  Examples:

    >>> import sparseopt_jax
    >>> topology = sparseopt_jax.RigL(update_until=30_000)
    >>> tx = sparseopt_jax.sparseopt(0.9, topology)

  References:
    Evci et al., `Rigging the Lottery: Making All Tickets Winners
    <https://arxiv.org/abs/1911.11134>`_, 2020
  """

  grow_from: str = "raw"
  accumulate: int = 1

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.grow_from not in ("raw", "corrected"):
      raise ValueError(
        f"grow_from must be 'raw' or 'corrected'; got {self.grow_from!r}."
      )
    _check_integer("accumulate", self.accumulate, 1)
    if self.accumulate > self.update_every:
      raise ValueError(
        f"accumulate must be at most update_every={self.update_every}; got "
        f"{self.accumulate!r}."
      )

  def in_window(self, count: jax.Array) -> jax.Array:
    """Whether the call's gradient counts towards the next mask update."""
    ahead = -count % self.update_every
    return (ahead < self.accumulate) & self.is_due(count + ahead)

  def opens_window(self, count: jax.Array) -> jax.Array:
    """Whether the call is the first of its window."""
    return -count % self.update_every == self.accumulate - 1


Topology = Static | SET | RigL


def check(topology: Topology) -> None:
  if not isinstance(topology, Static | SET | RigL):
    raise TypeError(
      f"topology must be a Static, SET or RigL; got {topology!r}."
    )


def random_words(key: jax.Array, count: jax.Array, layers: int) -> jax.Array:
  """The random state of each layer's selection; uint32 of shape (layers, 2).

  Args:
    key: uint32 of shape (2,).
    count: The call of ``update`` that it is for, from 1 on; 0 for ``init``.
    layers: The number of layers.
  """
  # jax.random would take as long to compile as the rest of the selection.
  position = _blocks.linear_index((layers, 2))
  # random_order takes 31 bits of a word; the last of an int seed is kept here.
  first = key[0] ^ ((key[1] >> 31) << 30)
  by_call = _selection.random_order((first, key[1]), count.astype(jnp.uint32))
  return _selection.random_order((by_call, key[1]), position)


def update_masks(
  block: _blocks.Block,
  masks: jax.Array,
  weights: jax.Array,
  scores: jax.Array | None,
  n: jax.Array,
  words: jax.Array,
) -> jax.Array:
  """Drops and grows ``n`` weights of each layer in a block.

  Args:
    block: The layers.
    masks: Bools, true where a weight is active.
    weights: The weights, of which the active with smallest magnitude go.
    scores: What to grow by, largest magnitude first; None to grow at random.
    n: int32 of shape (slots,).
    words: Random state of shape (slots, 2).

  Returns:
    The new masks, each with as many active weights as the old.
  """
  kept = masks & ~_selection.smallest(block, weights, masks, n)
  if scores is None:
    return kept | _selection.at_random(block, ~kept, n, words)
  return kept | _selection.largest(block, scores, ~kept, n, words)
