"""Times several programs in turn, so that a drifting machine hits all alike."""

from collections.abc import Callable, Mapping
import json
import os
import platform
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import sparseopt_jax


class Times(NamedTuple):
  """Seconds of one call, one entry for each repeat; shape (repeats,)."""

  wall: np.ndarray
  cpu: np.ndarray  # of all threads of this process


def interleave(
  steps: Mapping[str, Callable[[Any], Any]],
  states: Mapping[str, Any],
  *,
  repeats: int,
  calls: int,
) -> dict[str, Times]:
  """Times each step `repeats` times, one after the other in each round.

  Args:
    steps: Functions from a state to the next; compiled, they may donate.
    states: The state that each begins with; two calls are made before timing.
    repeats: Number of rounds.
    calls: Number of calls that a round times together.

  Returns:
    The times of one call, by name.
  """
  states = dict(states)
  for name, step in steps.items():
    states[name] = jax.block_until_ready(step(step(states[name])))
  rounds: dict[str, list] = {name: [] for name in steps}
  for _ in range(repeats):
    for name, step in steps.items():
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(calls):
        states[name] = step(states[name])
      jax.block_until_ready(states[name])
      elapsed = (time.perf_counter() - wall, time.process_time() - cpu)
      rounds[name].append(elapsed)
  return {
    name: Times(
      *(np.array(column) / calls for column in zip(*rows, strict=True))
    )
    for name, rows in rounds.items()
  }


def ratios(
  times: Mapping[str, Times], base: str, clock: str
) -> dict[str, dict]:
  """Median, quartiles of the ratio to `base`, round by round."""
  reference = getattr(times[base], clock)
  rows = {}
  for name, row in times.items():
    quartiles = np.percentile(getattr(row, clock) / reference, [25, 50, 75])
    rows[name] = {
      "milliseconds": 1e3 * float(np.median(getattr(row, clock))),
      "ratio": float(quartiles[1]),
      "ratio_quartiles": [float(quartiles[0]), float(quartiles[2])],
    }
  return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Name, milliseconds, ratio and its quartiles, as text."""
  width = max(map(len, rows))
  lines = [f"{'':{width}}  {'ms':>9}  ratio  (quartiles)"]
  for name, row in rows.items():
    low, high = row["ratio_quartiles"]
    lines.append(
      f"{name:{width}}  {row['milliseconds']:9.2f}  {row['ratio']:5.2f}  "
      f"({low:.2f} to {high:.2f})"
    )
  return "\n".join(lines)


def machine() -> dict[str, Any]:
  """Where and with what the figures were taken."""
  return {
    "device": jax.devices()[0].device_kind,
    "platform": jax.default_backend(),
    "processor": platform.processor() or platform.machine(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "optax": optax.__version__,
  }


def report(name: str, rows: dict[str, dict], output: str | None) -> None:
  """Prints a table and writes it as JSON where `output` says."""
  print(f"{name}\n{table(rows)}\n{json.dumps(machine())}")
  if output is not None:
    with open(output, "w") as file:
      json.dump({"benchmark": name, **machine(), "rows": rows}, file, indent=2)


def optimizers(
  learning_rate: float, sparsity: float, update_every: int
) -> dict[str, optax.GradientTransformation]:
  """Plain SGD with momentum, and the three topologies around it."""
  forever = 2**31 - 1
  topologies: dict[str, Any] = {
    "static": sparseopt_jax.Static(),
    "SET": sparseopt_jax.SET(forever, update_every),
    "RigL": sparseopt_jax.RigL(forever, update_every),
  }
  sparse = {
    name: sparseopt_jax.sparseopt_sgd(learning_rate, sparsity, topology)
    for name, topology in topologies.items()
  }
  return {"plain": optax.sgd(learning_rate, momentum=0.9), **sparse}
