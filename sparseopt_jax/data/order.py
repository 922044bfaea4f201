"""The order of examples, as pure functions of seed and step.

Everything that must not change when a run is resumed, or when its batches are
split over processes, is decided here, for all data sets.
"""

from __future__ import annotations

import functools

import numpy as np


def share(batch_size: int, process_index: int, process_count: int) -> slice:
  """The rows of each whole batch that belong to one process.

  Args:
    batch_size: Size of the whole batch.
    process_index: The process, in [0, process_count).
    process_count: Number of processes.

  Returns:
    A slice of batch_size / process_count rows.

  Raises:
    ValueError: If the batch cannot be split so.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index must be in [0, {process_count}), got {process_index}"
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      "batch_size must be a positive multiple of the number of processes, "
      f"{process_count}, got {batch_size}"
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def train_indices(
  num_train: int, seed: int, step: int, batch_size: int
) -> np.ndarray:
  """The examples of one whole training batch.

  Args:
    num_train: Number of training examples.
    seed: Seed of the order, not negative.
    step: Number of the batch.
    batch_size: Size of the whole batch, at most `num_train`.

  Returns:
    int64 (batch_size,).
  """
  epoch, step = divmod(step, num_train // batch_size)
  return epoch_rows(num_train, seed, epoch, batch_size)[step]


def epoch_rows(
  num_train: int, seed: int, epoch: int, batch_size: int
) -> np.ndarray:
  """The examples of each whole training batch of an epoch.

  Args:
    num_train: Number of training examples.
    seed: Seed of the order, not negative.
    epoch: Number of the epoch.
    batch_size: Size of a whole batch, at most `num_train`.

  Returns:
    int64 (num_train // batch_size, batch_size).
  """
  batches = num_train // batch_size
  order = _shuffled(num_train, seed, epoch)[: batches * batch_size]
  return order.reshape(batches, batch_size)


@functools.lru_cache(maxsize=4)
def _shuffled(num_train: int, seed: int, epoch: int) -> np.ndarray:
  order = np.random.default_rng((seed, epoch)).permutation(num_train)
  order.flags.writeable = False  # It is shared by all who ask for it.
  return order


def test_indices(
  num_test: int, step: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """The examples of one whole test batch, in order.

  Args:
    num_test: Number of test examples.
    step: Number of the batch.
    batch_size: Size of the whole batch.

  Returns:
    The examples, int64 (batch_size,), and which of them count, bool
    (batch_size,): past the end, the last example is repeated.
  """
  indices = np.arange(step * batch_size, (step + 1) * batch_size)
  return np.minimum(indices, num_test - 1), indices < num_test


def test_rows(num_test: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """The examples of all whole test batches, and which of them count.

  Returns:
    int64 and bool, (batches, batch_size), with a row for each of the batches of
    `test_indices`.
  """
  batches = range(-(-num_test // batch_size))
  each = [test_indices(num_test, step, batch_size) for step in batches]
  indices, valid = zip(*each, strict=True)
  return np.stack(indices), np.stack(valid)
