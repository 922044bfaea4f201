"""What of SparseOpt matters: direction, place in the chain, dead neurons, ...

All variants share seeds, data, initialisation and first masks (those with dense
ends have masks of their own), and the learning rate is not tuned for each. SGD
is that of the trainer; see `VARIANTS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax import _paths
from sparseopt_jax import inspection
from sparseopt_jax._state import map_sparse
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import ham as ham_lib
from sparseopt_jax.studies import paired
from sparseopt_jax.studies import report
from sparseopt_jax.training import cli
from sparseopt_jax.training import optimizer
from sparseopt_jax.training.config import Config

# Norm of normalised gradients over all layers, the same with SparseOpt and
# without: the median of the baseline's in its first epoch (0.76 for resnet8 of
# width 8, rigl-95), so that the learning rate means about the same. A norm that
# does not fade is another schedule: compare normalised with normalised.
GRADIENT_NORM = 0.8
HAM = {"alpha": 200.0, "beta": 1e-3}
# The first and the last layer.
ENDS = ("Conv_0/kernel", "Dense_0/kernel")
# From a layer's mask to the factors of its gradient.
Factors = Callable[[jax.Array], jax.Array]


class _Parts(NamedTuple):
  """What the trainer's optimiser is made of."""

  masking: dict[str, Any]  # `sparsify`'s arguments beside the optimiser
  decay: optax.GradientTransformation
  sgd: optax.GradientTransformation
  schedule: optax.Schedule


def _parts(
  config: Config,
  params: Any,
  steps_per_epoch: int,
  corrected: inspection.BatchNormalized,
  seed: Any,
) -> _Parts:
  """What `training.optimizer.create` puts together."""
  schedule = optimizer.schedule(config, steps_per_epoch)
  return _Parts(
    optimizer.masking(config, params, steps_per_epoch, corrected, seed),
    optimizer.decay(config, params),
    optax.sgd(schedule, momentum=config.momentum),
    schedule,
  )


def normalized(*arguments: Any) -> Any:
  """The gradient's norm is the same in each step: its direction alone."""
  parts = _parts(*arguments)
  norm = optax.normalize_by_update_norm(GRADIENT_NORM)
  inner = optax.chain(norm, parts.decay, parts.sgd)
  return sparseopt_jax.sparsify(inner, **parts.masking)


def ham(*arguments: Any) -> Any:
  """HAM around decay and SGD."""
  parts = _parts(*arguments)
  base = optax.chain(parts.decay, parts.sgd)
  inner = ham_lib.ham(base, parts.schedule, **HAM)
  return sparseopt_jax.sparsify(inner, **parts.masking)


def decay_first(*arguments: Any) -> Any:
  """The correction scales the weight decay too."""
  parts = _parts(*arguments)
  sparse = sparseopt_jax.sparsify(parts.sgd, **parts.masking)
  return optax.chain(parts.decay, sparse)


def live_mean(*arguments: Any) -> Any:
  """The mean sparsity of a layer is that of its live neurons."""
  return _rescaled(_parts(*arguments), live_share)


def inverted(*arguments: Any) -> Any:
  """The skew is made twice as large, instead of being undone."""
  return _rescaled(_parts(*arguments), inverse)


def halved(*arguments: Any) -> Any:
  """The exponent of the correction is 1/4, and not 1/2."""
  return _rescaled(_parts(*arguments), inverse_root)


def kept_alive(*arguments: Any) -> Any:
  """A mask update leaves every neuron its largest weight."""
  parts = _parts(*arguments)
  topology = keep_alive(parts.masking["topology"])
  inner = optax.chain(parts.decay, parts.sgd)
  return sparseopt_jax.sparsify(
    inner, **{**parts.masking, "topology": topology}
  )


def _rescaled(parts: _Parts, factors: Factors) -> Any:
  """The trainer's optimiser, with factors after the correction."""
  inner = optax.chain(scale_by_factors(), parts.decay, parts.sgd)
  tx = sparseopt_jax.sparsify(inner, **parts.masking)
  return with_factors(tx, parts.masking["corrected"], factors)


def scale_by_factors() -> optax.GradientTransformationExtraArgs:
  """Multiplies updates by the extra argument `factors`.

  That has the structure of the updates, with MaskedNode where nothing is done.
  """

  def update_fn(
    updates: Any, state: Any, params: Any = None, *, factors: Any, **extra: Any
  ) -> tuple[Any, Any]:
    del params, extra
    scale = lambda factor, update: update * factor
    scaled = map_sparse(scale, factors, updates)
    return scaled, state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )


def with_factors(
  tx: optax.GradientTransformationExtraArgs,
  corrected: inspection.BatchNormalized,
  factors: Factors,
) -> optax.GradientTransformationExtraArgs:
  """Hands factors to `scale_by_factors` inside of an optimiser.

  They are of the masks under which the gradient was taken.

  Args:
    tx: `sparsify` around a chain with `scale_by_factors` in it.
    corrected: Which layers get factors.
    factors: Makes them from a layer's mask.
  """

  def of_leaf(path: tuple, mask: Any) -> Any:
    is_one = corrected(_paths.name(path), mask)
    is_dense = _paths.is_masked_node(mask)
    return factors(mask) if is_one and not is_dense else optax.MaskedNode()

  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    masks = sparseopt_jax.get_masks(state)
    extra["factors"] = jax.tree_util.tree_map_with_path(
      of_leaf, masks, is_leaf=_paths.is_masked_node
    )
    return tx.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def correction(mask: jax.Array) -> jax.Array:
  """The factors of the correction, of each weight; 0 outside the mask."""
  return sparseopt_jax.correct(jnp.ones(mask.shape), mask)


def live_share(mask: jax.Array) -> jax.Array:
  r"""The root of the share of neurons that are alive.

  With :math:`n_{live}` of :math:`n_{out}` neurons alive, the factor
  :math:`\sqrt{f_i n_{live} / nnz}` is :math:`\sqrt{n_{live} / n_{out}}` times
  that of the correction.
  """
  is_live = jnp.any(mask, axis=tuple(range(mask.ndim - 1)))
  return jnp.sqrt(jnp.mean(is_live))


def inverse(mask: jax.Array) -> jax.Array:
  """What turns the factors of the correction into their inverses."""
  return 1 / jnp.where(mask, correction(mask), 1) ** 2


def inverse_root(mask: jax.Array) -> jax.Array:
  """What turns the factors of the correction into their roots."""
  return 1 / jnp.sqrt(jnp.where(mask, correction(mask), 1))


class _KeepAlive:
  """Drops a neuron's largest weight after all others, if ever.

  So no neuron dies in training. One without inputs from the start may stay so.
  """

  def drop_scores(self, layer: sparseopt_jax.Layer) -> jax.Array:
    """The weights, but infinity for the largest of each neuron.

    Of equal ones it is the first. The neurons lie along the last axis.
    """
    size = jnp.where(layer.mask, jnp.abs(layer.weight), -1)
    size = size.reshape(-1, size.shape[-1])
    place = jnp.argmax(size, axis=0)
    is_largest = jax.nn.one_hot(place, len(size), axis=0, dtype=bool)
    is_largest = is_largest.reshape(layer.mask.shape)
    return jnp.where(is_largest, jnp.inf, layer.weight)


class KeepAliveSET(_KeepAlive, sparseopt_jax.SET):
  """SET that leaves every neuron its largest weight."""


class KeepAliveRigL(_KeepAlive, sparseopt_jax.RigL):
  """RigL that leaves every neuron its largest weight."""


def keep_alive(topology: sparseopt_jax.Topology) -> sparseopt_jax.Topology:
  """The same topology, but no neuron loses its largest weight."""
  kinds: dict[type, type[sparseopt_jax.SET]] = {
    sparseopt_jax.SET: KeepAliveSET,
    sparseopt_jax.RigL: KeepAliveRigL,
  }
  kind = kinds.get(type(topology))
  return topology if kind is None else kind(**vars(topology))


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to train.

  Attributes:
    label: For tables and figures.
    correction: `Config.correction`.
    against: The label of the variant to compare with.
    factory: The optimiser, where no flag of the trainer tells it.
    dense_layers: `Config.dense_layers`.
    grow_from: `Config.grow_from`.
  """

  label: str
  correction: Literal["on", "off"]
  against: str | None = None
  factory: grid.Factory | None = None
  dense_layers: tuple[str, ...] = ()
  grow_from: Literal["raw", "corrected"] = "raw"

  def config(
    self, args: argparse.Namespace, condition: str, seed: int
  ) -> Config:
    """One run of it."""
    arm = cells.Arm(self.label, self.correction, self.grow_from)
    found = cells.config(args, condition, arm, args.epochs, seed)
    return dataclasses.replace(
      found,
      dense_layers=self.dense_layers or found.dense_layers,
      measure_skew=self.factory is None,
    )

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
  Variant(
    "SparseOpt, corrected growth", "on", "SparseOpt", grow_from="corrected"
  ),
  Variant("normalised baseline", "off", "baseline", normalized),
  Variant("normalised SparseOpt", "on", "normalised baseline", normalized),
  Variant("HAM", "off", "baseline", ham),
  Variant("SparseOpt and HAM", "on", "HAM", ham),
  Variant("SparseOpt after decay", "on", "SparseOpt", decay_first),
  Variant("SparseOpt, mean of live neurons", "on", "SparseOpt", live_mean),
  Variant("correction inverted", "on", "baseline", inverted),
  Variant("half the exponent", "on", "baseline", halved),
  Variant("kept alive", "off", "baseline", kept_alive),
  Variant("SparseOpt, kept alive", "on", "kept alive", kept_alive),
  Variant("dense ends", "off", "baseline", None, ENDS),
  Variant("SparseOpt, dense ends", "on", "dense ends", None, ENDS),
)

_NOTE = (
  ", not tuned for a variant.\n"
  f"normalised: the gradient after the link has norm {GRADIENT_NORM:g} in each "
  f"step. HAM: alpha {HAM['alpha']:g}, beta {HAM['beta']:g}.\n"
  f"dense ends: {' and '.join(ENDS)} have no mask; the other layers keep their "
  "sparsity over all of them."
)


def study(args: argparse.Namespace) -> report.Report:
  """Trains what is missing, and reports.

  Raises:
    UsageError: A flag out of its range, or `--report` and nothing is there.
  """
  cells.check(args)
  wanted = [
    paired.Cell(
      condition, variant, variant.name(config), config, variant.factory
    )
    for seed in range(args.seeds)
    for condition in args.conditions
    for variant in VARIANTS
    if variant.label in args.variants
    for config in [variant.config(args, condition, seed)]
  ]
  about = {
    "gradient_norm": GRADIENT_NORM,
    "ham": HAM,
    "dense_ends": ENDS,
  }
  return paired.study(args, wanted, about, _NOTE)


def add_flags(parser: cli.Parser) -> None:
  """Adds those of this study."""
  cells.add_flags(parser, seeds=3)
  cells.add_conditions(parser, ["rigl-95"])
  cells.add_budget(parser)
  labels = [variant.label for variant in VARIANTS]
  parser.add_argument(
    "--variants",
    nargs="+",
    choices=labels,
    metavar="VARIANT",
    default=labels,
    help=f"any of: {'; '.join(labels)} (default: all)",
  )
