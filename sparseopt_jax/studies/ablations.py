"""What of SparseOpt matters: direction, place in the chain, dead neurons, ...

All variants share seeds, data, initialisation and first masks (those with dense
ends have masks of their own), and the learning rate is not tuned for each. SGD
is that of the trainer; see `VARIANTS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import shlex
import statistics
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import optax

import sparseopt_jax
from sparseopt_jax import compare
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training import optimizer
from sparseopt_jax.training import plots
from sparseopt_jax.training import tables
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

NAME = "ablations"
# Norm of normalised gradients over all layers, the same with SparseOpt and
# without: the median of the baseline's in its first epoch (0.76 for resnet8 of
# width 8, rigl-95), so that the learning rate means about the same. A norm that
# does not fade is another schedule: compare normalised with normalised.
GRADIENT_NORM = 0.8
HAM = {"alpha": 200.0, "beta": 1e-3}
ADAM_LEARNING_RATE = 1e-3
# The first and the last layer.
ENDS = ("Conv_0/kernel", "Dense_0/kernel")


class _Parts(NamedTuple):
  """What the trainer's optimiser is a chain of, in this order."""

  link: optax.GradientTransformationExtraArgs
  decay: optax.GradientTransformation
  sgd: optax.GradientTransformation
  schedule: optax.Schedule


def _parts(
  config: Config, params: Any, steps_per_epoch: int, corrected: frozenset[str]
) -> _Parts:
  """What `training.optimizer.create` chains."""
  schedule = optimizer.schedule(config, steps_per_epoch)
  return _Parts(
    optimizer.link(config, params, steps_per_epoch, corrected),
    optimizer.decay(config, params),
    optax.sgd(schedule, momentum=config.momentum),
    schedule,
  )


def _sparse(*links: optax.GradientTransformation) -> Any:
  return sparseopt_jax.keep_params_sparse(optax.chain(*links))


def normalized(*arguments: Any) -> Any:
  """The gradient's norm is the same in each step: its direction alone."""
  parts = _parts(*arguments)
  norm = optax.normalize_by_update_norm(GRADIENT_NORM)
  return _sparse(parts.link, norm, parts.decay, parts.sgd)


def ham(*arguments: Any) -> Any:
  """HAM around decay and SGD."""
  parts = _parts(*arguments)
  inner = optax.chain(parts.decay, parts.sgd)
  return _sparse(parts.link, sparseopt_jax.ham(inner, parts.schedule, **HAM))


def decay_first(*arguments: Any) -> Any:
  """The correction scales the weight decay too."""
  parts = _parts(*arguments)
  return _sparse(parts.decay, parts.link, parts.sgd)


def adam(*arguments: Any) -> Any:
  """The link, then Adam with decoupled weight decay."""
  parts = _parts(*arguments)
  rate = optax.scale_by_learning_rate(parts.schedule)
  return _sparse(parts.link, optax.scale_by_adam(), parts.decay, rate)


def after_adam(*arguments: Any) -> Any:
  """The correction scales what Adam makes of the gradient."""
  parts = _parts(*arguments)
  rate = optax.scale_by_learning_rate(parts.schedule)
  first = correct_after(parts.link, optax.scale_by_adam())
  return _sparse(first, parts.decay, rate)


def live_mean(*arguments: Any) -> Any:
  """The mean sparsity of a layer is that of its live neurons."""
  parts = _parts(*arguments)
  return _sparse(leave_out_dead(parts.link), parts.decay, parts.sgd)


def kept_alive(*arguments: Any) -> Any:
  """A mask update leaves every neuron its largest weight."""
  parts = _parts(*arguments)
  return _sparse(keep_largest(parts.link), parts.decay, parts.sgd)


def inverted(*arguments: Any) -> Any:
  """The skew is made twice as large, instead of being undone."""
  parts = _parts(*arguments)
  return _sparse(invert(parts.link), parts.decay, parts.sgd)


def correct_after(
  link: optax.GradientTransformationExtraArgs,
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """The correction after an optimiser, instead of before it.

  Masks still follow from the gradient as it is. Within `keep_params_sparse`
  only: updates outside the masks are left to it.

  Args:
    link: `sparseopt_jax.sparseopt`.
    inner: What the correction comes after.
  """

  def init_fn(params: Any) -> tuple[Any, Any]:
    return link.init(params), inner.init(params)

  def update_fn(
    updates: Any, state: tuple[Any, Any], params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    factors = state[0].correction
    _, masks = link.update(updates, state[0], params, **extra_args)
    updates, inner_state = inner.update(updates, state[1], params)
    scaled = _for_each_layer(lambda d, u: d * u, factors, updates)
    return scaled, (masks, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def leave_out_dead(
  link: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  r"""The correction with the mean sparsity of a layer's live neurons alone.

  With :math:`n_{live}` of :math:`n_{out}` neurons alive, the factor
  :math:`\sqrt{f_i n_{live} / nnz}` is :math:`\sqrt{n_{live} / n_{out}}` times
  that of the link.

  Args:
    link: `sparseopt_jax.sparseopt`; the state is its own.
  """

  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    # A neuron is dead if, and only if, its factor is 0.
    factors = state.correction
    updates, state = link.update(updates, state, params, **extra_args)
    return _for_each_layer(_scale_by_live, factors, updates), state

  return optax.GradientTransformationExtraArgs(link.init, update_fn)


def keep_largest(
  link: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """A link that drops a neuron's largest weight after all others, if ever.

  So no neuron dies in training. One without inputs from the start may stay so.

  Args:
    link: `sparseopt_jax.sparseopt`; the state is its own. All its sparse layers
      have their neurons on the last axis.
  """

  def largest_last(mask: jax.Array, weights: jax.Array) -> jax.Array:
    size = jnp.where(mask, jnp.abs(weights), -1).reshape(-1, mask.shape[-1])
    place = jnp.argmax(size, axis=0)
    is_largest = jax.nn.one_hot(place, len(size), axis=0, dtype=bool)
    return jnp.where(is_largest.reshape(mask.shape), jnp.inf, weights)

  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    masks = sparseopt_jax.get_masks(state)
    params = _for_each_layer(largest_last, masks, params)
    return link.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(link.init, update_fn)


def invert(
  link: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """The gradient divided by the factors of the correction.

  Args:
    link: `sparseopt_jax.sparseopt`; the state is its own.
  """

  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    factors = state.correction
    updates, state = link.update(updates, state, params, **extra_args)
    return _for_each_layer(_divide_twice, factors, updates), state

  return optax.GradientTransformationExtraArgs(link.init, update_fn)


def _divide_twice(factor: jax.Array, update: jax.Array) -> jax.Array:
  # A dead neuron has factor 0, and updates of 0.
  return update / jnp.where(factor > 0, factor, 1) ** 2


def _scale_by_live(factor: jax.Array, update: jax.Array) -> jax.Array:
  return update * jnp.sqrt(jnp.mean(factor > 0))


def _for_each_layer(function: Any, per_layer: Any, tree: Any) -> Any:
  """Applies a function where the state has a value for a layer."""

  def is_masked_node(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)

  return jax.tree.map(
    lambda a, b: b if is_masked_node(a) else function(a, b),
    per_layer,
    tree,
    is_leaf=is_masked_node,
  )


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to train.

  Attributes:
    label: For tables and figures.
    correction: `Config.correction`.
    against: The label of the variant to compare with.
    factory: The optimiser, where no flag of the trainer tells it.
    dense_layers: `Config.dense_layers`.
  """

  label: str
  correction: Literal["on", "off"]
  against: str | None = None
  factory: grid.Factory | None = None
  dense_layers: tuple[str, ...] = ()

  def config(
    self, args: argparse.Namespace, condition: str, seed: int
  ) -> Config:
    """One run of it."""
    is_adam = self.factory in (adam, after_adam)
    rate = ADAM_LEARNING_RATE if is_adam else args.learning_rate
    arm = cells.Arm(self.label, self.correction)
    found = cells.config(args, condition, arm, args.epochs, rate, seed)
    return dataclasses.replace(found, dense_layers=self.dense_layers)

  def name(self, config: Config) -> str:
    """The folder of a run; that of other studies where they share it."""
    words = [cells.name(config)]
    if self.factory is not None:
      words.append(self.factory.__name__)
    if self.dense_layers:
      words.append("dense_ends")
    return "-".join(words)


VARIANTS = (
  Variant("baseline", "off"),
  Variant("SparseOpt", "on", "baseline"),
  Variant("normalised baseline", "off", "baseline", normalized),
  Variant("normalised SparseOpt", "on", "normalised baseline", normalized),
  Variant("HAM", "off", "baseline", ham),
  Variant("SparseOpt and HAM", "on", "HAM", ham),
  Variant("SparseOpt after decay", "on", "SparseOpt", decay_first),
  Variant("SparseOpt, mean of live neurons", "on", "SparseOpt", live_mean),
  Variant("correction inverted", "on", "baseline", inverted),
  Variant("kept alive", "off", "baseline", kept_alive),
  Variant("SparseOpt, kept alive", "on", "kept alive", kept_alive),
  Variant("dense ends", "off", "baseline", None, ENDS),
  Variant("SparseOpt, dense ends", "on", "dense ends", None, ENDS),
  Variant("Adam", "off", None, adam),
  Variant("SparseOpt before Adam", "on", "Adam", adam),
  Variant("SparseOpt after Adam", "on", "Adam", after_adam),
)


Runs = Mapping[str, Mapping[int, compare.Run]]


def summarise(found: Runs) -> dict[str, dict[str, Any]]:
  """Statistics over the seeds, variant by variant.

  Args:
    found: {label of the variant: {seed: run}}.

  Returns:
    Means with half the width of their 95 % confidence interval; the difference
    to the variant `against` is of pairs of the same seed.
  """
  results = {}
  for variant in VARIANTS:
    runs = found.get(variant.label)
    if not runs:
      continue
    ends = {seed: run.lines[-1] for seed, run in runs.items()}
    others = found.get(variant.against or "", {})
    raw = {
      figure: {seed: line[figure] for seed, line in ends.items()}
      for figure in ("test_accuracy", "train_accuracy", "dead_neurons")
    }
    test, train = (
      {
        seed: value - others[seed].lines[-1][figure]
        for seed, value in raw[figure].items()
        if seed in others
      }
      for figure in ("test_accuracy", "train_accuracy")
    )
    results[variant.label] = {
      "against": variant.against,
      "test_accuracy": report.interval(list(raw["test_accuracy"].values())),
      "difference": report.interval(list(test.values())) if test else None,
      "train_difference": (
        report.interval(list(train.values())) if train else None
      ),
      "itop_rate": statistics.fmean(x["itop_rate"] for x in ends.values()),
      "dead_neurons": statistics.fmean(raw["dead_neurons"].values()),
      "raw": {**raw, "difference": test},
    }
  return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
  """A line a condition and variant."""
  header = [
    "condition, variant",
    "seeds",
    "test %",
    "difference",
    "while training",
    "to",
    "ITOP %",
    "dead",
  ]
  rows = [header]
  for condition, found in results.items():
    for label, row in found.items():
      changes = [row["difference"], row["train_difference"]]
      rows.append(
        [
          f"{condition}, {label}",
          str(len(row["raw"]["test_accuracy"])),
          report.percent(row["test_accuracy"]),
          *(report.percent(change) if change else "-" for change in changes),
          row["against"] or "-",
          f"{100 * row['itop_rate']:.1f}",
          f"{row['dead_neurons']:.1f}",
        ]
      )
  return tables.aligned(rows)


def figure(results: dict[str, dict[str, dict[str, Any]]]) -> Figure:
  """A row a condition: accuracies on the left, differences on the right."""
  found = Figure(figsize=(12, 4.2 * len(results)), layout="constrained")
  axes: Any = found.subplots(len(results), 2, squeeze=False, sharey="row")
  for (left, right), (condition, rows) in zip(
    axes, results.items(), strict=True
  ):
    _dots(left, rows, "test_accuracy")
    left.set_title(f"{condition}: test accuracy, %")
    left.set_yticks([-i for i in range(len(rows))], list(rows))
    _dots(right, rows, "difference")
    right.set_title("Difference to ..., points")
    right.axvline(0, color="black", lw=0.8)
    for index, row in enumerate(rows.values()):
      right.annotate(
        f"to {row['against']}" if row["against"] else "",
        (1.0, -index),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8,
      )
  found.supxlabel("each seed; mean and 95 % interval", fontsize=9)
  return found


def _dots(axis: Axes, rows: dict[str, dict[str, Any]], name: str) -> None:
  for index, row in enumerate(rows.values()):
    each = [100 * x for x in row["raw"][name].values()]
    axis.plot(each, [-index] * len(each), "o", ms=4, color="#9aa5b1")
    if each:
      mean, half = row[name]
      axis.errorbar(
        100 * mean, -index, xerr=100 * half, fmt="D", ms=5, color="#1f5fa8"
      )


def _notes(args: argparse.Namespace) -> str:
  return (
    f"{args.model} of width {args.width}, {args.epochs} epochs; SGD with "
    f"learning rate {args.learning_rate:g}, Adam with {ADAM_LEARNING_RATE:g}, "
    "none of them tuned for a variant.\n"
    f"normalised: the gradient after the link has norm {GRADIENT_NORM:g} in "
    "each step. HAM: alpha "
    f"{HAM['alpha']:g}, beta {HAM['beta']:g}. dense ends: {' and '.join(ENDS)} "
    "have no mask; the other layers keep their sparsity over all of them."
  )


def study(args: argparse.Namespace, command: str) -> None:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  cells.check(args)
  chosen = [variant for variant in VARIANTS if variant.label in args.variants]
  every, factories, places = {}, {}, {}
  for seed in range(args.seeds):
    for condition in args.conditions:
      for variant in chosen:
        config = variant.config(args, condition, seed)
        name = variant.name(config)
        every[name] = config
        places[condition, variant.label, seed] = name
        if variant.factory is not None:
          factories[name] = variant.factory
  jobs = 0 if args.report else args.jobs
  runs = grid.run(every, args.out, jobs, factories)
  if not runs:
    raise UsageError(cells.nothing_there(args))
  results = {}
  for condition in args.conditions:
    found: dict[str, dict[int, compare.Run]] = {}
    for (place, label, seed), name in places.items():
      if place == condition and name in runs:
        found.setdefault(label, {})[seed] = runs[name]
    if found:
      results[condition] = summarise(found)
  raw = {
    "model": args.model,
    "width": args.width,
    "learning_rate": args.learning_rate,
    "adam_learning_rate": ADAM_LEARNING_RATE,
    "gradient_norm": GRADIENT_NORM,
    "ham": HAM,
    "dense_ends": ENDS,
    "trained_on": grid.trained_on(args.out, runs),
    "results": results,
  }
  text = f"{table(results)}\n{len(runs)} of {len(every)} runs; {_notes(args)}"
  with matplotlib.rc_context(plots.STYLE):
    report.save(args.out, NAME, command, raw, text, figure(results))


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit code."""
  parser = cells.parser(NAME, (__doc__ or "").splitlines()[0], seeds=3)
  cells.add_conditions(parser, [cells.TUNED_ON])
  cells.add_training(parser)
  labels = [variant.label for variant in VARIANTS]
  parser.add_argument(
    "--variants",
    nargs="+",
    choices=labels,
    metavar="VARIANT",
    default=labels,
    help=f"any of: {'; '.join(labels)} (default: all)",
  )

  def command() -> None:
    args = parser.parse_args(arguments)
    words = ["python", "-m", "sparseopt_jax.studies", NAME, *arguments]
    study(args, shlex.join(words))

  return cli.run(command)
