"""Does SparseOpt converge faster? Paired runs.

For each condition (topology and sparsity) and each training budget, the same
seeds are trained with and without the correction. The learning rate is chosen
for each of the two by itself, by the same runs of other seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import itertools
import math
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

NAME = "convergence"
ARMS = (cells.BASELINE, cells.SPARSEOPT)
# Test accuracies to count epochs to.
LEVELS = (0.80, 0.85, 0.88)
_COLORS = {"baseline": "#9a4f2c", "SparseOpt": "#1f5fa8", "dense": "#8a8a8a"}


def epochs_to(run: compare.Run, accuracy: float) -> float:
  """Epochs to a test accuracy, interpolated; NaN if it is not reached."""
  before = (0.0, 0.0)
  for line in run.lines:
    now = (float(line["epoch"]), line["test_accuracy"])
    if now[1] >= accuracy:
      share = (accuracy - before[1]) / (now[1] - before[1])
      return before[0] + share * (now[0] - before[0])
    before = now
  return math.nan


def main_cells(
  args: argparse.Namespace, rates: dict[str, float]
) -> dict[str, Config]:
  """All runs but those that choose the learning rate, short budgets first."""
  found = []
  for epochs, seed in itertools.product(args.budgets, range(args.seeds)):
    for condition, arm in itertools.product(args.conditions, ARMS):
      rate = rates[arm.label]
      found.append(cells.config(args, condition, arm, epochs, rate, seed))
    dense_rate = rates[cells.BASELINE.label]
    found.append(
      cells.config(args, "dense", cells.BASELINE, epochs, dense_rate, seed)
    )
  return {cells.name(each): each for each in found}


def pairs(
  args: argparse.Namespace,
  rates: dict[str, float],
  runs: dict[str, compare.Run],
  condition: str,
  epochs: int,
) -> list[tuple[compare.Run, compare.Run]]:
  """Baseline and SparseOpt of each seed, where both are there."""
  found = []
  for seed in range(args.seeds):
    names = [
      cells.name(
        cells.config(args, condition, arm, epochs, rates[arm.label], seed)
      )
      for arm in ARMS
    ]
    if all(each in runs for each in names):
      found.append((runs[names[0]], runs[names[1]]))
  return found


def compare_pairs(
  found: Sequence[tuple[compare.Run, compare.Run]],
) -> dict[str, Any]:
  """Statistics over the seeds of one condition and budget.

  Args:
    found: (baseline, SparseOpt), one pair a seed.

  Returns:
    Means with half the width of their 95 % confidence interval; the difference
    is of pairs. The speed-up is the baseline's epochs to its own final test
    accuracy over SparseOpt's epochs to the same accuracy: the median over all
    seeds, with 0 for the `never` ones in which SparseOpt does not get there.
  """

  def final(figure: str) -> np.ndarray:
    return np.array([[run.lines[-1][figure] for run in pair] for pair in found])

  test, train = final("test_accuracy"), final("train_accuracy")
  dead = final("dead_neurons")
  speedups = []
  for baseline, other in found:
    target = baseline.lines[-1]["test_accuracy"]
    speedup = epochs_to(baseline, target) / epochs_to(other, target)
    speedups.append(0.0 if math.isnan(speedup) else speedup)
  return {
    "seeds": len(found),
    "baseline": report.interval(test[:, 0].tolist()),
    "sparseopt": report.interval(test[:, 1].tolist()),
    "difference": report.interval((test[:, 1] - test[:, 0]).tolist()),
    "train_difference": report.interval((train[:, 1] - train[:, 0]).tolist()),
    "speedup": statistics.median(speedups),
    "never": speedups.count(0.0),
    "epochs_to": {
      f"{level:.0%}": [
        report.interval([epochs_to(pair[arm], level) for pair in found])
        for arm in range(2)
      ]
      for level in LEVELS
    },
    "itop_rate": final("itop_rate").mean(axis=0).tolist(),
    "dead_neurons": dead.mean(axis=0).tolist(),
    "dead_difference": report.interval((dead[:, 1] - dead[:, 0]).tolist()),
    "raw": {
      "test": test.tolist(),
      "train": train.tolist(),
      "dead_neurons": dead.tolist(),
    },
  }


def table(results: dict[str, dict[str, Any]]) -> str:
  """A line a condition and budget."""
  header = [
    "condition, epochs",
    "seeds",
    "baseline %",
    "SparseOpt %",
    "difference",
    "while training",
    "speed-up",
    "never",
    *(f"epochs to {level:.0%}" for level in LEVELS),
    "ITOP %",
    "dead",
    "more dead",
  ]
  rows = [header]
  for label, row in results.items():
    levels = [
      " | ".join(map(report.number, row["epochs_to"][f"{level:.0%}"]))
      for level in LEVELS
    ]
    rows.append(
      [
        label,
        str(row["seeds"]),
        report.percent(row["baseline"]),
        report.percent(row["sparseopt"]),
        report.percent(row["difference"]),
        report.percent(row["train_difference"]),
        f"{row['speedup']:.2f}" if row["speedup"] else "never",
        str(row["never"]),
        *levels,
        " | ".join(f"{100 * x:.1f}" for x in row["itop_rate"]),
        " | ".join(f"{x:.1f}" for x in row["dead_neurons"]),
        report.number(row["dead_difference"]),
      ]
    )
  return metrics.aligned(rows)


def _curves(
  axis: Axes,
  found: Sequence[tuple[compare.Run, compare.Run]],
  dense: Sequence[compare.Run],
) -> None:
  columns = list(zip(*found, strict=True))
  groups = dict(zip(("baseline", "SparseOpt"), columns, strict=True))
  if dense:
    groups["dense"] = tuple(dense)
  for label, runs in groups.items():
    epochs = [line["epoch"] for line in runs[0].lines]
    for figure, style in (("test_accuracy", ".-"), ("train_accuracy", ".:")):
      values = np.array([[line[figure] for line in r.lines] for r in runs])
      is_test = figure == "test_accuracy"
      axis.plot(
        epochs,
        values.mean(axis=0),
        style,
        color=_COLORS[label],
        label=label if is_test else None,
      )
      if is_test and len(values) > 1:
        spread = [report.interval(column)[1] for column in values.T]
        middle = values.mean(axis=0)
        axis.fill_between(
          epochs,
          middle - spread,
          middle + spread,
          color=_COLORS[label],
          alpha=0.2,
          lw=0,
        )
  axis.yaxis.set_major_formatter(PercentFormatter(1.0))
  axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _lowest(found: Sequence[tuple[compare.Run, compare.Run]]) -> float:
  """The lowest accuracy after a quarter of the epochs."""
  return min(
    min(line["test_accuracy"], line["train_accuracy"])
    for pair in found
    for run in pair
    for line in run.lines[len(run.lines) // 4 :]
  )


def _forest(axis: Axes, results: dict[str, dict[str, Any]]) -> None:
  axis.set_title("Gain of SparseOpt, points")
  for index, (mean, half) in enumerate(
    row["difference"] for row in results.values()
  ):
    axis.errorbar(
      100 * mean, -index, xerr=100 * half, fmt="o", color=_COLORS["SparseOpt"]
    )
  axis.axvline(0, color="black", lw=0.8)
  axis.set_yticks([-i for i in range(len(results))], list(results))


def figure(
  args: argparse.Namespace,
  rates: dict[str, float],
  runs: dict[str, compare.Run],
  results: dict[str, dict[str, Any]],
) -> Figure:
  """Curves of each condition and budget, and all differences."""
  rows, columns = len(args.conditions), len(args.budgets)
  width = max(3.3 * columns, 4.5)  # of the curves; the legend needs its room
  found = Figure(figsize=(width + 5, 2.3 * rows), layout="constrained")
  parts: Any = found.subfigures(1, 2, width_ratios=(width, 5))
  left, right = parts
  axes = left.subplots(rows, columns, squeeze=False)
  for i, condition in enumerate(args.conditions):
    for j, epochs in enumerate(args.budgets):
      axis = axes[i, j]
      axis.set_title(f"{condition}, {epochs} epochs")
      paired = pairs(args, rates, runs, condition, epochs)
      if paired:
        _curves(axis, paired, _dense(args, rates, runs, epochs))
        axis.set_ylim(_lowest(paired) - 0.02, None)
        axis.set_xlim(0.5, epochs + 0.5)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  title = "test accuracy (dotted: while training), mean and 95 % interval"
  left.legend(handles, labels, loc="outside upper center", ncols=3, title=title)
  for axis in axes[-1]:
    axis.set_xlabel("epoch")
  _forest(right.subplots(), results)
  return found


def _dense(
  args: argparse.Namespace,
  rates: dict[str, float],
  runs: dict[str, compare.Run],
  epochs: int,
) -> list[compare.Run]:
  rate = rates[cells.BASELINE.label]
  names = [
    cells.name(cells.config(args, "dense", cells.BASELINE, epochs, rate, seed))
    for seed in range(args.seeds)
  ]
  return [runs[each] for each in names if each in runs]


def _by_rate(accuracies: dict[float, list[float]]) -> str:
  return ", ".join(
    f"{rate:g}: {statistics.fmean(found):.2%}"
    for rate, found in accuracies.items()
  )


def _report(
  args: argparse.Namespace,
  command: str,
  tuned: dict[str, compare.Run],
  rates: dict[str, float],
) -> None:
  runs = grid.collect(main_cells(args, rates), args.out)
  results = {}
  for condition, epochs in itertools.product(args.conditions, args.budgets):
    found = pairs(args, rates, runs, condition, epochs)
    if found:
      results[f"{condition}, {epochs}"] = compare_pairs(found)
  dense = {
    epochs: report.interval([r.lines[-1]["test_accuracy"] for r in same])
    for epochs in args.budgets
    if (same := _dense(args, rates, runs, epochs))
  }
  tuning = {
    arm.label: cells.accuracies_by_rate(args, arm, tuned) for arm in ARMS
  }
  lines = [
    f"learning rates of {label} on {cells.TUNED_ON}, {args.tuning_epochs} "
    f"epochs: {_by_rate(tuning[label])}"
    for label in tuning
    if tuning[label]
  ]
  lines += [
    f"dense, {e} epochs: {report.percent(x)} %" for e, x in dense.items()
  ]
  raw = {
    "network": cells.described(args),
    "trained_on": grid.trained_on(args.out, [*tuned, *runs]),
    "rates": rates,
    "tuning": tuning,
    "dense": dense,
    "results": results,
  }
  with matplotlib.rc_context(plots.STYLE):
    image = figure(args, rates, runs, results)
    text = "\n".join([table(results), *lines])
    report.save(args.out, NAME, command, raw, text, image)


def study(args: argparse.Namespace, command: str) -> None:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or no learning rate is chosen yet and
      `--report` forbids to train.
  """
  cells.check(args)
  cells.check_tuning(args)
  main_cells(args, {arm.label: args.learning_rates[0] for arm in ARMS})
  tuning = cells.tuning(args, ARMS)
  jobs = 0 if args.report else args.jobs
  tuned = grid.run(tuning, args.out, jobs)
  rates = cells.chosen_rates(args, ARMS, tuned)
  grid.run(main_cells(args, rates), args.out, jobs)
  _report(args, command, tuned, rates)


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit code."""
  parser = cells.parser(NAME, (__doc__ or "").splitlines()[0])
  cells.add_conditions(parser, ["rigl-90", "rigl-95", "rigl-97", "set-95"])
  cells.add_tuning(parser)
  parser.add_argument(
    "--budgets",
    type=int,
    nargs="+",
    default=[2, 4],
    help="epochs (default: %(default)s)",
  )

  def command() -> None:
    args = parser.parse_args(arguments)
    words = ["python", "-m", "sparseopt_jax.studies", NAME, *arguments]
    study(args, shlex.join(words))

  return cli.run(command)
