"""Gradient skew of batch normalisation, before SparseOpt and after it.

`sparseopt_jax.studies.skew` says what is measured, and measures it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import itertools
import pathlib
import shlex
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from sparseopt_jax import data
from sparseopt_jax import metrics
from sparseopt_jax.studies import report
from sparseopt_jax.studies import skew
from sparseopt_jax.training import cli
from sparseopt_jax.training import plots
from sparseopt_jax.training.errors import UsageError

NAME = "gradient-skew"


def _cell(values: Sequence[float], sign: str = "+") -> str:
  mean, half = report.interval(values)
  return f"{mean:{sign}.3f} ± {half:.3f}"


def table(raw: dict[str, Any]) -> str:
  """What `skew.measure_all` found, as text; means with 95 % intervals."""
  return "\n\n".join(
    [
      "Sparse over dense gradient, all neurons with the same fan-in\n"
      + metrics.aligned(_ratio_rows(raw)),
      "Slopes against log(1 - s_i) at initialisation, without SparseOpt -> "
      "with it\n" + metrics.aligned(_slope_rows(raw)),
      *_few_inputs_text(raw),
      "Slopes along training, batch norm, neurons with at least "
      f"{skew.FAN_INS[-1]} inputs\n" + metrics.aligned(_training_rows(raw)),
    ]
  )


def _ratio_rows(raw: dict[str, Any]) -> list[list[str]]:
  rows = [["sparsity", "fan-in", "theory", *map(_words, skew.NORMALIZATIONS)]]
  for sparsity, fan_in in zip(
    skew.SPARSITIES, skew.fan_ins(raw["inputs"]), strict=True
  ):
    theory = (raw["inputs"] / fan_in) ** 0.5
    found = [raw["ratios"][norm][str(sparsity)] for norm in skew.NORMALIZATIONS]
    cells = [_cell(each, "") for each in found]
    rows.append([f"{sparsity:.0%}", str(fan_in), f"{theory:.3f}", *cells])
  return rows


def _slope_rows(raw: dict[str, Any]) -> list[list[str]]:
  header = ["normalisation", "initialisation", "fan-in", "gradient"]
  rows = [[*header, skew.UPDATE]]
  for norm, start, fan_in in itertools.product(
    skew.NORMALIZATIONS, skew.INITIALIZATIONS, skew.FAN_INS
  ):
    found = raw["slopes"][norm][start][str(fan_in)]
    cells = []
    for name in ("gradient", skew.UPDATE):
      mean, _ = report.interval(found[name])
      cells.append(f"{mean:+.3f} -> {_cell(found[f'corrected {name}'])}")
    rows.append([_words(norm), _words(start), f">= {fan_in}", *cells])
  return rows


def _few_inputs_text(raw: dict[str, Any]) -> list[str]:
  """Empty where no neuron has few inputs."""
  rows = [
    [
      fan_in,
      str(len(logs)),
      f"{skew.few_inputs(int(fan_in)):+.3f}",
      _cell(logs),
    ]
    for fan_in, logs in raw["few_inputs"].items()
  ]
  if not rows:
    return []
  title = (
    "Neurons with few inputs, batch norm, He, with SparseOpt: log of the "
    "relative update\nless its mean over neurons with at least 20\n"
  )
  header = ["fan-in", "networks", "independent inputs", "measured"]
  return [title + metrics.aligned([header, *rows])]


def _training_rows(raw: dict[str, Any]) -> list[list[str]]:
  header = ["slope of", "initialisation", "SparseOpt", "weight decay"]
  rows = [[*header, *(f"step {stop}" for stop in raw["stops"])]]
  for name, start, on, decay in itertools.product(
    (skew.UPDATE, "weights", "outgoing"),
    skew.INITIALIZATIONS,
    skew.CORRECTIONS,
    skew.WEIGHT_DECAYS,
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
  if name == skew.UPDATE and correction == "on":
    name = f"corrected {name}"
  found = raw["training"][initialization][correction][str(decay)]
  return [stop[str(skew.FAN_INS[-1])][name] for stop in found]


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
  """Plots what `skew.measure_all` found.

  Args:
    raw: From `skew.measure_all`.
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
  for axis, start in zip(axes[1, :2], skew.INITIALIZATIONS, strict=True):
    plot_training(axis, raw, start)
  plot_weights(axes[1, 2], raw)
  return result


def plot_ratios(axis: Axes, raw: dict[str, Any]) -> None:
  """Sparse over dense gradient against theory; hollow below 10 inputs."""
  axis.set_title("Equal fan-ins: sparse over dense gradient")
  density = 1 - np.linspace(0, skew.SPARSITIES[-1], 200)
  axis.plot(
    1 - density, density**-0.5, color=_THEORY, lw=1, label=r"$1/\sqrt{1-s}$"
  )
  enough = np.array(skew.fan_ins(raw["inputs"])) >= skew.FAN_INS[-1]
  for norm, (marker, color, size) in _MARKERS.items():
    values = raw["ratios"][norm]
    mean = np.array([np.mean(values[str(s)]) for s in skew.SPARSITIES])
    for some, fill in ((enough, color), (~enough, "none")):
      axis.plot(
        np.array(skew.SPARSITIES)[some],
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
  axis.set_xlabel(f"sparsity s (hollow: fewer than {skew.FAN_INS[-1]} inputs)")
  axis.legend()


def plot_neurons(axis: Axes, raw: dict[str, Any]) -> None:
  """Relative update of each neuron of one network, before and after."""
  axis.set_title("Unequal fan-ins: each neuron, batch norm, He")
  neurons = skew.Neurons(
    *(np.array(raw["neurons"][k]) for k in skew.Neurons._fields)
  )
  fits = skew.slopes(neurons, skew.FAN_INS[-1])
  x = np.log(neurons.density)
  some = neurons.fan_in >= skew.FAN_INS[-1]
  for label, name, values, color in (
    ("without SparseOpt", skew.UPDATE, neurons.gradient, _BEFORE),
    ("with", f"corrected {skew.UPDATE}", neurons.corrected, _AFTER),
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
  rows = list(itertools.product(skew.NORMALIZATIONS, skew.INITIALIZATIONS))
  for y, (norm, start) in enumerate(rows):
    found = raw["slopes"][norm][start][str(skew.FAN_INS[-1])]
    before, after = (
      report.interval(found[name])
      for name in (skew.UPDATE, f"corrected {skew.UPDATE}")
    )
    axis.plot([before[0], after[0]], [y, y], color="#bbbbbb", lw=1, zorder=1)
    for (mean, half), color in ((before, _BEFORE), (after, _AFTER)):
      axis.errorbar(mean, y, xerr=half, fmt="o", color=color, markersize=5)
  axis.axvline(0, color=_THEORY, lw=1)
  labels = [f"{_words(norm)}, {_words(start)}" for norm, start in rows]
  axis.set_yticks(range(len(rows)), labels)
  axis.invert_yaxis()
  axis.set_xlabel(
    f"without SparseOpt, with; at least {skew.FAN_INS[-1]} inputs"
  )


def plot_training(axis: Axes, raw: dict[str, Any], initialization: str) -> None:
  """Slope of the relative update along training."""
  axis.set_title(f"Along training, batch norm, {_words(initialization)}")
  for on, decay in itertools.product(skew.CORRECTIONS, skew.WEIGHT_DECAYS):
    found = _slopes_by_stop(raw, skew.UPDATE, initialization, on, decay)
    _band(axis, raw["stops"], found, on, decay)
  axis.set_ylabel(r"slope of $\Vert g_i\Vert/\Vert w_i\Vert$")


def plot_weights(axis: Axes, raw: dict[str, Any]) -> None:
  """Slope of the weights' norm along training."""
  axis.set_title("Norm of the weights along training, He")
  for on, decay in itertools.product(skew.CORRECTIONS, skew.WEIGHT_DECAYS):
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
    examples = skew.load(args.dataset, args.data_dir)
  except (data.DataNotPreparedError, ImportError) as error:
    raise UsageError(f"--dataset {args.dataset}: {error}") from error
  raw = {
    "dataset": args.dataset,
    **skew.measure_all(examples, args.seeds, args.steps),
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
    "--dataset",
    choices=skew.DATASETS,
    default="digits",
    help="whose images to take (default: %(default)s)",
  )
  parser.add_argument("--data-dir", help="folder of TensorFlow Datasets")
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=pathlib.Path("runs") / NAME,
    help="folder of the results (default: %(default)s)",
  )
  parser.add_argument(
    "--seeds",
    type=int,
    default=10,
    help="networks a figure (default: %(default)s)",
  )
  parser.add_argument(
    "--steps",
    type=int,
    default=3000,
    help="training steps (default: %(default)s)",
  )

  def command() -> None:
    args = parser.parse_args(arguments)
    words = ["python", "-m", "sparseopt_jax.studies", NAME, *arguments]
    study(args, shlex.join(words))

  return cli.run(command)
