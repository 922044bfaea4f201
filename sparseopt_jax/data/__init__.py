"""Image data sets as batches of NumPy arrays.

`load` gives a `Dataset` (see `sparseopt_jax.data.dataset`), the one interface
that the training loop knows:

- `train_batches(seed, start_step, batch_size)` never ends; its t-th batch is a
  function of the seed and of t alone, so a resumed run sees the same images;
- `test_batches(batch_size)` gives every test example exactly once;
- `augment` and `preprocess` run on the device, inside the jitted step.

This module loads libraries only when a data set is opened, so that a command
can check a name first.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
  import os

  from sparseopt_jax.data.dataset import Dataset

NAMES = ("digits", "fashion_mnist", "cifar10", "cifar100", "imagenet2012")


class DataNotPreparedError(FileNotFoundError):
  """The data set is not on disk; the message says how to prepare it."""


def load(
  name: str,
  data_dir: str | os.PathLike[str] | None = None,
  image_size: int | None = None,
) -> Dataset:
  """Opens a data set; downloads nothing.

  `digits` comes with scikit-learn. The others are read from what
  `python -m sparseopt_jax.data.prepare` has left in `data_dir`: the small ones
  from `<name>.npz` if it is there, with NumPy alone, else as TensorFlow
  Datasets has prepared them, which needs the extra `tfds`, but not TensorFlow.

  Args:
    name: One of `NAMES`.
    data_dir: The folder of TensorFlow Datasets. By default the environment
      variable `TFDS_DATA_DIR`, else ``~/tensorflow_datasets``.
    image_size: Height and width of the images in pixels, 224 by default; for
      `imagenet2012` only, the other data sets have a size of their own.

  Returns:
    The data set. Small ones are held in memory as a whole; ImageNet streams.

  Raises:
    ValueError: An unknown `name`, an `image_size` that cannot be had, or a
      `<name>.npz` that holds something else.
    DataNotPreparedError: The data set is not in `data_dir`.

  Examples:
    >>> from sparseopt_jax import data
    >>> digits = data.load("digits")
    >>> digits.num_train, digits.num_test, digits.image_shape
    (1437, 360, (8, 8, 1))
    >>> batch = next(digits.train_batches(seed=0, start_step=0, batch_size=32))
    >>> batch["image"].shape, batch["image"].dtype
    ((32, 8, 8, 1), dtype('uint8'))
  """
  if name not in NAMES:
    raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
  if name == "imagenet2012":
    from sparseopt_jax.data import imagenet

    return imagenet.load(data_dir, 224 if image_size is None else image_size)
  if image_size is not None:
    raise ValueError(
      f"image_size is for imagenet2012 only, got {image_size} for {name}"
    )
  from sparseopt_jax.data import in_memory

  return in_memory.load(name, data_dir)
