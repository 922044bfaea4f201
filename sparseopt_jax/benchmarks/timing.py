"""Times several programs in turn, so that a drifting machine hits all alike."""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import os
import platform
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import sparseopt_jax
from sparseopt_jax import metrics

NEVER = 2**30
_LEARNING_RATE = 0.01


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


def clock() -> str:
  """CPU time on a CPU, which others may share; wall time elsewhere."""
  return "cpu" if jax.default_backend() == "cpu" else "wall"


def ratios(
  times: Mapping[str, Times], base: str, clock: str
) -> dict[str, dict]:
  """Median, quartiles of the ratio to `base`, round by round."""
  reference = getattr(times[base], clock)
  rows = {}
  for name, row in times.items():
    rows[name] = {
      "milliseconds": 1e3 * float(np.median(getattr(row, clock))),
      **spread("ratio", getattr(row, clock) / reference),
    }
  return rows


def spread(name: str, values: np.ndarray) -> dict[str, Any]:
  """Median and quartiles."""
  low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
  return {name: middle, f"{name}_quartiles": [low, high]}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Every row's figures, as text."""
  titles = list(dict.fromkeys(title for row in rows.values() for title in row))
  cells = [["", *(title.replace("_", " ") for title in titles)]]
  for name, row in rows.items():
    cells.append([name, *(_text(row.get(title)) for title in titles)])
  return metrics.aligned(cells)


def _text(value: Any) -> str:
  if value is None:
    return ""
  if isinstance(value, list):
    return " to ".join(map(_text, value))
  return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def machine() -> dict[str, Any]:
  """Where and with what the figures were taken."""
  from sparseopt_jax.training import telling  # Needs tqdm.

  processor = platform.processor() or platform.machine()
  cores = os.cpu_count()
  return {**telling.surroundings(), "processor": processor, "cores": cores}


def report(name: str, rows: dict[str, dict], output: str | None) -> None:
  """Prints a table and writes it as JSON where `output` says."""
  print(f"{name}\n{table(rows)}\n{json.dumps(machine())}")
  if output is not None:
    with open(output, "w") as file:
      json.dump({"benchmark": name, **machine(), "rows": rows}, file, indent=2)


def optimizers(
  sparsity: float, update_every: int, updating: Sequence[str] = ()
) -> dict[str, optax.GradientTransformation]:
  """Plain SGD with momentum, and the three topologies around it.

  Those 'told' get `update_masks` from the host, the others find out for
  themselves, on the device.

  Args:
    sparsity: Fraction of zeros.
    update_every: 1 for a mask update in each step; `NEVER` for none.
    updating: Names of those that are there a second time, as "NAME, mask
      update", with a mask update in each step.
  """
  forever = 2**31 - 1
  topologies: dict[str, Any] = {
    "static": sparseopt_jax.Static(),
    "SET": sparseopt_jax.SET(forever, update_every),
    "RigL": sparseopt_jax.RigL(forever, update_every),
  }
  found = {
    name: sparseopt_jax.sparsify(
      optax.sgd(_LEARNING_RATE, momentum=0.9),
      sparsity,
      topology,
      corrected=True,
    )
    for name, topology in topologies.items()
  }
  for name in ("SET", "RigL"):
    update = functools.partial(
      found[name].update, update_masks=update_every == 1
    )
    found[f"{name}, told"] = optax.GradientTransformationExtraArgs(
      found[name].init, update
    )
  often = optimizers(sparsity, 1) if updating else {}
  found |= {f"{name}, mask update": often[name] for name in updating}
  return {"plain": optax.sgd(_LEARNING_RATE, momentum=0.9), **found}
