"""The input alone, against what a training step takes.

ImageNet cannot be had everywhere, so JPEG files of its size are made on the
spot and written as TensorFlow Datasets writes them. They are read from the
file system's cache: a slow disk is not measured.
"""

from collections.abc import Mapping, Sequence
import contextlib
import io
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from sparseopt_jax import data
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.data import in_memory
from sparseopt_jax.data.dataset import Dataset
from sparseopt_jax.training import build
from sparseopt_jax.training import feed
from sparseopt_jax.training import runtime
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.parallel import Layout

_JPEGS = 128
_SMALL_IMAGES = 10_000
# Batches before timing, more than Grain holds ready.
_WARM_UP = 6


def run(config: Config, repeats: int) -> dict[str, dict]:
  """Images per second of the input, and of a step of the trainer that it feeds.

  Args:
    config: What to train on ImageNet.
    repeats: Batches of the input to time, and steps.
  """
  layout = build.devices(config)
  with tempfile.TemporaryDirectory() as folder:
    size = prepare_jpegs(pathlib.Path(folder), max(_JPEGS, config.batch_size))
    source = data.load("imagenet2012", folder)
    alone = reading(source, layout, config.batch_size, repeats)
    step = training(config, layout, source, repeats)
  alone["kilobytes_an_image"] = size / 1e3
  ratio = alone["images_per_second"] / step["images_per_second"]
  alone["times_the_step"] = ratio
  return {"JPEG, 500x375 to 224x224": alone, f"{config.model} step": step}


def reading(
  source: Dataset, layout: Layout, batch_size: int, repeats: int
) -> dict[str, Any]:
  """Training batches, drawn and put on the device, with nothing else to do.

  Args:
    source: The data set.
    layout: Where the batches go.
    batch_size: Images in a batch.
    repeats: Batches to time.
  """
  batches = feed.Streamed(source, layout, seed=0, batch_size=batch_size, step=0)
  wall, cpu = [], []
  with contextlib.closing(batches):
    for step in range(_WARM_UP + repeats):
      start = time.perf_counter(), time.process_time()
      jax.block_until_ready(batches.train(step))
      wall.append(time.perf_counter() - start[0])
      cpu.append(time.process_time() - start[1])
  return {
    **_speed(batch_size, wall[_WARM_UP:]),
    "images_per_second_a_core": batch_size / float(np.median(cpu[_WARM_UP:])),
  }


def _speed(images: int, seconds: Sequence[float]) -> dict[str, Any]:
  return timing.spread("images_per_second", images / np.array(seconds))


def training(
  config: Config, layout: Layout, source: Dataset, repeats: int
) -> dict[str, Any]:
  """The trainer's step between mask updates, fed by the input.

  `input_wait` is the share of the time in which the step waits for images, as
  in metrics.jsonl.

  Args:
    config: What to train.
    layout: Where.
    source: The data set.
    repeats: Steps to time, after one that compiles.
  """
  task, create = build.task_on(source, config, layout)
  program = layout.compile_train(task)
  state = layout.put(runtime.quick_jit(create)(np.uint32(config.seed)))
  batches = feed.Streamed(source, layout, config.seed, config.batch_size, 0)
  wall, waited = [], 0.0
  with contextlib.closing(batches):
    for step in range(repeats + 1):
      start = time.perf_counter()
      state, metrics = program(state, *batches.train(step), False)
      jax.block_until_ready(metrics)
      wall.append(time.perf_counter() - start)
      if step == 0:  # The first step compiles.
        waited = batches.waited
  return {
    **_speed(config.batch_size, wall[1:]),
    "input_wait": (batches.waited - waited) / sum(wall[1:]),
  }


def small_images() -> Dataset:
  """Noise of CIFAR's size, in memory."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (_SMALL_IMAGES, 32, 32, 3), np.uint8)
  labels = rng.integers(0, 100, _SMALL_IMAGES, np.int32)
  return in_memory.InMemory(
    name="cifar100",
    num_classes=100,
    image_shape=(32, 32, 3),
    num_train=_SMALL_IMAGES,
    num_test=_SMALL_IMAGES,
    mean=(0.5, 0.5, 0.5),
    std=(0.3, 0.3, 0.3),
    pad=4,
    flip=True,
    train=(images, labels),
    test=(images, labels),
  )


def prepare_jpegs(folder: pathlib.Path, count: int) -> float:
  """Writes an ImageNet of random images; returns the bytes of one, on average.

  Args:
    folder: The folder of TensorFlow Datasets.
    count: How many training images.
  """
  rng = np.random.default_rng(0)
  examples = [(_jpeg(rng), label) for label in range(count)]
  splits = {"train": examples, "validation": examples[:1]}
  write_prepared("imagenet2012", folder, splits)
  return float(np.mean([len(image) for image, _ in examples]))


def _jpeg(rng: np.random.Generator) -> bytes:
  """500 x 375 pixels in about ImageNet's 110 kB: coarse shapes and grain."""
  from PIL import Image

  coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
  smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
  grain = rng.normal(0, 20, (375, 500, 1))
  pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG", quality=90)
  return file.getvalue()


def write_prepared(
  name: str,
  data_dir: pathlib.Path,
  splits: Mapping[str, Sequence[tuple[bytes, int]]],
) -> None:
  """Writes a data set as TensorFlow Datasets does, without TensorFlow.

  Args:
    name: The data set's name.
    data_dir: Their folder.
    splits: {split: [(encoded image, label), ...]}.
  """
  from array_record.python import array_record_module
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  folder = pathlib.Path(builder.data_dir)
  folder.mkdir(parents=True)
  infos = []
  for split, examples in splits.items():
    file = folder / f"{name}-{split}.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for image, label in examples:
      writer.write(_record(image, label, builder.info.features.keys()))
    writer.close()
    infos.append({"name": split, "shardLengths": [str(len(examples))]})
  info = {
    "name": name,
    "version": str(builder.version),
    "fileFormat": "array_record",
    "splits": infos,
  }
  (folder / "dataset_info.json").write_text(json.dumps(info))


def _record(image: bytes, label: int, names: Sequence[str]) -> bytes:
  from tensorflow_datasets.proto import tf_example_pb2

  example = tf_example_pb2.Example()
  feature = example.features.feature
  feature["image"].bytes_list.value.append(image)
  feature["label"].int64_list.value.append(int(label))
  for other in {"id", "file_name"} & set(names):
    feature[other].bytes_list.value.append(b"")
  return example.SerializeToString()
