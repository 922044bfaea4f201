"""Which topology trains best? RigL, SRigL, gradual pruning, static, dense.

Under SRigL all fan-ins are equal, so SparseOpt changes nothing there: it is the
control for what the correction does to RigL.
"""

from __future__ import annotations

import argparse
import dataclasses

from sparseopt_jax.studies import cells
from sparseopt_jax.studies import paired
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training.config import Config


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


def study(args: argparse.Namespace) -> report.Report:
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
  return paired.study(args, wanted, {}, ", not tuned for a topology")


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  cells.add_flags(parser, seeds=3)
  cells.add_budget(parser)
  parser.add_argument(
    "--sparsities",
    nargs="+",
    type=int,
    default=[90, 95],
    help="in percent (default: %(default)s)",
  )
