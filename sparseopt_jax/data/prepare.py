"""Downloads and prepares a data set: `python -m sparseopt_jax.data.prepare`.

To be run once for each data set. TensorFlow Datasets downloads it and writes
the array_record format, which can be read without TensorFlow; preparing itself
needs TensorFlow (`pip install tensorflow`). A small data set is then written as
`<data_dir>/<name>.npz` as well, which is read in a second and with NumPy alone.
Where the data set is prepared already, writing that file needs no TensorFlow.

ImageNet cannot be downloaded: put `ILSVRC2012_img_train.tar` and
`ILSVRC2012_img_val.tar` in a folder and name it with `--manual-dir`. Files of
other data sets that are in that folder are not downloaded either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import importlib.util
import pathlib
import sys
from typing import NoReturn

from sparseopt_jax import data

_IMAGENET_FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = _Parser(
    prog="python -m sparseopt_jax.data.prepare",
    description="Prepares a data set for sparseopt_jax, once.",
  )
  names = [name for name in data.NAMES if name != "digits"]
  parser.add_argument("name", choices=names)
  parser.add_argument(
    "--data-dir",
    help="where to put it (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
  )
  parser.add_argument(
    "--manual-dir", help="folder with files that were downloaded by hand"
  )
  args = parser.parse_args(arguments)
  try:
    _check_manual_dir(args.name, args.manual_dir)
    _check_data_dir(args.data_dir)
    where = _prepare(args.name, args.data_dir, args.manual_dir)
  except (OSError, ModuleNotFoundError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print(f"{args.name} is prepared in {where}")
  return 0


def _check_manual_dir(name: str, manual_dir: str | None) -> None:
  needed = _IMAGENET_FILES if name == "imagenet2012" else ()
  if manual_dir is None:
    if needed:
      raise FileNotFoundError(
        f"{name} cannot be downloaded: --manual-dir must name a folder with "
        f"{' and '.join(needed)}"
      )
    return
  folder = pathlib.Path(manual_dir)
  if not folder.is_dir():
    raise NotADirectoryError(f"--manual-dir {manual_dir} is not a folder")
  missing = [file for file in needed if not (folder / file).exists()]
  if missing:
    raise FileNotFoundError(f"--manual-dir {manual_dir} lacks {missing[0]}")


def _check_data_dir(data_dir: str | None) -> None:
  if data_dir is None:
    return
  try:
    pathlib.Path(data_dir).expanduser().mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise NotADirectoryError(
      f"--data-dir {data_dir} cannot be written: {error.strerror}"
    ) from error


def _prepare(name: str, data_dir: str | None, manual_dir: str | None) -> str:
  """Prepares a data set and returns where it is."""
  if name == "imagenet2012":
    return _prepare_by_tfds(name, data_dir, manual_dir)
  from sparseopt_jax.data import in_memory
  from sparseopt_jax.data import npz_source

  try:
    splits = in_memory.read_prepared(name, data_dir)
  except data.DataNotPreparedError:
    _prepare_by_tfds(name, data_dir, manual_dir)
    splits = in_memory.read_prepared(name, data_dir)
  file = npz_source.path(name, data_dir)
  npz_source.write(file, *splits)
  return str(file)


def _prepare_by_tfds(
  name: str, data_dir: str | None, manual_dir: str | None
) -> str:
  for module in ("tensorflow", "tensorflow_datasets"):
    if importlib.util.find_spec(module) is None:
      package = module.replace("_", "-")
      raise ModuleNotFoundError(f"needs {package}: pip install {package}")

  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
  )
  return str(builder.data_dir)


if __name__ == "__main__":
  sys.exit(main())
