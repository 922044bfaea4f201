"""The first call of the optimiser's step, and the bytes of its state."""

import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from sparseopt_jax.benchmarks import optimizer
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.training.errors import UsageError


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
  told = "SET, told", "RigL, told"
  every = lambda: timing.optimizers(sparsity, timing.NEVER, told)
  rounds: dict[str, list] = {}
  for _ in range(repeats):
    for name, tx in every().items():
      state = optimizer.first_state(tx, params)
      wall, cpu = time.perf_counter(), time.process_time()
      program = optimizer.lowered_step(tx, state, gradients).compile()
      jax.block_until_ready(program(state, gradients))
      elapsed = (time.perf_counter() - wall, time.process_time() - cpu)
      rounds.setdefault(name, []).append(elapsed)
  times = {n: timing.Times(*np.array(row).T) for n, row in rounds.items()}
  rows = timing.ratios(times, "plain", timing.clock())
  for name, tx in every().items():
    state = jax.eval_shape(lambda tx=tx: optimizer.first_state(tx, params))
    kernels = count_kernels(optimizer.lowered_step(tx, state, gradients))
    if kernels:
      each = rows[name]["milliseconds"] / kernels
      rows[name] |= {"kernels": kernels, "milliseconds_a_kernel": each}
  return rows


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
  """Bytes of the state a parameter, beyond plain SGD's.

  Args:
    model: Whose parameters to optimise.
    sparsity: Fraction of zeros.
  """
  params, _ = optimizer.problem(model)
  optimizers = timing.optimizers(sparsity, 1)
  states = {n: jax.eval_shape(tx.init, params) for n, tx in optimizers.items()}
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  plain = _num_bytes(states["plain"])
  return {
    name: {"state_bytes_a_parameter": (_num_bytes(state) - plain) / size}
    for name, state in states.items()
  }


def _num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
