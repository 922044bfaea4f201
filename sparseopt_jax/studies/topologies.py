"""Which topology trains best? RigL, SRigL, gradual pruning, static, dense.

Under SRigL all fan-ins are equal, so SparseOpt changes nothing there: it is the
control for what the correction does to RigL.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import shlex

import matplotlib

from sparseopt_jax import compare
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import paired
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training import plots
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

NAME = "topologies"


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to train.

  Attributes:
    label: For tables and figures.
    topology: `Config.topology`.
    arm: With the correction or without.
    against: The label of the variant to compare with.
  """

  label: str
  topology: str
  arm: cells.Arm
  against: str | None = "RigL"


VARIANTS = (
  Variant("RigL", "rigl", cells.BASELINE, None),
  Variant("RigL, SparseOpt", "rigl", cells.SPARSEOPT),
  Variant("SRigL", "srigl", cells.BASELINE),
  Variant("gradual pruning", "magnitude", cells.BASELINE),
  Variant("static", "static", cells.BASELINE),
  Variant("dense", "dense", cells.BASELINE),
)


def configs(
  args: argparse.Namespace, variant: Variant, sparsity: int
) -> dict[int, Config]:
  """The runs of one variant, by seed; `sparsity` is in percent."""
  condition = f"{variant.topology}-{sparsity}"
  if variant.topology == "dense":
    condition = "dense"
  rate = args.learning_rate
  return {
    seed: cells.config(args, condition, variant.arm, args.epochs, rate, seed)
    for seed in range(args.seeds)
  }


def study(args: argparse.Namespace, command: str) -> None:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  args.conditions = [f"rigl-{sparsity}" for sparsity in args.sparsities]
  cells.check(args)
  wanted = {
    (f"{sparsity} %", variant.label): configs(args, variant, sparsity)
    for sparsity in args.sparsities
    for variant in VARIANTS
  }
  every = {
    cells.name(config): config
    for runs in wanted.values()
    for config in runs.values()
  }
  runs = grid.run(every, args.out, 0 if args.report else args.jobs)
  if not runs:
    raise UsageError(cells.nothing_there(args))
  found: dict[str, dict[str, dict[int, compare.Run]]] = {}
  for (place, label), each in wanted.items():
    for seed, config in each.items():
      if cells.name(config) in runs:
        one = found.setdefault(place, {}).setdefault(label, {})
        one[seed] = runs[cells.name(config)]
  results = {
    place: paired.summarise(each, VARIANTS) for place, each in found.items()
  }
  raw = {
    "network": cells.described(args),
    "trained_on": grid.trained_on(args.out, runs),
    "results": results,
  }
  text = (
    f"{paired.table(results)}\n{len(runs)} of {len(every)} runs; "
    f"{cells.described(args)}, {args.epochs} epochs, learning rate "
    f"{args.learning_rate:g}, not tuned for a topology"
  )
  with matplotlib.rc_context(plots.STYLE):
    report.save(args.out, NAME, command, raw, text, paired.figure(results))


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit code."""
  parser = cells.parser(NAME, (__doc__ or "").splitlines()[0], seeds=3)
  cells.add_training(parser)
  parser.add_argument(
    "--sparsities",
    nargs="+",
    type=int,
    default=[90, 95],
    help="in percent (default: %(default)s)",
  )

  def command() -> None:
    args = parser.parse_args(arguments)
    words = ["python", "-m", "sparseopt_jax.studies", NAME, *arguments]
    study(args, shlex.join(words))

  return cli.run(command)
