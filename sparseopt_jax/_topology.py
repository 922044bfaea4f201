"""How masks change during training: the protocol, and the topologies."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import math
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
  def dense_fan_in(self) -> int:
    """The number of inputs of a neuron, active or not."""
    shape = jnp.shape(self.weight)
    return math.prod(shape[axis] for axis in self.input_axes)

  @property
  def active(self) -> jax.Array:
    """Active weights of each layer, int32 in the shape of the stacked axes."""
    axes = tuple(range(self.stacked, self.mask.ndim))
    return jnp.sum(self.mask, axis=axes, dtype=jnp.int32)


def _draw(key: Any, layers: Sequence[Layer], counts: Any) -> list[jax.Array]:
  """Random masks with these numbers of active weights."""
  rows = [(jnp.shape(layer.weight), layer.stacked) for layer in layers]
  return _selection.draw(key, flat(counts), *zip(*rows, strict=True))


def flat(counts: Iterable[Any]) -> jax.Array:
  """Numbers of each layer, stacked ones too, in one int32 array."""
  return jnp.concatenate(list(map(jnp.ravel, counts)))


@runtime_checkable
class Topology(Protocol):
  """When masks change, and to what; for topologies of one's own.

  In ``init`` the link asks for `first_masks`, and then `init` for each layer.
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

  def first_masks(
    self, layers: Sequence[Layer], key: jax.Array
  ) -> list[jax.Array]:
    """The masks to start with; by default random, of ``target`` weights each.

    Args:
      layers: The sparse leaves that no masks are given for, without mask.
      key: From the seed; uint32 of shape (2,), as of ``jax.random.PRNGKey``.

    Returns:
      Bools in the shape of each leaf.
    """
    return _draw(key, layers, [layer.target for layer in layers])

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


def _check_calls(name: str, value: Any, least: int) -> None:
  """Raises unless it is an int from ``least`` on; calls are int32."""
  check_type(is_int(value), f"{name} must be an int", value)
  rule = f"{name} must lie in [{least}, 2**31 - 1]"
  check(least <= value < 2**31, rule, value)


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
    _check_calls("update_until", self.update_until, 0)
    _check_calls("update_every", self.update_every, 1)
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
    else:
      steps = max(self.update_until, 1)
      cosine = optax.cosine_decay_schedule(float(self.drop_fraction), steps)
      given = cosine(jnp.float32(count))
    return jnp.clip(jnp.asarray(given, jnp.float32), 0.0, 1.0)

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
    is_random = any(scores is None for scores in grow)
    num_dropped = functools.partial(self.num_dropped, count)
    return _selection.drop_and_grow(
      layers, drop, None if is_random else grow, num_dropped, key
    )


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


def _neurons_first(layer: Layer, array: Any) -> jax.Array:
  """Moves the axes of inputs to the end, so that each neuron is a layer."""
  last = tuple(range(-len(layer.input_axes), 0))
  return jnp.moveaxis(array, layer.input_axes, last)


def _inputs_back(layer: Layer, array: jax.Array) -> jax.Array:
  """The inverse of `_neurons_first`."""
  last = tuple(range(-len(layer.input_axes), 0))
  return jnp.moveaxis(array, last, layer.input_axes)


@dataclasses.dataclass(frozen=True)
class SRigL(SET):
  r"""Structured RigL: every neuron of a layer has the same fan-in.

  Of :math:`N` inputs, each live neuron of a layer has exactly

  .. math::

    k = \min(N, \max(1, [n / n_{live}]))

  active ones, with :math:`n` the number of active weights that ``sparsity`` and
  ``distribution`` give the layer, :math:`n_{live}` its live neurons (at first
  all) and :math:`[\cdot]` the nearest integer, of two the larger. So the layer
  has :math:`k n_{live}` active weights: equal fan-ins, which the method is
  about, come first, and :math:`n`, to half a weight a neuron, second.

  Mask updates fall on the calls of :class:`sparseopt_jax.SET`:

  1. The :math:`\lfloor f(t) \, nnz \rfloor` active weights of smallest
     :math:`|w|` in the layer are dropped, whichever neurons they belong to.
  2. Salient are the weights that stay, and as many of the others of live
     neurons as were dropped, those of largest :math:`|\partial L / \partial
     w| > 0`.
  3. A neuron of fewer than :math:`\gamma_{sal} k` salient weights is ablated:
     it loses all its inputs, for ever. Not if the neurons left could not hold
     :math:`n` weights; then none is ablated in this update.
  4. :math:`k` follows from the neurons that are left, and each of them grows to
     it where its :math:`|\partial L / \partial w|` is largest. Ties are as for
     :class:`sparseopt_jax.RigL`.

  Without ablation the correction is the identity, bit for bit: the control for
  what it does elsewhere. With it, live neurons are scaled by
  :math:`\sqrt{n_{out} / n_{live}}`.

  An ablated neuron of a classifier leaves its class a constant logit, so give
  that layer a :math:`\gamma_{sal}` of 0. Masks that are given stay until the
  first mask update, which gives each live neuron :math:`k` active inputs.

  Attributes:
    update_until: The end of the mask updates, in calls.
    update_every: Calls between two mask updates.
    drop_fraction: :math:`\alpha` in [0, 1], or an Optax schedule that gives
      :math:`f(t)` itself, a scalar; it is clipped to [0, 1].
    gamma_sal: :math:`\gamma_{sal}` in [0, 1], or a function of a path such as
      ``'Conv_0/kernel'`` and the leaf that returns it; 0: no ablation.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> topology = sparseopt_jax.SRigL(update_until=30_000)
    >>> tx = sparseopt_jax.sparseopt(0.75, topology, corrected=False)
    >>> masks = sparseopt_jax.get_masks(tx.init(jnp.ones((8, 5))))
    >>> print(masks.sum(0))
    [2 2 2 2 2]

  References:
    Lasby et al., `Dynamic Sparse Training with Structured Sparsity
    <https://arxiv.org/abs/2305.02299>`_, 2024
  """

  gamma_sal: float | Callable[[str, Any], float] = 0.3

  def __post_init__(self) -> None:
    super().__post_init__()
    if not callable(self.gamma_sal):
      self._check_gamma(self.gamma_sal)

  def _check_gamma(self, value: Any) -> None:
    rule = "gamma_sal must be a number in [0, 1], or a function that gives one"
    check_type(is_real(value), rule, value)
    check(0.0 <= value <= 1.0, rule, value)

  def grow_scores(self, layer: Layer) -> jax.Array:
    """The gradient."""
    return layer.gradient

  def fan_ins(self, layer: Layer, alive: jax.Array) -> jax.Array:
    """The fan-in of each neuron if these are alive; int32, shaped alike."""
    axes = tuple(range(layer.stacked, alive.ndim))
    number = jnp.maximum(jnp.sum(alive, axis=axes, dtype=jnp.int32), 1)
    fan_in, rest = jnp.divmod(layer.target, number)
    fan_in += (rest >= number - rest).astype(jnp.int32)  # To the nearest.
    fan_in = jnp.clip(fan_in, 1, layer.dense_fan_in)
    return jnp.where(alive, jnp.expand_dims(fan_in, axes), 0)

  def first_masks(
    self, layers: Sequence[Layer], key: jax.Array
  ) -> list[jax.Array]:
    """Random inputs for each neuron, equally many."""
    neurons, fan_ins = [], []
    for layer in layers:
      move = functools.partial(_neurons_first, layer)
      moved = jax.eval_shape(move, layer.weight)
      stacked = len(moved.shape) - len(layer.input_axes)
      neurons.append(layer._replace(weight=moved, stacked=stacked))
      alive = jnp.ones(moved.shape[:stacked], bool)
      fan_ins.append(self.fan_ins(layer, alive))
    masks = _draw(key, neurons, fan_ins)
    return list(map(_inputs_back, layers, masks))

  def update_masks(
    self, layers: Sequence[Layer], count: jax.Array, key: jax.Array
  ) -> list[jax.Array]:
    """Drops in the layer, ablates neurons, and grows each to its fan-in."""
    stacked = [layer.stacked for layer in layers]
    active = flat(layer.active for layer in layers)
    stay = active - self.num_dropped(count, active)
    masks = [layer.mask for layer in layers]
    drop = list(map(self.drop_scores, layers))
    kept = _selection.keep_largest(drop, masks, stay, stacked)
    # What is kept goes before whatever may grow, and a dead neuron never grows.
    scores = list(map(self._grow_scores, layers, kept))
    chosen = _selection.pick_largest(scores, active, stacked, key)
    fan_ins = list(map(self._new_fan_ins, layers, scores, chosen))
    rows = list(map(_neurons_first, layers, scores))
    neurons = [fan_in.ndim for fan_in in fan_ins]
    masks = _selection.pick_largest(rows, flat(fan_ins), neurons, key)
    return list(map(_inputs_back, layers, masks))

  def _grow_scores(self, layer: Layer, kept: jax.Array) -> jax.Array:
    """The scores to grow by, infinite where a weight is kept."""
    alive = jnp.any(layer.mask, axis=layer.input_axes, keepdims=True)
    scores = jnp.where(alive, self.grow_scores(layer), 0)
    return jnp.where(kept, jnp.inf, scores)

  def _new_fan_ins(
    self, layer: Layer, scores: jax.Array, chosen: jax.Array
  ) -> jax.Array:
    """The fan-in of each neuron after ablation."""
    gamma = self.gamma_sal
    if callable(gamma):
      gamma = gamma(layer.path, layer.weight)
      self._check_gamma(gamma)
    axes = layer.input_axes
    chosen &= _selection.magnitude_bits(scores) > 0  # A zero grows by chance.
    salient = jnp.sum(chosen, axis=axes, dtype=jnp.int32).astype(jnp.float32)
    alive = jnp.any(layer.mask, axis=axes)
    needed = np.float32(gamma) * self.fan_ins(layer, alive).astype(jnp.float32)
    left = alive & (salient >= needed)
    neurons = tuple(range(layer.stacked, alive.ndim))
    room = layer.dense_fan_in * jnp.sum(left, axis=neurons, dtype=jnp.int32)
    is_enough = jnp.expand_dims(room >= layer.target, neurons)
    return self.fan_ins(layer, jnp.where(is_enough, left, alive))


@dataclasses.dataclass(frozen=True)
class Magnitude(Topology):
  r"""Gradual magnitude pruning: from dense to sparse on a cubic schedule.

  On the calls whose 0-based count :math:`t` is ``begin_step`` plus a positive
  multiple of ``update_every``, up to ``end_step``, and on that of ``end_step``
  itself, each layer :math:`l` keeps, of its active weights, the

  .. math::

    n^l(t) = n^l_1 + \left\lfloor \left(\frac{t_1 - t}{t_1 - t_0}\right)^3
    (n^l_0 - n^l_1) \right\rfloor

  of largest :math:`|w|`, with :math:`t_0` and :math:`t_1` the two steps and
  :math:`n^l_1` the number of active weights that the link's ``sparsity`` and
  ``distribution`` give the layer. It begins with :math:`n^l_0`: the fraction
  :math:`1 - s_0` of its weights at ``initial_sparsity`` :math:`s_0`, chosen at
  random, or :math:`n^l_1` if that is more. So the densities of all layers, and
  with them the sparsity of the whole, follow the one cubic, and none ever
  rises. Of equal magnitudes those of lowest row-major index are pruned first.
  The fraction and its products are in float32.

  A pruned weight does not come back. Zhu and Gupta let the weights train on
  behind their masks, where a large one would be admitted again. Here weights
  outside the masks are exactly 0, of the smallest magnitude there is.

  Masks that are given stay until the first update, which prunes them to its
  counts and never beyond. If the update at ``end_step`` is skipped, since a
  gradient is not finite, the counts stay those of the update before.

  Attributes:
    begin_step: :math:`t_0`, in calls; no update up to this call.
    end_step: :math:`t_1`, in calls, after ``begin_step``; the last update.
    update_every: Calls between two mask updates.
    initial_sparsity: :math:`s_0` in [0, 1).

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range.

  Examples:

    >>> import sparseopt_jax
    >>> topology = sparseopt_jax.Magnitude(5_000, 30_000)
    >>> tx = sparseopt_jax.sparseopt(0.9, topology, corrected=True)

  References:
    Zhu and Gupta, `To prune, or not to prune: exploring the efficacy of pruning
    for model compression <https://arxiv.org/abs/1710.01878>`_, 2017

  .. seealso:: :func:`sparseopt_jax.magnitude_masks`
  """

  begin_step: int
  end_step: int
  update_every: int = 100
  initial_sparsity: float = 0.0

  def __post_init__(self) -> None:
    _check_calls("begin_step", self.begin_step, 0)
    _check_calls("end_step", self.end_step, self.begin_step + 1)
    _check_calls("update_every", self.update_every, 1)
    rule = "initial_sparsity must be a number in [0, 1)"
    check_type(is_real(self.initial_sparsity), rule, self.initial_sparsity)
    check(0.0 <= self.initial_sparsity < 1.0, rule, self.initial_sparsity)

  def is_due(self, count: Any) -> Any:
    """Whether the call with this 0-based count updates the masks."""
    passed = count - self.begin_step
    is_on = (passed > 0) & (count <= self.end_step)
    return is_on & (
      (passed % self.update_every == 0) | (count == self.end_step)
    )

  def first_active(self, layer: Layer) -> np.ndarray:
    """The number of active weights to begin with; shape[:stacked], int32."""
    size = math.prod(jnp.shape(layer.weight)[layer.stacked :])
    density = 1 - float(self.initial_sparsity)
    return np.maximum(layer.target, round(density * size))

  def num_active(
    self, count: jax.Array, first: jax.Array, target: jax.Array
  ) -> jax.Array:
    """The number of active weights by the schedule; int32."""
    # A product, since a compiler may divide in another way than by rounding.
    rate = np.float32(1 / (self.end_step - self.begin_step))
    left = (self.end_step - count).astype(jnp.float32) * rate
    left = jnp.clip(left, 0.0, 1.0)
    pruned_later = left * left * left * (first - target).astype(jnp.float32)
    pruned_later = jnp.floor(pruned_later).astype(jnp.int32)
    return target + jnp.minimum(pruned_later, first - target)

  def first_masks(
    self, layers: Sequence[Layer], key: jax.Array
  ) -> list[jax.Array]:
    """Random masks of ``initial_sparsity``; by default everything is active."""
    return _draw(key, layers, map(self.first_active, layers))

  def update_masks(
    self, layers: Sequence[Layer], count: jax.Array, key: jax.Array
  ) -> list[jax.Array]:
    """Keeps the active weights of largest magnitude."""
    first = flat(map(self.first_active, layers))
    target = flat(layer.target for layer in layers)
    weights, masks = [x.weight for x in layers], [x.mask for x in layers]
    counts = self.num_active(count, first, target)
    stacked = [layer.stacked for layer in layers]
    return _selection.keep_largest(weights, masks, counts, stacked)
