"""The first call of the optimiser's step, and the memory of its program."""

import functools
import pathlib
import resource
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax

from sparseopt_jax.benchmarks import optimizer
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.training.errors import UsageError


def _optimizers(sparsity: float) -> dict[str, optax.GradientTransformation]:
  """Those told that no masks are due, and those told that they are, too."""
  found = timing.optimizers(0.1, sparsity, 2**30)
  often = timing.optimizers(0.1, sparsity, 1)
  told = ("SET, told", "RigL, told")
  return found | {f"{name}, mask update": often[name] for name in told}


def first_call(model: str, sparsity: float, repeats: int) -> dict[str, dict]:
  """Ratios of tracing, compiling and running once, to plain SGD.

  All but those told compile the mask update, due or not. The number of kernels,
  the small programs that XLA makes of a step, is from another compilation, by
  JAX's profiler, which counts them on a CPU.

  Every repeat starts from steps that JAX has not seen; the rows told share the
  compiled `init` of those that are not. Without a persistent compilation cache,
  so JAX_COMPILATION_CACHE_DIR must not be set.

  Args:
    model: Whose parameters to optimise.
    sparsity: Fraction of zeros.
    repeats: Rounds of measurement.

  Raises:
    UsageError: There is such a cache.
  """
  config: Any = jax.config
  if config.jax_compilation_cache_dir:
    raise UsageError(
      "compile times need JAX_COMPILATION_CACHE_DIR unset, got "
      f"{config.jax_compilation_cache_dir}"
    )
  params, gradients = optimizer.problem(model)
  rounds: dict[str, list] = {}
  for _ in range(repeats):
    for name, tx in _optimizers(sparsity).items():
      wall, cpu = time.perf_counter(), time.process_time()
      state = optimizer.first_state(tx, params)
      init_cpu = time.process_time() - cpu
      wall, cpu = time.perf_counter(), time.process_time()
      program = optimizer.lowered_step(tx, state, gradients).compile()
      jax.block_until_ready(program(state, gradients))
      elapsed = (time.perf_counter() - wall, time.process_time() - cpu)
      rounds.setdefault(name, []).append((*elapsed, init_cpu))
  columns = {name: np.array(row).T for name, row in rounds.items()}
  times = {name: timing.Times(c[0], c[1]) for name, c in columns.items()}
  rows = timing.ratios(times, "plain", timing.clock())
  for name, column in columns.items():
    rows[name]["init_milliseconds"] = 1e3 * float(np.median(column[2]))
  for name, tx in _optimizers(sparsity).items():
    _, lowered = _abstract_step(tx, params, gradients)
    kernels = count_kernels(lowered)
    if kernels:
      each = rows[name]["milliseconds"] / kernels
      rows[name] |= {"kernels": kernels, "milliseconds_a_kernel": each}
  return rows


def _abstract_step(
  tx: optax.GradientTransformation, params: Any, gradients: Any
) -> tuple[Any, Any]:
  """The shapes of a step's state, and the step itself, not yet compiled."""
  first_state = functools.partial(optimizer.first_state, tx)
  state = jax.eval_shape(first_state, params)
  return state, optimizer.lowered_step(tx, state, gradients)


def count_kernels(lowered: Any) -> int:
  """How many kernels XLA compiles; 0 where its profile does not tell."""
  options = jax.profiler.ProfileOptions()
  options.host_tracer_level = 3
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      lowered.compile()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
  return sum(
    event.name == "FusionCompiler::Compile"
    for plane in profile.planes
    for line in plane.lines
    for event in line.events
  )


def memory(model: str, sparsity: float) -> dict[str, dict]:
  """Bytes a parameter: the state beyond plain SGD's, and the program's own.

  Args:
    model: Whose parameters to optimise.
    sparsity: Fraction of zeros.
  """
  params, gradients = optimizer.problem(model)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  rows: dict[str, dict[str, Any]] = {}
  for name, tx in timing.optimizers(0.1, sparsity, 1).items():
    state, lowered = _abstract_step(tx, params, gradients)
    analysis: Any = lowered.compile().memory_analysis()
    rows[name] = {
      "state_bytes_a_parameter": _num_bytes(state[1]) / size,
      "temporary_bytes_a_parameter": analysis.temp_size_in_bytes / size,
    }
  plain = rows["plain"]["state_bytes_a_parameter"]
  for row in rows.values():
    row["state_bytes_a_parameter"] -= plain
  # Kilobytes on Linux.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  rows["process"] = {"peak_gigabytes": peak}
  return rows


def _num_bytes(tree: optax.OptState) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
