"""The optimiser that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection
import fnmatch
from typing import Any

import jax
import optax

import sparseopt_jax
from sparseopt_jax import _paths
from sparseopt_jax import inspection
from sparseopt_jax.training import skew
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError


def sparse_paths(params: Any, dense_layers: tuple[str, ...]) -> set[str]:
  """The kernels that get a mask.

  Args:
    params: The parameters, or their shapes.
    dense_layers: Shell patterns of paths, such as "Conv_0/*"; a kernel that
      one of them matches stays dense.

  Returns:
    Paths such as "Conv_1/kernel".

  Raises:
    UsageError: A pattern that matches no kernel, or nothing left to be sparse.
  """
  leaves = _paths.by_name(params)
  kernels = {path for path, leaf in leaves.items() if len(leaf.shape) > 1}
  dense: set[str] = set()
  for pattern in dense_layers:
    matches = set(fnmatch.filter(kernels, pattern))
    if not matches:
      names = ", ".join(sorted(kernels))
      raise UsageError(f"--dense-layers {pattern!r} matches none of {names}")
    dense |= matches
  if dense == kernels:
    raise UsageError(
      f"--dense-layers {' '.join(dense_layers)} leaves no layer to be sparse; "
      "--topology dense trains without masks"
    )
  return kernels - dense


def schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
  """Linear warm-up from 0, then a cosine to 0 after the last step."""
  steps = config.epochs * steps_per_epoch
  warmup = round(config.warmup_epochs * steps_per_epoch)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=min(warmup, steps - 1),  # Optax wants a cosine after it.
    decay_steps=steps,
  )


def topology(
  config: Config, total_steps: int, normalized: Collection[str] = ()
) -> Any:
  """The topology, with its last mask update at a fraction of all steps.

  Args:
    config: What was asked for.
    total_steps: Steps of the run.
    normalized: The paths of kernels that feed batch normalisation. SRigL
      ablates neurons of these alone: one of the classifier is a class.
  """
  until = round(config.update_until * total_steps)
  if config.topology == "static":
    return sparseopt_jax.Static()
  if config.topology == "magnitude":
    begin = round(config.update_from * total_steps)
    # The masks stand still from `until` on, as those of the others do.
    steps = begin, max(begin + 1, until - 1)
    options = config.update_every, config.initial_sparsity
    return sparseopt_jax.Magnitude(*steps, *options)
  schedule = until, config.update_every, config.drop_fraction
  if config.topology == "set":
    return sparseopt_jax.SET(*schedule)
  if config.topology == "srigl":
    gamma = lambda path, leaf: config.gamma_sal if path in normalized else 0.0
    return sparseopt_jax.SRigL(*schedule, gamma_sal=gamma)
  return sparseopt_jax.RigL(*schedule, grow_from=config.grow_from)


def mask_updates(
  config: Config, total_steps: int
) -> Callable[[int], bool | None]:
  """Tells of each step whether it updates the masks, as far as is known.

  The optimiser counts the steps it makes. With `--skip-nonfinite` these can be
  fewer than the loop's, so there the optimiser decides: None.
  """
  if config.topology in ("dense", "static"):
    return lambda step: False
  if config.skip_nonfinite:
    return lambda step: None
  return topology(config, total_steps).is_due


def decay(config: Config, params: Any) -> optax.GradientTransformation:
  """Weight decay of the kernels."""
  kernels = jax.tree.map(lambda leaf: len(leaf.shape) > 1, params)
  return optax.add_decayed_weights(config.weight_decay, mask=kernels)


def masking(
  config: Config,
  params: Any,
  steps_per_epoch: int,
  corrected: inspection.BatchNormalized,
  seed: Any,
) -> dict[str, Any]:
  """What `sparsify` takes beside the optimiser, by keyword.

  Arguments and errors are those of `create`.
  """
  sparse = sparse_paths(params, config.dense_layers)
  if config.correction == "on" and not sparse.intersection(corrected.paths):
    raise UsageError(
      "--correction on: no sparse layer feeds batch normalisation; "
      "--correction off trains without it"
    )
  return {
    "sparsity": config.sparsity,
    "topology": topology(
      config, config.epochs * steps_per_epoch, corrected.paths
    ),
    "corrected": corrected if config.correction == "on" else False,
    "distribution": config.distribution,
    "sparse": lambda path, leaf: path in sparse,
    "seed": seed,
  }


def create(
  config: Config,
  params: Any,
  steps_per_epoch: int,
  corrected: inspection.BatchNormalized,
  seed: Any,
) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum, sparse unless `--topology dense`.

  `sparsify` masks and corrects the gradient and keeps the zeros exact; decay of
  the kernels comes after the correction, then momentum and learning rate.

  Args:
    config: What was asked for.
    params: The parameters, or their shapes.
    steps_per_epoch: Steps in an epoch.
    corrected: The kernels that feed batch normalisation.
    seed: Of the masks; an int or an array.

  Returns:
    The optimiser.

  Raises:
    UsageError: See `sparse_paths`; or there is nothing to correct.
  """
  sgd = optax.chain(
    decay(config, params),
    optax.sgd(schedule(config, steps_per_epoch), momentum=config.momentum),
  )
  if config.topology == "dense":
    return optax.with_extra_args_support(sgd)
  options = masking(config, params, steps_per_epoch, corrected, seed)
  tx = sparseopt_jax.sparsify(sgd, **options)
  if config.measure_skew:
    return skew.measured(tx, corrected.paths, steps_per_epoch)
  return tx
