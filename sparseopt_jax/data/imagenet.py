"""ImageNet (ILSVRC 2012), decoded in threads while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import os
import sys

import grain
import numpy as np
from PIL import Image

from sparseopt_jax.data import order
from sparseopt_jax.data import tfds_source
from sparseopt_jax.data.dataset import Batch
from sparseopt_jax.data.dataset import Batches
from sparseopt_jax.data.dataset import Dataset
from sparseopt_jax.data.tfds_source import Example

Box = tuple[float, float, float, float]

_MIN_AREA = 0.08
_MAX_RATIO = 4 / 3
# Evaluation cuts 224 pixels out of an image whose short side has 256.
_CENTER_FRACTION = 224 / 256


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ImageNet(Dataset):
  """ImageNet as a stream: what is not needed soon is not in memory.

  Attributes:
    train: The training examples, for random access.
    test: The test examples: ImageNet's validation set.
  """

  train: Sequence[Example]
  test: Sequence[Example]

  def _train_batches(
    self, seed: int, start_step: int, batch_size: int, rows: slice
  ) -> Batches:
    size = rows.stop - rows.start

    def decode(position: int) -> Batch:
      step, row = divmod(position, size)
      row += rows.start
      indices = order.train_indices(self.num_train, seed, step, batch_size)
      example = self.train[indices[row]]
      rng = np.random.default_rng((seed, step, row))
      return {
        "image": random_crop_and_flip(example["image"], rng, self._size),
        "label": np.asarray(example["label"], np.int32),
      }

    return _stream(decode, start_step * size, sys.maxsize, size)

  def _test_batches(
    self, num_batches: int, batch_size: int, rows: slice
  ) -> Batches:
    size = rows.stop - rows.start

    def decode(position: int) -> Batch:
      step, row = divmod(position, size)
      indices, valid = order.test_indices(self.num_test, step, batch_size)
      row += rows.start
      example = self.test[indices[row]]
      return {
        "image": center_crop(example["image"], self._size),
        "label": np.asarray(example["label"], np.int32),
        "valid": valid[row],
      }

    return _stream(decode, 0, num_batches * size, size)

  @property
  def _size(self) -> int:
    return self.image_shape[0]


def load(data_dir: str | os.PathLike[str] | None, image_size: int) -> ImageNet:
  """Opens ImageNet; see `sparseopt_jax.data.load`."""
  if image_size < 1:
    raise ValueError(f"image_size must be positive, got {image_size}")
  info, (train, test) = tfds_source.open_splits(
    "imagenet2012", data_dir, ("train", "validation")
  )
  return ImageNet(
    name="imagenet2012",
    num_classes=info.features["label"].num_classes,
    image_shape=(image_size, image_size, 3),
    num_train=len(train),
    num_test=len(test),
    # The statistics of the training set that everybody uses.
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    pad=0,
    flip=False,
    train=train,
    test=test,
  )


def random_crop_and_flip(
  image: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
  """Resizes a random part of an image; mirrors half of the images.

  The part has 8 % to 100 % of the image's area and a ratio of width to height
  of 3/4 to 4/3, log-uniform.

  Args:
    image: uint8 (h, w, 3).
    rng: The source of randomness.
    size: Height and width of the result.

  Returns:
    uint8 (size, size, 3).

  References:
    Szegedy et al., "Going deeper with convolutions", 2015.
  """
  crop = _resize(image, _random_box(rng, *image.shape[:2]), size)
  return crop[:, ::-1] if rng.random() < 0.5 else crop


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes the square in the middle, 7/8 of the short side wide.

  That is an image resized until its short side has 256 pixels, of which the
  middle 224 are kept.

  Args:
    image: uint8 (h, w, 3).
    size: Height and width of the result.

  Returns:
    uint8 (size, size, 3).
  """
  height, width = image.shape[:2]
  side = _CENTER_FRACTION * min(height, width)
  return _resize(image, _middle_box(height, width, side, side), size)


def _random_box(rng: np.random.Generator, height: int, width: int) -> Box:
  for _ in range(10):
    area = height * width * rng.uniform(_MIN_AREA, 1)
    ratio = np.exp(rng.uniform(-1, 1) * np.log(_MAX_RATIO))
    box_height, box_width = np.sqrt(area / ratio), np.sqrt(area * ratio)
    if box_height <= height and box_width <= width:
      left = rng.uniform(0, width - box_width)
      top = rng.uniform(0, height - box_height)
      return left, top, left + box_width, top + box_height
  # A very long image: as much of its middle as the ratio allows.
  return _middle_box(
    height,
    width,
    min(height, width * _MAX_RATIO),
    min(width, height * _MAX_RATIO),
  )


def _middle_box(
  height: int, width: int, box_height: float, box_width: float
) -> Box:
  left, top = (width - box_width) / 2, (height - box_height) / 2
  return left, top, left + box_width, top + box_height


def _resize(image: np.ndarray, box: Box, size: int) -> np.ndarray:
  resized = Image.fromarray(image).resize(
    (size, size), Image.Resampling.BILINEAR, box=box
  )
  return np.asarray(resized)


def _stream(
  decode: Callable[[int], Batch], start: int, stop: int, batch_size: int
) -> Batches:
  """Decodes examples start, ..., stop - 1 in threads, three batches ahead."""
  # Pillow releases the interpreter's lock while it decodes and resizes.
  threads = os.cpu_count() or 1
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(threads, batch_size)
  )
  examples = grain.MapDataset.range(start, stop).map(decode)
  batches = grain.experimental.ThreadPrefetchIterDataset(
    examples.to_iter_dataset(options).batch(batch_size), prefetch_buffer_size=2
  )
  with contextlib.closing(iter(batches)) as iterator:
    yield from iterator
