"""Which topology trains best? RigL, SRigL, gradual pruning, static, dense.

Under SRigL all fan-ins are equal, so SparseOpt changes nothing there: it is the
control for what the correction does to RigL.
"""

from __future__ import annotations

import argparse

from sparseopt_jax.studies import cells
from sparseopt_jax.studies import paired
from sparseopt_jax.studies import report
from sparseopt_jax.studies.paired import OFF
from sparseopt_jax.studies.paired import ON
from sparseopt_jax.studies.paired import Variant
from sparseopt_jax.training import cli

VARIANTS = (
  Variant("RigL", None, {**OFF, "topology": "rigl"}),
  Variant("RigL, SparseOpt", "RigL", {**ON, "topology": "rigl"}),
  Variant("SRigL", "RigL", {**OFF, "topology": "srigl"}),
  Variant("gradual pruning", "RigL", {**OFF, "topology": "magnitude"}),
  Variant("static", "RigL", {**OFF, "topology": "static"}),
  Variant("dense", "RigL", {"topology": "dense"}),
)


def study(args: argparse.Namespace) -> report.Report:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  conditions = {f"{s} %": f"rigl-{s}" for s in args.sparsities}
  cells.check(args, conditions.values())
  rate = cells.learning_rate(args)
  note = f", learning rate {rate:g}, not tuned for a topology"
  return paired.study(args, conditions, VARIANTS, {}, note)


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
