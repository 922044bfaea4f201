"""Sparse training from one command: `python -m sparseopt_jax.train`.

Without arguments: a ResNet-8 with 10 % of its weights learns scikit-learn's
digits by RigL and SparseOpt, in about a minute on two CPU cores.

Arguments are checked before anything heavy is imported. Exit codes: 0; 2 for
bad input; 1 for a run that failed; 143 and 130 after SIGTERM and SIGINT, with a
checkpoint to go on from by `--resume`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import shlex
import sys
from typing import Any

from sparseopt_jax.training import cli
from sparseopt_jax.training import folder
from sparseopt_jax.training import processes
from sparseopt_jax.training import recipes
from sparseopt_jax.training import signals
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.config import check_effects
from sparseopt_jax.training.config import from_environment

_PROG = "python -m sparseopt_jax.train"


def parse(arguments: Sequence[str]) -> Config:
  """The configuration of a command line, all defaults filled in."""
  recipe, rest = recipes.take(arguments)
  default = recipe.config() if recipe else Config()
  config = cli.parse(default, rest, _PROG, recipes.help_text())
  check_effects(config, default)
  config = from_environment(config)
  if config.workdir is None:
    config = dataclasses.replace(config, workdir=folder.default(config))
  return config


def train(
  config: Config,
  stop: signals.StopRequest,
  command: str,
  create_optimizer: Callable[..., Any] | None = None,
) -> list[dict[str, Any]]:
  """Builds what `config` asks for and trains it.

  Args:
    config: What was asked for, `workdir` filled in.
    stop: Says when a signal has come.
    command: The command line, for the summary.
    create_optimizer: In place of `training.optimizer.create`, with its
      arguments; a function of a module, which names it in the run's files.

  Returns:
    The summary of each network, as in `summary.json`.

  Raises:
    UsageError: Bad input.
    RunError: The run could not go on.
    Interrupted: A signal came.
  """
  with processes.failing_at_once(config):
    with folder.prepared(config, create_optimizer) as folders:
      from sparseopt_jax.training import build
      from sparseopt_jax.training import optimizer
      from sparseopt_jax.training import runtime

      runtime.prepare()
      layout = build.devices(config)
      task, create = build.task(
        config, layout, create_optimizer or optimizer.create
      )
    from sparseopt_jax.training import loop
    from sparseopt_jax.training import telling

    telling.say(f"{folders.run}: {build.describe(config, task)}")
    run = loop.Run(config, folders, task, layout, stop)
    return run.train(create, command)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  arguments = sys.argv[1:] if arguments is None else arguments

  def command() -> None:
    config = parse(arguments)
    train(config, stop, shlex.join([*_PROG.split(), *arguments]))

  with signals.StopRequest() as stop:
    try:
      return cli.run(command)
    except signals.Interrupted as end:
      print(end, file=sys.stderr)
      return end.exit_code


if __name__ == "__main__":
  sys.exit(main())
