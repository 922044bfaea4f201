r"""Gradient skew of batch normalisation, without SparseOpt and with it.

A hidden layer with masks, a normalisation, a ReLU and a dense layer, on real
images. Batch normalisation divides the output of neuron :math:`i` by its
standard deviation :math:`\sigma_i`, and so its gradient :math:`g_i`. With
inputs of variance 1 and weights of one variance, :math:`\sigma_i^2` goes with
the number of active inputs, hence with the density :math:`1 - s_i`. So

- where all fan-ins are equal, the gradient is :math:`(1 - s)^{-1/2}` times that
  of the dense layer;
- where they are not, the relative update :math:`\lVert g_i \rVert / \lVert w_i
  \rVert` goes with :math:`(1 - s_i)^{-1/2}`: a slope of -1/2 in a log-log plot.

SparseOpt adds 1/2 to the slope, exactly. "per neuron" is the initialisation of
Evci et al., 2022: the variance of the weights goes with 1 over their neuron's
own fan-in.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import optax

import sparseopt_jax
from sparseopt_jax import metrics
from sparseopt_jax.studies import report
from sparseopt_jax.training import build
from sparseopt_jax.training import cli
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

NORMALIZATIONS = {"batch norm": 0, "layer norm": 1, "none": None}  # axes
INITIALIZATIONS = ("He", "per neuron")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
STOPS = (0, 10, 30, 100, 300, 1000, 3000)
# Batch normalisation takes one of a neuron's directions off its gradient: with
# few inputs, that alone would make a slope.
LEAST_FAN_IN = 10
# Training costs more than gradients do.
WIDTH, TRAINED_WIDTH = 1024, 128

TITLES = {
  "ratios": "Equal fan-ins: sparse over dense gradient",
  "slopes": "Slope of the relative update at initialisation",
  "training": "Slopes along training, batch norm, He",
}
RUNS = {"without SparseOpt": "#9a4f2c", "with SparseOpt": "#1f5fa8"}

Examples = tuple[jax.Array, jax.Array]  # (n, inputs) and (n,), see `load`
Figures = dict[str, list[float]]  # one a seed
Params = dict[str, jax.Array]


class Neurons(NamedTuple):
  """A number for each neuron of the hidden layer."""

  fan_in: jax.Array
  dense: jax.Array  # norm of the gradient over all weights
  gradient: jax.Array  # over the active ones
  corrected: jax.Array  # the same after SparseOpt
  weights: jax.Array  # norm of the weights


def load(dataset: str, data_dir: str | None = None) -> Examples:
  """At most 10,000 images and their labels.

  Constant pixels are left out, the others have mean 0 and variance 1.
  """
  found = build.dataset(Config(dataset=dataset, data_dir=data_dir))
  count = min(found.num_train, 10_000)
  batch = next(found.train_batches(seed=0, start_step=0, batch_size=count))
  pixels = batch["image"].reshape(count, -1).astype(np.float64)
  pixels = pixels[:, np.ptp(pixels, axis=0) > 0]
  images = (pixels - pixels.mean(axis=0)) / pixels.std(axis=0)
  return jnp.asarray(images, jnp.float32), jnp.asarray(batch["label"])


def start(
  seed: int | jax.Array,
  inputs: int,
  width: int = WIDTH,
  initialization: str = "He",
  fan_in: int | jax.Array | None = None,
) -> tuple[Params, jax.Array]:
  """Draws parameters, and the mask of "hidden", bool (inputs, width).

  Without a `fan_in` for all neurons, fan-ins are unequal: log-uniform from 3 %
  of the inputs to all, at least 2.
  """
  keys = jax.random.split(jax.random.key(seed), 4)
  if fan_in is None:
    density = 0.03 ** jax.random.uniform(keys[0], (1, width))
    fan_in = jnp.maximum(jnp.round(density * inputs), 2)
  order = jnp.argsort(jax.random.uniform(keys[1], (inputs, width)), axis=0)
  mask = jnp.argsort(order, axis=0) < fan_in
  hidden = mask * jax.nn.initializers.he_normal()(keys[2], mask.shape)
  if initialization == "per neuron":
    hidden /= jnp.sqrt(jnp.mean(mask, axis=0, keepdims=True))
  output = jax.nn.initializers.lecun_normal()(keys[3], (width, 10))
  scale, shift = jnp.ones((1, width)), jnp.zeros((1, width))
  params = {"hidden": hidden, "scale": scale, "shift": shift}
  return {**params, "output": output, "bias": jnp.zeros((1, 10))}, mask


def loss(params: Params, examples: Examples, normalization: str) -> jax.Array:
  """Mean cross-entropy; batch norm takes the statistics of the batch."""
  images, labels = examples
  x = images @ params["hidden"]
  axis = NORMALIZATIONS[normalization]
  if axis is not None:
    x = jax.nn.standardize(x, axis, epsilon=1e-5)
    x = x * params["scale"] + params["shift"]
  logits = jax.nn.relu(x) @ params["output"] + params["bias"]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses)


def measure(
  params: Params, mask: jax.Array, examples: Examples, normalization: str
) -> Neurons:
  """The gradient on the first 2,048 images."""
  head = jax.tree.map(lambda array: array[:2048], examples)
  gradient = jax.grad(loss)(params, head, normalization)["hidden"]
  norm = functools.partial(jnp.linalg.norm, axis=0)
  return Neurons(
    fan_in=jnp.sum(mask, axis=0),
    dense=norm(gradient),
    gradient=norm(mask * gradient),
    corrected=norm(sparseopt_jax.correct(gradient, mask)),
    weights=norm(params["hidden"]),
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def at_initialization(
  examples: Examples,
  normalization: str,
  initialization: str,
  seed: int,
  fan_in: int | None = None,
) -> Neurons:
  """The neurons of a network that `start` draws."""
  inputs = examples[0].shape[1]
  params, mask = start(seed, inputs, WIDTH, initialization, fan_in)
  return measure(params, mask, examples, normalization)


def fan_ins(inputs: int) -> list[int]:
  """The fan-ins that come closest to `SPARSITIES`."""
  return [max(round((1 - s) * inputs), 1) for s in SPARSITIES]


def ratios(
  examples: Examples, normalization: str, seeds: Sequence[int]
) -> Figures:
  """Equal fan-ins: norm of the dense gradient, over that without zeros."""
  of = functools.partial(at_initialization, examples, normalization, "He")
  sizes = lambda n: np.array([jnp.linalg.norm(of(s, n).dense) for s in seeds])
  inputs = examples[0].shape[1]
  dense = sizes(inputs)
  return {
    f"{sparsity:.0%}": (sizes(fan_in) / dense).tolist()
    for sparsity, fan_in in zip(SPARSITIES, fan_ins(inputs), strict=True)
  }


def fit(neurons: Neurons, norm: jax.Array) -> np.ndarray:
  """Slope and intercept of log(norm) against log(fan-in), or log(1 - s_i)."""
  some = neurons.fan_in >= LEAST_FAN_IN
  x, y = np.log(neurons.fan_in[some]), np.log(norm[some])
  return np.polyfit(x, y.astype(np.float64), 1)


def slopes(found: Sequence[Neurons]) -> Figures:
  """Of the relative update and of the norm of the weights, one a network."""
  slope = lambda neurons, norm: float(fit(neurons, norm)[0])
  return {
    "without SparseOpt": [slope(n, n.gradient / n.weights) for n in found],
    "with SparseOpt": [slope(n, n.corrected / n.weights) for n in found],
    "weights": [slope(n, n.weights) for n in found],
  }


def along_training(
  examples: Examples, corrected: bool, seeds: Sequence[int], stops: list[int]
) -> list[list[Neurons]]:
  """SGD, static masks: for each of `stops`, in steps, the neurons by seed."""

  def train(seed: jax.Array, examples: Examples) -> Neurons:
    params, mask = start(seed, examples[0].shape[1], TRAINED_WIDTH)
    tx = sparseopt_jax.sparsify(
      optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9)),
      sparsity=0.0,  # Not used: masks are given.
      corrected=corrected,
      sparse=lambda path, _: path == "hidden",
      masks={**dict.fromkeys(params, optax.MaskedNode()), "hidden": mask},
    )

    def step(count: jax.Array, carry: tuple) -> tuple:
      params, opt_state = carry
      key = jax.random.fold_in(jax.random.key(seed), count)
      rows = jax.random.randint(key, (128,), 0, len(examples[0]))
      batch = jax.tree.map(lambda array: array[rows], examples)
      gradient = jax.grad(loss)(params, batch, "batch norm")
      updates, opt_state = tx.update(gradient, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    def until(carry: tuple, bounds: jax.Array) -> tuple[tuple, Neurons]:
      carry = lax.fori_loop(bounds[0], bounds[1], step, carry)
      return carry, measure(carry[0], mask, examples, "batch norm")

    bounds = jnp.array([[0, *stops[:-1]], stops]).T
    return lax.scan(until, (params, tx.init(params)), bounds)[1]

  train_all = jax.jit(jax.vmap(train, in_axes=(0, None)))
  found = train_all(jnp.asarray(seeds), examples)
  return [
    [Neurons(*(array[i, j] for array in found)) for i in range(len(seeds))]
    for j in range(len(stops))
  ]


def measure_all(examples: Examples, seeds: int, steps: int) -> dict[str, Any]:
  """The study: for each of `TITLES` the `Figures` of each network."""
  every = range(seeds)
  stops = [*(stop for stop in STOPS if stop < steps), steps]
  training: dict[str, Figures] = {}
  for run in RUNS:
    runs = along_training(examples, run == "with SparseOpt", every, stops)
    found = {f"step {n}": slopes(r) for n, r in zip(stops, runs, strict=True)}
    for what, key in (("update", run), ("weights", "weights")):
      training[f"{what} {run}"] = {n: each[key] for n, each in found.items()}
  return {
    "inputs": examples[0].shape[1],
    "stops": stops,
    "ratios": {n: ratios(examples, n, every) for n in ("batch norm", "none")},
    "slopes": {
      f"{norm}, {first}": slopes(
        [at_initialization(examples, norm, first, seed) for seed in every]
      )
      for norm in NORMALIZATIONS
      for first in INITIALIZATIONS
    },
    "training": training,
  }


def table(raw: dict[str, Any]) -> str:
  """What `measure_all` found, as text; means with 95 % intervals."""
  parts = []
  for name, title in TITLES.items():
    columns = list(next(iter(raw[name].values())))
    rows = [["", *columns]]
    if name == "ratios":
      theory = [(raw["inputs"] / n) ** 0.5 for n in fan_ins(raw["inputs"])]
      rows.append(["theory", *(f"{ratio:.3f}" for ratio in theory)])
    for network, found in raw[name].items():
      cells = [report.interval(found[column]) for column in columns]
      rows.append([network, *(f"{m:.3f} ± {half:.3f}" for m, half in cells)])
    parts.append(f"{title}\n{metrics.aligned(rows)}")
  return "\n\n".join(parts)


def _errorbars(axis: Axes, x: Any, found: Figures, **style: Any) -> None:
  mean, half = np.array([report.interval(each) for each in found.values()]).T
  axis.errorbar(x, mean, half, ms=4, **style)


def plot_ratios(axis: Axes, raw: dict[str, Any]) -> None:
  """Equal fan-ins, against theory."""
  s = np.linspace(0, SPARSITIES[-1], 200)
  axis.plot(s, (1 - s) ** -0.5, "k", lw=1, label=r"$1/\sqrt{1 - s}$")
  for network, found in raw["ratios"].items():
    _errorbars(axis, SPARSITIES, found, fmt="o", label=network)
  few = f"fewer than {LEAST_FAN_IN} inputs"
  axis.axvspan(1 - LEAST_FAN_IN / raw["inputs"], 1, color="0.92", label=few)
  ticks = [1, 2, 3, 4, 6, 10]
  axis.set(title=TITLES["ratios"], xlabel="sparsity $s$")
  axis.set(yscale="log", yticks=ticks, yticklabels=ticks)
  axis.minorticks_off()
  axis.legend(loc="upper left")


def plot_neurons(axis: Axes, neurons: Neurons, inputs: int) -> None:
  """The relative update of each neuron of one network, batch norm, He."""
  ends = np.array([np.min(neurons.fan_in), np.max(neurons.fan_in)])
  ends = np.maximum(ends, LEAST_FAN_IN)
  norms = (neurons.gradient, neurons.corrected)
  for (run, color), norm in zip(RUNS.items(), norms, strict=True):
    update = norm / neurons.weights
    density = neurons.fan_in / inputs
    axis.scatter(density, update, s=7, alpha=0.35, color=color, lw=0)
    line = fit(neurons, update)
    y = np.exp(np.polyval(line, np.log(ends)))
    label = f"{run}: slope {line[0]:.2f}"
    axis.plot(ends / inputs, y, color, label=label)
  middle = np.median(update)
  axis.set(title="Unequal fan-ins: the neurons of one network")
  axis.set(xscale="log", yscale="log", ylim=(middle / 12, middle * 25))
  update_name = r"relative update $\Vert g_i\Vert / \Vert w_i\Vert$"
  axis.set(xlabel="density $1 - s_i$", ylabel=update_name)
  axis.legend(loc="upper right")


def plot_slopes(axis: Axes, raw: dict[str, Any]) -> None:
  """The slope at initialisation, for each network."""
  for run, color in RUNS.items():
    cells = [report.interval(found[run]) for found in raw["slopes"].values()]
    mean, half = np.array(cells).T
    networks = list(raw["slopes"])
    axis.errorbar(mean, networks, xerr=half, fmt="o", color=color, label=run)
  axis.axvline(0, color="k", lw=1)
  axis.invert_yaxis()
  axis.set(title=TITLES["slopes"])
  axis.legend()


def plot_training(axis: Axes, raw: dict[str, Any]) -> None:
  """Slopes along training, batch norm, He."""
  for network, found in raw["training"].items():
    what, run = network.split(" ", 1)
    style = {"color": RUNS[run], "label": network}
    fmt = "o-" if what == "update" else "s--"
    _errorbars(axis, raw["stops"], found, fmt=fmt, **style)
  axis.axhline(0, color="k", lw=1)
  axis.set_xscale("symlog", linthresh=10)
  axis.set(title=TITLES["training"], xlabel="step")
  axis.set_xlim(-1, 1.5 * raw["stops"][-1] + 1)
  axis.margins(y=0.2)
  axis.legend(loc="lower right", ncols=2, fontsize="small")


def figure(raw: dict[str, Any], one: Any) -> Figure:
  """Ratios, one network's neurons, slopes, and slopes along training."""
  found = Figure(figsize=(10.5, 8), layout="constrained")
  title = f"Gradient skew, {raw['dataset']}, {raw['seeds']} seeds"
  found.suptitle(title, fontweight="bold")
  axes = found.subplots(2, 2)
  plot_ratios(axes[0, 0], raw)
  plot_neurons(axes[0, 1], one, raw["inputs"])
  plot_slopes(axes[1, 0], raw)
  plot_training(axes[1, 1], raw)
  return found


def study(args: argparse.Namespace) -> report.Report:
  """Measures and reports; raises UsageError for bad flags or missing data."""
  if args.seeds < 1:
    raise UsageError(f"--seeds must be at least 1, got {args.seeds}")
  if args.steps < 0:
    raise UsageError(f"--steps must not be negative, got {args.steps}")
  report.make(args.out)
  examples = load(args.dataset, args.data_dir)
  found = measure_all(examples, args.seeds, args.steps)
  raw = {"dataset": args.dataset, "seeds": args.seeds, **found}
  one = at_initialization(examples, "batch norm", "He", 0)
  return report.Report(raw, table(raw), lambda: figure(raw, one))


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  add = parser.add_argument
  names = ("digits", "fashion_mnist")
  add(
    "--dataset",
    choices=names,
    default="digits",
    help="whose images to take (default: %(default)s)",
  )
  add("--data-dir", help="folder of the data sets")
  add(
    "--seeds",
    type=int,
    default=10,
    help="networks a figure (default: %(default)s)",
  )
  add(
    "--steps",
    type=int,
    default=3000,
    help="training steps (default: %(default)s)",
  )
