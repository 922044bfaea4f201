"""`python -m sparseopt_jax.benchmarks optimizer | mask-update | training-step`.

Each prints a table of ratios to plain `optax.sgd` with momentum, measured in
turn in the same process, and writes it as JSON where `--output` says.
"""

import argparse

from sparseopt_jax import models
from sparseopt_jax.benchmarks import optimizer
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.benchmarks import training_step

_NEVER = 2**30


def parser() -> argparse.ArgumentParser:
  """The command line."""
  top = argparse.ArgumentParser(
    prog="python -m sparseopt_jax.benchmarks", description=__doc__
  )
  commands = top.add_subparsers(dest="command", required=True)
  for name, model, text in (
    ("optimizer", "resnet50", "the optimiser's step between mask updates"),
    ("mask-update", "resnet50", "the optimiser's step with a mask update"),
    ("training-step", "resnet20", "the whole step between mask updates"),
  ):
    command = commands.add_parser(name, help=text)
    command.add_argument("--model", choices=models.NAMES, default=model)
    command.add_argument("--sparsity", type=float, default=0.9)
    command.add_argument("--repeats", type=int, default=15)
    command.add_argument("--output", help="write the figures here, as JSON")
  command.add_argument("--batch-size", type=int, default=128)
  command.add_argument("--image-size", type=int, default=32)
  command.add_argument("--precision", default="float32")
  return top


def main(arguments: list[str] | None = None) -> None:
  """Runs one benchmark."""
  args = parser().parse_args(arguments)
  if args.command == "training-step":
    rows = training_step.run(
      args.model,
      args.image_size,
      args.batch_size,
      args.sparsity,
      args.repeats,
      args.precision,
    )
  else:
    calls, every = (1, 1) if args.command == "mask-update" else (3, _NEVER)
    rows = optimizer.run(args.model, args.sparsity, args.repeats, calls, every)
  name = f"{args.command} of {args.model}, {args.sparsity:.0%} sparse"
  timing.report(name, rows, args.output)


if __name__ == "__main__":
  main()
