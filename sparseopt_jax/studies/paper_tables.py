"""The paper's tables: published figures, and what finished runs have reached.

Each row is a pair: the baseline and SparseOpt with the same topology, sparsity
and number of epochs. The study `convergence` trains such pairs. What the paper
publishes of HAM is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import shlex
from typing import Any

from sparseopt_jax import compare
from sparseopt_jax import metrics
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training import folder as folder_lib
from sparseopt_jax.training import recipes
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

CIFAR, IMAGENET = "cifar100-resnet20", "imagenet-resnet50"
# Flags that do not change what a run finds out.
_ANY = ("seed", "networks", "devices", "shard_params", "measure_skew")

EPOCHS = {CIFAR: (100, 200, 300, 500), IMAGENET: (90, 180, 270)}
# For each of them, test accuracies in percent of baseline and SparseOpt, or,
# where the paper gives no more, the gain in points.
_PUBLISHED: dict[tuple[str, str, float], tuple[Any, ...]] = {
  (CIFAR, "rigl", 0.90): (0.68, 0.19, 0.53, 0.56),
  (CIFAR, "rigl", 0.95): (
    (55.80, 56.80),
    (59.22, 59.91),
    (60.00, 60.67),
    (61.45, 61.74),
  ),
  (CIFAR, "rigl", 0.97): (1.42, 2.14, 1.12, 1.03),
  (IMAGENET, "rigl", 0.90): ((73.88, 74.41), (74.99, 75.06), (75.26, 75.26)),
  (IMAGENET, "rigl", 0.95): ((72.33, 72.93), (73.36, 73.62), (73.62, 73.95)),
  (IMAGENET, "rigl", 0.97): ((69.94, 71.15), (72.00, 72.65), (72.35, 72.66)),
  (IMAGENET, "set", 0.90): ((73.69, 74.15), (74.83, 74.81), (75.17, 74.85)),
  (IMAGENET, "set", 0.95): ((71.84, 72.59), (73.51, 73.75), (73.82, 73.79)),
  (IMAGENET, "set", 0.97): ((70.12, 71.43), (72.17, 72.40), (72.65, 72.73)),
}


@dataclasses.dataclass(frozen=True)
class Pair:
  """What the paper says of a baseline and of SparseOpt.

  Attributes:
    recipe: The recipe, and so the table.
    topology: `Config.topology`.
    sparsity: `Config.sparsity`.
    epochs: `Config.epochs`.
    baseline: Test accuracy in percent, or None.
    sparseopt: Likewise.
    gain: SparseOpt's, in points.
  """

  recipe: str
  topology: Any
  sparsity: float
  epochs: int
  baseline: float | None
  sparseopt: float | None
  gain: float

  def config(self, correction: Any) -> Config:
    """What trains one of the two, with seed 0."""
    return dataclasses.replace(
      recipes.RECIPES[self.recipe].config(),
      topology=self.topology,
      sparsity=self.sparsity,
      epochs=self.epochs,
      correction=correction,
    )


def pairs() -> list[Pair]:
  """All rows of both tables."""
  found = []
  for place, values in _PUBLISHED.items():
    for epochs, value in zip(EPOCHS[place[0]], values, strict=True):
      figures: Any = (None, None, value)
      if isinstance(value, tuple):
        figures = (*value, round(value[1] - value[0], 2))
      found.append(Pair(*place, epochs, *figures))
  return found


def finished(folders: Sequence[pathlib.Path]) -> list[compare.Run]:
  """The complete runs of one network that these folders hold, however deep.

  Raises:
    UsageError: One of them cannot be read.
  """
  places = {
    file.parent.resolve()
    for folder in folders
    for file in folder.rglob(folder_lib.SUMMARY)
  }
  return list(map(compare.read, sorted(places)))


def accuracies(config: Config, runs: Sequence[compare.Run]) -> dict[int, float]:
  """Final test accuracies in percent by seed, of runs with these flags.

  Args:
    config: The flags; those of `_ANY` do not matter.
    runs: From `finished`.
  """
  matter = lambda flags: {k: v for k, v in flags.items() if k not in _ANY}
  wanted = matter(config.identity())
  return {
    run.flags["seed"]: 100 * run.lines[-1]["test_accuracy"]
    for run in runs
    if matter(run.flags) == wanted
  }


def row(pair: Pair, runs: Sequence[compare.Run]) -> dict[str, Any]:
  """What is published of a pair, and what the runs say.

  Returns:
    The fields of the pair, `label`, and `own`: {figure: interval}, with the
    numbers of seeds in `seeds`; gains are of pairs of a seed.
  """
  baseline = accuracies(pair.config("off"), runs)
  sparseopt = accuracies(pair.config("on"), runs)
  both = sorted(baseline.keys() & sparseopt.keys())
  own: Mapping[str, list[float]] = {
    "baseline": list(baseline.values()),
    "sparseopt": list(sparseopt.values()),
    "gain": [sparseopt[seed] - baseline[seed] for seed in both],
  }
  percent = f"{100 * pair.sparsity:.0f}"
  return {
    **dataclasses.asdict(pair),
    "label": f"{pair.topology}-{percent}, {pair.epochs} epochs",
    "own": {k: report.interval(v) for k, v in own.items()},
    "seeds": {k: len(v) for k, v in own.items()},
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """A line a pair, published figures before our own."""
  header = ["", "baseline %", "own", "SparseOpt %", "own"]
  lines = [[*header, "gain", "own", "pairs"]]
  for each in rows:
    line = [each["label"]]
    for name, sign in (("baseline", ""), ("sparseopt", ""), ("gain", "+")):
      published = each[name]
      line += ["-" if published is None else f"{published:{sign}.2f}"]
      line += [report.number(each["own"][name])]
    lines.append([*line, str(each["seeds"]["gain"])])
  return metrics.aligned(lines)


def study(args: argparse.Namespace) -> report.Report:
  """Collects and reports.

  Raises:
    UsageError: A folder that is not there, or a run that cannot be read.
  """
  for place in args.runs:
    if not place.is_dir():
      raise UsageError(f"--runs {place} is not a folder")
  runs = finished(args.runs or [args.out])
  rows = [row(pair, runs) for pair in pairs()]
  used = sum(x["seeds"]["baseline"] + x["seeds"]["sparseopt"] for x in rows)
  parts = [
    f"{recipe}\n{table([x for x in rows if x['recipe'] == recipe])}\n"
    f"python -m sparseopt_jax.studies convergence --recipe {recipe} "
    f"--conditions {conditions} --budgets {budgets} --data-dir DIR "
    f"--out {shlex.quote(str(args.out))}"
    for recipe, conditions, budgets in (
      (CIFAR, "rigl-95 rigl-97", 100),
      (IMAGENET, "rigl-95 set-95", 90),
    )
  ]
  note = (
    "own: mean and 95 % interval over seeds; gains: of pairs of one seed; the "
    "commands train pairs, also\nof other conditions and budgets; "
    f"{used} of {len(runs)} finished runs have the flags of a pair"
  )
  raw = {"pairs": rows, "finished_runs": len(runs)}
  return report.Report(raw, "\n\n".join([*parts, note]))


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  parser.add_argument(
    "--runs",
    type=pathlib.Path,
    nargs="+",
    default=[],
    help="folders that hold finished runs (default: that of --out)",
  )
