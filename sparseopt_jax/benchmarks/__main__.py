"""`python -m sparseopt_jax.benchmarks COMMAND`.

Each command prints a table, most of ratios to plain `optax.sgd` with momentum
measured in turn in the same process, and writes it as JSON where `--output`
says.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from sparseopt_jax import models
from sparseopt_jax.benchmarks import compilation
from sparseopt_jax.benchmarks import optimizer
from sparseopt_jax.benchmarks import scaling
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.benchmarks import training_step
from sparseopt_jax.training import cli
from sparseopt_jax.training import config as config_lib
from sparseopt_jax.training.errors import UsageError

_NEVER = 2**30


def parser() -> cli.Parser:
  """The command line."""
  top = cli.Parser(
    prog="python -m sparseopt_jax.benchmarks", description=__doc__
  )
  commands = top.add_subparsers(dest="command", required=True)
  for name, text in (
    ("optimizer", "the optimiser's step between mask updates"),
    ("mask-update", "the optimiser's step with a mask update"),
    ("compile", "the first call: trace, compile and run"),
    ("memory", "bytes of the state and of the compiled program"),
    ("scaling", "the mask update by number of weights and layers"),
    ("training-step", "the whole step between mask updates"),
    ("networks", "many networks in one program, against one after the other"),
    ("tensorflow", "the trainer's step, against the same one in TensorFlow"),
    ("input", "images a second of the input, against the trainer's step"),
  ):
    command = commands.add_parser(name, help=text)
    command.add_argument("--output", help="write the figures here, as JSON")
    _add(command, "--sparsity", 0.9, "fraction of zeros")
    if name != "memory":
      _add(command, "--repeats", 15, "rounds of measurement")
    if name == "scaling":
      sizes = [10_000, 100_000, 1_000_000, 10_000_000, 100_000_000]
      _add(command, "--sizes", sizes, "numbers of weights", type=int, nargs="+")
      topologies = ["SET", "RigL"]
      _add(command, "--topology", "RigL", "how masks change", topologies)
    elif name == "tensorflow":
      names = ("resnet8", "resnet14", "resnet20")
      _add(command, "--model", "resnet20", "the network", names)
      _add(command, "--batch-size", 128, "images in a step")
      _add(command, "--steps", 3, "steps that are timed together")
    elif name in ("training-step", "input", "networks"):
      _add(command, "--model", "resnet20", "the network", models.NAMES)
      _add(command, "--batch-size", 128, "images in a step")
      precisions = config_lib.PRECISIONS
      _add(command, "--precision", "float32", "of the computation", precisions)
      if name == "training-step":
        _add(command, "--image-size", 32, "height and width in pixels")
      if name == "networks":
        _add_networks(command)
    else:
      trees = optimizer.TREES
      _add(command, "--model", "resnet50", "whose parameters to take", trees)
  return top


def _add_networks(command: argparse.ArgumentParser) -> None:
  counts = [1, 2, 4, 8, 16, 32]
  text = "numbers of networks; 1 is always there"
  _add(command, "--networks", counts, text, type=int, nargs="+")
  _add(command, "--devices", 1, "devices that share the networks out")
  _add(command, "--width", None, "channels or neurons", type=int)
  _add(command, "--steps", 10, "steps that one call takes")


def _add(
  command: argparse.ArgumentParser,
  flag: str,
  default: Any,
  text: str,
  choices: Sequence[str] | None = None,
  **options: Any,
) -> None:
  """A flag of the default's type, whose help tells the default."""
  options = {"type": type(default), "default": default} | options
  command.add_argument(
    flag, choices=choices, help=f"{text} (default: %(default)s)", **options
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""

  def command() -> None:
    args = parser().parse_args(arguments)
    _check(args)
    _run(args)

  return cli.run(command)


def _check(args: argparse.Namespace) -> None:
  if not 0 <= args.sparsity < 1:
    raise UsageError(f"--sparsity must be in [0, 1), got {args.sparsity}")
  for name in ("repeats", "batch_size", "image_size", "steps"):
    if getattr(args, name, 1) < 1:
      raise UsageError(
        f"{config_lib.flag(name)} must be at least 1, got {getattr(args, name)}"
      )
  for count in getattr(args, "networks", []):
    _config(args, count)
  if min(getattr(args, "sizes", [8_000])) < 8_000:
    raise UsageError(f"--sizes must be at least 8000, got {min(args.sizes)}")
  if args.output and not pathlib.Path(args.output).parent.is_dir():
    raise UsageError(f"--output {args.output}: there is no such folder")
  if args.output and pathlib.Path(args.output).exists():
    raise UsageError(f"--output {args.output} is there already")


def _run(args: argparse.Namespace) -> None:
  name = f"{args.command}, {args.sparsity:.0%} sparse"
  if args.command == "scaling":
    name += f", {args.topology}"
    rows = scaling.run(args.sizes, args.sparsity, args.repeats, args.topology)
  elif args.command == "training-step":
    name += f", {args.model}"
    rows = training_step.run(
      args.model,
      args.image_size,
      args.batch_size,
      args.sparsity,
      args.repeats,
      args.precision,
    )
  elif args.command == "tensorflow":
    from sparseopt_jax.benchmarks import tensorflow_step

    name += f", {args.model}"
    config = config_lib.Config(
      dataset="cifar100",
      model=args.model,
      sparsity=args.sparsity,
      batch_size=args.batch_size,
      update_every=100,
    )
    rows = tensorflow_step.run(config, args.repeats, args.steps)
  elif args.command == "networks":
    from sparseopt_jax.benchmarks import networks

    name += f", {args.model}, {args.devices} device(s)"
    configs = [_config(args, n) for n in sorted({1, *args.networks})]
    rows = networks.run(configs, args.repeats, args.steps)
  elif args.command == "input":
    from sparseopt_jax.benchmarks import input_pipeline

    name += f", {args.model}"
    rows = input_pipeline.run(
      args.model, args.batch_size, args.sparsity, args.repeats, args.precision
    )
  else:
    name += f", {args.model}"
    rows = _on_tree(args)
  timing.report(name, rows, args.output)


def _config(args: argparse.Namespace, networks: int) -> config_lib.Config:
  """What `networks` trains."""
  return config_lib.Config(
    dataset="cifar100",
    model=args.model,
    width=args.width,
    sparsity=args.sparsity,
    batch_size=args.batch_size,
    precision=args.precision,
    update_every=100,
    networks=networks,
    devices=args.devices if networks > 1 else 1,
  )


def _on_tree(args: argparse.Namespace) -> dict[str, dict]:
  if args.command == "compile":
    return compilation.first_call(args.model, args.sparsity, args.repeats)
  if args.command == "memory":
    return compilation.memory(args.model, args.sparsity)
  calls, every = (1, 1) if args.command == "mask-update" else (10, _NEVER)
  return optimizer.run(args.model, args.sparsity, args.repeats, calls, every)


if __name__ == "__main__":
  sys.exit(main())
