"""The paper's tables: commands, published figures and own results.

For each cell of the tables of CIFAR-100 / ResNet-20 and ImageNet / ResNet-50:
the command that trains it, the published figure, and what finished runs have
reached.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import shlex
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparseopt_jax import compare
from sparseopt_jax import metrics
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training import folder as folder_lib
from sparseopt_jax.training import recipes
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

CIFAR, IMAGENET = "cifar100-resnet20", "imagenet-resnet50"
BASELINE, SPARSEOPT = "baseline", "SparseOpt"
TITLES = {
  CIFAR: "CIFAR-100, ResNet-20",
  IMAGENET: "ImageNet, ResNet-50",
}
_NO_HAM = "no flag of the trainer; see the study ablations"
# Flags that do not change what a run finds out.
_ANY = ("seed", "networks", "devices", "shard_params", "measure_skew")

# Published gains of SparseOpt in points, by sparsity and epochs; RigL.
_CIFAR_EPOCHS = (100, 200, 300, 500)
_CIFAR_GAINS = {
  0.90: (0.68, 0.19, 0.53, 0.56),
  0.95: (1.00, 0.69, 0.67, 0.29),
  0.97: (1.42, 2.14, 1.12, 1.03),
}
# Published test accuracies in percent at 95 %; RigL.
_CIFAR_ACCURACIES = {
  BASELINE: (55.80, 59.22, 60.00, 61.45),
  SPARSEOPT: (56.80, 59.91, 60.67, 61.74),
  "HAM": (56.72, 58.76, 60.38, 61.66),
  "SparseOpt and HAM": (57.31, 60.41, 60.91, 62.20),
}
# Published top-1 accuracies in percent: SparseOpt, baseline.
_IMAGENET_EPOCHS = (90, 180, 270)
_IMAGENET_ACCURACIES = {
  ("rigl", 0.90): ((74.41, 73.88), (75.06, 74.99), (75.26, 75.26)),
  ("set", 0.90): ((74.15, 73.69), (74.81, 74.83), (74.85, 75.17)),
  ("rigl", 0.95): ((72.93, 72.33), (73.62, 73.36), (73.95, 73.62)),
  ("set", 0.95): ((72.59, 71.84), (73.75, 73.51), (73.79, 73.82)),
  ("rigl", 0.97): ((71.15, 69.94), (72.65, 72.00), (72.66, 72.35)),
  ("set", 0.97): ((71.43, 70.12), (72.40, 72.17), (72.73, 72.65)),
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """What one command trains, and the accuracy that is published for it.

  Attributes:
    recipe: The recipe, and so the table.
    topology: `Config.topology`.
    sparsity: `Config.sparsity`.
    epochs: `Config.epochs`.
    arm: "baseline", "SparseOpt" or one with HAM.
    published: Test accuracy in percent, or None.
  """

  recipe: str
  topology: str
  sparsity: float
  epochs: int
  arm: str
  published: float | None

  @property
  def is_trainable(self) -> bool:
    """Whether the trainer has flags for it."""
    return self.arm in (BASELINE, SPARSEOPT)

  @property
  def condition(self) -> str:
    """Such as rigl-95, 100 epochs."""
    return f"{self.topology}-{100 * self.sparsity:.0f}, {self.epochs} epochs"

  def flags(self) -> list[str]:
    """The trainer's flags, but for seed and folder."""
    return [
      f"--recipe={self.recipe}",
      f"--topology={self.topology}",
      f"--sparsity={self.sparsity:g}",
      f"--epochs={self.epochs}",
      f"--correction={'on' if self.arm == SPARSEOPT else 'off'}",
    ]

  def config(self) -> Config:
    """What these flags mean."""
    return dataclasses.replace(
      recipes.RECIPES[self.recipe].config(),
      topology=self.topology,  # type: ignore[arg-type]
      sparsity=self.sparsity,
      epochs=self.epochs,
      correction="on" if self.arm == SPARSEOPT else "off",
    )

  def command(self, out: pathlib.Path) -> str:
    """Trains it; other seeds are to be put in by hand."""
    if not self.is_trainable:
      return _NO_HAM
    name = "-".join(
      [
        self.recipe,
        f"{self.topology}-{100 * self.sparsity:.0f}",
        "on" if self.arm == SPARSEOPT else "off",
        f"{self.epochs}epochs-seed0",
      ]
    )
    words = [*self.flags(), "--seed=0", f"--workdir={out / name}"]
    return f"python -m sparseopt_jax.train {shlex.join(words)}"


@dataclasses.dataclass(frozen=True)
class Gain:
  """SparseOpt against the baseline: two cells and a published difference.

  Attributes:
    baseline: The one cell.
    sparseopt: The other.
    published: Points of test accuracy.
  """

  baseline: Cell
  sparseopt: Cell
  published: float


def gains() -> list[Gain]:
  """All pairs of both tables."""
  found = []
  for sparsity, values in _CIFAR_GAINS.items():
    for index, epochs in enumerate(_CIFAR_EPOCHS):
      pair = [
        Cell(
          CIFAR,
          "rigl",
          sparsity,
          epochs,
          arm,
          _CIFAR_ACCURACIES[arm][index] if sparsity == 0.95 else None,
        )
        for arm in (BASELINE, SPARSEOPT)
      ]
      found.append(Gain(pair[0], pair[1], values[index]))
  for (topology, sparsity), rows in _IMAGENET_ACCURACIES.items():
    for epochs, (sparse, base) in zip(_IMAGENET_EPOCHS, rows, strict=True):
      place = (IMAGENET, topology, sparsity, epochs)
      found.append(
        Gain(
          Cell(*place, BASELINE, base),
          Cell(*place, SPARSEOPT, sparse),
          round(sparse - base, 2),
        )
      )
  return found


def cells() -> list[Cell]:
  """All cells of both tables, those with HAM in their places."""
  found = []
  for gain in gains():
    found += [gain.baseline, gain.sparseopt]
    if gain.baseline.recipe == CIFAR and gain.baseline.sparsity == 0.95:
      index = _CIFAR_EPOCHS.index(gain.baseline.epochs)
      found += [
        dataclasses.replace(gain.baseline, arm=arm, published=values[index])
        for arm, values in _CIFAR_ACCURACIES.items()
        if arm not in (BASELINE, SPARSEOPT)
      ]
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


def _matter(flags: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in flags.items() if name not in _ANY}


def results_of(cell: Cell, runs: Sequence[compare.Run]) -> dict[int, float]:
  """Final test accuracy in percent of the runs of a cell, by seed.

  Args:
    cell: Whose flags a run must have, but for seed and devices.
    runs: From `finished`.
  """
  if not cell.is_trainable:
    return {}
  wanted = _matter(cell.config().identity())
  return {
    run.flags["seed"]: 100 * run.lines[-1]["test_accuracy"]
    for run in runs
    if _matter(run.flags) == wanted
  }


def _own(values: Sequence[float]) -> dict[str, Any] | None:
  """The interval over seeds, and their number."""
  if not values:
    return None
  return {"interval": report.interval(values), "seeds": len(values)}


def cell_rows(
  runs: Sequence[compare.Run], out: pathlib.Path
) -> list[dict[str, Any]]:
  """What is known of each cell."""
  return [
    {
      **dataclasses.asdict(cell),
      "label": f"{cell.condition}, {cell.arm}",
      "own": _own(list(results_of(cell, runs).values())),
      "command": cell.command(out),
    }
    for cell in cells()
  ]


def gain_rows(runs: Sequence[compare.Run]) -> list[dict[str, Any]]:
  """Published gains, and own ones of pairs of the same seed."""
  rows = []
  for gain in gains():
    baseline = results_of(gain.baseline, runs)
    sparseopt = results_of(gain.sparseopt, runs)
    pairs = [
      accuracy - baseline[seed]
      for seed, accuracy in sparseopt.items()
      if seed in baseline
    ]
    cell = gain.baseline
    rows.append(
      {
        "recipe": cell.recipe,
        "topology": cell.topology,
        "sparsity": cell.sparsity,
        "epochs": cell.epochs,
        "label": cell.condition,
        "published": gain.published,
        "own": _own(pairs),
      }
    )
  return rows


def _lines(
  rows: Sequence[dict[str, Any]], recipe: str, header: list[str], sign: str = ""
) -> str:
  lines = [[*header, "published", "own", "seeds"]]
  for row in rows:
    if row["recipe"] == recipe:
      published, own = row["published"], row["own"]
      lines.append(
        [
          row["label"],
          "-" if published is None else f"{published:{sign}.2f}",
          report.number(own["interval"] if own else None),
          str(own["seeds"]) if own else "0",
        ]
      )
  return metrics.aligned(lines)


def text(
  rows: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]
) -> str:
  """Both tables: accuracies, gains, and all commands."""
  parts = []
  for recipe, title in TITLES.items():
    accuracies = _lines(rows, recipe, ["test accuracy, %"])
    gained = _lines(differences, recipe, ["gain of SparseOpt, points"], "+")
    commands = [
      f"# {row['label']}\n{row['command']}"
      for row in rows
      if row["recipe"] == recipe
    ]
    parts += [
      f"{title}\n{accuracies}",
      f"{title}\n{gained}",
      "\n".join([f"{title}: commands", *commands]),
    ]
  return "\n\n".join(parts)


def figure(differences: Sequence[dict[str, Any]]) -> Figure:
  """Gains over epochs: published ones as lines, own ones as diamonds."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for row in differences:
    title = f"{TITLES[row['recipe']]}, {row['topology']}"
    groups.setdefault(title, []).append(row)
  found = Figure(figsize=(4 * len(groups), 4), layout="constrained")
  axes: Any = found.subplots(1, len(groups), squeeze=False)
  for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
    _gains(axis, rows)
    axis.set_title(title)
    axis.set_xlabel("epochs")
  axes[0, 0].set_ylabel("gain of SparseOpt, points")
  handles, labels = axes[0, 0].get_legend_handles_labels()
  found.legend(
    handles,
    labels,
    loc="outside upper center",
    ncols=3,
    title="published; diamonds: own, with 95 % intervals",
  )
  return found


def _gains(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
  sparsities = sorted({row["sparsity"] for row in rows})
  for index, sparsity in enumerate(sparsities):
    same = [row for row in rows if row["sparsity"] == sparsity]
    epochs = [row["epochs"] for row in same]
    published = [row["published"] for row in same]
    color = f"C{index}"
    axis.plot(
      epochs, published, "o-", ms=4, color=color, label=f"{sparsity:.0%}"
    )
    for row in same:
      if row["own"]:
        axis.errorbar(
          row["epochs"],
          row["own"]["interval"][0],
          yerr=row["own"]["interval"][1],
          fmt="D",
          ms=7,
          color=color,
        )
  axis.axhline(0, color="black", lw=0.8)
  axis.set_xticks(sorted({row["epochs"] for row in rows}))


def study(args: argparse.Namespace) -> report.Report:
  """Collects and reports.

  Raises:
    UsageError: A folder that is not there, or a run that cannot be read.
  """
  for place in args.runs:
    if not place.is_dir():
      raise UsageError(f"--runs {place} is not a folder")
  runs = finished(args.runs or [args.out])
  rows, differences = cell_rows(runs, args.out), gain_rows(runs)
  used = sum(row["own"]["seeds"] for row in rows if row["own"])
  note = (
    "own: mean and 95 % interval over seeds; gains: of pairs of one seed; "
    f"{used} of {len(runs)} finished runs have the flags of a cell"
  )
  raw = {"cells": rows, "gains": differences, "finished_runs": len(runs)}
  whole = f"{text(rows, differences)}\n\n{note}"
  return report.Report(raw, whole, lambda: figure(differences))


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  parser.add_argument(
    "--runs",
    type=pathlib.Path,
    nargs="+",
    default=[],
    help="folders that hold finished runs (default: that of --out)",
  )
