"""Checkpoints of the whole state: asynchronous, checked, newest K and best.

Orbax writes each checkpoint beside the others and renames it when it is whole,
so a run that is killed while it writes leaves the ones before intact. A CRC of
the state lies beside it, because Orbax alone reads flipped bits as numbers.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any
import warnings
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sparseopt_jax import _paths
from sparseopt_jax.training.errors import RunError
from sparseopt_jax.training.errors import UsageError
from sparseopt_jax.training.state import TrainState


@dataclasses.dataclass
class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps one step. Orbax itself forgets accuracies when a run is resumed."""

  step: int | None = None

  def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
    del context
    return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
  """The checkpoints of one run, in one folder.

  Args:
    folder: Where they lie; made if it is not there.
    keep: How many of the newest to keep, beside the best; None: all.
    read_only: Whether to leave everything in the folder as it is.
  """

  def __init__(
    self, folder: pathlib.Path, keep: int | None, read_only: bool = False
  ) -> None:
    self._folder = folder
    self._best = _Best()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(
        [checkpoint_managers.LatestN(keep), self._best]
      ),
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  def save(self, state: TrainState, step: int, best_step: int | None) -> None:
    """Writes a state in the background.

    Where this step's checkpoint is there already, it stays: one that a signal
    forced during the evaluation.

    Args:
      state: The state, as `Layout.gathered` gives it.
      step: Steps done.
      best_step: The step of the best checkpoint so far, which is kept.

    Raises:
      RunError: If this checkpoint, or the one before, could not be written.
    """
    self._best.step = best_step
    if step in self._manager.all_steps():
      return
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      crc=ocp.args.JsonSave(_crc(state)),
    )
    try:
      self._manager.save(step, args=items)
    except Exception as error:
      raise self._write_error(error) from error

  def wait(self) -> None:
    """Waits until all is written; raises RunError if it could not be."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._write_error(error) from error

  def _write_error(self, error: Exception) -> RunError:
    sound = max(_steps(self._folder), default=None)
    kept = "none is there" if sound is None else f"step {sound}'s is intact"
    reason = str(error).partition(" [")[0].rpartition(": ")[2]
    return RunError(
      f"a checkpoint could not be written to {self._folder} ({kept}): {reason}"
    )

  def restore(self, target: TrainState) -> tuple[int, TrainState | None]:
    """Reads the newest sound checkpoint.

    Newer ones that are damaged are named in a warning and moved aside, into the
    folder `damaged`.

    Args:
      target: What to read it into: `Layout.target`.

    Returns:
      Its step and the state; 0 and None where there is no checkpoint at all.

    Raises:
      UsageError: If all checkpoints are damaged, or of another network, or not
        every process can read the same. They are left as they are.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    reasons: list[str] = []
    found, state = 0, None
    for step in steps:
      try:
        found, state = step, self.read(step, target)
        break
      except Exception as error:  # Orbax has no one type for a bad file.
        reasons.append(f"step {step}: {first_line(error)}")
    _check_agreed(-1 if state is None else found, reasons)
    if state is not None:
      self._move_aside(steps[: len(reasons)], reasons)
    elif reasons:
      raise UsageError(
        f"--resume: no checkpoint in {self._folder} can be used; "
        + "; ".join(reasons)
      )
    return found, state

  def read(self, step: int, target: TrainState) -> TrainState:
    """Reads one checkpoint; raises an error of some kind unless it is sound."""
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target), crc=ocp.args.JsonRestore()
      ),
    )
    _check_shapes(items.state, target)
    crc = _crc(items.state)
    if len(crc) == len(items.crc) and crc != items.crc:
      raise ValueError("the state does not have the CRC that it was saved with")
    return items.state

  def _move_aside(self, steps: list[int], reasons: list[str]) -> None:
    if not steps:
      return
    if jax.process_index() == 0:
      damaged = self._folder.parent / "damaged"
      damaged.mkdir(exist_ok=True)
      for step, reason in zip(steps, reasons, strict=True):
        _free_name(damaged, step, self._folder / str(step))
        warnings.warn(
          f"skipped a damaged checkpoint (moved to {damaged}): {reason}",
          stacklevel=3,
        )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoints moved")
    self._manager.reload()

  def close(self) -> None:
    """Waits for what is being written, then frees the threads."""
    try:
      self._manager.close()
    except Exception as error:
      raise self._write_error(error) from error


def first_line(error: Exception) -> str:
  """What an error of Orbax says, without what it adds."""
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_agreed(step: int, reasons: list[str]) -> None:
  """Raises UsageError unless all processes read the same step (-1: none)."""
  if jax.process_count() == 1:
    return
  steps = np.ravel(multihost_utils.process_allgather(np.int32(step)))
  if np.any(steps != step):
    raise UsageError(
      f"--resume: the processes can read different steps, {steps.tolist()}; "
      + "; ".join(reasons)
    )


def _check_shapes(state: Any, target: Any) -> None:
  """Orbax gives arrays the shapes that they were saved with."""
  leaves, _ = jax.tree.flatten_with_path(state)
  for (path, leaf), wanted in zip(leaves, jax.tree.leaves(target), strict=True):
    if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
      raise ValueError(
        f"{_paths.name(path)} is {leaf.dtype} {leaf.shape}, not {wanted.dtype} "
        f"{wanted.shape}: another network"
      )


def _free_name(damaged: pathlib.Path, step: int, source: pathlib.Path) -> None:
  number = sum(1 for _ in damaged.glob(f"{step}-*"))
  source.rename(damaged / f"{step}-{number}")


def _steps(folder: pathlib.Path) -> list[int]:
  return [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]


def _crc(tree: Any) -> list[int]:
  """The CRC-32 of all values; where they are spread over processes, one each.

  Lists of unequal lengths come from unequal layouts and cannot be compared.
  """
  crc = 0
  whole = True
  for leaf in jax.tree.leaves(tree):
    whole &= isinstance(leaf, np.ndarray)
    for values in _local_values(leaf):
      crc = zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data, crc)
  if whole:
    return [crc]
  return np.ravel(multihost_utils.process_allgather(np.uint32(crc))).tolist()


def _local_values(leaf: Any) -> list[np.ndarray]:
  if isinstance(leaf, np.ndarray):
    return [leaf]
  return [np.asarray(shard.data) for shard in leaf.addressable_shards]
