"""How a run is laid out over devices: one, replicas, shards, or many networks.

Each layout turns the pure functions of `sparseopt_jax.training.step` into
compiled ones and puts arrays where these want them; the loop does not know
which layout it runs on.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
import functools
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

import sparseopt_jax
from sparseopt_jax.data.order import share
from sparseopt_jax.training import runtime
from sparseopt_jax.training import state as state_lib
from sparseopt_jax.training import step
from sparseopt_jax.training.errors import UsageError
from sparseopt_jax.training.state import TrainState

AXIS = "batch"
T = TypeVar("T")


class Layout(abc.ABC):
  """Where the states and the batches of a run live.

  What is said of a state here holds for `Sums` too. Where a run has one
  network, there is nothing to join.

  Attributes:
    axis_name: The mapped axis that the model and the step average over, or
      None where they see whole arrays.
    mapped: Whether one step is of several networks, by `jax.vmap`.
  """

  axis_name: str | None = None
  mapped = False

  def joined(self, states: Sequence[T]) -> T:
    """One tree of the states of all networks, as a checkpoint holds it."""
    (state,) = states
    return state

  @abc.abstractmethod
  def put(self, tree: T) -> T:
    """Places a joined state, equal in all processes, on the devices."""

  def gathered(self, state: T) -> T:
    """A state that was put, joined again; NumPy arrays where they are whole."""
    return jax.tree.map(_on_host, state)

  def split(self, state: T) -> list[T]:
    """The state of each network."""
    return [state]

  @abc.abstractmethod
  def put_arrays(self, image: np.ndarray, label: np.ndarray) -> step.Examples:
    """Places all examples of a data set on each device."""

  @abc.abstractmethod
  def put_rows(self, rows: Sequence[np.ndarray]) -> Any:
    """Places the batches' rows, (batches, b), one array a network."""

  @abc.abstractmethod
  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Examples:
    """Places this process's share of a batch on its devices."""

  def target(self, abstract: Any) -> Any:
    """What a checkpoint is read into, given a state's `jax.eval_shape`."""
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract)

  def compile_train(self, task: step.Task) -> Any:
    """`(state, examples, first, count, update_masks) -> (state, metrics)`.

    The old state is given away. `update_masks` is not an array: there is a
    program for each of its values.
    """
    return self._jit(
      functools.partial(step.train_steps, task),
      donate_argnums=0,
      static_argnums=4,
      compiler_options=runtime.step_options(),
    )

  def compile_eval(self, task: step.Task) -> Any:
    """`(state, sums, examples, first, count) -> sums`."""
    program = self._jit(functools.partial(step.eval_steps, task))
    return lambda state, *rest: program(state_lib.variables(state), *rest)

  def _jit(self, function: Any, **options: Any) -> Any:
    return jax.jit(function, **options)

  def check_replicas(self, state: TrainState) -> None:
    """Raises RuntimeError unless all replicas hold the same masks."""
    del state


def _on_host(x: jax.Array) -> Any:
  return np.asarray(x) if x.is_fully_addressable else x


def _taken(tree: T, which: int | slice) -> T:
  """Some of the networks, or one of them."""
  return jax.tree.map(lambda x: x[which], tree)


class Single(Layout):
  """Everything on one device."""

  def __init__(self, device: jax.Device) -> None:
    self._device = device

  def put(self, tree: T) -> T:
    return jax.device_put(tree, self._device)

  def put_arrays(self, image: np.ndarray, label: np.ndarray) -> step.Examples:
    return self.put(step.Examples(image, label))

  def put_rows(self, rows: Sequence[np.ndarray]) -> Any:
    return self.put(self.joined(rows))

  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Examples:
    return self.put(step.Examples(**batch))


class _Meshed(Layout):
  """What layouts over several devices share."""

  _mesh: Mesh

  def _place(self, tree: T, *spec: str | None) -> T:
    sharding = NamedSharding(self._mesh, PartitionSpec(*spec))
    return jax.device_put(tree, sharding)


class Networks(_Meshed):
  """Several networks, shared out over the devices; none sees another.

  A group of networks is trained at a time, as many on each device as one step
  takes: all by `jax.vmap` on accelerators; one on a CPU, where convolutions
  with a kernel for each network are slow. A state is a tuple of groups, whose
  arrays have a leading axis of networks, split over the devices.
  """

  def __init__(self, devices: list[jax.Device], networks: int) -> None:
    self._networks = networks
    on_cpu = devices[0].platform == "cpu"
    self._size = len(devices) if on_cpu else networks
    self.mapped = self._size > len(devices)
    self._mesh = Mesh(np.array(devices), (AXIS,))

  def joined(self, states: Sequence[T]) -> T:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)

  def put(self, tree: T) -> Any:
    firsts = range(0, self._networks, self._size)
    groups = [slice(first, first + self._size) for first in firsts]
    return tuple(self._place(_taken(tree, group), AXIS) for group in groups)

  def gathered(self, state: Any) -> Any:
    groups = [super(Networks, self).gathered(group) for group in state]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)

  def split(self, state: Any) -> list[Any]:
    whole = self.gathered(state)
    return [_taken(whole, index) for index in range(self._networks)]

  def put_arrays(self, image: np.ndarray, label: np.ndarray) -> step.Examples:
    return self._place(step.Examples(image, label))

  def put_rows(self, rows: Sequence[np.ndarray]) -> Any:
    if len(rows) == 1:  # The test batches, for all.
      return self._place(rows[0])
    return self.put(np.stack(rows))

  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Examples:
    raise NotImplementedError("each network has batches of its own")

  def target(self, abstract: Any) -> Any:
    return jax.tree.map(
      lambda x: np.empty((self._networks, *x.shape), x.dtype), abstract
    )

  def _on_each_device(self, function: Any, in_specs: Any) -> Any:
    """The function of this device's networks; of one, without their axis."""

    def local(tree: Any, *rest: Any) -> Any:
      if self.mapped:
        return function(tree, *rest)
      found = function(_taken(tree, 0), *rest)
      return jax.tree.map(lambda x: x[None], found)

    return jax.shard_map(
      local,
      mesh=self._mesh,
      in_specs=in_specs,
      out_specs=PartitionSpec(AXIS),
      check_vma=False,
    )

  def compile_train(self, task: step.Task) -> Any:
    def train(
      state: Any, data: Any, first: Any, count: Any, update_masks: Any
    ) -> Any:
      def local(own: Any, data: Any, first: Any, count: Any) -> Any:
        own_state, rows = own
        examples = data._replace(rows=rows)
        return step.train_steps(
          task, own_state, examples, first, count, update_masks
        )

      own, whole = PartitionSpec(AXIS), PartitionSpec()
      rest = (data._replace(rows=None), first, count)
      run = self._on_each_device(local, (own, whole, whole, whole))
      return run((state, data.rows), *rest)

    program = jax.jit(
      train,
      donate_argnums=0,
      static_argnums=4,
      compiler_options=runtime.step_options(),
    )

    def groups(state: Any, examples: step.Examples, *rest: Any) -> Any:
      results = [
        program(group, examples._replace(rows=rows), *rest)
        for group, rows in zip(state, examples.rows, strict=True)
      ]
      states, metrics = zip(*results, strict=True)
      return states, metrics

    return groups

  def compile_eval(self, task: step.Task) -> Any:
    def evaluate(own: Any, examples: Any, first: Any, count: Any) -> Any:
      variables, sums = own
      return step.eval_steps(task, variables, sums, examples, first, count)

    own, whole = PartitionSpec(AXIS), PartitionSpec()
    program = jax.jit(
      self._on_each_device(evaluate, (own, whole, whole, whole))
    )

    def groups(state: Any, sums: Any, *rest: Any) -> Any:
      return tuple(
        program((state_lib.variables(group), each), *rest)
        for group, each in zip(state, sums, strict=True)
      )

    return groups


class Replicated(_Meshed):
  """A copy of the state on each device, and a share of the batch: `jax.pmap`.

  The state goes in and comes out without a device axis. In several processes
  its arrays live on the process's own devices; pmap joins them. Examples have
  the axis.
  """

  axis_name = AXIS

  def __init__(self, devices: list[jax.Device]) -> None:
    self._devices = devices
    self._local = [d for d in devices if d.process_index == jax.process_index()]
    self._mesh = Mesh(np.array(self._local), (AXIS,))

  def put(self, tree: T) -> T:
    return self._place(tree)

  def put_arrays(self, image: np.ndarray, label: np.ndarray) -> step.Examples:
    count = len(self._local)
    copies = [np.broadcast_to(x, (count, *x.shape)) for x in (image, label)]
    return self._place(step.Examples(*copies), AXIS)

  def put_rows(self, rows: Sequence[np.ndarray]) -> Any:
    (whole,) = rows
    own = share(whole.shape[1], jax.process_index(), jax.process_count())
    split = whole[:, own].reshape(len(whole), len(self._local), -1)
    return self._place(np.moveaxis(split, 1, 0), AXIS)

  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Examples:
    count = len(self._local)
    split = {k: x.reshape(count, -1, *x.shape[1:]) for k, x in batch.items()}
    return self._place(step.Examples(**split), AXIS)

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
    return self._pmap(
      functools.partial(step.train_steps, task),
      (None, 0, None, None, None),
      donate_argnums=0,
      static_broadcasted_argnums=4,
    )

  def compile_eval(self, task: step.Task) -> Any:
    program = self._pmap(
      functools.partial(step.eval_steps, task), (None, None, 0, None, None)
    )
    return lambda state, *rest: program(state_lib.variables(state), *rest)

  @functools.cached_property
  def _checksum_range(self) -> Any:
    def find(opt_state: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
      del index
      checksum = sparseopt_jax.masks_checksum(opt_state)
      return lax.pmin(checksum, AXIS), lax.pmax(checksum, AXIS)

    return self._pmap(find, (None, 0))

  def check_replicas(self, state: TrainState) -> None:
    index = self._place(np.arange(len(self._local)), AXIS)
    low, high = jax.device_get(self._checksum_range(state.opt_state, index))
    if low != high:
      raise RuntimeError(
        f"the replicas' masks differ at step {int(state.step)}: checksums "
        f"from {low:#x} to {high:#x}"
      )


class Sharded(_Meshed):
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

  def put_arrays(self, image: np.ndarray, label: np.ndarray) -> step.Examples:
    return self._place(step.Examples(image, label))

  def put_rows(self, rows: Sequence[np.ndarray]) -> Any:
    return self._place(self.joined(rows), None, AXIS)

  def put_batch(self, batch: dict[str, np.ndarray]) -> step.Examples:
    sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
    return step.Examples(
      **{
        k: jax.make_array_from_process_local_data(sharding, x)
        for k, x in batch.items()
      }
    )

  def _jit(self, function: Any, **options: Any) -> Any:
    def constrained(*args: Any) -> Any:
      return jax.tree.map(
        lambda x: lax.with_sharding_constraint(x, self.sharding(x.shape)),
        function(*args),
      )

    return super()._jit(constrained, **options)


def layout(devices: int, shard_params: bool, networks: int = 1) -> Layout:
  """Chooses the layout of a run.

  Args:
    devices: How many devices, over all processes.
    shard_params: Whether to split the state over them, instead of copying it.
    networks: How many networks to train.

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
  if networks > 1:
    return Networks(chosen, networks)
  if shard_params:
    return Sharded(chosen)
  return Single(chosen[0]) if devices == 1 else Replicated(chosen)
