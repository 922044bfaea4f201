"""Small data sets as one file of plain arrays, `<data_dir>/<name>.npz`.

It is read in a second and with NumPy alone; `sparseopt_jax.data.prepare` writes
it beside what TensorFlow Datasets has prepared.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]

_SPLITS = ("train", "test")
# What NumPy raises at a damaged file, a missing array, a single array.
_DAMAGED = (
  OSError,
  EOFError,
  ValueError,
  KeyError,
  TypeError,
  zipfile.BadZipFile,
  zlib.error,
)


def path(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Where the file of a data set is, or would be.

  Args:
    name: The data set's name.
    data_dir: Its folder; None for the one that TensorFlow Datasets uses.
  """
  if data_dir is None:
    data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  return pathlib.Path(data_dir).expanduser() / f"{name}.npz"


def write(file: pathlib.Path, train: Arrays, test: Arrays) -> None:
  """Writes a data set, whole or not at all.

  Args:
    file: From `path`.
    train: Images, uint8 (n, h, w, c), and labels, int32 (n,).
    test: Likewise.
  """
  beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
  try:
    with beside.open("wb") as stream:
      np.savez_compressed(
        stream,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
      )
    beside.replace(file)
  finally:
    beside.unlink(missing_ok=True)


def read(
  file: pathlib.Path, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[Arrays, Arrays]:
  """Reads a data set.

  Args:
    file: From `path`.
    image_shape: What the images must have.
    num_classes: What the labels must lie below.

  Returns:
    `train` and `test` as they were given to `write`.

  Raises:
    ValueError: If the file is damaged or holds something else.
  """
  name, folder = file.stem, file.parent
  command = f"python -m sparseopt_jax.data.prepare {name} --data-dir {folder}"
  try:
    # NumPy would leave a damaged file open.
    with file.open("rb") as stream, np.load(stream) as arrays:
      train, test = (_split(arrays, split) for split in _SPLITS)
    for images, labels in (train, test):
      _check(images, labels, image_shape, num_classes)
  except _DAMAGED as error:
    raise ValueError(
      f"{file} does not hold {name}: {error}; to write it again, run: {command}"
    ) from error
  return train, test


def _split(arrays: np.lib.npyio.NpzFile, split: str) -> Arrays:
  return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def _check(
  images: np.ndarray,
  labels: np.ndarray,
  image_shape: tuple[int, int, int],
  num_classes: int,
) -> None:
  if images.dtype != np.uint8 or images.shape[1:] != image_shape:
    raise ValueError(
      f"images must be uint8 (n, {', '.join(map(str, image_shape))}), got "
      f"{images.dtype} {images.shape}"
    )
  if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
    raise ValueError(
      f"labels of {len(images)} images must be int32 ({len(images)},), got "
      f"{labels.dtype} {labels.shape}"
    )
  if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(
      f"labels must be there and in [0, {num_classes}), got "
      f"{sorted(set(labels.tolist()))}"
    )
