"""Training of many networks in one program, against one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import time
from typing import Any

import jax
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
  have too; its quartiles are over rounds, in which all numbers take turns. The
  first call compiles. `peak_bytes` is the most that the device has held by
  then, over all rows so far; a CPU does not tell.

  Args:
    configs: What to train; they differ in nothing but `networks`, and one of
      them has one.
    repeats: Rounds of measurement.
    steps: Steps between mask updates that one call takes.
  """
  build.devices(configs[-1])  # Simulated devices are made before all else.
  calls, states, rows = {}, {}, {}
  for config in configs:
    name = str(config.networks)
    calls[name], state = program(config, steps)
    start = time.perf_counter()
    states[name] = jax.block_until_ready(calls[name](state))
    leaves = jax.tree.leaves(states[name])
    memory = jax.devices()[0].memory_stats() or {}
    rows[name] = {
      "first_call_seconds": time.perf_counter() - start,
      "state_megabytes": sum(leaf.nbytes for leaf in leaves) / 1e6,
      "peak_bytes": memory.get("peak_bytes_in_use"),
    }
  times = timing.interleave(calls, states, repeats=repeats, calls=1)
  images = steps * configs[0].batch_size
  for name, row in times.items():
    ratio = int(name) * times["1"].wall / row.wall
    rows[name] |= {
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
