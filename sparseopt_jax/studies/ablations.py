"""What of SparseOpt matters: direction, place in the chain, dead neurons, ...

All variants share seeds, data, initialisation and first masks (those with dense
ends have masks of their own), and the learning rate is not tuned for each. SGD
is that of the trainer; see `VARIANTS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax import _paths
from sparseopt_jax import inspection
from sparseopt_jax._state import map_sparse
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import ham as ham_lib
from sparseopt_jax.studies import paired
from sparseopt_jax.studies import report
from sparseopt_jax.studies.paired import OFF
from sparseopt_jax.studies.paired import ON
from sparseopt_jax.studies.paired import Variant
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
_ENDS = {"dense_layers": ENDS}
# From a layer's mask to the factors of its gradient.
Factors = Callable[[jax.Array], jax.Array]


def _parts(
  config: Config,
  params: Any,
  steps_per_epoch: int,
  corrected: inspection.BatchNormalized,
  seed: Any,
) -> tuple[dict[str, Any], Any, Any]:
  """What `training.optimizer.create` puts together.

  Returns:
    `sparsify`'s arguments beside the optimiser, weight decay, and SGD.
  """
  schedule = optimizer.schedule(config, steps_per_epoch)
  return (
    optimizer.masking(config, params, steps_per_epoch, corrected, seed),
    optimizer.decay(config, params),
    optax.sgd(schedule, momentum=config.momentum),
  )


def normalized(*arguments: Any) -> Any:
  """The gradient's norm is the same in each step: its direction alone."""
  masking, decay, sgd = _parts(*arguments)
  norm = optax.normalize_by_update_norm(GRADIENT_NORM)
  return sparseopt_jax.sparsify(optax.chain(norm, decay, sgd), **masking)


def ham(config: Config, params: Any, steps_per_epoch: int, *rest: Any) -> Any:
  """HAM around decay and SGD."""
  masking, *base = _parts(config, params, steps_per_epoch, *rest)
  schedule = optimizer.schedule(config, steps_per_epoch)
  inner = ham_lib.ham(optax.chain(*base), schedule, **HAM)
  return sparseopt_jax.sparsify(inner, **masking)


def decay_first(*arguments: Any) -> Any:
  """The correction scales the weight decay too."""
  masking, decay, sgd = _parts(*arguments)
  return optax.chain(decay, sparseopt_jax.sparsify(sgd, **masking))


def kept_alive(*arguments: Any) -> Any:
  """A mask update leaves every neuron its largest weight."""
  return _dropping(KeepAlive, *arguments)


def relative_drop(*arguments: Any) -> Any:
  """Weights are dropped by their size relative to their neuron's."""
  return _dropping(RelativeDrop, *arguments)


def _dropping(mixin: type, *arguments: Any) -> Any:
  """The trainer's optimiser, with a topology that drops in another way."""
  masking, *inner = _parts(*arguments)
  masking["topology"] = changed(masking["topology"], mixin)
  return sparseopt_jax.sparsify(optax.chain(*inner), **masking)


def live_mean(*arguments: Any) -> Any:
  """The mean sparsity of a layer is that of its live neurons."""
  return _rescaled(live_share, *arguments)


def inverted(*arguments: Any) -> Any:
  """The skew is made twice as large, instead of being undone."""
  return _rescaled(inverse, *arguments)


def halved(*arguments: Any) -> Any:
  """The exponent of the correction is 1/4, and not 1/2."""
  return _rescaled(inverse_root, *arguments)


def _rescaled(factors: Factors, *arguments: Any) -> Any:
  """The trainer's optimiser, with factors after the correction."""
  masking, *inner = _parts(*arguments)
  tx = sparseopt_jax.sparsify(
    optax.chain(scale_by_factors(), *inner), **masking
  )
  return with_factors(tx, masking["corrected"], factors)


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
  """The factors of the correction, of each weight; 1 outside the mask."""
  factors = sparseopt_jax.correct(jnp.ones(mask.shape), mask)
  return jnp.where(mask, factors, 1)


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
  return correction(mask) ** -2


def inverse_root(mask: jax.Array) -> jax.Array:
  """What turns the factors of the correction into their roots."""
  return correction(mask) ** -0.5


class KeepAlive:
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


class RelativeDrop:
  """Drops the weights that are smallest beside the others of their neuron.

  Batch normalisation takes the size of a neuron's weights away, so that weights
  of several neurons cannot be compared as they are. The neurons lie along the
  last axis.
  """

  def drop_scores(self, layer: sparseopt_jax.Layer) -> jax.Array:
    """The weights over the root mean square of their neuron's."""
    square = jnp.square(layer.weight.astype(jnp.float32))
    axes = tuple(range(square.ndim - 1))
    mean = jnp.mean(square, axes, keepdims=True, where=layer.mask)
    return layer.weight / jnp.sqrt(jnp.where(mean > 0, mean, 1))


def changed(
  topology: sparseopt_jax.Topology, mixin: type
) -> sparseopt_jax.Topology:
  """SET and RigL with a method of the mixin's; others as they are."""
  if type(topology) not in (sparseopt_jax.SET, sparseopt_jax.RigL):
    return topology
  kind = type(mixin.__name__, (mixin, type(topology)), {})
  return kind(**vars(topology))


VARIANTS = (
  Variant("baseline", None, OFF),
  Variant("SparseOpt", "baseline", ON),
  Variant(
    "SparseOpt, corrected growth", "SparseOpt", ON | {"grow_from": "corrected"}
  ),
  Variant("normalised baseline", "baseline", OFF, normalized),
  Variant("normalised SparseOpt", "normalised baseline", ON, normalized),
  Variant("HAM", "baseline", OFF, ham),
  Variant("SparseOpt and HAM", "HAM", ON, ham),
  Variant("SparseOpt after decay", "SparseOpt", ON, decay_first),
  Variant("SparseOpt, mean of live neurons", "SparseOpt", ON, live_mean),
  Variant("correction inverted", "baseline", ON, inverted),
  Variant("half the exponent", "baseline", ON, halved),
  Variant("kept alive", "baseline", OFF, kept_alive),
  Variant("SparseOpt, kept alive", "kept alive", ON, kept_alive),
  Variant("relative drop", "baseline", OFF, relative_drop),
  Variant("SparseOpt, relative drop", "relative drop", ON, relative_drop),
  Variant("dense ends", "baseline", OFF | _ENDS, suffix="dense_ends"),
  Variant(
    "SparseOpt, dense ends", "dense ends", ON | _ENDS, suffix="dense_ends"
  ),
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
  cells.check(args, args.conditions)
  chosen = [each for each in VARIANTS if each.label in args.variants]
  about = {"gradient_norm": GRADIENT_NORM, "ham": HAM, "dense_ends": ENDS}
  conditions = {condition: condition for condition in args.conditions}
  note = f", learning rate {cells.learning_rate(args):g}{_NOTE}"
  return paired.study(args, conditions, chosen, about, note)


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
