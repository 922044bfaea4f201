"""Which recipe reaches the paper's baseline? A grid of what is unpublished.

The paper names neither its learning rate, nor its shortcuts, nor whether its
classifier is sparse. All combinations are trained without SparseOpt, so that
no choice is made in its favour.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any, Literal

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

CLASSIFIER = "Dense_0/*"
Found = dict["Choice", list[compare.Run]]


@dataclasses.dataclass(frozen=True)
class Choice:
  """One combination.

  Attributes:
    learning_rate: `Config.learning_rate`.
    shortcut: `Config.shortcut`.
    classifier: Whether its kernel is dense or sparse.
  """

  learning_rate: float
  shortcut: Literal["1x1", "3x3"]
  classifier: Literal["dense", "sparse"]

  @property
  def network(self) -> str:
    """All but the learning rate, for people."""
    return f"shortcuts {self.shortcut}, {self.classifier} classifier"

  def config(self, args: argparse.Namespace, seed: int) -> Config:
    """One run of it."""
    return cells.config(
      args,
      args.condition,
      seed,
      correction="off",
      learning_rate=self.learning_rate,
      shortcut=self.shortcut,
      dense_layers=(CLASSIFIER,) if self.classifier == "dense" else (),
      measure_skew=False,
    )

  def name(self, config: Config) -> str:
    """The folder of a run."""
    return f"{cells.name(config)}-{self.shortcut}-{self.classifier}"


def choices(rates: Sequence[float]) -> list[Choice]:
  """The whole grid."""
  shortcuts: tuple[Literal["1x1", "3x3"], ...] = ("1x1", "3x3")
  classifiers: tuple[Literal["dense", "sparse"], ...] = ("dense", "sparse")
  return [
    Choice(rate, shortcut, classifier)
    for shortcut, classifier, rate in itertools.product(
      shortcuts, classifiers, rates
    )
  ]


def main_effects(found: Found) -> dict[str, dict[str, float]]:
  """Mean final test accuracy by each factor alone, over all the others.

  Args:
    found: The runs of the whole grid.

  Returns:
    {factor: {level: accuracy}}.
  """
  effects: dict[str, dict[str, float]] = {}
  for field in dataclasses.fields(Choice):
    levels: dict[str, list[float]] = {}
    for choice, runs in found.items():
      ends = levels.setdefault(str(getattr(choice, field.name)), [])
      ends += [run.lines[-1]["test_accuracy"] for run in runs]
    effects[field.name] = {k: float(np.mean(v)) for k, v in levels.items()}
  return effects


def summarise(found: Found) -> list[dict[str, Any]]:
  """A row a combination, the best first."""
  rows = []
  for choice, runs in found.items():
    ends = [run.lines[-1] for run in runs]
    accuracies = [line["test_accuracy"] for line in ends]
    rows.append(
      {
        **dataclasses.asdict(choice),
        "test_accuracy": report.interval(accuracies),
        "train_accuracy": report.interval([e["train_accuracy"] for e in ends]),
        "dead_neurons": float(np.mean([e["dead_neurons"] for e in ends])),
        "curves": [
          [line["test_accuracy"] for line in run.lines] for run in runs
        ],
      }
    )
  return sorted(rows, key=lambda row: -row["test_accuracy"][0])


def table(rows: Sequence[dict[str, Any]]) -> str:
  """A line a combination."""
  header = ["rate", "shortcuts", "classifier", "test %", "train %", "dead"]
  lines = [
    [
      f"{row['learning_rate']:g}",
      row["shortcut"],
      row["classifier"],
      report.percent(row["test_accuracy"]),
      report.percent(row["train_accuracy"]),
      f"{row['dead_neurons']:.1f}",
    ]
    for row in rows
  ]
  return metrics.aligned([header, *lines])


def figure(found: Found) -> Figure:
  """Learning curves: a panel a network, a line a learning rate."""
  networks = list(dict.fromkeys(choice.network for choice in found))
  rates = sorted({choice.learning_rate for choice in found})
  colors = {rate: f"C{number}" for number, rate in enumerate(rates)}
  result = Figure(figsize=(4 * len(networks), 3.6), layout="constrained")
  axes: Any = result.subplots(1, len(networks), squeeze=False, sharey=True)
  for axis, network in zip(axes[0], networks, strict=True):
    axis.set_title(network)
    mine = {c: runs for c, runs in found.items() if c.network == network}
    _curves(axis, mine, colors)
    axis.legend(title="learning rate")
  axes[0, 0].set_ylabel("test accuracy")
  return result


def _curves(axis: Axes, found: Found, colors: dict[float, str]) -> None:
  for choice, runs in found.items():
    values = [[line["test_accuracy"] for line in run.lines] for run in runs]
    epochs = [line["epoch"] for line in runs[0].lines]
    label = f"{choice.learning_rate:g}"
    color = colors[choice.learning_rate]
    mean = np.mean(values, axis=0)
    axis.plot(epochs, mean, "o-", ms=4, label=label, color=color)
  axis.set_xlabel("epoch")
  axis.xaxis.set_major_locator(MaxNLocator(integer=True))
  axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def study(args: argparse.Namespace) -> report.Report:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  cells.check(args, [args.condition])
  names: dict[tuple[Choice, int], str] = {}
  every = {}
  for seed in range(args.seeds):
    for choice in choices(args.learning_rates):
      config = choice.config(args, seed)
      names[choice, seed] = choice.name(config)
      every[choice.name(config)] = config
  runs = cells.trained(args, every)
  found: Found = {}
  for (choice, _), name in names.items():
    if name in runs:
      found.setdefault(choice, []).append(runs[name])
  rows = summarise(found)
  effects = main_effects(found) if len(runs) == len(every) else {}
  raw = {
    "network": cells.described(args),
    "condition": args.condition,
    "epochs": args.epochs,
    "trained_on": grid.trained_on(args.out, runs),
    "main_effects": effects,
    "results": rows,
  }
  lines = [
    table(rows),
    f"{len(runs)} of {len(every)} runs; {cells.described(args)}, "
    f"{args.condition} without SparseOpt, {args.epochs} epochs",
    *(
      f"mean by {factor}: "
      + ", ".join(f"{level} {value:.2%}" for level, value in levels.items())
      for factor, levels in effects.items()
    ),
  ]
  return report.Report(raw, "\n".join(lines), lambda: figure(found))


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  cells.add_flags(parser, seeds=1)
  parser.add_argument(
    "--condition",
    default="rigl-95",
    help="topology and sparsity (default: %(default)s)",
  )
  parser.add_argument(
    "--epochs", type=int, default=2, help="of a run (default: %(default)s)"
  )
  parser.add_argument(
    "--learning-rates",
    type=float,
    nargs="+",
    default=[0.02, 0.1, 0.2],
    help="to combine with all else (default: %(default)s)",
  )
