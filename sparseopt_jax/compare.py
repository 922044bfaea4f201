"""Compares runs: `python -m sparseopt_jax.compare RUN RUN ...`.

Runs that differ in nothing but the seed make one group. A table gives each
group's final test accuracy (mean and standard deviation over seeds) and how
many epochs it takes to an accuracy; a plot gives the curves. Seconds are of the
program: networks that were trained together share them.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

from sparseopt_jax import metrics
from sparseopt_jax.training import cli
from sparseopt_jax.training import folder
from sparseopt_jax.training import records
from sparseopt_jax.training.errors import UsageError

_FIGURES = ("epoch", "test_accuracy", "itop_rate", "seconds")
_HEADER = (
  "group",
  "seeds",
  "final accuracy",
  "best",
  "epochs to {:.2%}",
  "ITOP rate",
  "seconds",
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run has left in its folder.

  Attributes:
    flags: What `folder.identity` gives.
    lines: The lines of `metrics.jsonl`.
  """

  flags: dict[str, Any]
  lines: list[dict[str, Any]]

  def epochs_to(self, accuracy: float) -> int | None:
    """The first epoch with at least this test accuracy, or None."""
    for line in self.lines:
      if line["test_accuracy"] >= accuracy:
        return line["epoch"]
    return None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in nothing but the seed.

  Attributes:
    label: The flags by which the groups differ.
    runs: At least one, all with as many lines as the shortest had.
  """

  label: str
  runs: list[Run]

  def accuracies(self) -> list[list[float]]:
    """Test accuracy, one list a run."""
    return [[line["test_accuracy"] for line in r.lines] for r in self.runs]

  def epochs(self) -> list[int]:
    """The epochs of `accuracies`."""
    return [line["epoch"] for line in self.runs[0].lines]

  def final(self) -> list[float]:
    """Each run's last test accuracy."""
    return [accuracies[-1] for accuracies in self.accuracies()]

  def progress(self) -> str:
    """How far the runs have got, if not to their end."""
    last, planned = self.epochs()[-1], self.runs[0].flags["epochs"]
    return f", epoch {last} of {planned}" if last < planned else ""


def read(path: pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    UsageError: If it is not one, or holds no evaluation yet.
  """
  flags = folder.read_network(path)
  file = path / folder.METRICS
  lines = records.read_lines(file) if file.is_file() else []
  if not lines:
    raise UsageError(f"{path} holds no evaluation yet")
  for line in lines:
    missing = [name for name in _FIGURES if not _is_number(line.get(name))]
    if missing:
      raise UsageError(
        f"{file}: step {line['step']} has no {' and no '.join(missing)}"
      )
  return Run(flags, lines)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float)


def group(runs: Sequence[Run]) -> list[Group]:
  """Groups runs, in order of first appearance; cut to their common epochs."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    rest = {k: v for k, v in run.flags.items() if k != "seed"}
    groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
  every = [json.loads(key) for key in groups]
  names = sorted({name for flags in every for name in flags})
  differing = [
    name
    for name in names
    if any(f.get(name) != every[0].get(name) for f in every)
  ]
  return [
    Group(_label(flags, differing), _cut(members))
    for flags, members in zip(every, groups.values(), strict=True)
  ]


def _cut(runs: Sequence[Run]) -> list[Run]:
  length = min(len(run.lines) for run in runs)
  return [Run(run.flags, run.lines[:length]) for run in runs]


def _label(flags: dict[str, Any], names: Sequence[str]) -> str:
  if not names:
    return f"{flags['dataset']} {flags['model']}"
  return ", ".join(
    f"{name.replace('_', ' ')} {flags.get(name)}" for name in names
  )


def table(groups: Sequence[Group], accuracy: float) -> str:
  """The comparison as text.

  Args:
    groups: At least one.
    accuracy: The test accuracy to count epochs to.

  Returns:
    A line a group, below a header.
  """
  rows = [[name.format(accuracy) for name in _HEADER]]
  rows += [_row(each, accuracy) for each in groups]
  return metrics.aligned(rows)


def _row(each: Group, accuracy: float) -> list[str]:
  best = [max(line["test_accuracy"] for line in run.lines) for run in each.runs]
  last = [run.lines[-1] for run in each.runs]
  return [
    each.label + each.progress(),
    str(len(each.runs)),
    _spread(each.final()),
    _spread(best),
    _reached([run.epochs_to(accuracy) for run in each.runs]),
    f"{statistics.fmean(line['itop_rate'] for line in last):.1%}",
    f"{statistics.fmean(line['seconds'] for line in last):.0f}",
  ]


def _spread(values: Sequence[float]) -> str:
  mean = f"{statistics.fmean(values):.2%}"
  return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2%}"


def _reached(epochs: Sequence[int | None]) -> str:
  reached = [epoch for epoch in epochs if epoch is not None]
  if not reached:
    return "never"
  mean = f"{statistics.fmean(reached):.1f}"
  if len(reached) < len(epochs):
    return f"{mean} ({len(reached)} of {len(epochs)})"
  return mean


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python -m sparseopt_jax.compare",
    description="Compares runs, with mean and spread over seeds.",
  )
  parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
  parser.add_argument(
    "--accuracy",
    type=float,
    help="count epochs to this test accuracy, in (0, 1] (default: the final "
    "accuracy of the weakest group)",
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=pathlib.Path("compare.png"),
    help="the image file (default: %(default)s)",
  )
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""

  def command() -> None:
    args = _parser().parse_args(arguments)
    if args.accuracy is not None and not 0 < args.accuracy <= 1:
      raise UsageError(f"--accuracy must be in (0, 1], got {args.accuracy}")
    if args.out.exists():
      raise UsageError(f"--out {args.out} is there already")
    if args.out.suffix.lower() != ".png":
      raise UsageError(f"--out must end in .png, got {args.out}")
    if not args.out.parent.is_dir():
      raise UsageError(
        f"--out {args.out}: there is no folder {args.out.parent}"
      )
    places = [path.resolve() for path in args.runs]
    twice = [p for i, p in enumerate(args.runs) if places[i] in places[:i]]
    if twice:
      raise UsageError(f"{twice[0]} is given twice")
    runs = [read(path) for path in args.runs]
    for i, run in enumerate(runs):
      same = [j for j in range(i) if runs[j].flags == run.flags]
      if same:
        raise UsageError(
          f"{args.runs[i]} has the flags and the seed of {args.runs[same[0]]}; "
          "give one of the two"
        )
    groups = group(runs)
    weakest = min(statistics.fmean(each.final()) for each in groups)
    print(table(groups, weakest if args.accuracy is None else args.accuracy))
    from sparseopt_jax.training import plots

    curves = {each.label: (each.epochs(), each.accuracies()) for each in groups}
    records.write_bytes(args.out, plots.comparison(curves))
    print(f"curves: {args.out}")

  return cli.run(command)


if __name__ == "__main__":
  sys.exit(main())
