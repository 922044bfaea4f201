"""The method once more, slow and plain, for the tests to compare with.

Everything here is NumPy and Python loops; nothing comes from the package. A
mask is a bool array of its layer's shape, True where a weight is active. The
neuron axis is an int or a tuple of ints; per-neuron results have the shape of
those axes, in ascending order.
"""

from collections.abc import Callable, Mapping, Sequence
import fractions
import math
from typing import Any, NamedTuple

import numpy as np

Arrays = Mapping[str, Any]
Axis = int | Sequence[int]
Shapes = Mapping[str, Sequence[int]]


# --- The correction, one layer ------------------------------------------------


def fan_ins(mask, axis: Axis = -1) -> np.ndarray:
  """Returns f_i, the number of active incoming weights of each neuron."""
  mask = np.asarray(mask, bool)
  counts = np.zeros([mask.shape[a] for a in _axes(axis, mask.ndim)], int)
  for neuron in np.ndindex(*counts.shape):
    counts[neuron] = mask[_weights_of(neuron, axis, mask.ndim)].sum()
  return counts


def neuron_sparsity(mask, axis: Axis = -1) -> np.ndarray:
  """Returns s_i = 1 - f_i / N.

  >>> neuron_sparsity([[True, False], [True, True]])
  array([0. , 0.5])
  """
  counts = fan_ins(mask, axis)
  dense_fan_in = np.size(mask) // counts.size
  return 1 - counts / dense_fan_in


def factors(mask, axis: Axis = -1) -> np.ndarray:
  """Returns sqrt((1 - s_i) / (1 - s_avg)), from integer counts."""
  counts = fan_ins(mask, axis)
  total = int(counts.sum())
  if total == 0:
    return np.zeros(counts.shape)
  return np.sqrt(counts * counts.size / total)


def correct(gradient, mask, axis: Axis = -1) -> np.ndarray:
  """Returns D g / sqrt(1 - s_avg) in float64, exactly 0 outside the mask."""
  return np.where(mask, _scale(gradient, mask, axis), 0.0)


def skew_angle(mask, axis: Axis = -1) -> float:
  """Returns the angle, in degrees, by which unequal fan-ins turn a gradient.

  cos = sum_i sqrt(f_i) / sqrt(n_live * sum_i f_i), over the live neurons.
  """
  live = [int(f) for f in fan_ins(mask, axis).ravel() if f > 0]
  if len(set(live)) <= 1:  # Equal fan-ins, or none: no skew, exactly.
    return 0.0
  cosine = sum(math.sqrt(f) for f in live) / math.sqrt(len(live) * sum(live))
  return math.degrees(math.acos(min(1.0, cosine)))


def _scale(gradient, mask, axis):
  """Scales every weight's gradient, active or not, by its neuron's factor."""
  gradient = np.asarray(gradient).astype(np.float64)
  scaled = np.empty_like(gradient)
  factor = factors(mask, axis)
  for neuron in np.ndindex(*factor.shape):
    where = _weights_of(neuron, axis, gradient.ndim)
    with np.errstate(invalid="ignore"):  # A dead neuron may see 0 * inf.
      scaled[where] = gradient[where] * factor[neuron]
  return scaled


def _axes(axis, ndim):
  return sorted(a % ndim for a in np.atleast_1d(axis))


def _weights_of(neuron, axis, ndim):
  """Returns the index of all incoming weights of one neuron."""
  index: list[Any] = [slice(None)] * ndim
  for a, position in zip(_axes(axis, ndim), neuron, strict=True):
    index[a] = position
  return tuple(index)


# --- How many weights each layer gets -----------------------------------------


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
  """Returns the same density for every layer."""
  return dict.fromkeys(shapes, 1 - sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
  """Returns densities proportional to sum(shape) / prod(shape), at most 1.

  Solved in exact fractions, so no layer is dense by a rounding error.
  """
  size = {path: math.prod(shape) for path, shape in shapes.items()}
  budget = (1 - fractions.Fraction(sparsity)) * sum(size.values())
  dense: set[str] = set()
  while True:
    rest = [path for path in shapes if path not in dense]
    if not rest:
      return dict.fromkeys(shapes, 1.0)
    left = budget - sum(size[path] for path in dense)
    epsilon = left / sum(sum(shapes[path]) for path in rest)
    density = {path: epsilon * sum(shapes[path]) / size[path] for path in rest}
    too_dense = {path for path in rest if density[path] > 1}
    if not too_dense:
      return {path: float(density.get(path, 1)) for path in shapes}
    dense |= too_dense


def active_counts(
  shapes: Shapes, densities: Mapping[str, float]
) -> dict[str, int]:
  """Returns n = max(1, round(density * size)) for each layer."""
  return {
    path: max(1, round(densities[path] * math.prod(shape)))
    for path, shape in shapes.items()
  }


# --- One mask update of one layer ---------------------------------------------


def largest(scores, n: int, eligible) -> np.ndarray:
  """Returns a mask of the n largest eligible scores.

  Ties go to the lowest row-major index, -0 equals 0, and NaN ranks below every
  number.

  >>> largest([2.0, np.nan, 3.0, 2.0], 2, [True, True, True, True])
  array([ True, False,  True, False])
  """
  scores = np.asarray(scores).astype(np.float64)
  flat = [float(score) for score in scores.ravel()]
  indices = [int(i) for i in np.flatnonzero(eligible)]
  if not 0 <= n <= len(indices):
    raise ValueError(f"n must be between 0 and {len(indices)}, got {n}.")

  def rank(i):
    missing = math.isnan(flat[i])
    return (missing, 0.0 if missing else -flat[i], i)

  chosen = np.zeros(scores.size, bool)
  chosen[sorted(indices, key=rank)[:n]] = True
  return chosen.reshape(scores.shape)


def drop(weights, mask, n: int) -> np.ndarray:
  """Returns a mask of the n active weights of smallest magnitude.

  Ties go to the lowest row-major index; NaN is dropped last.
  """
  return largest(-np.abs(np.asarray(weights).astype(np.float64)), n, mask)


def drop_fraction(alpha: float, t: int, t_end: int) -> np.float32:
  """Returns alpha / 2 * (1 + cos(pi t / t_end)) in float32, within [0, 1]."""
  f32 = np.float32
  angle = f32(np.pi) * f32(t) / f32(t_end)
  fraction = f32(alpha) / f32(2) * (f32(1) + np.cos(angle))
  return np.clip(fraction, f32(0), f32(1))


def drop_count(fraction: float, nnz: int) -> int:
  """Returns floor(fraction * nnz) in float32, at most nnz."""
  return min(nnz, math.floor(np.float32(fraction) * np.float32(nnz)))


class Update(NamedTuple):
  """What a mask update has to do, and how much of it is left to chance."""

  dropped: np.ndarray  # bool: active weights that are dropped.
  certain: np.ndarray  # bool: surely active afterwards.
  remaining: int  # The number of candidates that are grown at random.

  @property
  def candidates(self) -> np.ndarray:
    """The weights among which the random rest is grown."""
    return ~self.certain


def rigl_update(weights, mask, gradient, fraction: float) -> Update:
  """Drops by magnitude, grows by the largest |gradient| of the inactive.

  Weights that were just dropped may be grown. Where too few scores are
  nonzero, the rest is grown at random.
  """
  dropped, kept, n = _dropped(weights, mask, fraction)
  scores = np.abs(np.asarray(gradient).astype(np.float64))
  nonzero = ~kept & (scores > 0)
  n_certain = min(n, int(nonzero.sum()))
  certain = kept | largest(scores, n_certain, nonzero)
  return Update(dropped, certain, n - n_certain)


def set_update(weights, mask, fraction: float) -> Update:
  """Drops by magnitude, grows at random among the inactive."""
  dropped, kept, n = _dropped(weights, mask, fraction)
  return Update(dropped, kept, n)


def magnitude_count(t: int, begin: int, end: int, first: int, last: int) -> int:
  """Returns last + floor(((end - t) / (end - begin))^3 (first - last)).

  With the fraction and its products in float32, and between `last` and `first`.
  """
  left = np.float32(end - t) * np.float32(1 / (end - begin))
  left = np.clip(left, np.float32(0), np.float32(1))
  more = math.floor(left * left * left * np.float32(first - last))
  return last + min(more, first - last)


def magnitude_update(weights, mask, n: int) -> Update:
  """Prunes the active weights of smallest magnitude until n are left."""
  mask = np.asarray(mask, bool)
  dropped = drop(weights, mask, max(0, int(mask.sum()) - n))
  return Update(dropped, mask & ~dropped, remaining=0)


def constant_fan_in(n: int, live: int, inputs: int) -> int:
  """Returns the integer nearest to n / live, at least 1 and at most `inputs`.

  >>> [constant_fan_in(n, 4, 3) for n in (1, 5, 6, 7, 20)]
  [1, 1, 2, 2, 3]
  """
  nearest = math.floor(fractions.Fraction(n, live) + fractions.Fraction(1, 2))
  return min(inputs, max(1, nearest))


def srigl_update(
  weights, mask, gradient, fraction: float, gamma: float, n: int, axis: Axis
) -> list[tuple[Any, Update]]:
  """Returns what happens to each neuron, with the index of its weights.

  Drops over the whole layer, ablates neurons with fewer than gamma * fan-in
  salient weights, and grows the others to equal fan-ins of n weights in all.
  """
  _, kept, n_drop = _dropped(weights, mask, fraction)
  alive = fan_ins(mask, axis) > 0
  scores = np.abs(np.asarray(gradient).astype(np.float64))
  for neuron in np.argwhere(~alive):
    scores[_weights_of(neuron, axis, scores.ndim)] = 0
  may_grow = ~kept & (scores > 0)
  grown = largest(scores, min(n_drop, int(may_grow.sum())), may_grow)
  salient = fan_ins(kept | grown, axis)
  inputs = scores.size // alive.size
  left = alive.copy()
  if alive.any():
    fan_in = constant_fan_in(n, int(alive.sum()), inputs)
    needed = np.float32(gamma) * np.float32(fan_in)
    left &= salient.astype(np.float32) >= needed
    if left.sum() * inputs < n:
      left = alive
    fan_in = constant_fan_in(n, int(left.sum()), inputs)
  parts = []
  for neuron in np.ndindex(*left.shape):
    index = _weights_of(neuron, axis, scores.ndim)
    n_left = fan_in if left[neuron] else 0
    parts.append(
      (index, _fill(mask[index], kept[index], scores[index], n_left))
    )
  return parts


def _fill(mask, kept, scores, n):
  """One neuron: what is kept, the first n of it, and the largest scores."""
  certain = largest(np.zeros(kept.shape), min(n, int(kept.sum())), kept)
  need = n - int(certain.sum())
  nonzero = ~certain & ~kept & (scores > 0)
  certain |= largest(scores, min(need, int(nonzero.sum())), nonzero)
  return Update(mask & ~kept, certain, n - int(certain.sum()))


def permits(update: Update, new_mask) -> bool:
  """Returns whether `new_mask` is one that the update may lead to."""
  new_mask = np.asarray(new_mask, bool)
  grown = new_mask & update.candidates
  return bool(
    new_mask[update.certain].all() and grown.sum() == update.remaining
  )


def complete(update: Update, rng: np.random.Generator) -> np.ndarray:
  """Returns a new mask, its random part drawn from `rng`."""
  candidates = np.flatnonzero(update.candidates)
  new_mask = update.certain.copy()
  new_mask.flat[rng.choice(candidates, update.remaining, replace=False)] = True
  return new_mask


def _dropped(weights, mask, fraction):
  mask = np.asarray(mask, bool)
  n = drop_count(fraction, int(mask.sum()))
  dropped = drop(weights, mask, n)
  return dropped, mask & ~dropped, n


# --- A whole run --------------------------------------------------------------


class Topology(NamedTuple):
  """When and how the masks change."""

  kind: str = "static"  # "static", "set", "rigl", "srigl" or "magnitude".
  update_until: int = 0
  update_every: int = 100
  alpha: float | Callable[[int], float] = 0.3  # A function is the fraction.
  grow_from: str = "raw"  # Or "corrected".
  begin_step: int = 0  # Of "magnitude", which ends with `update_until`.
  counts: Mapping[str, tuple[int, int]] = {}  # Active weights, first and last.
  gamma: float = 0.3  # Of "srigl", whose counts are the last ones.

  def is_due(self, t: int) -> bool:
    """Returns whether the call with the 0-based count t updates the masks."""
    if self.kind == "magnitude":
      regular = range(self.begin_step, self.update_until, self.update_every)
      return t in [*regular[1:], self.update_until]
    return (
      self.kind != "static"
      and t > 0
      and t % self.update_every == 0
      and t < self.update_until
    )

  def fraction(self, t: int) -> float:
    """Returns the fraction of the active weights to drop, within [0, 1]."""
    if callable(self.alpha):
      return np.clip(np.float32(self.alpha(t)), np.float32(0), np.float32(1))
    return drop_fraction(self.alpha, t, self.update_until)


class Record(NamedTuple):
  """What a run looks like after one step."""

  params: dict[str, np.ndarray]
  masks: dict[str, np.ndarray]
  momentum: dict[str, np.ndarray]
  sparsity: float
  itop_rate: float  # Fraction of the sparse weights that were ever active.
  mask_change: float  # Newly grown / active, at the last mask update.
  dead_neurons: int
  skipped_updates: int


class Run:
  """Sparse training by SGD with heavy-ball momentum, one step at a time.

  A parameter without a mask is dense. `corrected` names the layers that are
  corrected; None means all that have a mask. `learning_rate` may be a function
  of the count. Every operation is done in `dtype`, but for the correction,
  which is float64 and then rounded. The attributes may be overwritten, with
  NumPy arrays, between steps: with `params` of the tested code, `step` checks
  the masks alone.
  """

  def __init__(
    self,
    params: Arrays,
    masks: Arrays,
    topology: Topology,
    *,
    learning_rate: float | Callable[[int], float],
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    corrected: Sequence[str] | None = None,
    axis: Axis = -1,
    dtype: Any = np.float64,
    seed: int = 0,
  ):
    self.masks = {path: np.array(mask, bool) for path, mask in masks.items()}
    self.params = {
      path: np.where(self._mask(path), param, 0).astype(dtype)
      for path, param in params.items()
    }
    self.momentum = {p: np.zeros_like(w) for p, w in self.params.items()}
    self.ever_active = {path: mask.copy() for path, mask in self.masks.items()}
    self.topology = topology
    self.learning_rate = learning_rate
    self.decay_rate = momentum
    self.weight_decay = weight_decay
    self.corrected = set(self.masks if corrected is None else corrected)
    self.axis = axis
    self.dtype = np.dtype(dtype)
    self.rng = np.random.default_rng(seed)
    self.count = 0
    self.mask_change = 0.0
    self.skipped_updates = 0

  def step(self, gradients: Arrays, chosen: Arrays | None = None) -> Record:
    """Takes one step, and updates the masks where the count says so.

    Args:
      gradients: The dense gradient of every parameter.
      chosen: The masks of the tested code after its step. The random part of a
        mask update follows them, once they are found to be permitted.

    Returns:
      The state after the step.

    Raises:
      AssertionError: `chosen` is not what the method allows.
    """
    gradients = {
      path: np.asarray(gradient).astype(self.dtype)
      for path, gradient in gradients.items()
    }
    new_masks = self._new_masks(gradients, chosen or {})
    for path in self.params:
      self._step_leaf(path, gradients[path])
    for path, new_mask in new_masks.items():
      changed = self.masks[path] != new_mask
      self.params[path][changed] = 0
      self.momentum[path][changed] = 0
      self.ever_active[path] |= new_mask
    self.masks = new_masks
    self.count += 1
    return self.record()

  def record(self) -> Record:
    """Returns the present state, copied."""
    size = sum(mask.size for mask in self.masks.values())
    return Record(
      params={path: param.copy() for path, param in self.params.items()},
      masks={path: mask.copy() for path, mask in self.masks.items()},
      momentum={path: slot.copy() for path, slot in self.momentum.items()},
      sparsity=1 - _total(self.masks) / size,
      itop_rate=_total(self.ever_active) / size,
      mask_change=self.mask_change,
      dead_neurons=sum(
        int((fan_ins(mask, self.axis) == 0).sum())
        for mask in self.masks.values()
      ),
      skipped_updates=self.skipped_updates,
    )

  def _mask(self, path):
    return self.masks.get(path, True)

  def _step_leaf(self, path, gradient):
    """The SGD step of one parameter under its present mask."""
    rate = self.learning_rate
    rate = self.dtype.type(rate(self.count) if callable(rate) else rate)
    decay = self.dtype.type(self.weight_decay)
    beta = self.dtype.type(self.decay_rate)
    mask, param = self._mask(path), self.params[path]
    with np.errstate(all="ignore"):
      if path in self.corrected:
        gradient = correct(gradient, mask, self.axis).astype(self.dtype)
      gradient = np.where(mask, gradient, self.dtype.type(0)) + decay * param
      slot = beta * self.momentum[path] + gradient
      self.momentum[path] = np.where(mask, slot, self.dtype.type(0))
      stepped = param - rate * self.momentum[path]
      self.params[path] = np.where(mask, stepped, self.dtype.type(0))

  def _new_masks(self, gradients, chosen):
    """The masks after this step, from the parameters before it."""
    due = self.topology.is_due(self.count)
    finite = all(np.isfinite(g).all() for g in gradients.values())
    self.skipped_updates += due and not finite
    new_masks = {}
    for path, mask in self.masks.items():
      if due and finite:
        parts = self._update(path, gradients[path])
      else:
        parts = [(..., Update(np.zeros_like(mask), mask, remaining=0))]
      new_mask = np.array(chosen.get(path, mask), bool)
      for index, update in parts:
        if path not in chosen:
          new_mask[index] = complete(update, self.rng)
        is_right = permits(update, new_mask[index])
        assert is_right, f"{path}: wrong mask at {self.count}."
      new_masks[path] = new_mask
    if due and finite:
      grown = {path: new_masks[path] & ~self.masks[path] for path in new_masks}
      self.mask_change = _total(grown) / max(1, _total(new_masks))
    return new_masks

  def _update(self, path, gradient):
    """The update of the layer, or of each neuron; with the index of each."""
    weights, mask = self.params[path], self.masks[path]
    if self.topology.kind == "magnitude":
      steps = self.topology.begin_step, self.topology.update_until
      n = magnitude_count(self.count, *steps, *self.topology.counts[path])
      return [(..., magnitude_update(weights, mask, n))]
    fraction = self.topology.fraction(self.count)
    if self.topology.kind == "set":
      return [(..., set_update(weights, mask, fraction))]
    if self.topology.kind == "srigl":
      gamma, (_, n) = self.topology.gamma, self.topology.counts[path]
      options = (fraction, gamma, n, self.axis)
      return srigl_update(weights, mask, gradient, *options)
    if self.topology.grow_from == "corrected" and path in self.corrected:
      gradient = _scale(gradient, mask, self.axis).astype(self.dtype)
    return [(..., rigl_update(weights, mask, gradient, fraction))]


def simulate(
  run: Run,
  gradients: Sequence[Arrays] | Callable[[dict[str, np.ndarray]], Arrays],
  steps: int,
) -> list[Record]:
  """Takes `steps` steps with given gradients, or a function of the params."""
  records = []
  for t in range(steps):
    known = gradients(run.params) if callable(gradients) else gradients[t]
    records.append(run.step(known))
  return records


def _total(masks):
  return sum(int(mask.sum()) for mask in masks.values())


# --- HAM ----------------------------------------------------------------------


def ham(
  weights_before,
  base_updates,
  gradient,
  lr: float,
  alpha: float = 200.0,
  beta: float = 1e-3,
) -> np.ndarray:
  """Returns w * exp(-lr (alpha sign(w) g + beta)), w after the base step.

  The exponent is clamped to [-5, 5]; zeros and leaves of fewer than two axes
  keep the value of the base step.
  """
  weights, updates, gradient = (
    np.asarray(x).astype(np.float64)
    for x in (weights_before, base_updates, gradient)
  )
  stepped = weights + updates
  if stepped.ndim < 2:
    return stepped
  exponent = -lr * (alpha * np.sign(stepped) * gradient + beta)
  scaled = stepped * np.exp(np.clip(exponent, -5, 5))
  return np.where(stepped == 0, stepped, scaled)
