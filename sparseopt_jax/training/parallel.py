"""How a run is laid out over devices: one, many replicas, or many shards.

Each layout turns the pure functions of `sparseopt_jax.training.step` into
compiled ones and puts arrays where these want them; the loop does not know
which layout it runs on.
"""

from __future__ import annotations

import abc
import functools
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

import sparseopt_jax
from sparseopt_jax.training import step
from sparseopt_jax.training.errors import UsageError
from sparseopt_jax.training.state import TrainState

AXIS = "batch"
T = TypeVar("T")


class Layout(abc.ABC):
  """Where the state and the batches of a run live.

  Attributes:
    axis_name: The mapped axis that the model and the step average over, or
      None where they see whole arrays.
  """

  axis_name: str | None = None

  @abc.abstractmethod
  def put(self, tree: T) -> T:
    """Places a state, equal in all processes, on the devices."""

  @abc.abstractmethod
  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Batch:
    """Places this process's share of a batch on its devices."""

  def target(self, abstract: Any) -> Any:
    """What a checkpoint is read into, given the state's `jax.eval_shape`."""
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract)

  @abc.abstractmethod
  def compile_train(self, task: step.Task) -> Any:
    """`(state, batch, update_masks) -> (state, metrics)`.

    The old state is given away. `update_masks` is not an array: there is a
    program for each of its values.
    """

  @abc.abstractmethod
  def compile_eval(self, task: step.Task) -> Any:
    """`(variables, sums, batch) -> sums`."""

  def check_replicas(self, state: TrainState) -> None:
    """Raises RuntimeError unless all replicas hold the same masks."""
    del state


class Single(Layout):
  """Everything on one device."""

  def __init__(self, device: jax.Device) -> None:
    self._device = device

  def put(self, tree: T) -> T:
    return jax.device_put(tree, self._device)

  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Batch:
    return jax.device_put(batch, self._device)

  def compile_train(self, task: step.Task) -> Any:
    return jax.jit(
      functools.partial(step.train_step, task),
      donate_argnums=0,
      static_argnums=2,
    )

  def compile_eval(self, task: step.Task) -> Any:
    return jax.jit(functools.partial(step.eval_step, task))


class Replicated(Layout):
  """A copy of the state on each device, and a share of the batch: `jax.pmap`.

  The state goes in and comes out without a device axis. In several processes
  its arrays live on the process's own devices; pmap joins them.
  """

  axis_name = AXIS

  def __init__(self, devices: list[jax.Device]) -> None:
    self._devices = devices
    self._local = [d for d in devices if d.process_index == jax.process_index()]
    self._mesh = Mesh(np.array(self._local), (AXIS,))

  def put(self, tree: T) -> T:
    return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Batch:
    count = len(self._local)
    split = {k: x.reshape(count, -1, *x.shape[1:]) for k, x in batch.items()}
    return jax.device_put(split, NamedSharding(self._mesh, PartitionSpec(AXIS)))

  def _pmap(self, function: Any, in_axes: Any, **options: Any) -> Any:
    return jax.pmap(
      function,
      AXIS,
      in_axes=in_axes,
      out_axes=None,
      devices=self._devices,
      **options,
    )

  def compile_train(self, task: step.Task) -> Any:
    function = functools.partial(step.train_step, task)
    return self._pmap(
      function, (None, 0, None), donate_argnums=0, static_broadcasted_argnums=2
    )

  def compile_eval(self, task: step.Task) -> Any:
    return self._pmap(functools.partial(step.eval_step, task), (None, None, 0))

  @functools.cached_property
  def _checksum_range(self) -> Any:
    def find(opt_state: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
      del index
      checksum = sparseopt_jax.masks_checksum(opt_state)
      return lax.pmin(checksum, AXIS), lax.pmax(checksum, AXIS)

    return self._pmap(find, (None, 0))

  def check_replicas(self, state: TrainState) -> None:
    index = self.put_batch({"index": np.arange(len(self._local))})["index"]
    low, high = jax.device_get(self._checksum_range(state.opt_state, index))
    if low != high:
      raise RuntimeError(
        f"the replicas' masks differ at step {int(state.step)}: checksums "
        f"from {low:#x} to {high:#x}"
      )


class Sharded(Layout):
  """Each large array split over the devices, and the batch too: `jax.jit`.

  An array is split along its longest axis that the number of devices divides;
  masks and momentum have their parameter's shape, so they are laid out as it.
  """

  def __init__(self, devices: list[jax.Device]) -> None:
    self._mesh = Mesh(np.array(devices), (AXIS,))

  def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of this shape lives."""
    count = self._mesh.size
    sizes = [n if n % count == 0 else 0 for n in shape]
    spec: list[str | None] = [None] * len(shape)
    if len(shape) > 1 and max(sizes) > 0:
      spec[sizes.index(max(sizes))] = AXIS
    return NamedSharding(self._mesh, PartitionSpec(*spec))

  def target(self, abstract: Any) -> Any:
    if jax.process_count() == 1:
      return super().target(abstract)

    def sharded(x: Any) -> jax.ShapeDtypeStruct:
      sharding = self.sharding(x.shape)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(sharded, abstract)

  def put(self, tree: T) -> T:
    shardings = jax.tree.map(lambda x: self.sharding(np.shape(x)), tree)
    return jax.device_put(tree, shardings)

  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Batch:
    sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
    return {
      k: jax.make_array_from_process_local_data(sharding, x)
      for k, x in batch.items()
    }

  def compile_train(self, task: step.Task) -> Any:
    return self._jit(
      functools.partial(step.train_step, task),
      donate_argnums=0,
      static_argnums=2,
    )

  def compile_eval(self, task: step.Task) -> Any:
    return self._jit(functools.partial(step.eval_step, task))

  def _jit(self, function: Any, **options: Any) -> Any:
    def constrained(*args: Any) -> Any:
      return jax.tree.map(
        lambda x: lax.with_sharding_constraint(x, self.sharding(x.shape)),
        function(*args),
      )

    return jax.jit(constrained, **options)


def layout(devices: int, shard_params: bool) -> Layout:
  """Chooses the layout of a run.

  Args:
    devices: How many devices, over all processes.
    shard_params: Whether to split the state over them, instead of copying it.

  Returns:
    The layout.

  Raises:
    UsageError: If JAX does not see that many devices.
  """
  available = jax.devices()
  if devices > len(available) or devices % jax.process_count():
    raise UsageError(
      f"--devices {devices} cannot be had: JAX sees {len(available)} "
      f"{available[0].platform} device(s) in {jax.process_count()} process(es)"
    )
  if jax.process_count() > 1 and devices != len(available):
    raise UsageError(
      f"--devices must be {len(available)}, all of the "
      f"{jax.process_count()} processes, got {devices}"
    )
  chosen = available[:devices]
  if shard_params:
    return Sharded(chosen)
  return Single(chosen[0]) if devices == 1 else Replicated(chosen)
