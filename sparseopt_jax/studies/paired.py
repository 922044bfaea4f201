"""Studies of variants, compared by pairs of runs of the same seed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
import itertools
import statistics
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparseopt_jax import compare
from sparseopt_jax import metrics
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import report

Runs = Mapping[str, Mapping[int, compare.Run]]


# Without SparseOpt, and with it.
OFF: dict[str, Any] = {"correction": "off"}
ON: dict[str, Any] = {"correction": "on"}


class Variant(NamedTuple):
  """One way to train.

  Attributes:
    label: For tables and figures.
    against: The label of the variant to compare with, or None.
    changes: Fields of `Config` that differ from flags and condition.
    factory: As of `grid.Cell`.
    suffix: Of the folder's name, which by itself does not tell every field.
  """

  label: str
  against: str | None
  changes: dict[str, Any]
  factory: Callable[..., Any] | None = None
  suffix: str = ""

  def cell(
    self, args: argparse.Namespace, condition: str, seed: int
  ) -> tuple[str, grid.Cell]:
    """One run of it, and its folder: that of other studies which train it."""
    changes, words = self.changes, [self.suffix] if self.suffix else []
    if self.factory is not None:
      # Only the trainer's own optimiser measures it.
      changes = {**changes, "measure_skew": False}
      words = [self.factory.__name__, *words]
    config = cells.config(args, condition, seed, **changes)
    name = "-".join([cells.name(config), *words])
    return name, grid.Cell(config, self.factory)


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
  every: dict[str, grid.Cell] = {}
  places: dict[tuple[str, str, int], str] = {}
  for seed, (label, condition), variant in itertools.product(
    range(args.seeds), conditions.items(), variants
  ):
    name, cell = variant.cell(args, condition, seed)
    assert every.setdefault(name, cell) == cell, f"two variants named {name}"
    places[label, variant.label, seed] = name
  runs = cells.trained(args, every)
  found: dict[str, dict[str, dict[int, compare.Run]]] = {}
  for (label, of, seed), name in places.items():
    if name in runs:
      found.setdefault(label, {}).setdefault(of, {})[seed] = runs[name]
  results = {label: summarise(each, variants) for label, each in found.items()}
  raw = {**cells.about(args, runs), **about, "results": results}
  text = (
    f"{table(results)}\n{len(runs)} of {len(every)} runs; "
    f"{cells.described(args)}, {args.epochs} epochs{note}"
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
    values = {**raw, "difference": test, "train_difference": train}
    results[variant.label] = {
      "against": variant.against,
      **{k: report.interval(list(v.values())) for k, v in values.items()},
      "itop_rate": statistics.fmean(x["itop_rate"] for x in ends.values()),
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
      rows.append(
        [
          f"{condition}, {label}",
          str(len(row["raw"]["test_accuracy"])),
          report.percent(row["test_accuracy"]),
          report.percent(row["difference"]),
          report.percent(row["train_difference"]),
          row["against"] or "-",
          f"{100 * row['itop_rate']:.1f}",
          f"{row['dead_neurons'][0]:.1f}",
        ]
      )
  return metrics.aligned(rows)


def figure(results: dict[str, dict[str, dict[str, Any]]]) -> Figure:
  """A row a condition: accuracies on the left, differences on the right."""
  every = [row for rows in results.values() for row in rows.values()]
  columns = 2 if any(row["against"] for row in every) else 1
  size = 6 * columns, 4.2 * len(results)
  found = Figure(figsize=size, layout="constrained")
  axes: Any = found.subplots(len(results), columns, squeeze=False, sharey="row")
  for (left, *others), (condition, rows) in zip(
    axes, results.items(), strict=True
  ):
    _dots(left, rows, "test_accuracy")
    left.set_title(f"{condition}: test accuracy, %")
    left.set_yticks([-i for i in range(len(rows))], list(rows))
    for right in others:
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
