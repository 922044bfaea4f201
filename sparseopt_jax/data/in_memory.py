"""Small data sets, held in memory as a whole."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import NamedTuple

import numpy as np

from sparseopt_jax.data import npz_source
from sparseopt_jax.data import order
from sparseopt_jax.data import tfds_source
from sparseopt_jax.data.dataset import Batches
from sparseopt_jax.data.dataset import Dataset

Arrays = npz_source.Arrays


class _Kind(NamedTuple):
  """What is known of a data set before it is read; see `Dataset`."""

  num_classes: int
  image_shape: tuple[int, int, int]
  pad: int
  flip: bool


# Digits lose their meaning when they are mirrored, clothes do not.
_KINDS = {
  "digits": _Kind(10, (8, 8, 1), pad=1, flip=False),
  "fashion_mnist": _Kind(10, (28, 28, 1), pad=2, flip=True),
  "cifar10": _Kind(10, (32, 32, 3), pad=4, flip=True),
  "cifar100": _Kind(100, (32, 32, 3), pad=4, flip=True),
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InMemory(Dataset):
  """A data set whose images are two NumPy arrays.

  Attributes:
    train: Images, uint8 (n, h, w, c), and labels, int32 (n,).
    test: Likewise.
  """

  train: Arrays
  test: Arrays

  def arrays(self) -> tuple[Arrays, Arrays] | None:
    return self.train, self.test

  def _train_batches(
    self, seed: int, start_step: int, batch_size: int, rows: slice
  ) -> Batches:
    images, labels = self.train
    for step in itertools.count(start_step):
      indices = order.train_indices(self.num_train, seed, step, batch_size)
      taken = indices[rows]
      yield {"image": images[taken], "label": labels[taken]}

  def _test_batches(
    self, num_batches: int, batch_size: int, rows: slice
  ) -> Batches:
    images, labels = self.test
    for step in range(num_batches):
      indices, valid = order.test_indices(self.num_test, step, batch_size)
      taken = indices[rows]
      yield {
        "image": images[taken],
        "label": labels[taken],
        "valid": valid[rows],
      }


def load(name: str, data_dir: str | os.PathLike[str] | None) -> InMemory:
  """Reads a small data set; see `sparseopt_jax.data.load`."""
  kind = _KINDS[name]
  train, test = _read(name, data_dir)
  mean, std = channel_statistics(train[0])
  return InMemory(
    name=name,
    num_train=len(train[1]),
    num_test=len(test[1]),
    mean=mean,
    std=std,
    train=train,
    test=test,
    **kind._asdict(),
  )


def read_prepared(
  name: str, data_dir: str | os.PathLike[str] | None
) -> tuple[Arrays, Arrays]:
  """Decodes what TensorFlow Datasets has prepared: training set, test set.

  Raises:
    DataNotPreparedError: The data set is not in `data_dir`.
    ModuleNotFoundError: The extra `tfds` is not installed.
  """
  _, sources = tfds_source.open_splits(name, data_dir, ("train", "test"))
  train, test = (_stack(tfds_source.read_all(source)) for source in sources)
  return train, test


def channel_statistics(
  images: np.ndarray,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of each channel, for pixels in [0, 1].

  Args:
    images: uint8 (n, h, w, c).

  Returns:
    The means and the standard deviations, c numbers each.
  """
  levels = np.arange(256) / 255
  means, stds = [], []
  for channel in range(images.shape[-1]):
    # Counting the 256 levels is exact and needs no copy in floating point.
    counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
    mean = np.average(levels, weights=counts)
    means.append(float(mean))
    variance = np.average((levels - mean) ** 2, weights=counts)
    stds.append(float(np.sqrt(variance)))
  return tuple(means), tuple(stds)


def _read(
  name: str, data_dir: str | os.PathLike[str] | None
) -> tuple[Arrays, Arrays]:
  if name == "digits":
    return _read_digits()
  file = npz_source.path(name, data_dir)
  if file.exists():
    kind = _KINDS[name]
    return npz_source.read(file, kind.image_shape, kind.num_classes)
  try:
    return read_prepared(name, data_dir)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"there is no {file}, and {error}") from error


def _read_digits() -> tuple[Arrays, Arrays]:
  """Scikit-learn's digits, 80 % for training, the same split in every run."""
  from sklearn import datasets
  from sklearn import model_selection

  pixels, labels = datasets.load_digits(return_X_y=True)
  # Ink comes in 0, ..., 16.
  images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  train_images, test_images, train_labels, test_labels = (
    model_selection.train_test_split(
      images,
      labels.astype(np.int32),
      test_size=0.2,
      random_state=0,
      stratify=labels,
    )
  )
  return (train_images, train_labels), (test_images, test_labels)


def _stack(examples: list[dict[str, np.ndarray]]) -> Arrays:
  images = np.stack([example["image"] for example in examples])
  labels = np.array([example["label"] for example in examples], np.int32)
  return images, labels
