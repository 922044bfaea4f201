"""Studies of variants, compared by pairs of runs of the same seed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparseopt_jax import compare
from sparseopt_jax import metrics
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import report
from sparseopt_jax.training.config import Config

Runs = Mapping[str, Mapping[int, compare.Run]]


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to train.

  Attributes:
    label: For tables and figures.
    against: The label of the variant to compare with.
    changes: Fields of `Config`.
    factory: Its optimiser, where no flag of the trainer tells it.
  """

  label: str
  against: str | None
  changes: Mapping[str, Any]
  factory: grid.Factory | None = None

  def config(
    self, args: argparse.Namespace, condition: str, seed: int
  ) -> Config:
    """One run of it."""
    changes = dict(self.changes)
    if self.factory is not None:
      changes["measure_skew"] = False  # The trainer's optimiser does it.
    return cells.config(args, condition, seed, **changes)

  def name(self, config: Config) -> str:
    """The folder of a run; that of other studies where they share it."""
    words = [cells.name(config)]
    if self.factory is not None:
      words.append(self.factory.__name__)
    if "dense_layers" in self.changes:
      words.append("dense_layers")
    return "-".join(words)


def study(
  args: argparse.Namespace,
  conditions: Mapping[str, str],
  variants: Sequence[Variant],
  about: dict[str, Any],
  note: str,
) -> report.Report:
  """Trains what is missing, and reports.

  Args:
    args: The flags of all studies.
    conditions: {label: condition}; variants are compared within one.
    variants: In order of the report.
    about: What the raw results say beside the runs.
    note: What the table says beside them.

  Raises:
    UsageError: `--report`, and nothing is there.
  """
  wanted = [
    (variant.name(config), label, variant, config)
    for label, condition in conditions.items()
    for variant in variants
    for seed in range(args.seeds)
    for config in [variant.config(args, condition, seed)]
  ]
  every = {name: config for name, _, _, config in wanted}
  makers = {name: one.factory for name, _, one, _ in wanted if one.factory}
  runs = cells.trained(args, every, makers)
  found: dict[str, dict[str, dict[int, compare.Run]]] = {}
  for name, label, variant, config in wanted:
    if name in runs:
      of_label = found.setdefault(label, {})
      of_label.setdefault(variant.label, {})[config.seed] = runs[name]
  results = {label: summarise(each, variants) for label, each in found.items()}
  raw = {**cells.about(args, runs), **about, "results": results}
  text = (
    f"{table(results)}\n{len(runs)} of {len(every)} runs; "
    f"{cells.described(args)}, {args.epochs} epochs, learning rate "
    f"{cells.learning_rate(args):g}{note}"
  )
  return report.Report(raw, text, lambda: figure(results))


def summarise(
  found: Runs, variants: Sequence[Variant]
) -> dict[str, dict[str, Any]]:
  """Statistics over the seeds, variant by variant.

  Args:
    found: {label of the variant: {seed: run}}.
    variants: What is compared.

  Returns:
    Means with half the width of their 95 % confidence interval; the difference
    to the variant `against` is of pairs of the same seed.
  """
  results = {}
  for variant in variants:
    runs = found.get(variant.label)
    if not runs:
      continue
    ends = {seed: run.lines[-1] for seed, run in runs.items()}
    others = found.get(variant.against or "", {})
    raw = {
      figure: {seed: line[figure] for seed, line in ends.items()}
      for figure in ("test_accuracy", "train_accuracy", "dead_neurons")
    }
    test, train = (
      {
        seed: value - others[seed].lines[-1][figure]
        for seed, value in raw[figure].items()
        if seed in others
      }
      for figure in ("test_accuracy", "train_accuracy")
    )
    results[variant.label] = {
      "against": variant.against,
      "test_accuracy": report.interval(list(raw["test_accuracy"].values())),
      "difference": report.interval(list(test.values())) if test else None,
      "train_difference": (
        report.interval(list(train.values())) if train else None
      ),
      "itop_rate": statistics.fmean(x["itop_rate"] for x in ends.values()),
      "dead_neurons": statistics.fmean(raw["dead_neurons"].values()),
      "raw": {**raw, "difference": test},
    }
  return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
  """A line a condition and variant."""
  header = [
    "condition, variant",
    "seeds",
    "test %",
    "difference",
    "while training",
    "to",
    "ITOP %",
    "dead",
  ]
  rows = [header]
  for condition, found in results.items():
    for label, row in found.items():
      changes = [row["difference"], row["train_difference"]]
      rows.append(
        [
          f"{condition}, {label}",
          str(len(row["raw"]["test_accuracy"])),
          report.percent(row["test_accuracy"]),
          *(report.percent(change) if change else "-" for change in changes),
          row["against"] or "-",
          f"{100 * row['itop_rate']:.1f}",
          f"{row['dead_neurons']:.1f}",
        ]
      )
  return metrics.aligned(rows)


def figure(results: dict[str, dict[str, dict[str, Any]]]) -> Figure:
  """A row a condition: accuracies on the left, differences on the right."""
  found = Figure(figsize=(12, 4.2 * len(results)), layout="constrained")
  axes: Any = found.subplots(len(results), 2, squeeze=False, sharey="row")
  for (left, right), (condition, rows) in zip(
    axes, results.items(), strict=True
  ):
    _dots(left, rows, "test_accuracy")
    left.set_title(f"{condition}: test accuracy, %")
    left.set_yticks([-i for i in range(len(rows))], list(rows))
    _dots(right, rows, "difference")
    right.set_title("Difference to ..., points")
    right.axvline(0, color="black", lw=0.8)
    for index, row in enumerate(rows.values()):
      right.annotate(
        f"to {row['against']}" if row["against"] else "",
        (1.0, -index),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8,
      )
  found.supxlabel("each seed; mean and 95 % interval", fontsize=9)
  return found


def _dots(axis: Axes, rows: dict[str, dict[str, Any]], name: str) -> None:
  for index, row in enumerate(rows.values()):
    each = [100 * x for x in row["raw"][name].values()]
    axis.plot(each, [-index] * len(each), "o", ms=4, color="#9aa5b1")
    if each:
      mean, half = row[name]
      axis.errorbar(
        100 * mean, -index, xerr=100 * half, fmt="D", ms=5, color="#1f5fa8"
      )
