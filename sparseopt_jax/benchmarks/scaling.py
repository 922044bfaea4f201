"""A mask update's time by the size of a layer and the number of layers."""

import jax
import numpy as np
import optax

import sparseopt_jax
from sparseopt_jax.benchmarks import optimizer
from sparseopt_jax.benchmarks import timing

_WIDTH = 1_000


def run(
  sizes: list[int], sparsity: float, repeats: int, topology: str
) -> dict[str, dict]:
  """Nanoseconds a weight of the step with a mask update, less the one without.

  Each size is measured as one layer and as eight layers of an eighth.

  Args:
    sizes: Numbers of weights.
    sparsity: Fraction of zeros.
    repeats: Rounds of measurement.
    topology: 'SET' or 'RigL'.
  """
  rows = {}
  for size in sizes:
    for layers in (1, 8):
      height = max(1, size // _WIDTH // layers)
      rng = np.random.default_rng(0)
      params = {
        f"{i}": rng.standard_normal((height, _WIDTH), np.float32)
        for i in range(layers)
      }
      params = jax.device_put(params)
      gradients = jax.tree.map(lambda p: p[::-1], params)
      steps, states = {}, {}
      for name, every in (("update", 1), ("between", 2**30)):
        make = getattr(sparseopt_jax, topology)
        tx = sparseopt_jax.sparsify(
          optax.sgd(0.1, momentum=0.9),
          sparsity,
          make(2**31 - 1, every),
          corrected=True,
        )
        steps[name], states[name] = optimizer.compiled_step(
          tx, params, gradients
        )
      times = timing.interleave(steps, states, repeats=repeats, calls=1)
      seconds = {n: getattr(t, timing.clock()) for n, t in times.items()}
      change = seconds["update"] - seconds["between"]
      low, middle, high = np.percentile(change, [25, 50, 75])
      scale = 1e9 / (layers * height * _WIDTH)
      rows[f"{size:.0e} weights, {layers} layers"] = {
        "nanoseconds_a_weight": float(middle * scale),
        "quartiles": [float(low * scale), float(high * scale)],
      }
  return rows
