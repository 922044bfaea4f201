"""How masks change during training: the protocol, Static, SET and RigL."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _correction
from sparseopt_jax import _selection
from sparseopt_jax._numbers import check, check_type, is_int, is_real


class Layer(NamedTuple):
  """A sparse leaf of the parameters, and all that belongs to it.

  Layers that are stacked in a leaf come together: ``stacked`` of its leading
  axes enumerate them, and each slice is a layer of its own.
  """

  path: str  # such as 'Conv_0/kernel'
  place: int  # among all leaves of the parameters
  stacked: int
  input_axes: tuple[int, ...]  # a neuron's inputs lie along these
  target: np.ndarray  # shape[:stacked], int32; active weights as asked for
  corrected: bool
  weight: jax.Array  # leaf shape; as passed to init or update
  mask: Any = None  # leaf shape, dtype=jnp.bool_; before a mask update
  gradient: Any = None  # leaf shape; as passed to update, None in init
  factor: Any = None  # per neuron, length 1 on input_axes; as in the state
  state: Any = ()  # what the topology keeps for it

  @property
  def active(self) -> jax.Array:
    """The number of active weights; shape[:stacked], dtype=jnp.int32."""
    axes = tuple(range(self.stacked, self.mask.ndim))
    return jnp.sum(self.mask, axis=axes, dtype=jnp.int32)


@runtime_checkable
class Topology(Protocol):
  """When masks change, and to what; for topologies of one's own.

  In a call of ``update`` the link asks, in this order: `is_due` with the count
  of the call, `observe` for each layer, and, where masks are due and all
  gradients and states are finite, `update_masks` for all layers at once. All
  of it is traced. Most topologies inherit from one that is there and change
  what they need.

  Examples:

    RigL that never takes a neuron its last input: the largest weight of each
    neuron is dropped after all others.

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> class KeepAlive(sparseopt_jax.RigL):
    ...
    ...   def drop_scores(self, layer):
    ...     size = jnp.where(layer.mask, jnp.abs(layer.weight), -1)
    ...     top = size.max(layer.input_axes, keepdims=True)
    ...     return jnp.where(size == top, jnp.inf, size)
    >>> tx = sparseopt_jax.sparseopt(
    ...   0.9, KeepAlive(update_until=30_000), corrected=True
    ... )

    RigL that grows by a running mean of the gradient, which it keeps for each
    layer as its state.

    >>> class GrowByMean(sparseopt_jax.RigL):
    ...
    ...   def init(self, layer):
    ...     return jnp.zeros_like(layer.weight)
    ...
    ...   def observe(self, layer, count):
    ...     new = 0.9 * layer.state + 0.1 * layer.gradient
    ...     return jnp.where(jnp.isfinite(new), new, layer.state)
    ...
    ...   def grow_scores(self, layer):
    ...     return layer.state

    From nothing: in every tenth call, each layer moves its mask by one place.

    >>> class Rotate(sparseopt_jax.Topology):
    ...
    ...   def is_due(self, count):
    ...     return (count > 0) & (count % 10 == 0)
    ...
    ...   def update_masks(self, layers, count, key):
    ...     return [jnp.roll(layer.mask, 1) for layer in layers]
    >>> tx = sparseopt_jax.sparseopt(0.9, Rotate(), corrected=True)
  """

  def is_due(self, count: Any) -> Any:
    """Whether the call with this 0-based count updates the masks.

    Args:
      count: An int, or an int32 array.

    Returns:
      A bool, or an array of bools. The Python bool ``False``, whatever the
      count, if masks never change: then no branch is compiled.
    """
    return False

  def update_masks(
    self, layers: Sequence[Layer], count: jax.Array, key: jax.Array
  ) -> list[jax.Array]:
    """The new mask of each layer.

    Args:
      layers: The sparse leaves, in the order of the parameters.
      count: The 0-based count of the call; int32.
      key: Fresh for this call; uint32 of shape (2,), as of
        ``jax.random.PRNGKey``.

    Returns:
      Bools in the shape of each leaf. As many of them true as before, unless
      the topology is meant to change the sparsity.
    """
    return [layer.mask for layer in layers]

  def init(self, layer: Layer) -> Any:
    """What to keep for a layer between calls; nothing by default.

    Args:
      layer: The layer, without gradient and state.

    Returns:
      A pytree of arrays.
    """
    return ()

  def observe(self, layer: Layer, count: jax.Array) -> Any:
    """The layer's state after a call, masks due or not; by default the same.

    Args:
      layer: The layer, with the state before.
      count: The 0-based count of the call; int32.

    Returns:
      A pytree as `init` gave it.
    """
    return layer.state


@dataclasses.dataclass(frozen=True)
class Static(Topology):
  """Static sparse training: the same masks from start to end.

  Examples:

    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparseopt(
    ...   0.9, sparseopt_jax.Static(), corrected=True
    ... )
  """


@dataclasses.dataclass(frozen=True)
class SET(Topology):
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
    >>> tx = sparseopt_jax.sparseopt(0.9, topology, corrected=True)

  References:
    Mocanu et al., `Scalable training of artificial neural networks with
    adaptive sparse connectivity inspired by network science
    <https://arxiv.org/abs/1707.04780>`_, 2018
  """

  update_until: int
  update_every: int = 100
  drop_fraction: float | optax.Schedule = 0.3

  def __post_init__(self) -> None:
    for name, least in {"update_until": 0, "update_every": 1}.items():
      value = getattr(self, name)
      check_type(is_int(value), f"{name} must be an int", value)
      # Calls are counted in int32.
      rule = f"{name} must lie in [{least}, 2**31 - 1]"
      check(least <= value < 2**31, rule, value)
    given = self.drop_fraction
    if not callable(given):
      rule = "drop_fraction must be a number in [0, 1], or a schedule"
      check_type(is_real(given), rule, given)
      check(0.0 <= given <= 1.0, rule, given)

  def is_due(self, count: Any) -> Any:
    """Whether the call with this 0-based count updates the masks."""
    multiple = (count > 0) & (count % self.update_every == 0)
    return multiple & (count < self.update_until)

  def fraction(self, count: jax.Array) -> jax.Array:
    """The fraction of active weights to drop; float32 in [0, 1]."""
    if callable(self.drop_fraction):
      given = self.drop_fraction(count)
      check_type(is_real(given), "drop_fraction must give a scalar", given)
      fraction = jnp.asarray(given, jnp.float32)
    else:
      # Not beyond T, where the cosine rises again.
      count = jnp.minimum(count, self.update_until)
      angle = jnp.float32(jnp.pi) * count.astype(jnp.float32)
      angle /= jnp.float32(max(self.update_until, 1))
      fraction = jnp.float32(self.drop_fraction) / 2 * (1 + jnp.cos(angle))
    return jnp.clip(fraction, 0.0, 1.0)

  def num_dropped(self, count: jax.Array, active: jax.Array) -> jax.Array:
    """floor(f * nnz), the product in float32; int32, at most nnz."""
    product = self.fraction(count) * active.astype(jnp.float32)
    return jnp.minimum(jnp.floor(product).astype(jnp.int32), active)

  def drop_scores(self, layer: Layer) -> jax.Array:
    """The active weights of smallest magnitude here are dropped."""
    return layer.weight

  def grow_scores(self, layer: Layer) -> jax.Array | None:
    """The inactive of largest magnitude here grow; None: all at random."""
    return None

  def update_masks(
    self, layers: Sequence[Layer], count: jax.Array, key: jax.Array
  ) -> list[jax.Array]:
    """Drops and grows the same number of weights in each layer."""
    drop = list(map(self.drop_scores, layers))
    grow = list(map(self.grow_scores, layers))
    n = functools.partial(self.num_dropped, count)
    scores = None if any(x is None for x in grow) else grow
    return _selection.drop_and_grow(layers, drop, scores, n, key)


@dataclasses.dataclass(frozen=True)
class RigL(SET):
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

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range.

  Examples:

    >>> import sparseopt_jax
    >>> topology = sparseopt_jax.RigL(update_until=30_000)
    >>> tx = sparseopt_jax.sparseopt(0.9, topology, corrected=True)

  References:
    Evci et al., `Rigging the Lottery: Making All Tickets Winners
    <https://arxiv.org/abs/1911.11134>`_, 2020
  """

  grow_from: str = "raw"

  def __post_init__(self) -> None:
    super().__post_init__()
    is_known = self.grow_from in ("raw", "corrected")
    check(is_known, "grow_from must be 'raw' or 'corrected'", self.grow_from)

  def grow_scores(self, layer: Layer) -> jax.Array:
    """The gradient, raw or corrected."""
    if self.grow_from == "corrected":
      return _correction.rescale(layer.gradient, layer.factor)
    return layer.gradient
