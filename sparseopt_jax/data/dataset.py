"""What every data set offers to the training loop."""

from __future__ import annotations

import abc
from collections.abc import Generator
import dataclasses

import jax
from jax.typing import DTypeLike
import numpy as np

from sparseopt_jax.data import augmentation
from sparseopt_jax.data import order

Arrays = tuple[np.ndarray, np.ndarray]
Batch = dict[str, np.ndarray]
Batches = Generator[Batch, None, None]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dataset(abc.ABC):
  """Images and labels, in training batches and in test batches.

  Attributes:
    name: The data set's name, as given to `sparseopt_jax.data.load`.
    num_classes: Number of classes; labels are 0, ..., num_classes - 1.
    image_shape: (height, width, channels) of the images in the batches.
    num_train: Number of training examples.
    num_test: Number of test examples.
    mean: Mean of each channel over the training set, for pixels in [0, 1].
    std: Standard deviation of each channel, likewise.
    pad: Width of the black border from which `augment` crops; 0: no crop.
    flip: Whether `augment` mirrors images.
  """

  name: str
  num_classes: int
  image_shape: tuple[int, int, int]
  num_train: int
  num_test: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  pad: int
  flip: bool

  def train_batches(
    self,
    seed: int,
    start_step: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Batches:
    """Yields training batches for ever, from batch number `start_step` on.

    Each epoch has an order of its own, and the num_train % batch_size examples
    at its end are left out. Batch t is a function of `seed`, `batch_size` and
    t.

    Args:
      seed: Seed of the order (and of ImageNet's crops), not negative.
      start_step: Number of the first batch, from 0; a resumed run gives its
        step.
      batch_size: Size of the whole batch, over all processes.
      process_index: Which share to yield: rows
        [process_index * b, (process_index + 1) * b) of the whole batch, with
        b = batch_size / process_count.
      process_count: Number of shares.

    Returns:
      A generator of dicts of `image`, uint8 (b, h, w, c), and `label`, int32
      (b,).

    Raises:
      ValueError: If `batch_size` is not in [1, num_train], or is not a multiple
        of `process_count`; if `seed` or `start_step` is negative.
    """
    rows = order.share(batch_size, process_index, process_count)
    if batch_size > self.num_train:
      raise ValueError(
        f"batch_size must be at most {self.num_train}, the number of training "
        f"examples, got {batch_size}"
      )
    for name, value in (("seed", seed), ("start_step", start_step)):
      if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return self._train_batches(seed, start_step, batch_size, rows)

  def test_batches(
    self,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Batches:
    """Yields the test set once, in order; all batches have the same shape.

    The last batch is filled up with rows whose `valid` is False. Every process
    gets the same number of batches, and each example is valid in one of them.

    Args:
      batch_size: Size of the whole batch, over all processes.
      process_index: Which share to yield, as in `train_batches`.
      process_count: Number of shares.

    Returns:
      A generator of dicts of `image` and `label`, as above, and `valid`, bool
      (b,).

    Raises:
      ValueError: If `batch_size` is not positive, or is not a multiple of
        `process_count`.
    """
    rows = order.share(batch_size, process_index, process_count)
    num_batches = -(-self.num_test // batch_size)
    return self._test_batches(num_batches, batch_size, rows)

  def arrays(self) -> tuple[Arrays, Arrays] | None:
    """The training set and the test set, if they are in memory; else None.

    Returns:
      Images, uint8 (n, h, w, c), and labels, int32 (n,), of each. Their batches
      are those of `order.epoch_rows` and `order.test_rows`.
    """
    return None

  def steps_per_epoch(self, batch_size: int) -> int:
    """Number of training batches in an epoch; the remainder is left out."""
    return self.num_train // batch_size

  def augment(
    self, key: jax.Array, images: jax.Array, offset: jax.Array | int = 0
  ) -> jax.Array:
    """Crops and flips a training batch at random, on the device.

    The identity where the data set needs none (ImageNet's training images are
    cropped and flipped as they are decoded).

    Args:
      key: The step's random key, the same on all devices.
      images: uint8 (b, h, w, c).
      offset: Position of `images[0]` in the whole batch. With it, a batch that
        is split over devices is augmented exactly as it is in one piece.

    Returns:
      uint8 (b, h, w, c).
    """
    return augmentation.crop_and_flip(key, images, self.pad, self.flip, offset)

  def preprocess(
    self, images: jax.Array, dtype: DTypeLike = np.float32
  ) -> jax.Array:
    """Normalises pixels: (x / 255 - mean) / std, in float32, then cast.

    Args:
      images: uint8 (b, h, w, c).
      dtype: The dtype to compute the network in.

    Returns:
      `dtype` (b, h, w, c).
    """
    return augmentation.normalize(images, self.mean, self.std, dtype)

  @abc.abstractmethod
  def _train_batches(
    self, seed: int, start_step: int, batch_size: int, rows: slice
  ) -> Batches:
    """`train_batches` with checked arguments; `rows` are those to yield."""

  @abc.abstractmethod
  def _test_batches(
    self, num_batches: int, batch_size: int, rows: slice
  ) -> Batches:
    """`test_batches` with checked arguments; `rows` are those to yield."""
