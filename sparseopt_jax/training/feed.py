"""How batches come to the steps: from arrays on the devices, or one by one."""

from __future__ import annotations

import abc
from collections.abc import Generator, Sequence
import contextlib
import time

import jax
import numpy as np

from sparseopt_jax.data import order
from sparseopt_jax.data.dataset import Dataset
from sparseopt_jax.training.parallel import Layout
from sparseopt_jax.training.step import Examples


class Feed(abc.ABC):
  """The batches of a run.

  Attributes:
    waited: Seconds that the run has waited for training batches.
  """

  waited = 0.0

  @abc.abstractmethod
  def train(self, step: int) -> tuple[Examples, int, int]:
    """Where to find training batch number `step`, one after the other.

    Returns:
      Examples, the batch's number in them, and how many they have from there.
    """

  @abc.abstractmethod
  def test(self) -> Generator[tuple[Examples, int], None, None]:
    """The test set, once: examples, and how many batches they have."""

  @abc.abstractmethod
  def close(self) -> None:
    """Ends what is going on in the background."""


class Resident(Feed):
  """The data set lives on the devices, and so does the order of an epoch.

  Args:
    dataset: One with `arrays`.
    layout: Where to put them.
    seeds: Of the networks.
    batch_size: Images in a step.
  """

  def __init__(
    self,
    dataset: Dataset,
    layout: Layout,
    seeds: Sequence[int],
    batch_size: int,
  ) -> None:
    arrays = dataset.arrays()
    assert arrays is not None
    self._layout = layout
    self._seeds = seeds
    self._epoch_size = dataset.num_train, batch_size
    self._epoch = -1
    train, test = arrays
    self._train = layout.put_arrays(*train)
    rows, valid = order.test_rows(dataset.num_test, batch_size)
    self._test_batches = len(rows)
    self._test = layout.put_arrays(*test)._replace(
      rows=layout.put_rows([rows.astype(np.int32)]),
      valid=layout.put_rows([valid]),
    )

  def train(self, step: int) -> tuple[Examples, int, int]:
    num_train, batch_size = self._epoch_size
    batches = num_train // batch_size
    epoch, first = divmod(step, batches)
    if epoch != self._epoch:
      each = [
        order.epoch_rows(num_train, seed, epoch, batch_size).astype(np.int32)
        for seed in self._seeds
      ]
      rows = self._layout.put_rows(each)
      self._epoch, self._train = epoch, self._train._replace(rows=rows)
    return self._train, first, batches - first

  def test(self) -> Generator[tuple[Examples, int], None, None]:
    yield self._test, self._test_batches

  def close(self) -> None:
    """Nothing goes on."""


class Streamed(Feed):
  """One batch at a time, as the data set gives them.

  Args:
    dataset: The data set.
    layout: Where to put batches.
    seed: Of the network.
    batch_size: Images in a step, over all processes.
    step: Number of the first batch.
  """

  def __init__(
    self,
    dataset: Dataset,
    layout: Layout,
    seed: int,
    batch_size: int,
    step: int,
  ) -> None:
    share = jax.process_index(), jax.process_count()
    self._test_batches = lambda: dataset.test_batches(batch_size, *share)
    self._put = layout.put_batch
    self._batches = dataset.train_batches(seed, step, batch_size, *share)

  def train(self, step: int) -> tuple[Examples, int, int]:
    start = time.perf_counter()
    batch = self._put(next(self._batches))
    self.waited += time.perf_counter() - start
    return batch, 0, 1

  def test(self) -> Generator[tuple[Examples, int], None, None]:
    with contextlib.closing(self._test_batches()) as batches:
      for batch in batches:
        yield self._put(batch), 1

  def close(self) -> None:
    self._batches.close()
