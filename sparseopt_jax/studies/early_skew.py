"""How long does the skew last? Its slope in each of the first steps.

Baseline and SparseOpt take the trainer's own first steps, from the same
parameters and masks and on the same batches; the learning rate's schedule is
that of the recipe's whole training. `sparseopt_jax.training.skew` says what the
slopes are: -1/2 is that of the theory, and SparseOpt adds 1/2.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from sparseopt_jax import metrics
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import convergence
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import report
from sparseopt_jax.studies.convergence import ARMS
from sparseopt_jax.studies.convergence import COLORS
from sparseopt_jax.training import build
from sparseopt_jax.training import cli
from sparseopt_jax.training import optimizer
from sparseopt_jax.training import runtime
from sparseopt_jax.training import skew
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

FIGURES = {
  "skew_slope": "slope of the relative update",
  "weight_slope": "slope of the weights' size",
}
# After these steps a column of the table ends.
_ENDS = (1, 10, 30, 100)


def measure(config: Config, steps: int) -> dict[str, Any]:
  """Takes a network's first steps.

  Returns:
    `flags` of the trainer; the two `FIGURES`, one number for each step:
    `skew_slope` is of the update that the step makes, `weight_slope` of the
    weights after it. NaN where there is nothing to measure.

  Raises:
    UsageError: More steps than the training has; see `build.task`.
  """
  runtime.prepare()
  layout = build.devices(config)
  task, create = build.task(config, layout, _measured)
  take = layout.compile_train(task)
  most = config.epochs * task.steps_per_epoch
  if steps > most:
    raise UsageError(f"--steps must be at most {most}, got {steps}")
  due = optimizer.mask_updates(config, most)
  state = layout.put(runtime.quick_jit(create)(np.uint32(config.seed)))
  batches = task.dataset.train_batches(config.seed, 0, config.batch_size)
  slopes: dict[str, list[float]] = {name: [] for name in FIGURES}
  for number, batch in enumerate(itertools.islice(batches, steps)):
    state, _ = take(state, layout.put_batch(batch), 0, 1, due(number))
    line = skew.figures(state.opt_state, state.params)
    for name in FIGURES:
      slope = convergence.figure_of(name, line, config.correction)
      slopes[name].append(round(slope, 4))
  return {"flags": grid.flags(config), **slopes}


def _measured(
  config: Config, params: Any, steps_per_epoch: int, corrected: Any, seed: Any
) -> Any:
  """The trainer's optimiser, whose figures start anew at each step."""
  plain = dataclasses.replace(config, measure_skew=False)
  tx = optimizer.create(plain, params, steps_per_epoch, corrected, seed)
  return skew.measured(tx, corrected.paths, 1)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
  """Measures what is not there yet, network by network.

  Returns:
    {condition and learning rate: {figure: {arm: slopes of each seed}}}. Beside
    the figures there are the `flags` of the first network.

  Raises:
    UsageError: `--out` has a network of other flags; see `build.task`.
  """
  results: dict[str, Any] = {}
  rates = args.learning_rates or [cells.learning_rate(args)]
  conditions = dict.fromkeys(itertools.product(args.conditions, rates))
  for condition, rate in conditions:
    networks = {
      arm: [
        _network(args, condition, seed, learning_rate=rate, correction=setting)
        for seed in range(args.seeds)
      ]
      for arm, setting in ARMS.items()
    }
    results[f"{condition}, rate {rate:g}"] = {
      "flags": networks["baseline"][0]["flags"],
      **{
        figure: {
          arm: [network[figure] for network in found]
          for arm, found in networks.items()
        }
        for figure in FIGURES
      },
    }
  return results


def _network(
  args: argparse.Namespace, condition: str, seed: int, **changes: Any
) -> dict[str, Any]:
  """What `measure` gives, made before or now."""
  config = cells.config(args, condition, seed, **changes)
  name = f"{cells.name(config)}-first{args.steps}"
  path = args.out / "pieces" / f"{name}.json"
  network = report.piece(path, measure, config, args.steps)
  if network["flags"] != grid.flags(config):
    raise UsageError(
      f"--out {args.out}: {path.name} there is of other flags; take another"
    )
  return network


def windows(steps: int) -> list[tuple[int, int]]:
  """The first and the last step of the table's columns."""
  ends = [*(end for end in _ENDS if end < steps), steps]
  return [(start + 1, end) for start, end in itertools.pairwise([0, *ends])]


def table(results: dict[str, Any], steps: int) -> str:
  """Means over windows of steps, with intervals over the seeds."""
  columns = windows(steps)
  header = [f"steps {first} to {last}" for first, last in columns]
  parts = []
  for name, title in FIGURES.items():
    rows = [[title, "step 1", *header[1:]]]
    for label, found in results.items():
      slopes = {arm: np.array(found[name][arm]) for arm in ARMS}
      slopes["difference"] = slopes["SparseOpt"] - slopes["baseline"]
      for arm, each in slopes.items():
        means = [
          each[:, first - 1 : last].mean(axis=1).tolist()
          for first, last in columns
        ]
        numbers = [report.number(report.interval(mean)) for mean in means]
        rows.append([f"{label}, {arm}", *numbers])
    parts.append(metrics.aligned(rows))
  return "\n\n".join(parts)


def figure(results: dict[str, Any]) -> Figure:
  """A row a condition and learning rate: each network, and their mean."""
  size = (4.5 * len(FIGURES), 2.7 * len(results))
  found = Figure(figsize=size, layout="constrained")
  axes: Any = found.subplots(
    len(results), len(FIGURES), squeeze=False, sharex=True, sharey="col"
  )
  for row, (label, result) in zip(axes, results.items(), strict=True):
    for axis, (name, title) in zip(row, FIGURES.items(), strict=True):
      for arm, color in COLORS.items():
        slopes = np.array(result[name][arm])
        steps = np.arange(1, slopes.shape[1] + 1)
        axis.plot(steps, slopes.T, color=color, alpha=0.3, lw=0.7)
        axis.plot(steps, slopes.mean(axis=0), color=color, label=arm)
      axis.axhline(0, color="black", lw=0.8)
      axis.set(title=title, xscale="log")
    row[0].axhline(-0.5, color="black", lw=0.8, ls=":")
    row[0].set_ylabel(label, fontweight="bold")
  for axis in axes[-1]:
    axis.set_xlabel("step")
  axes[0, 1].legend()
  return found


def study(args: argparse.Namespace) -> report.Report:
  """Measures and reports.

  Raises:
    UsageError: A flag out of its range, or data that are not there.
  """
  cells.check(args, args.conditions)
  report.make(args.out / "pieces")
  results = measure_all(args)
  raw = {"network": cells.described(args), "results": results}
  text = f"{table(results, args.steps)}\n{cells.described(args)}"
  return report.Report(raw, text, lambda: figure(results))


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  cells.add_network_flags(parser, seeds=3)
  cells.add_conditions(parser, ["static-97", "rigl-97"])
  parser.add_argument(
    "--learning-rates",
    type=float,
    nargs="+",
    help="of SGD, in both arms (default: the recipe's, or 0.1)",
  )
  parser.add_argument(
    "--steps", type=int, default=300, help="to take (default: %(default)s)"
  )
