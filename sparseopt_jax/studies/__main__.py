"""`python -m sparseopt_jax.studies NAME`."""

from __future__ import annotations

from collections.abc import Sequence
import importlib
import sys

from sparseopt_jax.training import cli
from sparseopt_jax.training import signals

NAMES = (
  "gradient-skew",
  "baseline",
  "convergence",
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
  module = f"sparseopt_jax.studies.{name.replace('-', '_')}"
  try:
    return importlib.import_module(module).main(rest)
  except ModuleNotFoundError as error:
    return cli.missing(error)
  except signals.Interrupted as end:
    print(end, file=sys.stderr)
    return end.exit_code


if __name__ == "__main__":
  sys.exit(main())
