"""How many weights does dynamic sparse training try, with SparseOpt or without?

For each topology and sparsity: the ITOP rate (the fraction of weights that have
been active at any time) along training, and at the end the spread of fan-ins
and the dead neurons of each layer. RigL grows by the raw gradient or by the
corrected one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import shlex
import statistics
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import PercentFormatter
import numpy as np

from sparseopt_jax import compare
from sparseopt_jax import metrics
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training import plots
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

NAME = "exploration"
CONDITIONS = ("rigl-90", "rigl-95", "rigl-97", "set-90", "set-95", "set-97")
# Of the layers, by the name of the figure in metrics.jsonl.
_LAYER_FIGURES = {"fan_in_spread": "fan-in spread", "dead_neurons": "dead"}
_COLORS = {
  cells.BASELINE.label: "#9a4f2c",
  cells.SPARSEOPT.label: "#1f5fa8",
  cells.CORRECTED_GROWTH.label: "#3d8b57",
}


def arms(condition: str) -> tuple[cells.Arm, ...]:
  """What is compared; SET does not grow by a gradient."""
  if cells.parse_condition(condition)["topology"] == "rigl":
    return cells.BASELINE, cells.SPARSEOPT, cells.CORRECTED_GROWTH
  return cells.BASELINE, cells.SPARSEOPT


def configs(
  args: argparse.Namespace, condition: str, arm: cells.Arm
) -> dict[str, Config]:
  """The runs of one arm, by name, one a seed."""
  found = [
    cells.config(args, condition, arm, args.epochs, args.learning_rate, seed)
    for seed in range(args.seeds)
  ]
  return {cells.name(each): each for each in found}


def mean_spread(line: dict[str, Any]) -> float:
  """The fan-in spread in a line of `metrics.jsonl`, mean over layers."""
  return statistics.fmean(
    layer["fan_in_spread"] for layer in line["layers"].values()
  )


def summarise(runs: Sequence[compare.Run]) -> dict[str, Any]:
  """Statistics over the seeds of one condition and arm.

  Args:
    runs: At least one; all of the same number of epochs.

  Returns:
    Means with half the width of their 95 % confidence interval. The first
    evaluation is that after an epoch, the last that at the end.
  """
  ends = [run.lines[-1] for run in runs]
  names = list(ends[0]["layers"])
  return {
    "seeds": len(runs),
    "itop_rate": report.interval([line["itop_rate"] for line in ends]),
    "itop_rate_by_epoch": [
      report.interval(column)
      for column in zip(
        *[plots.series(run.lines, "itop_rate") for run in runs], strict=True
      )
    ],
    "dead_neurons": report.interval([line["dead_neurons"] for line in ends]),
    "first_spread": report.interval([mean_spread(r.lines[0]) for r in runs]),
    "last_spread": report.interval([mean_spread(line) for line in ends]),
    "test_accuracy": report.interval([line["test_accuracy"] for line in ends]),
    "layers": {
      name: {
        figure: statistics.fmean(line["layers"][name][figure] for line in ends)
        for figure in _LAYER_FIGURES
      }
      for name in names
    },
    "raw": [
      {
        "seed": run.flags["seed"],
        "itop_rate": run.lines[-1]["itop_rate"],
        "dead_neurons": run.lines[-1]["dead_neurons"],
        "test_accuracy": run.lines[-1]["test_accuracy"],
      }
      for run in runs
    ],
  }


Results = dict[str, dict[str, dict[str, Any]]]


def table(results: Results) -> str:
  """A line a condition and arm."""
  rows = [
    [
      "condition, arm",
      "seeds",
      "ITOP %",
      "dead neurons",
      "fan-in spread, first",
      "last",
      "test %",
    ]
  ]
  for condition, found in results.items():
    for label, row in found.items():
      rows.append(
        [
          f"{condition}, {label}",
          str(row["seeds"]),
          report.percent(row["itop_rate"]),
          report.number(row["dead_neurons"]),
          report.number(row["first_spread"]),
          report.number(row["last_spread"]),
          report.percent(row["test_accuracy"]),
        ]
      )
  return metrics.aligned(rows)


def figure(results: Results) -> Figure:
  """A column a condition: ITOP rate, and each layer's spread and dead."""
  size = (3.1 * max(len(results), 2), 8.5)
  found = Figure(figsize=size, layout="constrained")
  axes: Any = found.subplots(3, len(results), squeeze=False, sharey="row")
  for column, (condition, by_arm) in zip(axes.T, results.items(), strict=True):
    column[0].set_title(condition)
    for index, (label, row) in enumerate(by_arm.items()):
      _rate(column[0], label, row)
      for axis, name in zip(column[1:], _LAYER_FIGURES, strict=True):
        _layers(axis, index, label, row["layers"], name)
    column[1].tick_params(labelbottom=False)
  # Once all is plotted: it fixes the upper limit as well.
  for axis in axes[1:].flat:
    axis.set_ylim(bottom=0)
  for axis, label in zip(
    axes[:, 0], ("ITOP rate", *_LAYER_FIGURES.values()), strict=True
  ):
    axis.set_ylabel(label)
  axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0))
  axes[2, 0].set_ylabel("dead neurons")
  handles = {
    label: handle
    for axis in axes[0]
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
  }
  found.legend(
    list(handles.values()),
    list(handles),
    loc="outside upper center",
    ncols=3,
    title="mean over seeds, at the top with its 95 % interval",
  )
  return found


def _rate(axis: Axes, label: str, row: dict[str, Any]) -> None:
  middle, half = np.nan_to_num(np.array(row["itop_rate_by_epoch"]).T)
  epochs = np.arange(1, len(middle) + 1)
  color = _COLORS[label]
  axis.plot(epochs, middle, "o-", ms=3, color=color, label=label)
  axis.fill_between(
    epochs, middle - half, middle + half, color=color, alpha=0.2, lw=0
  )
  axis.set_xlabel("epoch")
  axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _layers(
  axis: Axes,
  index: int,
  label: str,
  layers: dict[str, dict[str, float]],
  name: str,
) -> None:
  """One dot a layer; arms lie side by side."""
  places = np.arange(len(layers)) + 0.2 * (index - 1)
  heights = [layer[name] for layer in layers.values()]
  axis.plot(places, heights, "o", ms=4, color=_COLORS[label])
  names = [path.removesuffix("/kernel") for path in layers]
  axis.set_xticks(range(len(layers)), names, rotation=90, fontsize=7)


def study(args: argparse.Namespace, command: str) -> None:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  cells.check(args)
  groups = {
    (condition, arm.label): configs(args, condition, arm)
    for condition in args.conditions
    for arm in arms(condition)
  }
  # Seeds one after the other, so that early reports are of all arms.
  rounds = zip(*(group.items() for group in groups.values()), strict=True)
  every = {name: config for items in rounds for name, config in items}
  runs = grid.run(every, args.out, 0 if args.report else args.jobs)
  results: Results = {}
  for (condition, label), group in groups.items():
    found = [runs[name] for name in group if name in runs]
    if found:
      results.setdefault(condition, {})[label] = summarise(found)
  if not results:
    raise UsageError(cells.nothing_there(args))
  raw = {
    "network": cells.described(args),
    "learning_rate": args.learning_rate,
    "trained_on": grid.trained_on(args.out, runs),
    "results": results,
  }
  text = (
    f"{table(results)}\n{len(runs)} of {len(every)} runs; "
    f"{cells.described(args)}, {args.epochs} epochs, learning rate "
    f"{args.learning_rate:g}"
  )
  with matplotlib.rc_context(plots.STYLE):
    report.save(args.out, NAME, command, raw, text, figure(results))


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit code."""
  parser = cells.parser(NAME, (__doc__ or "").splitlines()[0], seeds=2)
  cells.add_conditions(parser, CONDITIONS)
  cells.add_training(parser)

  def command() -> None:
    args = parser.parse_args(arguments)
    words = ["python", "-m", "sparseopt_jax.studies", NAME, *arguments]
    study(args, shlex.join(words))

  return cli.run(command)
