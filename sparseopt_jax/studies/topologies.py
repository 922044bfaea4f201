"""Which topology trains best? RigL, SRigL, gradual pruning, static, dense.

Under SRigL all fan-ins are equal, so SparseOpt changes nothing there: it is the
control for what the correction does to RigL.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import shlex

from sparseopt_jax.studies import cells
from sparseopt_jax.studies import paired
from sparseopt_jax.training import cli
from sparseopt_jax.training.config import Config

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
) -> list[Config]:
  """The runs of one variant, by seed; `sparsity` is in percent."""
  dense = variant.topology == "dense"
  condition = "dense" if dense else f"{variant.topology}-{sparsity}"
  return [
    cells.config(args, condition, variant.arm, args.epochs, seed)
    for seed in range(args.seeds)
  ]


def study(args: argparse.Namespace, command: str) -> None:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  args.conditions = [f"rigl-{sparsity}" for sparsity in args.sparsities]
  cells.check(args)
  wanted = [
    paired.Cell(f"{sparsity} %", variant, cells.name(config), config)
    for sparsity in args.sparsities
    for variant in VARIANTS
    for config in configs(args, variant, sparsity)
  ]
  note = ", not tuned for a topology"
  paired.study(NAME, args, command, wanted, {}, note)


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit code."""
  parser = cells.parser(NAME, (__doc__ or "").splitlines()[0], seeds=3)
  cells.add_learning_rate(parser)
  cells.add_epochs(parser)
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
