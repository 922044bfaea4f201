"""From a configuration to the model, data, optimiser and first state."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax import data
from sparseopt_jax import inspection
from sparseopt_jax import models
from sparseopt_jax.training import optimizer
from sparseopt_jax.training import parallel
from sparseopt_jax.training import processes
from sparseopt_jax.training import state as state_lib
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError
from sparseopt_jax.training.step import Task


def devices(config: Config) -> parallel.Layout:
  """Joins the other processes, if any, and chooses the devices.

  To be called before any other use of JAX.

  Raises:
    UsageError: If there are not as many devices as asked for.
  """
  if config.precision == "float64":
    jax.config.update("jax_enable_x64", True)
  if config.networks > 1 and config.devices > 1:
    _simulate_devices(config.devices)
  processes.join(config)
  return parallel.layout(config.devices, config.shard_params, config.networks)


def _simulate_devices(count: int) -> None:
  """On a CPU, simulated devices share the networks out over the cores."""
  if "device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  # A process that has computed already keeps the devices it has.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", count)


def dataset(config: Config) -> data.dataset.Dataset:
  """Opens the data set.

  Raises:
    UsageError: If it is not there, too small for one batch, or to be gone
      through too often.
  """
  try:
    found = data.load(config.dataset, config.data_dir, config.image_size)
  except (data.DataNotPreparedError, ImportError, ValueError) as error:
    raise UsageError(f"--dataset {config.dataset}: {error}") from error
  if config.batch_size > found.num_train:
    raise UsageError(
      f"--batch-size must be at most {found.num_train}, the number of training "
      f"images of {found.name}, got {config.batch_size}"
    )
  if config.networks > 1 and found.arrays() is None:
    raise UsageError(
      f"--networks {config.networks} needs images in memory; those of "
      f"{found.name} are read as they are needed"
    )
  epoch = found.steps_per_epoch(config.batch_size)
  if config.epochs * epoch >= 2**31:
    raise UsageError(
      f"--epochs of {epoch} steps must be below 2^31 steps, got {config.epochs}"
    )
  return found


def task(
  config: Config,
  layout: parallel.Layout,
  create_optimizer: Callable[..., Any] = optimizer.create,
) -> tuple[Task, Callable[[jax.Array], state_lib.TrainState]]:
  """Builds what does not change in a run, and what makes its first state.

  Args:
    config: What was asked for.
    layout: Where it will run.
    create_optimizer: Another optimiser, in place of `optimizer.create` and with
      its arguments.

  Returns:
    What a step needs, and a function of a network's seed, uint32 [], that gives
    its state before step 0; under `jax.eval_shape` it costs nothing.

  Raises:
    UsageError: See `dataset` and `optimizer.sparse_paths`; or tensorboardX is
      asked for and not there.
  """
  if config.tensorboard and not importlib.util.find_spec("tensorboardX"):
    raise UsageError(
      "--tensorboard needs: pip install 'sparseopt-jax[tensorboard]'"
    )
  return task_on(dataset(config), config, layout, create_optimizer)


def task_on(
  source: data.dataset.Dataset,
  config: Config,
  layout: parallel.Layout,
  create_optimizer: Callable[..., Any] = optimizer.create,
) -> tuple[Task, Callable[[jax.Array], state_lib.TrainState]]:
  """`task` on a data set that is open already."""
  model = models.create(
    config.model,
    source.num_classes,
    width=config.width,
    shortcut_size=int(config.shortcut[0]),
    dtype=config.precision,
    axis_name=layout.axis_name,
  )
  images = jnp.zeros((1, *source.image_shape), config.precision)
  init = functools.partial(_init, config, model, images)
  params = jax.eval_shape(init, config.seed)["params"]
  epoch = source.steps_per_epoch(config.batch_size)
  corrected = inspection.batch_normalized(model, images, train=False)

  def optimizer_of(seed: Any) -> optax.GradientTransformationExtraArgs:
    return create_optimizer(config, params, epoch, corrected, seed)

  def create(seed: jax.Array) -> state_lib.TrainState:
    return state_lib.create(seed, init(seed), optimizer_of(seed))

  built = Task(
    model,
    source,
    optimizer_of(config.seed),
    epoch,
    jnp.dtype(config.precision),
    config.label_smoothing,
    config.accumulate,
    config.skip_nonfinite,
    layout.axis_name,
    layout.mapped,
    stops=config.networks == 1 and not config.skip_nonfinite,
  )
  return built, create


def _init(
  config: Config, model: Any, images: jax.Array, seed: Any
) -> dict[str, Any]:
  variables = dict(model.init(jax.random.key(seed), images, train=False))
  if config.precision == "float64":
    return jax.tree.map(lambda x: x.astype(jnp.float64), variables)
  return variables


def describe(config: Config, built: Task) -> str:
  """One line about what is going to be trained."""
  source = built.dataset
  how = f"{100 * config.sparsity:.6g}% sparse"
  if config.topology == "dense":
    how = "dense"
  if config.networks > 1:
    how = f"{config.networks} networks, {how}"
  return (
    f"{how} {config.model} on {source.num_train} images of {source.name} "
    f"({source.num_test} for testing), {config.epochs} epochs of "
    f"{source.steps_per_epoch(config.batch_size)} steps, "
    f"{config.devices} x {jax.devices()[0].device_kind}"
    + _without_updates(config, source)
  )


def _without_updates(config: Config, source: data.dataset.Dataset) -> str:
  """What to say of a run that is too short for its topology."""
  steps = config.epochs * source.steps_per_epoch(config.batch_size)
  if config.topology in ("dense", "static"):
    return ""
  if any(map(optimizer.topology(config, steps).is_due, range(steps))):
    return ""
  return (
    f"; the masks will not change: --update-every {config.update_every} is not "
    f"below --update-until {config.update_until:g} of {steps} steps"
  )
