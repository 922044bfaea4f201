r"""Gradient skew in a two-layer perceptron, on real images.

A hidden layer of which each neuron sees some of the inputs, a normalisation, a
ReLU, and a dense layer on top. Batch normalisation divides the output of
neuron :math:`i` by its standard deviation :math:`\sigma_i`, and so its gradient
:math:`g_i`. With weights of variance :math:`v`, inputs of unit variance and
:math:`f_i` active inputs out of :math:`N`, :math:`\sigma_i^2 = v f_i`. In units
of the density :math:`1 - s_i = f_i / N` this predicts

- equal fan-ins: gradients :math:`(1 - s)^{-1/2}` times the dense layer's;
- unequal ones, and :math:`v` the same for all neurons (He): the norm of
  :math:`g_i` over the active weights does not depend on :math:`s_i`, the norm
  of :math:`w_i` goes with :math:`(1 - s_i)^{1/2}`, so the relative update
  :math:`\lVert g_i \rVert / \lVert w_i \rVert` with :math:`(1 - s_i)^{-1/2}`.

SparseOpt multiplies :math:`g_i` by a multiple of :math:`(1 - s_i)^{1/2}`: its
slopes in a log-log plot are those without it plus 1/2, exactly.

What has to be seen to, or understood:

- A pixel that never changes has no gradient under batch normalisation, and
  inputs of different variance give neurons of equal fan-in different
  :math:`\sigma_i`. Constant pixels are left out, the others standardised.
- The loss does not change with the length of :math:`w_i` under batch
  normalisation, so :math:`g_i` has only :math:`f_i - 1` directions left: with
  one input it is exactly 0, with two or three it is clearly smaller than the
  rule says. `few_inputs` gives the amount for independent inputs; correlated
  ones, such as pixels side by side, lose more.
- :math:`\sigma_i` of few inputs is close to 0 in some neurons, and :math:`1 /
  \sigma_i^2` has no finite mean for two independent inputs: root mean squares
  over neurons are then those of a few neurons.

References:
  Adnan et al., "SparseOpt: Addressing Normalization-induced Gradient Skew in
  Sparse Training", 2026. Evci et al., "Gradient Flow in Sparse Neural Networks
  and How Lottery Tickets Win", 2022, for the initialisation by each neuron's
  own fan-in.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import functools
import itertools
import pathlib
import shlex
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import optax
from scipy import special

import sparseopt_jax
from sparseopt_jax import data
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training import plots
from sparseopt_jax.training import tables
from sparseopt_jax.training.errors import UsageError

NAME = "gradient-skew"
DATASETS = ("digits", "fashion_mnist")
NORMALIZATIONS = ("batch_norm", "layer_norm", "group_norm", "none")
INITIALIZATIONS = ("he", "per_neuron")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
# Slopes are taken over neurons with at least so many active inputs.
FAN_INS = (2, 10)
UPDATE = "relative update"
CORRECTIONS = ("off", "on")
WEIGHT_DECAYS = (0.0, 5e-4)
# The width of the hidden layer: gradients of many neurons cost little, training
# costs more.
WIDTH, TRAINED_WIDTH = 1024, 128

_IMAGES = 10_000
_MEASURED = 2_048  # images of which gradients are measured
_BATCH, _LEARNING_RATE = 128, 0.1


class Examples(NamedTuple):
  """Images as inputs of a dense layer.

  Attributes:
    images: float32 (n, N), each column with mean 0 and variance 1.
    labels: int32 (n,).
  """

  images: jax.Array
  labels: jax.Array


class Neurons(NamedTuple):
  """The hidden layer, a number for each neuron, all (width,).

  Attributes:
    fan_in: Active inputs.
    density: 1 - s_i.
    gradient: Norm of the gradient over the active weights.
    corrected: The same after SparseOpt.
    weights: Norm of the weights.
    outgoing: Norm of the weights to the outputs, times batch norm's scale.
  """

  fan_in: jax.Array | np.ndarray
  density: jax.Array | np.ndarray
  gradient: jax.Array | np.ndarray
  corrected: jax.Array | np.ndarray
  weights: jax.Array | np.ndarray
  outgoing: jax.Array | np.ndarray


class Mlp(nn.Module):
  """Dense, normalisation, ReLU, dense; batch norm by batch statistics.

  Attributes:
    normalization: One of `NORMALIZATIONS`.
    width: Neurons of the hidden layer.
    classes: Outputs.
  """

  normalization: str
  width: int = WIDTH
  classes: int = 10

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    init = nn.initializers.he_normal()
    x = nn.Dense(self.width, use_bias=False, kernel_init=init, name="hidden")(
      images
    )
    if self.normalization == "batch_norm":
      x = nn.BatchNorm(use_running_average=False)(x)
    elif self.normalization == "layer_norm":
      x = nn.LayerNorm()(x)
    elif self.normalization == "group_norm":
      x = nn.GroupNorm(num_groups=8)(x)
    return nn.Dense(self.classes, name="output")(nn.relu(x))


def load(dataset: str, data_dir: str | None = None) -> Examples:
  """Training images without constant pixels, the others standardised.

  Args:
    dataset: One of `DATASETS`.
    data_dir: As for `sparseopt_jax.data.load`, whose errors it raises too.

  Returns:
    At most 10,000 examples.
  """
  found = data.load(dataset, data_dir)
  count = min(found.num_train, _IMAGES)
  batch = next(found.train_batches(seed=0, start_step=0, batch_size=count))
  pixels = batch["image"].reshape(count, -1).astype(np.float64)
  spread = pixels.std(axis=0)
  varies = spread > 0
  images = (pixels - pixels.mean(axis=0))[:, varies] / spread[varies]
  return Examples(jnp.asarray(images, jnp.float32), jnp.asarray(batch["label"]))


def draw_fan_ins(key: jax.Array, inputs: int, width: int) -> jax.Array:
  """Fan-ins with log-uniform densities from 0.03 to 1, at least 2.

  Args:
    key: A random key.
    inputs: The dense fan-in.
    width: Number of neurons.

  Returns:
    int32 (width,).
  """
  low, high = np.log(1 - SPARSITIES[-1]), 0.0
  density = jnp.exp(jax.random.uniform(key, (width,), minval=low, maxval=high))
  return jnp.maximum(jnp.round(density * inputs), 2).astype(jnp.int32)


def draw_mask(key: jax.Array, fan_in: jax.Array, inputs: int) -> jax.Array:
  """Gives each neuron so many inputs at random; bool (inputs, width)."""
  shape = (inputs, fan_in.shape[0])
  order = jnp.argsort(jax.random.uniform(key, shape), axis=0)
  return jnp.argsort(order, axis=0) < fan_in[None, :]


def init(
  model: Mlp, key: jax.Array, mask: jax.Array, initialization: str
) -> dict[str, Any]:
  """Parameters, with zeros outside the mask of the hidden layer.

  Args:
    model: The network.
    key: A random key.
    mask: bool (inputs, width).
    initialization: "he": variance 2 / N. "per_neuron": 2 / f_i.

  Returns:
    `{"hidden": {"kernel": ...}, "output": ..., ...}`.
  """
  params = model.init(key, jnp.zeros((2, mask.shape[0])))["params"]
  kernel = jnp.where(mask, params["hidden"]["kernel"], 0.0)
  if initialization == "per_neuron":
    density = jnp.mean(mask, axis=0, keepdims=True)
    kernel /= jnp.sqrt(density)
  return {**params, "hidden": {"kernel": kernel}}


def loss(model: Mlp, params: dict[str, Any], examples: Examples) -> jax.Array:
  """Mean cross-entropy."""
  logits, _ = model.apply(
    {"params": params}, examples.images, mutable=["batch_stats"]
  )
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
  )


def hidden_gradient(
  model: Mlp, params: dict[str, Any], examples: Examples
) -> jax.Array:
  """The dense gradient of the hidden layer's weights, (inputs, width)."""
  head = Examples(*(array[:_MEASURED] for array in examples))
  gradient = jax.grad(loss, argnums=1)(model, params, head)
  return gradient["hidden"]["kernel"]


def measure(
  model: Mlp, params: dict[str, Any], mask: jax.Array, examples: Examples
) -> Neurons:
  """What each neuron's gradient is, before SparseOpt and after it."""
  gradient = hidden_gradient(model, params, examples)
  norm = functools.partial(jnp.linalg.norm, axis=0)
  scale = params.get("BatchNorm_0", {}).get("scale", 1.0)
  return Neurons(
    fan_in=jnp.sum(mask, axis=0),
    density=1 - sparseopt_jax.neuron_sparsity(mask),
    gradient=norm(jnp.where(mask, gradient, 0.0)),
    corrected=norm(sparseopt_jax.correct(gradient, mask)),
    weights=norm(params["hidden"]["kernel"]),
    outgoing=norm(params["output"]["kernel"].T) * jnp.abs(scale),
  )


@functools.partial(jax.jit, static_argnums=0)
def _root_mean_square(
  model: Mlp, seed: jax.Array, fan_in: jax.Array, examples: Examples
) -> jax.Array:
  """Of the dense gradient, where each neuron has `fan_in` inputs."""
  init_key, mask_key = jax.random.split(jax.random.key(seed))
  inputs = examples.images.shape[1]
  mask = draw_mask(mask_key, jnp.full(model.width, fan_in), inputs)
  params = init(model, init_key, mask, "he")
  return jnp.sqrt(jnp.mean(hidden_gradient(model, params, examples) ** 2))


def uniform_ratios(
  examples: Examples, normalization: str, seed: int
) -> list[float]:
  """Sparse over dense gradient where all neurons have the same fan-in.

  Args:
    examples: As `load` gives them.
    normalization: One of `NORMALIZATIONS`.
    seed: Of the weights and masks.

  Returns:
    For each of `SPARSITIES` the root mean square over all weights of the hidden
    layer's dense gradient, as a ratio to that of the network without zeros.
  """
  model = Mlp(normalization)
  inputs = examples.images.shape[1]
  dense, *sparse = [
    float(_root_mean_square(model, seed, fan_in, examples))
    for fan_in in (inputs, *fan_ins(inputs))
  ]
  return [each / dense for each in sparse]


def ratios(
  examples: Examples, normalization: str, seeds: Sequence[int]
) -> dict[str, list[float]]:
  """{sparsity: one a seed} of `uniform_ratios`."""
  found = [uniform_ratios(examples, normalization, seed) for seed in seeds]
  columns = zip(SPARSITIES, zip(*found, strict=True), strict=True)
  return {str(sparsity): list(column) for sparsity, column in columns}


def fan_ins(inputs: int) -> list[int]:
  """The fan-ins that come closest to `SPARSITIES`, at least 1."""
  return [max(round((1 - s) * inputs), 1) for s in SPARSITIES]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _start(
  model: Mlp, seed: jax.Array, examples: Examples, initialization: str
) -> tuple[dict[str, Any], jax.Array]:
  init_key, *mask_keys = jax.random.split(jax.random.key(seed), 3)
  inputs = examples.images.shape[1]
  fan_in = draw_fan_ins(mask_keys[0], inputs, model.width)
  mask = draw_mask(mask_keys[1], fan_in, inputs)
  return init(model, init_key, mask, initialization), mask


_measure = jax.jit(measure, static_argnums=0)


def at_initialization(
  examples: Examples, normalization: str, initialization: str, seed: int
) -> Neurons:
  """The neurons of a layer with fan-ins drawn by `draw_fan_ins`.

  Args:
    examples: As `load` gives them.
    normalization: One of `NORMALIZATIONS`.
    initialization: One of `INITIALIZATIONS`.
    seed: Of the weights, fan-ins and masks.
  """
  model = Mlp(normalization)
  params, mask = _start(model, seed, examples, initialization)
  return jax.device_get(_measure(model, params, mask, examples))


def slopes(neurons: Neurons, fan_in: int) -> dict[str, float]:
  """Least squares of logarithms against log(1 - s_i).

  Args:
    neurons: What was measured.
    fan_in: Neurons with fewer active inputs are left out.

  Returns:
    The slope of the gradient's norm and of the relative update
    ||g_i|| / ||w_i||, each before SparseOpt and after it, and of the norms of
    the weights and of the outgoing weights.
  """
  some = Neurons(*(each[neurons.fan_in >= fan_in] for each in neurons))
  fit = lambda y: float(np.polyfit(np.log(some.density), np.log(y), 1)[0])
  return {
    "gradient": fit(some.gradient),
    "corrected gradient": fit(some.corrected),
    UPDATE: fit(some.gradient / some.weights),
    f"corrected {UPDATE}": fit(some.corrected / some.weights),
    "weights": fit(some.weights),
    "outgoing": fit(some.outgoing),
  }


def few_inputs(fan_in: int) -> float:
  r"""Expected log of a neuron's relative update, as a deviation from the rule.

  For independent Gaussian inputs under batch normalisation and He
  initialisation, :math:`\lVert g_i \rVert^2 \lVert w_i \rVert^2` is chi-square
  with :math:`f_i - 1` degrees of freedom, and :math:`\lVert w_i \rVert^2` is
  with :math:`f_i`.

  Args:
    fan_in: :math:`f_i`, at least 2.

  Returns:
    :math:`E \log (\lVert g_i \rVert / \lVert w_i \rVert) + \tfrac12 \log f_i`,
    less its limit for large :math:`f_i`.
  """
  half = special.digamma((fan_in - 1) / 2) / 2 - special.digamma(fan_in / 2)
  return float(half + (np.log(fan_in) - np.log(2)) / 2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
  model: Mlp,
  correction: str,
  params: dict[str, Any],
  mask: jax.Array,
  weight_decay: float,
  seed: jax.Array,
  stops: jax.Array,
  examples: Examples,
) -> Neurons:
  """Trains one network; arrays of the result have a first axis of `stops`."""
  masks: dict[str, Any] = jax.tree.map(lambda _: optax.MaskedNode(), params)
  masks["hidden"]["kernel"] = mask
  tx = sparseopt_jax.sparseopt_sgd(
    _LEARNING_RATE,
    sparsity=0.0,  # Not used: masks are given.
    weight_decay=weight_decay,
    sparse=lambda path, _: path == "hidden/kernel",
    corrected=None if correction == "on" else False,
    masks=masks,
  )

  def step(count: jax.Array, carry: tuple) -> tuple:
    params, opt_state = carry
    key = jax.random.fold_in(jax.random.key(seed), count)
    batch = jax.random.randint(key, (_BATCH,), 0, examples.labels.shape[0])
    gradient = jax.grad(loss, argnums=1)(
      model, params, Examples(*(array[batch] for array in examples))
    )
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def until(carry: tuple, bounds: jax.Array) -> tuple[tuple, Neurons]:
    carry = lax.fori_loop(bounds[0], bounds[1], step, carry)
    return carry, measure(model, carry[0], mask, examples)

  starts = jnp.concatenate([jnp.zeros_like(stops[:1]), stops[:-1]])
  bounds = jnp.stack([starts, stops], axis=1)
  return lax.scan(until, (params, tx.init(params)), bounds)[1]


def stops_until(steps: int) -> list[int]:
  """0, 10, 30, 100, 300, ... and the last step."""
  powers = range(1, len(str(steps)) + 1)
  marks = [first * 10**power for power in powers for first in (1, 3)]
  return [
    0,
    *(mark for mark in marks if mark < steps),
    *([steps] * (steps > 0)),
  ]


def along_training(
  examples: Examples,
  initialization: str,
  correction: str,
  weight_decay: float,
  seeds: Sequence[int],
  stops: Sequence[int],
) -> list[list[Neurons]]:
  """Trains by SGD with momentum, batch norm and static masks.

  Args:
    examples: As `load` gives them.
    initialization: One of `INITIALIZATIONS`.
    correction: Whether SparseOpt is "on" or "off".
    weight_decay: Of all parameters.
    seeds: One network each.
    stops: Numbers of steps after which to measure, ascending.

  Returns:
    For each seed and stop the neurons.
  """
  model = Mlp("batch_norm", TRAINED_WIDTH)
  seed = jnp.asarray(seeds)
  params, mask = jax.vmap(
    lambda seed: _start(model, seed, examples, initialization)
  )(seed)
  train = jax.vmap(
    functools.partial(_train, model, correction),
    in_axes=(0, 0, None, 0, None, None),
  )
  found = jax.device_get(
    train(params, mask, weight_decay, seed, jnp.asarray(stops), examples)
  )
  return [
    [Neurons(*(array[i, j] for array in found)) for j in range(len(stops))]
    for i in range(len(seeds))
  ]


def by_seed(found: Sequence[Neurons]) -> dict[str, dict[str, list[float]]]:
  """Slopes of several networks.

  Args:
    found: The neurons of each.

  Returns:
    {least fan-in: {slope: one a network}}, see `slopes`.
  """
  result = {}
  for fan_in in FAN_INS:
    each = [slopes(neurons, fan_in) for neurons in found]
    result[str(fan_in)] = {name: [s[name] for s in each] for name in each[0]}
  return result


def _deviations(found: Sequence[Neurons]) -> dict[str, list[float]]:
  """{fan-in: log relative update after SparseOpt, less that of many inputs}."""
  fan_in = np.concatenate([neurons.fan_in for neurons in found])
  logs = np.concatenate([np.log(n.corrected / n.weights) for n in found])
  usual = np.mean(logs[fan_in >= 20])
  return {
    str(few): (logs[fan_in == few] - usual).tolist()
    for few in (2, 3, 4, 6, 10)
    if np.sum(fan_in == few) > 1
  }


def measure_all(examples: Examples, seeds: int, steps: int) -> dict[str, Any]:
  """All figures of the study.

  Args:
    examples: As `load` gives them.
    seeds: How many networks for each figure.
    steps: Length of the training.

  Returns:
    - `ratios`: {normalisation: {sparsity: one a seed}}, see `uniform_ratios`.
    - `slopes`: {normalisation: {initialisation: {least fan-in: {slope: one a
      seed}}}}, see `slopes`.
    - `few_inputs`: {fan-in: one a neuron}, see the function of that name.
    - `training`: {initialisation: {correction: {weight decay: at each of
      `stops` {least fan-in: {slope: one a seed}}}}}.
    - `neurons`: those of seed 0, batch norm and He initialisation.
  """
  stops = stops_until(steps)
  found = {
    (norm, start): [
      at_initialization(examples, norm, start, seed) for seed in range(seeds)
    ]
    for norm, start in itertools.product(NORMALIZATIONS, INITIALIZATIONS)
  }
  skewed = found["batch_norm", "he"]
  return {
    "inputs": examples.images.shape[1],
    "seeds": seeds,
    "stops": stops,
    "ratios": {n: ratios(examples, n, range(seeds)) for n in NORMALIZATIONS},
    "slopes": {
      norm: {start: by_seed(found[norm, start]) for start in INITIALIZATIONS}
      for norm in NORMALIZATIONS
    },
    "few_inputs": _deviations(skewed),
    "training": {
      start: {
        on: {
          str(decay): _by_stop(
            along_training(examples, start, on, decay, range(seeds), stops)
          )
          for decay in WEIGHT_DECAYS
        }
        for on in CORRECTIONS
      }
      for start in INITIALIZATIONS
    },
    "neurons": {k: v.tolist() for k, v in skewed[0]._asdict().items()},
  }


def _by_stop(runs: Sequence[Sequence[Neurons]]) -> list[dict[str, Any]]:
  return [by_seed(at_stop) for at_stop in zip(*runs, strict=True)]


def _cell(values: Sequence[float], sign: str = "+") -> str:
  mean, half = report.interval(values)
  return f"{mean:{sign}.3f} ± {half:.3f}"


def table(raw: dict[str, Any]) -> str:
  """What `measure_all` found, as text; means with 95 % intervals."""
  return "\n\n".join(
    [
      "Sparse over dense gradient, all neurons with the same fan-in\n"
      + tables.aligned(_ratio_rows(raw)),
      "Slopes against log(1 - s_i) at initialisation, without SparseOpt -> "
      "with it\n" + tables.aligned(_slope_rows(raw)),
      *_few_inputs_text(raw),
      "Slopes along training, batch norm, neurons with at least "
      f"{FAN_INS[-1]} inputs\n" + tables.aligned(_training_rows(raw)),
    ]
  )


def _ratio_rows(raw: dict[str, Any]) -> list[list[str]]:
  rows = [["sparsity", "fan-in", "theory", *map(_words, NORMALIZATIONS)]]
  for sparsity, fan_in in zip(SPARSITIES, fan_ins(raw["inputs"]), strict=True):
    theory = (raw["inputs"] / fan_in) ** 0.5
    found = [raw["ratios"][norm][str(sparsity)] for norm in NORMALIZATIONS]
    cells = [_cell(each, "") for each in found]
    rows.append([f"{sparsity:.0%}", str(fan_in), f"{theory:.3f}", *cells])
  return rows


def _slope_rows(raw: dict[str, Any]) -> list[list[str]]:
  header = ["normalisation", "initialisation", "fan-in", "gradient"]
  rows = [[*header, UPDATE]]
  for norm, start, fan_in in itertools.product(
    NORMALIZATIONS, INITIALIZATIONS, FAN_INS
  ):
    found = raw["slopes"][norm][start][str(fan_in)]
    cells = []
    for name in ("gradient", UPDATE):
      mean, _ = report.interval(found[name])
      cells.append(f"{mean:+.3f} -> {_cell(found[f'corrected {name}'])}")
    rows.append([_words(norm), _words(start), f">= {fan_in}", *cells])
  return rows


def _few_inputs_text(raw: dict[str, Any]) -> list[str]:
  """Empty where no neuron has few inputs."""
  rows = [
    [fan_in, str(len(logs)), f"{few_inputs(int(fan_in)):+.3f}", _cell(logs)]
    for fan_in, logs in raw["few_inputs"].items()
  ]
  if not rows:
    return []
  title = (
    "Neurons with few inputs, batch norm, He, with SparseOpt: log of the "
    "relative update\nless its mean over neurons with at least 20\n"
  )
  header = ["fan-in", "neurons", "independent inputs", "measured"]
  return [title + tables.aligned([header, *rows])]


def _training_rows(raw: dict[str, Any]) -> list[list[str]]:
  header = ["slope of", "initialisation", "SparseOpt", "weight decay"]
  rows = [[*header, *(f"step {stop}" for stop in raw["stops"])]]
  for name, start, on, decay in itertools.product(
    (UPDATE, "weights", "outgoing"), INITIALIZATIONS, CORRECTIONS, WEIGHT_DECAYS
  ):
    found = _slopes_by_stop(raw, name, start, on, decay)
    cells = [_cell(each) for each in found]
    rows.append([name, _words(start), on, f"{decay:g}", *cells])
  return rows


def _slopes_by_stop(
  raw: dict[str, Any],
  name: str,
  initialization: str,
  correction: str,
  decay: float,
) -> list[list[float]]:
  """One a seed for each stop; updates are those that the run makes."""
  if name == UPDATE and correction == "on":
    name = f"corrected {name}"
  found = raw["training"][initialization][correction][str(decay)]
  return [stop[str(FAN_INS[-1])][name] for stop in found]


def _words(name: str) -> str:
  return {"he": "He", "per_neuron": "per neuron"}.get(
    name, name.replace("_", " ")
  )


_BEFORE, _AFTER, _THEORY = "#9a4f2c", "#1f5fa8", "#444444"
# Marker, colour, size: what coincides is drawn one inside the other.
_MARKERS = {
  "layer_norm": ("s", "#3a8f6a", 9),
  "group_norm": ("D", "#c9a227", 6),
  "batch_norm": ("o", _BEFORE, 4),
  "none": ("v", "#8a8a8a", 5),
}


def figure(raw: dict[str, Any], title: str) -> Figure:
  """Plots what `measure_all` found.

  Args:
    raw: From `measure_all`.
    title: Above all panels.

  Returns:
    Six panels, made in matplotlib's current style.
  """
  result = Figure(figsize=(13.5, 8), layout="constrained")
  result.suptitle(title, fontweight="bold")
  axes = result.subplots(2, 3)
  plot_ratios(axes[0, 0], raw)
  plot_neurons(axes[0, 1], raw)
  plot_slopes(axes[0, 2], raw)
  for axis, start in zip(axes[1, :2], INITIALIZATIONS, strict=True):
    plot_training(axis, raw, start)
  plot_weights(axes[1, 2], raw)
  return result


def plot_ratios(axis: Axes, raw: dict[str, Any]) -> None:
  """Sparse over dense gradient against theory; hollow below 10 inputs."""
  axis.set_title("Equal fan-ins: sparse over dense gradient")
  density = 1 - np.linspace(0, SPARSITIES[-1], 200)
  axis.plot(
    1 - density, density**-0.5, color=_THEORY, lw=1, label=r"$1/\sqrt{1-s}$"
  )
  enough = np.array(fan_ins(raw["inputs"])) >= FAN_INS[-1]
  for norm, (marker, color, size) in _MARKERS.items():
    values = raw["ratios"][norm]
    mean = np.array([np.mean(values[str(s)]) for s in SPARSITIES])
    for some, fill in ((enough, color), (~enough, "none")):
      axis.plot(
        np.array(SPARSITIES)[some],
        mean[some],
        marker,
        color=color,
        markerfacecolor=fill,
        markersize=size,
        label=_words(norm) if fill == color else None,
      )
  axis.set_yscale("log")
  ticks = [1, 2, 3, 4, 6, 10]
  axis.set_yticks(ticks, [str(tick) for tick in ticks])
  axis.minorticks_off()
  axis.set_xlabel(f"sparsity s (hollow: fewer than {FAN_INS[-1]} inputs)")
  axis.legend()


def plot_neurons(axis: Axes, raw: dict[str, Any]) -> None:
  """Relative update of each neuron of one network, before and after."""
  axis.set_title("Unequal fan-ins: each neuron, batch norm, He")
  neurons = Neurons(*(np.array(raw["neurons"][k]) for k in Neurons._fields))
  fits = slopes(neurons, FAN_INS[-1])
  x = np.log(neurons.density)
  some = neurons.fan_in >= FAN_INS[-1]
  for label, name, values, color in (
    ("without SparseOpt", UPDATE, neurons.gradient, _BEFORE),
    ("with", f"corrected {UPDATE}", neurons.corrected, _AFTER),
  ):
    y = np.log(values / neurons.weights)
    axis.scatter(neurons.density, np.exp(y), s=7, alpha=0.35, color=color, lw=0)
    line = np.mean(y[some]) + fits[name] * (x[some] - np.mean(x[some]))
    order = np.argsort(x[some])
    axis.plot(
      neurons.density[some][order],
      np.exp(line[order]),
      color=color,
      label=f"{label}: slope {round(fits[name], 2) + 0.0:+.2f}",
    )
  middle = np.median(neurons.corrected / neurons.weights)
  axis.set_ylim(middle / 12, middle * 25)
  axis.set_xscale("log")
  axis.set_yscale("log")
  axis.set_xlabel(r"density $1 - s_i$")
  axis.set_ylabel(r"$\Vert g_i\Vert / \Vert w_i\Vert$")
  axis.legend(loc="upper right")


def plot_slopes(axis: Axes, raw: dict[str, Any]) -> None:
  """Slope of the relative update, before and after, for each network."""
  axis.set_title(r"Slope of $\Vert g_i\Vert/\Vert w_i\Vert$ at step 0")
  rows = list(itertools.product(NORMALIZATIONS, INITIALIZATIONS))
  for y, (norm, start) in enumerate(rows):
    found = raw["slopes"][norm][start][str(FAN_INS[-1])]
    before, after = (
      report.interval(found[name]) for name in (UPDATE, f"corrected {UPDATE}")
    )
    axis.plot([before[0], after[0]], [y, y], color="#bbbbbb", lw=1, zorder=1)
    for (mean, half), color in ((before, _BEFORE), (after, _AFTER)):
      axis.errorbar(mean, y, xerr=half, fmt="o", color=color, markersize=5)
  axis.axvline(0, color=_THEORY, lw=1)
  labels = [f"{_words(norm)}, {_words(start)}" for norm, start in rows]
  axis.set_yticks(range(len(rows)), labels)
  axis.invert_yaxis()
  axis.set_xlabel(f"without SparseOpt, with; at least {FAN_INS[-1]} inputs")


def plot_training(axis: Axes, raw: dict[str, Any], initialization: str) -> None:
  """Slope of the relative update along training."""
  axis.set_title(f"Along training, batch norm, {_words(initialization)}")
  for on, decay in itertools.product(CORRECTIONS, WEIGHT_DECAYS):
    found = _slopes_by_stop(raw, UPDATE, initialization, on, decay)
    _band(axis, raw["stops"], found, on, decay)
  axis.set_ylabel(r"slope of $\Vert g_i\Vert/\Vert w_i\Vert$")


def plot_weights(axis: Axes, raw: dict[str, Any]) -> None:
  """Slope of the weights' norm along training."""
  axis.set_title("Norm of the weights along training, He")
  for on, decay in itertools.product(CORRECTIONS, WEIGHT_DECAYS):
    found = _slopes_by_stop(raw, "weights", "he", on, decay)
    _band(axis, raw["stops"], found, on, decay)
  axis.set_ylabel(r"slope of $\Vert w_i\Vert$")


def _band(
  axis: Axes,
  stops: Sequence[int],
  values: Sequence[Sequence[float]],
  correction: str,
  decay: float,
) -> None:
  mean, half = np.array([report.interval(each) for each in values]).T
  color = _AFTER if correction == "on" else _BEFORE
  axis.plot(
    stops,
    mean,
    "o-" if decay == 0 else "o--",
    color=color,
    markersize=3,
    label=f"{'with' if correction == 'on' else 'without'}, decay {decay:g}",
  )
  axis.fill_between(stops, mean - half, mean + half, color=color, alpha=0.1)
  axis.axhline(0, color=_THEORY, lw=1)
  axis.set_xscale("symlog", linthresh=10)
  axis.set_xlabel("step")
  axis.legend()


def study(args: argparse.Namespace, command: str) -> None:
  """Measures and reports.

  Raises:
    UsageError: A flag out of its range, or a data set that is not there.
  """
  if args.seeds < 1:
    raise UsageError(f"--seeds must be at least 1, got {args.seeds}")
  if args.steps < 0:
    raise UsageError(f"--steps must not be negative, got {args.steps}")
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"--out {args.out}: {error.strerror}") from None
  try:
    examples = load(args.dataset, args.data_dir)
  except (data.DataNotPreparedError, ImportError) as error:
    raise UsageError(f"--dataset {args.dataset}: {error}") from error
  raw = {
    "dataset": args.dataset,
    **measure_all(examples, args.seeds, args.steps),
  }
  with matplotlib.rc_context(plots.STYLE):
    image = figure(raw, f"Gradient skew, {args.dataset}, {args.seeds} seeds")
    report.save(args.out, NAME, command, raw, table(raw), image)


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit code."""
  parser = cli.Parser(
    prog=f"python -m sparseopt_jax.studies {NAME}",
    description=(__doc__ or "").splitlines()[0],
  )
  parser.add_argument(
    "--dataset", choices=DATASETS, default="digits", help="[%(default)s]"
  )
  parser.add_argument("--data-dir", help="folder of TensorFlow Datasets")
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=pathlib.Path("runs") / NAME,
    help="folder [%(default)s]",
  )
  parser.add_argument(
    "--seeds", type=int, default=10, help="networks a figure [%(default)s]"
  )
  parser.add_argument(
    "--steps", type=int, default=3000, help="training steps [%(default)s]"
  )

  def command() -> None:
    args = parser.parse_args(arguments)
    words = ["python", "-m", "sparseopt_jax.studies", NAME, *arguments]
    study(args, shlex.join(words))

  return cli.run(command)
