"""What the studies of trained networks train: names, conditions, flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
import re
from typing import Any

from sparseopt_jax import compare
from sparseopt_jax.studies import grid
from sparseopt_jax.training import cli
from sparseopt_jax.training import config as config_lib
from sparseopt_jax.training import recipes
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

# What is trained where neither a recipe nor a flag says otherwise.
_DEFAULTS: dict[str, Any] = {
  "dataset": "fashion_mnist",
  "model": "resnet8",
  "width": 8,
  "batch_size": 128,
  "update_every": 100,
}


def parse_condition(text: str) -> dict[str, Any]:
  """'rigl-95' and the like as fields of `Config`.

  Raises:
    UsageError: It is not of that form.
  """
  topologies = "|".join(config_lib.TOPOLOGIES)
  match = re.fullmatch(rf"({topologies})-(\d\d)", text)
  if match is None or match[1] == "dense":
    raise UsageError(
      "a condition must be such as rigl-90, set-95, srigl-95, magnitude-95 or "
      f"static-97, got {text!r}"
    )
  return {"topology": match[1], "sparsity": int(match[2]) / 100}


def config(
  args: argparse.Namespace, condition: str, seed: int, **changes: Any
) -> Config:
  """One run.

  Args:
    args: The flags of the study.
    condition: Such as "rigl-95".
    seed: Of the run.
    **changes: Fields of `Config` that differ from flags and condition.
  """
  masking = {**parse_condition(condition), "measure_skew": True}
  if changes.get("topology") == "dense":
    masking = {}  # Without masks these have no effect.
  where = {"data_dir": args.data_dir, "seed": seed}
  return Config(**(_base(args) | where | masking | changes))


def _base(args: argparse.Namespace) -> dict[str, Any]:
  """The fields that all runs of a study share: a recipe's, or the studies' own.

  Flags by hand win, and the epochs are the study's.
  """
  flags = dict(_DEFAULTS)
  if args.recipe is not None:
    flags = dict(recipes.RECIPES[args.recipe].flags)
  names = "dataset", "model", "width", "precision", "learning_rate", "epochs"
  given = {name: vars(args).get(name) for name in names}
  return flags | {k: value for k, value in given.items() if value is not None}


def learning_rate(args: argparse.Namespace) -> float:
  """Of all runs that have no other."""
  return Config(**_base(args)).learning_rate


def about(
  args: argparse.Namespace, runs: Mapping[str, compare.Run]
) -> dict[str, Any]:
  """What raw results say of all their runs."""
  return {
    "network": described(args),
    "learning_rate": learning_rate(args),
    "trained_on": grid.trained_on(args.out, runs),
  }


def described(args: argparse.Namespace) -> str:
  """The network and the data set, for people."""
  config = Config(**_base(args))
  width = "" if config.width is None else f" of width {config.width}"
  return f"{config.model}{width} on {config.dataset}"


def name(config: Config) -> str:
  """The folder of a run."""
  words: list[str] = [config.topology]
  if config.topology != "dense":
    words += [f"{config.sparsity * 100:.0f}", config.correction]
  if config.grow_from != "raw":
    words.append(config.grow_from)
  words += [
    f"{config.epochs}epochs",
    f"lr{config.learning_rate:g}",
    f"seed{config.seed}",
  ]
  return "-".join(words)


def add_flags(parser: cli.Parser, seeds: int = 5) -> None:
  """The flags that all studies of whole runs share."""
  add_network_flags(parser, seeds)
  parser.add_argument(
    "--jobs",
    type=int,
    default=1,
    help="programs to train at a time (default: %(default)s)",
  )
  parser.add_argument(
    "--report", action="store_true", help="train nothing; report what is there"
  )


def add_network_flags(parser: cli.Parser, seeds: int) -> None:
  """The flags that say which networks."""
  parser.add_argument("--data-dir", help="folder of the prepared data sets")
  parser.add_argument(
    "--recipe",
    choices=list(recipes.RECIPES),
    help="take data set, network and flags from a recipe of the trainer; whole "
    "runs have epochs of their own (default: Fashion-MNIST, resnet8 of width "
    "8)",
  )
  parser.add_argument("--dataset", help="another data set")
  parser.add_argument("--model", help="another network")
  parser.add_argument("--width", type=int, help="channels of the first stage")
  parser.add_argument("--precision", help="of the trainer (default: float32)")
  parser.add_argument(
    "--seeds",
    type=int,
    default=seeds,
    help="number of seeds: 0, 1, ... (default: %(default)s)",
  )


def add_conditions(parser: cli.Parser, default: Sequence[str]) -> None:
  """The flag that says which topologies and sparsities."""
  parser.add_argument(
    "--conditions",
    nargs="+",
    default=list(default),
    help="such as rigl-90 set-95 srigl-95 magnitude-95 static-97 (default: "
    "%(default)s)",
  )


def add_learning_rate(parser: cli.Parser) -> None:
  """The flag of a study with one learning rate."""
  parser.add_argument(
    "--learning-rate",
    type=float,
    help="of SGD, in all arms (default: the recipe's, or 0.1)",
  )


def add_budget(parser: cli.Parser) -> None:
  """The flags of a study with one learning rate and one budget."""
  add_learning_rate(parser)
  parser.add_argument(
    "--epochs", type=int, default=4, help="of a run (default: %(default)s)"
  )


def trained(
  args: argparse.Namespace, every: Mapping[str, grid.Cell]
) -> dict[str, compare.Run]:
  """The complete runs of a study; those missing are trained before.

  Errors are those of `grid.run`.

  Raises:
    UsageError: `--report`, which trains none, and nothing is there.
  """
  jobs = 0 if args.report else args.jobs
  runs = grid.run(every, args.out, jobs)
  if not runs:
    raise UsageError(
      f"--out {args.out}: no run is there; leave out --report to train them"
    )
  return runs


def check(args: argparse.Namespace, conditions: Iterable[str]) -> None:
  """Raises UsageError if a flag that studies share is out of its range."""
  for name in ("seeds", "jobs", "steps"):
    value = getattr(args, name, 1)
    if value < 1:
      raise UsageError(f"--{name} must be at least 1, got {value}")
  for condition in conditions:
    parse_condition(condition)
