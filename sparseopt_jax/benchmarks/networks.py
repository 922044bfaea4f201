"""Training of many networks in one program, against one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparseopt_jax.benchmarks import input_pipeline
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.training import build
from sparseopt_jax.training import feed
from sparseopt_jax.training import runtime
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError


def run(
  configs: Sequence[Config], repeats: int, steps: int
) -> dict[str, dict[str, Any]]:
  """Images a second of all networks together, for each number of them.

  `times_one` is the ratio to one network, which N runs one after the other
  have too; its quartiles are over rounds, in which all numbers take turns.

  Args:
    configs: What to train; they differ in nothing but `networks`, and one of
      them has one.
    repeats: Rounds of measurement.
    steps: Steps between mask updates that one call takes.
  """
  build.devices(configs[-1])  # Simulated devices are made before all else.
  programs = {str(c.networks): program(c, steps) for c in configs}
  calls, states = (
    {name: pair[part] for name, pair in programs.items()} for part in (0, 1)
  )
  times = timing.interleave(calls, states, repeats=repeats, calls=1)
  images = steps * configs[0].batch_size
  rows = {}
  for name, row in times.items():
    ratio = int(name) * times["1"].wall / row.wall
    rows[name] = {
      "images_per_second": float(np.median(int(name) * images / row.wall)),
      **timing.spread("times_one", ratio),
      "cpu_ms_a_step": 1e3 * float(np.median(row.cpu)) / (steps * int(name)),
    }
  return rows


def program(config: Config, steps: int) -> tuple[Callable[[Any], Any], Any]:
  """A function from a state to the one some steps later, and the first.

  Args:
    config: What to train, on noise of CIFAR's size.
    steps: How many, all between mask updates.

  Raises:
    UsageError: More steps than an epoch has.
  """
  runtime.keep_pages()  # As the trainer does.
  layout = build.devices(config)
  source = input_pipeline.small_images()
  task, create = build.task_on(source, config, layout)
  first = runtime.quick_jit(create)
  seeds = range(config.networks)
  state = layout.put(layout.joined([first(np.uint32(seed)) for seed in seeds]))
  resident = feed.Resident(source, layout, seeds, config.batch_size)
  examples, _, most = resident.train(0)
  if steps > most:
    raise UsageError(
      f"--steps must be at most {most}, those of an epoch, got {steps}"
    )
  program = layout.compile_train(task)

  def call(state: Any) -> Any:
    state, _ = program(state, examples, np.int32(0), np.int32(steps), False)
    return state

  return call, state
