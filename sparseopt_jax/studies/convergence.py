"""Does SparseOpt converge faster, and does the skew behave as it should?

For each condition (topology and sparsity) and each training budget, the same
seeds are trained with and without the correction, with the baseline's learning
rate in both: the study `baseline` chooses it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import itertools
import math
import statistics
from typing import Any

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
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

# `Config.correction` by label.
ARMS: dict[str, Any] = {"baseline": "off", "SparseOpt": "on"}
# The paper's curves differ most early: after 10 epochs of 90.
EARLY = 10
COLORS = {"baseline": "#9a4f2c", "SparseOpt": "#1f5fa8"}
# Along training, by the name in `along`.
_PANELS = {
  "test_accuracy": "test accuracy",
  "skew_slope": "skew slope",
  "dead_neurons": "dead neurons",
  "itop_rate": "ITOP rate",
  "fan_in_spread": "fan-in spread",
}
Pair = tuple[compare.Run, compare.Run]


def early_epoch(epochs: int) -> int:
  """The epoch of a budget after which to look: 10, or half of fewer."""
  return min(EARLY, math.ceil(epochs / 2))


def epochs_to(run: compare.Run, accuracy: float) -> float:
  """Epochs to a test accuracy, interpolated; NaN if it is not reached."""
  before = (0.0, 0.0)
  if accuracy <= 0:
    return 0.0
  for line in run.lines:
    now = (float(line["epoch"]), line["test_accuracy"])
    if now[1] >= accuracy:
      share = (accuracy - before[1]) / (now[1] - before[1])
      return before[0] + share * (now[0] - before[0])
    before = now
  return math.nan


def runs_of(
  args: argparse.Namespace, condition: str, epochs: int
) -> list[tuple[Config, Config]]:
  """Baseline and SparseOpt of each seed."""

  def pair(seed: int) -> tuple[Config, Config]:
    one, other = (
      cells.config(args, condition, seed, correction=x, epochs=epochs)
      for x in ARMS.values()
    )
    return one, other

  return list(map(pair, range(args.seeds)))


def compare_pairs(found: Sequence[Pair]) -> dict[str, Any]:
  """Statistics over the seeds of one condition and budget.

  Args:
    found: (baseline, SparseOpt), one pair a seed.

  Returns:
    - For each of `final`, `early` (test accuracies at the end and after
      `early_epoch`), `half` (epochs to half of the baseline's final accuracy),
      `train` (accuracy while training, in the last epoch) and `dead_neurons`:
      `baseline`, `sparseopt` and their `difference`, means over the seeds with
      half the width of their 95 % confidence interval; the difference is of
      pairs. `raw`: [baseline, SparseOpt] of each seed.
    - `along`: see there.
  """
  early = early_epoch(int(found[0][0].lines[-1]["epoch"]))

  def last(name: str) -> list[list[float]]:
    return [[run.lines[-1][name] for run in pair] for pair in found]

  def early_accuracy(run: compare.Run) -> float:
    (line,) = [line for line in run.lines if line["epoch"] == early]
    return line["test_accuracy"]

  final = last("test_accuracy")
  half = [
    [epochs_to(run, ends[0] / 2) for run in pair]
    for pair, ends in zip(found, final, strict=True)
  ]
  return {
    "seeds": len(found),
    "final": _paired(final),
    "early": {
      "epoch": early,
      **_paired([[early_accuracy(run) for run in pair] for pair in found]),
    },
    "half": _paired(half),
    "train": _paired(last("train_accuracy")),
    "dead_neurons": _paired(last("dead_neurons")),
    "along": along(found),
  }


def _paired(values: list[list[float]]) -> dict[str, Any]:
  baseline, sparseopt = zip(*values, strict=True)
  return {
    "baseline": report.interval(baseline),
    "sparseopt": report.interval(sparseopt),
    "difference": report.interval([b - a for a, b in values]),
    "raw": values,
  }


def along(found: Sequence[Pair]) -> dict[str, dict[str, list[Any]]]:
  """{figure: {arm: an interval over the seeds each epoch}}.

  Beside the arms there is their `difference`, of pairs. The slope of the skew
  is that of the updates which the run makes: where SparseOpt is on, 1/2 more
  than that of the gradient.
  """
  columns = zip(ARMS, zip(*found, strict=True), strict=True)
  epochs = {
    arm: list(zip(*(run.lines for run in runs), strict=True))
    for arm, runs in columns
  }
  intervals = {}
  others = "skew_slope_before", "skew_slope_after", "weight_slope"
  for name in (*_PANELS, *others):
    values = {
      arm: [
        [figure_of(name, x, ARMS[arm]) for x in lines] for lines in epochs[arm]
      ]
      for arm in ARMS
    }
    values["difference"] = [
      [b - a for a, b in zip(*arms, strict=True)]
      for arms in zip(*values.values(), strict=True)
    ]
    intervals[name] = {
      label: list(map(report.interval, each)) for label, each in values.items()
    }
  return intervals


def figure_of(name: str, line: dict[str, Any], correction: str) -> float:
  """One figure of a line of `metrics.jsonl`; NaN if it was not measured.

  The slope of the skew is that of the updates: SparseOpt adds 1/2 to it.
  """
  if name == "fan_in_spread":
    layers = line["layers"].values()
    return statistics.fmean(layer[name] for layer in layers)
  value = line.get(name)
  if value is None:
    return math.nan
  corrected = name.startswith("skew_slope") and correction == "on"
  return value + 0.5 if corrected else value


def table(results: dict[str, dict[str, Any]]) -> str:
  """What was gained, a line a condition and budget; then how it went."""
  rows = [
    [
      "condition, epochs",
      "seeds",
      "baseline %",
      "SparseOpt %",
      "difference",
      "early epoch",
      "difference",
      "epochs to half",
      "difference",
      "while training",
    ]
  ]
  for label, row in results.items():
    final, early, half = row["final"], row["early"], row["half"]
    rows.append(
      [
        label,
        str(row["seeds"]),
        report.percent(final["baseline"]),
        report.percent(final["sparseopt"]),
        report.percent(final["difference"]),
        str(early["epoch"]),
        report.percent(early["difference"]),
        report.number(half["baseline"]),
        report.number(half["difference"]),
        report.percent(row["train"]["difference"]),
      ]
    )
  return f"{metrics.aligned(rows)}\n\n{_mechanism(results)}"


def _mechanism(results: dict[str, dict[str, Any]]) -> str:
  header = ["condition, epochs, arm", "skew slope: first epoch", "last"]
  header += ["before mask updates", "after", "weights' size", "dead", "ITOP %"]
  header += ["fan-in spread"]
  rows = [header]
  for label, row in results.items():
    for arm in (*COLORS, "difference"):
      found = {name: each[arm] for name, each in row["along"].items()}
      updating = [
        [x for x in found[f"skew_slope_{when}"] if not math.isnan(x[0])]
        or [report.interval([])]
        for when in ("before", "after")
      ]
      rows.append(
        [
          f"{label}, {arm}",
          report.number(found["skew_slope"][0]),
          report.number(found["skew_slope"][-1]),
          *(report.number(each[-1]) for each in updating),
          report.number(found["weight_slope"][-1]),
          report.number(found["dead_neurons"][-1]),
          report.percent(found["itop_rate"][-1]),
          report.number(found["fan_in_spread"][-1]),
        ]
      )
  note = (
    "skew slope: of log relative update against log density, of the updates "
    "that the run makes;\nbefore and after: in the last epoch with mask "
    "updates; weights' size: slope of the log root mean\nsquare of a neuron's "
    "weights at the end"
  )
  return f"{metrics.aligned(rows)}\n{note}"


def figure(results: dict[str, dict[str, Any]]) -> Figure:
  """A row a condition and budget: accuracy, and what goes with it."""
  size = (3 * len(_PANELS), 2.7 * len(results))
  found = Figure(figsize=size, layout="constrained")
  axes: Any = found.subplots(len(results), len(_PANELS), squeeze=False)
  for row, (label, result) in zip(axes, results.items(), strict=True):
    for axis, (name, title) in zip(row, _PANELS.items(), strict=True):
      axis.set_title(title, fontsize="small")
      for arm, color in COLORS.items():
        _band(axis, result["along"][name][arm], "-", color, arm)
      axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for arm, color in COLORS.items():
      after = result["along"]["skew_slope_after"][arm]
      _band(row[1], after, ":", color, "after mask updates")
    row[1].axhline(0, color="black", lw=0.8)
    row[2].set_ylim(0, max(1, row[2].get_ylim()[1]))
    row[0].set_ylabel(label, fontweight="bold")
    row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    row[3].yaxis.set_major_formatter(PercentFormatter(1.0))
  for axis in axes[-1]:
    axis.set_xlabel("epoch")
  axes[0, 0].legend(loc="lower right")
  axes[0, 1].legend(handles=axes[0, 1].get_lines()[2:3], loc="upper right")
  return found


def _band(
  axis: Axes,
  intervals: Sequence[Sequence[float]],
  style: str,
  color: str,
  label: str | None = None,
) -> None:
  mean, half = np.array(intervals, float).T
  epochs = np.arange(1, len(mean) + 1)
  axis.plot(epochs, mean, style, color=color, label=label)
  axis.fill_between(
    epochs, mean - half, mean + half, color=color, alpha=0.2, lw=0
  )


def study(args: argparse.Namespace) -> report.Report:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and no pair is there.
  """
  cells.check(args, args.conditions)
  wanted = {
    f"{condition}, {epochs}": runs_of(args, condition, epochs)
    for epochs, condition in itertools.product(args.budgets, args.conditions)
  }
  every = {
    cells.name(config): grid.Cell(config)
    for pairs in wanted.values()
    for pair in pairs
    for config in pair
  }
  runs = cells.trained(args, every)
  results = {}
  for label, pairs in wanted.items():
    named = [(cells.name(one), cells.name(other)) for one, other in pairs]
    found = [(runs[a], runs[b]) for a, b in named if {a, b} <= runs.keys()]
    if found:
      results[label] = compare_pairs(found)
  if not results:
    raise UsageError(f"--out {args.out}: no pair of runs is complete")
  raw = {**cells.about(args, runs), "results": results}
  text = (
    f"{table(results)}\n{len(runs)} of {len(every)} runs; "
    f"{cells.described(args)}, learning rate {cells.learning_rate(args):g}"
  )
  return report.Report(raw, text, lambda: figure(results))


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  cells.add_flags(parser)
  cells.add_conditions(parser, ["rigl-95", "rigl-97"])
  cells.add_learning_rate(parser)
  parser.add_argument(
    "--budgets",
    type=int,
    nargs="+",
    default=[10],
    help="epochs (default: %(default)s)",
  )
