"""Adam: what a grown weight's first steps do, and other ways to start it.

`sparseopt_jax.studies.regrowth` says what is measured, and measures it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math
import pathlib
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from sparseopt_jax import data
from sparseopt_jax import metrics
from sparseopt_jax.studies import regrowth
from sparseopt_jax.studies import regrowth_tasks
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training.errors import UsageError

_TASKS = ("digits", "digits-constant", "text")  # need no data from elsewhere
AGES = (1, 10, 50)
_JUMP = {"seeds": 10, "width": 64, "step": 500, "ages": AGES[-1]}
_COLORS = dict(
  zip(regrowth.WAYS, ("#9a4f2c", "#1f5fa8", "#3a8f6a"), strict=True)
)


# --- Measuring ----------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Measures what is not there yet, piece by piece.

  Returns:
    `jumps`: {optimiser: {way: {age: of each seed, "mean": of each age}}}, and
    `training`: {task: {topology: {rate: {way: a `summary`}}}}.
  """
  jumps: dict[str, Any] = {}
  for name, (_, ways) in regrowth.OPTIMIZERS.items():
    for way in ways:
      path = _path(args, "jump", name, way)
      found = report.piece(path, regrowth.jump, name, way, **_JUMP)
      ages = {str(age): [seed[age - 1] for seed in found] for age in AGES}
      ages["mean"] = np.mean(found, axis=0).tolist()
      jumps.setdefault(name, {})[way] = ages
  training = {name: _measure_task(args, name) for name in args.tasks}
  return {"jumps": jumps, "training": training}


def _measure_task(args: argparse.Namespace, name: str) -> dict[str, Any]:
  task = regrowth_tasks.TASKS[name]
  task = dataclasses.replace(task, steps=args.steps or task.steps)
  seeds = args.seeds or task.seeds
  try:
    examples = task.load(args.data_dir)
  except (data.DataNotPreparedError, ImportError, ValueError) as error:
    raise UsageError(f"--tasks {name}: {error}") from error
  found: dict[str, Any] = {}
  for topology in regrowth.TOPOLOGIES:
    rates = found.setdefault(topology, {})
    for rate in args.rates or task.rates:
      ways = rates.setdefault(f"{rate:g}", {})
      for way in regrowth.WAYS:
        size = f"lr{rate:g}", f"{task.steps}steps", f"{seeds}seeds"
        path = _path(args, name, topology, way, *size)
        cell = task, topology, way, seeds, rate, examples
        ways[way] = summary(report.piece(path, regrowth.train, *cell))
  return found


def _path(args: argparse.Namespace, *words: str) -> pathlib.Path:
  name = "-".join(words).replace(" ", "-").replace(",", "").lower()
  return args.out / "pieces" / f"{name}.json"


def summary(result: dict[str, Any]) -> dict[str, list[float]]:
  """What to keep of a piece of training.

  Args:
    result: What `regrowth.train` returned.

  Returns:
    For each seed `test_loss`; `test_accuracy`; `first_step`, the training loss
    after the first step of the grown weights over that before it; `five_steps`,
    that in `regrowth.AFTER` a mask update over that before it. And `around`,
    the mean over the seeds.
  """
  around = np.array(result["around"])
  before, first = map(regrowth.AROUND.index, (1, 2))
  after = list(map(regrowth.AROUND.index, regrowth.AFTER))
  return {
    "test_loss": result["test_loss"],
    "test_accuracy": result["test_accuracy"],
    "first_step": (around[:, first] / around[:, before]).tolist(),
    "five_steps": around[:, after].mean(axis=1).tolist(),
    "around": around.mean(axis=0).tolist(),
  }


# --- Figures of it ------------------------------------------------------------


def score(task: str, result: dict[str, Any]) -> list[float]:
  """What counts, for each seed, higher is better: % right, or - bits."""
  if regrowth_tasks.TASKS[task].is_text:
    return [-x for x in result["test_loss"]]
  return [100 * x for x in result["test_accuracy"]]


def differences(
  task: str, result: dict[str, Any], other: dict[str, Any]
) -> list[float]:
  """Of the scores of pairs of a seed."""
  pairs = zip(score(task, result), score(task, other), strict=True)
  return [x - y for x, y in pairs]


def best_rate(task: str, rates: dict[str, Any], way: str) -> str:
  """The learning rate of highest mean score."""
  mean = lambda rate: statistics.fmean(score(task, rates[rate][way]))
  return max(rates, key=lambda rate: (not math.isnan(mean(rate)), mean(rate)))


def _cell(values: Sequence[float], digits: int, sign: str = "") -> str:
  mean, half = report.interval(values)
  return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def _digits(task: str) -> int:
  return 3 if regrowth_tasks.TASKS[task].is_text else 2


def table(raw: dict[str, Any]) -> str:
  """What `measure` found, as text; means with 95 % intervals."""
  return "\n\n".join(
    [
      "Steps of grown weights over those of old ones, noise gradients, by "
      "steps since they grew\n" + metrics.aligned(_jump_rows(raw["jumps"])),
      "At the best learning rate of each way: test accuracy in %, or bits per "
      "character with a minus,\nand the difference to zero in pairs\n"
      + metrics.aligned(_best_rows(raw["training"])),
      "At each learning rate: the same\n"
      + metrics.aligned(_score_rows(raw["training"])),
      "Training loss: after the first step of the grown weights over before "
      "it; in five steps after a\nmask update over five before it\n"
      + metrics.aligned(_loss_rows(raw["training"])),
    ]
  )


def _jump_rows(jumps: dict[str, Any]) -> list[list[str]]:
  rows = [["optimiser", "way", *(f"step {age}" for age in AGES)]]
  for name, ways in jumps.items():
    for way, found in ways.items():
      cells = [_cell(found[str(age)], 2) for age in AGES]
      rows.append([name, way, *cells])
  return rows


def _best_rows(training: dict[str, Any]) -> list[list[str]]:
  rows = [["task", "topology", "way", "rate", "score", "difference"]]
  for task, topologies in training.items():
    for topology, rates in topologies.items():
      zero = rates[best_rate(task, rates, regrowth.ZERO)][regrowth.ZERO]
      for way in regrowth.WAYS:
        rate = best_rate(task, rates, way)
        result, digits = rates[rate][way], _digits(task)
        row = [task, topology, way, rate, _cell(score(task, result), digits)]
        change = _cell(differences(task, result, zero), digits, "+")
        rows.append([*row, "" if way == regrowth.ZERO else change])
  return rows


def _score_rows(training: dict[str, Any]) -> list[list[str]]:
  rows = [["task", "topology", "rate", *regrowth.WAYS]]
  for task, topology, rate, ways in _cells(training):
    zero, digits = ways[regrowth.ZERO], _digits(task)
    changes = [
      _cell(differences(task, ways[way], zero), digits, "+")
      for way in regrowth.WAYS[1:]
    ]
    first = _cell(score(task, zero), digits)
    rows.append([task, topology, rate, first, *changes])
  return rows


def _loss_rows(training: dict[str, Any]) -> list[list[str]]:
  header = ["task", "topology", "rate"]
  header += [f"first step, {way}" for way in regrowth.WAYS]
  rows = [[*header, *(f"five, {way}" for way in regrowth.WAYS)]]
  for task, topology, rate, ways in _cells(training):
    cells = [
      _cell(ways[way][figure], 2)
      for figure in ("first_step", "five_steps")
      for way in regrowth.WAYS
    ]
    rows.append([task, topology, rate, *cells])
  return rows


def _cells(training: dict[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
  for task, topologies in training.items():
    for topology, rates in topologies.items():
      for rate, ways in rates.items():
        yield task, topology, rate, ways


def figure(raw: dict[str, Any]) -> Figure:
  """Jumps on the left; of each task, the loss around updates, and scores."""
  training = raw["training"]
  width = 1 + len(training)
  result = Figure(figsize=(4.2 * width, 7.6), layout="constrained")
  axes = result.subplots(2, width)
  _plot_ages(axes[0, 0], raw["jumps"]["adam"])
  _plot_jumps(axes[1, 0], raw["jumps"])
  for column, (task, topologies) in zip(
    axes.T[1:], training.items(), strict=True
  ):
    _plot_around(column[0], task, topologies["RigL"])
    _plot_differences(column[1], task, topologies)
  axes[1, -1].legend(handlelength=3.5)
  return result


def _plot_ages(axis: Axes, ways: dict[str, Any]) -> None:
  axis.set_title("Adam: steps of grown over old weights")
  for way, found in ways.items():
    ages = range(1, len(found["mean"]) + 1)
    axis.plot(ages, found["mean"], color=_COLORS[way], label=way)
  axis.axhline(1, color="black", lw=0.8)
  axis.set_yscale("log")
  _plain_ticks(axis, (0.5, 1, 2, 5, 10))
  axis.set_xlabel("steps since they grew; noise gradients")
  axis.legend()


def _plot_jumps(axis: Axes, jumps: dict[str, Any]) -> None:
  axis.set_title("First step of grown over old weights")
  for y, ways in enumerate(jumps.values()):
    for way, found in ways.items():
      mean, half = report.interval(found["1"])
      axis.errorbar(mean, y, xerr=half, fmt="o", color=_COLORS[way])
  axis.set_yticks(range(len(jumps)), list(jumps))
  axis.invert_yaxis()
  axis.axvline(1, color="black", lw=0.8)
  axis.set_xscale("log")
  ticks = (0.5, 1, 2, 5, 10, 20)
  axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  axis.minorticks_off()


def _plot_around(axis: Axes, task: str, rates: dict[str, Any]) -> None:
  rate = best_rate(task, rates, regrowth.ZERO)
  axis.set_title(f"{task}, RigL, rate {rate}: loss")
  for way, result in rates[rate].items():
    axis.plot(regrowth.AROUND, result["around"], color=_COLORS[way])
  axis.axvline(0, color="black", lw=0.8)
  axis.set_xlabel("steps since a mask update; 1: mean before")


def _plot_differences(
  axis: Axes, task: str, topologies: dict[str, Any]
) -> None:
  unit = "bits saved" if regrowth_tasks.TASKS[task].is_text else "points"
  axis.set_title(f"{task}: gain on zero, {unit}")
  pairs = list(itertools.product(topologies, regrowth.WAYS[1:]))
  for i, (topology, way) in enumerate(pairs):
    rates = topologies[topology]
    gains = [
      report.interval(differences(task, ways[way], ways[regrowth.ZERO]))
      for ways in rates.values()
    ]
    mean, half = np.transpose(gains)
    shift = 1.06 ** (i - 1.5)  # Bars side by side.
    axis.errorbar(
      [float(rate) * shift for rate in rates],
      mean,
      yerr=half,
      ls="-" if topology == "RigL" else "--",
      marker="o",
      ms=4,
      color=_COLORS[way],
      label=f"{way}, {topology}",
    )
  axis.axhline(0, color=_COLORS[regrowth.ZERO], lw=1)
  axis.set_xscale("log")
  axis.set_xlabel("peak of the learning rate")


def _plain_ticks(axis: Axes, ticks: Sequence[float]) -> None:
  axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
  axis.minorticks_off()


# --- Command ------------------------------------------------------------------


def study(args: argparse.Namespace) -> report.Report:
  """Measures and reports.

  Raises:
    UsageError: A flag out of its range, or a data set that is not there.
  """
  for flag, least in (("seeds", 1), ("steps", 100)):
    value = getattr(args, flag)
    if value is not None and value < least:
      raise UsageError(f"--{flag} must be at least {least}, got {value}")
  if not all(0 < rate < math.inf for rate in args.rates or ()):
    raise UsageError(f"--rates must be finite and above 0, got {args.rates}")
  report.make(args.out / "pieces")
  raw = measure(args)
  return report.Report(raw, table(raw), lambda: figure(raw))


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  parser.add_argument(
    "--tasks",
    nargs="+",
    choices=list(regrowth_tasks.TASKS),
    default=list(_TASKS),
    help="what to train (default: %(default)s)",
  )
  parser.add_argument("--data-dir", help="folder of TensorFlow Datasets")
  for flag, kind, what in (
    ("--seeds", int, "networks a cell"),
    ("--steps", int, "training steps"),
  ):
    parser.add_argument(flag, type=kind, help=f"{what} (default: the task's)")
  parser.add_argument(
    "--rates",
    type=float,
    nargs="+",
    help="peaks of the learning rate (default: the task's)",
  )
