"""`python -m sparseopt_jax.studies NAME`."""

from __future__ import annotations

from collections.abc import Sequence
import importlib
import pathlib
import shlex
import sys

from sparseopt_jax.training import cli
from sparseopt_jax.training import signals

NAMES = (
  "gradient-skew",
  "baseline",
  "convergence",
  "early-skew",
  "ablations",
  "topologies",
  "adam",
  "paper-tables",
)
_USAGE = f"""usage: python -m sparseopt_jax.studies NAME [FLAGS]

NAME is one of {", ".join(NAMES)}; NAME --help tells its flags.
Each leaves raw results as JSON, a table and a figure."""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  arguments = sys.argv[1:] if arguments is None else arguments
  name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
  if name in ("-h", "--help"):
    print(_USAGE)
    return 0
  if name not in NAMES:
    print(
      f"error: NAME must be one of {', '.join(NAMES)}, got {name!r}",
      file=sys.stderr,
    )
    return 2
  try:
    return cli.run(lambda: _run(name, rest))
  except signals.Interrupted as end:
    print(end, file=sys.stderr)
    return end.exit_code


def _run(name: str, flags: Sequence[str]) -> None:
  module = f"sparseopt_jax.studies.{name.replace('-', '_')}"
  study = importlib.import_module(module)
  prog = f"python -m sparseopt_jax.studies {name}"
  (about, *_) = (study.__doc__ or "").splitlines()
  parser = cli.Parser(prog=prog, description=about)
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=pathlib.Path("runs/studies"),
    help="folder of the runs and results (default: %(default)s)",
  )
  study.add_flags(parser)
  args = parser.parse_args(flags)
  study.study(args).save(args.out, name, shlex.join([*prog.split(), *flags]))


if __name__ == "__main__":
  sys.exit(main())
