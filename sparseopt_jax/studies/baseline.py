"""Which recipe reaches the paper's baseline? A grid of what is unpublished.

The paper names neither its learning rate, nor its shortcuts, nor whether its
classifier is sparse. All combinations are trained without SparseOpt, so that
no choice is made in its favour. `python -m sparseopt_jax.compare` draws their
learning curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import itertools

from sparseopt_jax.studies import cells
from sparseopt_jax.studies import paired
from sparseopt_jax.studies import report
from sparseopt_jax.studies.paired import OFF
from sparseopt_jax.studies.paired import Variant
from sparseopt_jax.training import cli

SHORTCUTS = ("1x1", "3x3")
# `Config.dense_layers` by what becomes of the classifier.
CLASSIFIERS = {"dense": ("Dense_0/*",), "sparse": ()}


def variants(rates: Sequence[float]) -> list[Variant]:
  """The whole grid."""
  found = []
  for shortcut, classifier, rate in itertools.product(
    SHORTCUTS, CLASSIFIERS, rates
  ):
    changes = OFF | {
      "learning_rate": rate,
      "shortcut": shortcut,
      "dense_layers": CLASSIFIERS[classifier],
      "measure_skew": False,
    }
    label = f"{rate:g}, shortcuts {shortcut}, {classifier} classifier"
    suffix = f"{shortcut}-{classifier}"
    found.append(Variant(label, None, changes, suffix=suffix))
  return found


def study(args: argparse.Namespace) -> report.Report:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  cells.check(args, [args.condition])
  conditions = {args.condition: args.condition}
  grid_of = variants(args.learning_rates)
  about = {"learning_rate": args.learning_rates}
  return paired.study(args, conditions, grid_of, about, ", without SparseOpt")


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
