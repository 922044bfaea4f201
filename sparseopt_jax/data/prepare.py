"""Downloads and prepares a data set: `python -m sparseopt_jax.data.prepare`.

A thin command over TensorFlow Datasets, to be run once for each data set. It
writes the array_record format, the one that can be read without TensorFlow;
preparing itself needs TensorFlow (`pip install tensorflow`).

ImageNet cannot be downloaded: put `ILSVRC2012_img_train.tar` and
`ILSVRC2012_img_val.tar` in a folder and name it with `--manual-dir`. Files of
other data sets that are in that folder are not downloaded either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import importlib.util
import sys

from sparseopt_jax import data


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = argparse.ArgumentParser(
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
  for module in ("tensorflow", "tensorflow_datasets"):
    if importlib.util.find_spec(module) is None:
      package = module.replace("_", "-")
      print(f"error: needs {package}: pip install {package}", file=sys.stderr)
      return 2

  import tensorflow_datasets as tfds

  builder = tfds.builder(
    args.name, data_dir=args.data_dir, file_format="array_record"
  )
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=args.manual_dir)
  )
  print(f"{args.name} is prepared in {builder.data_dir}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
