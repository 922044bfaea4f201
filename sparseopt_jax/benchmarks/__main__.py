"""`python -m sparseopt_jax.benchmarks COMMAND`.

Each command prints a table, most of ratios to plain `optax.sgd` with momentum
measured in turn in the same process, and writes it as JSON where `--output`
says.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import pathlib
import sys
from typing import Any

from sparseopt_jax import models
from sparseopt_jax.benchmarks import compilation
from sparseopt_jax.benchmarks import optimizer
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.benchmarks import training_step
from sparseopt_jax.training import cli
from sparseopt_jax.training import config as config_lib
from sparseopt_jax.training.errors import UsageError

_FLAGS: dict[str, dict[str, Any]] = {
  "sparsity": {"default": 0.9, "help": "fraction of zeros"},
  "repeats": {"default": 15, "help": "rounds of measurement"},
  "model": {"choices": models.NAMES, "help": "the network"},
  "batch-size": {"default": 128, "help": "images in a step"},
  "precision": {
    "default": "float32",
    "choices": config_lib.PRECISIONS,
    "help": "of the computation",
  },
  "image-size": {"default": 32, "help": "height and width in pixels"},
  "networks": {
    "default": [1, 2, 4, 8, 16, 32],
    "type": int,
    "nargs": "+",
    "help": "numbers of networks; 1 is always there",
  },
  "devices": {"default": 1, "help": "devices that share the networks out"},
  "width": {"type": int, "help": "channels or neurons"},
  "steps": {"default": 3, "help": "steps that are timed together"},
}


# Imported when they run, since they need Flax and more.


def _networks(args: argparse.Namespace) -> dict[str, dict]:
  from sparseopt_jax.benchmarks import networks

  configs = [_config(args, n) for n in sorted({1, *args.networks})]
  return networks.run(configs, args.repeats, args.steps)


def _tensorflow(args: argparse.Namespace) -> dict[str, dict]:
  from sparseopt_jax.benchmarks import tensorflow_step

  return tensorflow_step.run(_config(args), args.repeats, args.steps)


def _input(args: argparse.Namespace) -> dict[str, dict]:
  from sparseopt_jax.benchmarks import input_pipeline

  config = dataclasses.replace(_config(args), dataset="imagenet2012")
  return input_pipeline.run(config, args.repeats)


def _config(args: argparse.Namespace, networks: int = 1) -> config_lib.Config:
  """What the trainer is timed with."""
  return config_lib.Config(
    dataset="imagenet2012" if args.model == "resnet50" else "cifar100",
    model=args.model,
    width=getattr(args, "width", None),
    sparsity=args.sparsity,
    batch_size=args.batch_size,
    precision=getattr(args, "precision", "float32"),
    update_every=100,
    networks=networks,
    devices=args.devices if networks > 1 else 1,
  )


# Each command: what runs, what it measures, and its flags.
_COMMANDS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
  "optimizer": (
    lambda a: optimizer.run(a.model, a.sparsity, a.repeats, 10, timing.NEVER),
    "the optimiser's step between mask updates",
    "model=resnet50 repeats",
  ),
  "mask-update": (
    lambda a: optimizer.run(a.model, a.sparsity, a.repeats, 1, 1),
    "the optimiser's step with a mask update",
    "model=resnet50 repeats",
  ),
  "compile": (
    lambda a: compilation.first_call(a.model, a.sparsity, a.repeats),
    "the first call: trace, compile and run",
    "model=resnet50 repeats",
  ),
  "memory": (
    lambda a: compilation.memory(a.model, a.sparsity),
    "bytes of the state",
    "model=resnet50",
  ),
  "training-step": (
    training_step.run,
    "the whole step between mask updates",
    "model=resnet20 batch-size image-size precision repeats",
  ),
  "networks": (
    _networks,
    "many networks in one program, against one after the other",
    "model=resnet20 width batch-size precision networks devices steps=10 "
    "repeats",
  ),
  "tensorflow": (
    _tensorflow,
    "the trainer's step, against the same one in TensorFlow",
    "model=resnet20 batch-size steps repeats",
  ),
  "input": (
    _input,
    "images a second of the input, against the trainer's step",
    "model=resnet50 batch-size precision repeats",
  ),
}


def _parser() -> cli.Parser:
  top = cli.Parser(
    prog="python -m sparseopt_jax.benchmarks", description=__doc__
  )
  commands = top.add_subparsers(dest="command", required=True)
  for name, (_, text, flags) in _COMMANDS.items():
    command = commands.add_parser(name, help=text)
    command.add_argument("--output", help="write the figures here, as JSON")
    for flag in ("sparsity", *flags.split()):
      _add(command, *flag.split("="))
  return top


def _add(
  command: argparse.ArgumentParser, flag: str, default: str | None = None
) -> None:
  """A flag whose help tells its default, which may be the command's own."""
  options = {"default": None, **_FLAGS[flag]}
  kind = options.pop("type", type(options["default"] or ""))
  if default is not None:
    options["default"] = kind(default)
  options["help"] += " (default: %(default)s)"
  command.add_argument(f"--{flag}", type=kind, **options)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""

  def command() -> None:
    args = _parser().parse_args(arguments)
    _check(args)
    rows = _COMMANDS[args.command][0](args)
    title = f"{args.command}, {args.sparsity:.0%} sparse, {args.model}"
    timing.report(title, rows, args.output)

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
  if args.output and not pathlib.Path(args.output).parent.is_dir():
    raise UsageError(f"--output {args.output}: there is no such folder")
  if args.output and pathlib.Path(args.output).exists():
    raise UsageError(f"--output {args.output} is there already")


if __name__ == "__main__":
  sys.exit(main())
