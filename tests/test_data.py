"""Tests of the data sets; those of TensorFlow Datasets are mocked."""

import errno
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from sparseopt_jax import data
from sparseopt_jax.benchmarks import input_pipeline
from sparseopt_jax.data import augmentation
from sparseopt_jax.data import imagenet
from sparseopt_jax.data import in_memory
from sparseopt_jax.data import npz_source
from sparseopt_jax.data import prepare

# ImageNet's mock images are generated anew at each access: keep them few.
NUM_MOCKED = 10
SMALL = ("fashion_mnist", "cifar10", "cifar100")
SHAPES = {
  "fashion_mnist": ((28, 28, 1), 10),
  "cifar10": ((32, 32, 3), 10),
  "cifar100": ((32, 32, 3), 100),
  "imagenet2012": ((64, 64, 3), 1000),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  # A folder of its own: files in the default one would be read.
  folder = tmp_path_factory.mktemp("empty")
  with tfds.testing.mock_data(num_examples=NUM_MOCKED):
    mocked = {name: data.load(name, folder) for name in SMALL}
    mocked["imagenet2012"] = data.load("imagenet2012", folder, image_size=64)
  return {"digits": data.load("digits"), **mocked}


def _prepare(name, data_dir, splits):
  """Writes a data set as TensorFlow Datasets does, without TensorFlow.

  Args:
    name: The data set's name.
    data_dir: Where to put it.
    splits: {split: [(image, label), ...]}.
  """
  encoded = {
    split: [(_png(image), label) for image, label in examples]
    for split, examples in splits.items()
  }
  input_pipeline.write_prepared(name, data_dir, encoded)


def _png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


def _take(batches, number):
  return list(itertools.islice(batches, number))


def _rows(batches):
  """Each example of the batches as a hashable value."""
  return [
    (image.tobytes(), int(label))
    for batch in batches
    for image, label in zip(batch["image"], batch["label"], strict=True)
  ]


def _assert_equal(batch, expected):
  assert batch.keys() == expected.keys()
  for key in batch:
    np.testing.assert_array_equal(batch[key], expected[key])


def test_digits():
  """Scikit-learn's images, split so that the classes keep their shares."""
  from sklearn import datasets as sklearn_datasets

  digits = data.load("digits")
  assert (digits.num_train, digits.num_test) == (1437, 360)
  assert (digits.pad, digits.flip) == (1, False)
  pixels, labels = sklearn_datasets.load_digits(return_X_y=True)
  images = np.concatenate([digits.train[0], digits.test[0]])
  assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 255)
  # 16 levels of ink, 15.94 apart: rounding loses nothing.
  ink = np.rint(images.reshape(-1, 64) / (255 / 16))
  both = np.column_stack(
    [ink, np.concatenate([digits.train[1], digits.test[1]])]
  )
  original = np.column_stack([pixels, labels])
  np.testing.assert_array_equal(
    both[np.lexsort(both.T)], original[np.lexsort(original.T)]
  )
  share = np.bincount(digits.test[1]) / np.bincount(labels)
  np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_the_split_is_the_same_every_time():
  first, second = data.load("digits"), data.load("digits")
  np.testing.assert_array_equal(first.train[0], second.train[0])
  np.testing.assert_array_equal(first.test[1], second.test[1])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(datasets, name):
  dataset = datasets[name]
  shape, num_classes = SHAPES[name]
  assert (dataset.image_shape, dataset.num_classes) == (shape, num_classes)
  assert (dataset.num_train, dataset.num_test) == (NUM_MOCKED, NUM_MOCKED)
  assert len(dataset.mean) == len(dataset.std) == shape[-1]
  batch = next(dataset.train_batches(0, 0, 4))
  assert (batch["image"].shape, batch["image"].dtype) == ((4, *shape), np.uint8)
  assert (batch["label"].shape, batch["label"].dtype) == ((4,), np.int32)
  batch = next(dataset.test_batches(4))
  assert batch["image"].shape == (4, *shape)
  assert (batch["valid"].shape, batch["valid"].dtype) == ((4,), np.bool_)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_an_epoch_has_each_example_at_most_once(datasets, name):
  dataset = datasets[name]
  known = _rows([{"image": dataset.train[0], "label": dataset.train[1]}])
  steps = dataset.steps_per_epoch(4)
  assert steps == dataset.num_train // 4
  epochs = _take(dataset.train_batches(7, 0, 4), 2 * steps)
  first, second = _rows(epochs[:steps]), _rows(epochs[steps:])
  for epoch in (first, second):
    assert len(epoch) == 4 * steps
    assert len(set(epoch)) == len(epoch)
    assert set(epoch) <= set(known)
  assert first != second
  assert _rows(_take(dataset.train_batches(8, 0, 4), steps)) != first


@pytest.mark.parametrize("name", ["digits", *SHAPES])
def test_a_resumed_run_sees_the_same_batches(datasets, name):
  dataset = datasets[name]
  # Steps 0 to 6 of two or four epochs.
  undisturbed = _take(dataset.train_batches(3, 0, 3), 7)
  for start in (1, 3, 5):
    resumed = _take(dataset.train_batches(3, start, 3), 2)
    for batch, expected in zip(resumed, undisturbed[start:], strict=False):
      _assert_equal(batch, expected)


@pytest.mark.parametrize("name", ["digits", *SHAPES])
def test_processes_share_each_batch(datasets, name):
  dataset = datasets[name]
  whole = _take(dataset.train_batches(3, 1, 4), 3)
  shares = [_take(dataset.train_batches(3, 1, 4, i, 2), 3) for i in range(2)]
  for batch, *parts in zip(whole, *shares, strict=True):
    for key in batch:
      joined = np.concatenate([part[key] for part in parts])
      np.testing.assert_array_equal(joined, batch[key])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("batch_size", [4, 10, 16])
@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_each_test_example_is_valid_once(datasets, name, batch_size, processes):
  dataset = datasets[name]
  if name == "cifar10":
    images, labels = dataset.test
  else:
    images = np.stack(
      [
        imagenet.center_crop(dataset.test[i]["image"], 64)
        for i in range(NUM_MOCKED)
      ]
    )
    labels = np.array([dataset.test[i]["label"] for i in range(NUM_MOCKED)])
  shares = [
    list(dataset.test_batches(batch_size, i, processes))
    for i in range(processes)
  ]
  assert len({len(share) for share in shares}) == 1
  seen = []
  for parts in zip(*shares, strict=True):
    batch = {
      key: np.concatenate([part[key] for part in parts]) for key in parts[0]
    }
    assert len(batch["valid"]) == batch_size
    seen += _rows(
      [{key: batch[key][batch["valid"]] for key in ("image", "label")}]
    )
  assert seen == _rows([{"image": images, "label": labels}])


def test_prepared_imagenet_is_read(tmp_path):
  """Images of any size, gray ones among them; flat ones survive a crop."""
  shapes = [(40, 50, 3), (90, 30, 3), (64, 64), (20, 20, 3), (7, 9)]
  examples = [(np.full(s, 10 * i, np.uint8), i) for i, s in enumerate(shapes)]
  splits = {"train": examples, "validation": examples[:3]}
  _prepare("imagenet2012", tmp_path, splits)
  dataset = data.load("imagenet2012", tmp_path, image_size=32)
  assert (dataset.num_train, dataset.num_test) == (5, 3)
  train = next(dataset.train_batches(0, 0, 5))
  assert sorted(train["label"]) == [0, 1, 2, 3, 4]
  (test,) = dataset.test_batches(3)
  np.testing.assert_array_equal(test["label"], [0, 1, 2])
  for batch in (train, test):
    labels = batch["label"].reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(
      batch["image"], np.broadcast_to(10 * labels, batch["image"].shape)
    )


def test_another_format_is_not_taken_for_prepared(tmp_path):
  _prepare("cifar10", tmp_path, {"train": [], "test": []})
  info = next(tmp_path.rglob("dataset_info.json"))
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(data.DataNotPreparedError, match="as array_record"):
    data.load("cifar10", tmp_path)


def test_statistics_are_those_of_the_training_set(datasets):
  images = datasets["cifar10"].train[0] / 255
  mean, std = in_memory.channel_statistics(datasets["cifar10"].train[0])
  np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-12)
  assert (mean, std) == (datasets["cifar10"].mean, datasets["cifar10"].std)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_preprocess(datasets, dtype):
  dataset = datasets["cifar10"]
  images = dataset.train[0]
  result = jax.jit(lambda images: dataset.preprocess(images, dtype))(images)
  assert result.dtype == dtype
  expected = (images / 255 - np.array(dataset.mean)) / np.array(dataset.std)
  tolerance = 1e-5 if dtype == jnp.float32 else 0.02
  np.testing.assert_allclose(
    np.asarray(result, np.float64), expected, atol=tolerance
  )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_augmented_images_are_crops_of_the_padded_one(pad, flip):
  """Each result is one of the (2 pad + 1)^2 (times two) that there can be."""
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, (64, 6, 5, 3), np.uint8)
  crop = jax.jit(
    lambda key, images: augmentation.crop_and_flip(key, images, pad, flip)
  )
  results = np.asarray(crop(jax.random.key(1), images))
  assert (results.shape, results.dtype) == (images.shape, np.uint8)
  drawn = set()
  for image, result in zip(images, results, strict=True):
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    matches = [
      (top, left, mirrored)
      for top in range(2 * pad + 1)
      for left in range(2 * pad + 1)
      for mirrored in (False, True)
      if np.array_equal(
        padded[top : top + 6, left : left + 5][:, :: -1 if mirrored else 1],
        result,
      )
    ]
    assert len(matches) == 1
    drawn.add(matches[0])
  assert {mirrored for _, _, mirrored in drawn} == {False, flip}
  for axis in (0, 1):
    # All shifts occur: 64 draws miss one of nine with probability 5e-3.
    assert {match[axis] for match in drawn} == set(range(2 * pad + 1))


def test_augmentation_does_not_depend_on_the_split_over_devices(datasets):
  dataset = datasets["cifar10"]
  images = jnp.asarray(dataset.train[0][:8])
  key = jax.random.key(5)
  whole = dataset.augment(key, images)
  assert not np.array_equal(whole, images)
  parts = [dataset.augment(key, images[i : i + 2], i) for i in (0, 2, 4, 6)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_what_is_augmented(datasets):
  assert not datasets["digits"].flip
  assert (datasets["cifar10"].pad, datasets["cifar10"].flip) == (4, True)
  images = jnp.asarray(next(datasets["imagenet2012"].test_batches(2))["image"])
  result = datasets["imagenet2012"].augment(jax.random.key(0), images)
  np.testing.assert_array_equal(result, images)


def test_a_stream_passes_errors_on_and_ends_its_threads():
  def decode(position):
    if position == 9:
      raise OSError("gone")
    return {"label": np.int32(position)}

  before = set(threading.enumerate())
  stream = imagenet._stream(decode, start=2, stop=100, batch_size=3)
  labels = [next(stream)["label"].tolist() for _ in range(2)]
  assert labels == [[2, 3, 4], [5, 6, 7]]
  with pytest.raises(OSError, match="gone"):
    next(stream)
  whole = imagenet._stream(lambda position: {"x": position}, 0, 99, 3)
  next(whole)
  whole.close()
  deadline = time.monotonic() + 60
  while set(threading.enumerate()) - before:
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_imagenet_crops_differ_between_epochs(datasets):
  dataset = datasets["imagenet2012"]
  first, second = _take(dataset.train_batches(0, 0, NUM_MOCKED), 2)
  np.testing.assert_array_equal(
    np.sort(first["label"]), np.sort(second["label"])
  )
  assert not set(_rows([first])) & set(_rows([second]))


@pytest.mark.parametrize("shape", [(300, 400, 3), (400, 300, 3), (37, 91, 3)])
def test_center_crop_agrees_with_resizing_first(shape):
  """Short side to 64, then the middle 56, on an image without fine detail."""
  rows, columns = np.indices(shape[:2]) / np.array(shape[:2]).reshape(2, 1, 1)
  image = np.stack([255 * rows, 255 * columns, 127 * (rows + columns)], -1)
  image = image.astype(np.uint8)
  short = min(shape[:2])
  height, width = (round(64 * side / short) for side in shape[:2])
  resized = np.asarray(
    Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
  )
  top, left = (height - 56) // 2, (width - 56) // 2
  expected = resized[top : top + 56, left : left + 56].astype(int)
  result = imagenet.center_crop(image, 56)
  assert (result.shape, result.dtype) == ((56, 56, 3), np.uint8)
  # Half a pixel of a ramp of 255 levels over at least 64 pixels, and rounding.
  assert np.abs(result - expected).max() <= 3


@pytest.mark.parametrize("shape", [(300, 400, 3), (30, 400, 3), (1, 1, 3)])
def test_random_crops_lie_in_the_image(shape):
  """A ramp shows where a crop was taken: its first and last column."""
  columns = np.linspace(0, 255, shape[1]).reshape(1, -1, 1)
  image = np.broadcast_to(columns, shape).astype(np.uint8)
  spans, mirrored = [], 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    crop = imagenet.random_crop_and_flip(image, rng, 16).astype(int)
    assert crop.shape == (16, 16, 3)
    span = crop[0, -1, 0] - crop[0, 0, 0]
    spans.append(abs(span) / 255)
    mirrored += span < 0
  if shape == (300, 400, 3):
    assert 70 <= mirrored <= 130
    # Widths from sqrt(0.08 * 3 / 4 * 300 / 400) = 0.21 of the image to all.
    assert min(spans) < 0.35
    assert max(spans) > 0.8
  if shape == (30, 400, 3):
    # The widest allowed part of a long image: 40 of 400 columns.
    assert max(spans) <= 0.1


@pytest.mark.parametrize("name", [*SMALL, "imagenet2012"])
def test_unprepared_data_is_told_at_once(tmp_path, name):
  start = time.monotonic()
  with pytest.raises(data.DataNotPreparedError) as error:
    data.load(name, tmp_path)
  assert time.monotonic() - start < 3
  command = f"python -m sparseopt_jax.data.prepare {name} --data-dir {tmp_path}"
  assert command in str(error.value)
  assert "\n" not in str(error.value)


def test_unprepared_data_in_the_default_folder(tmp_path):
  code = "from sparseopt_jax import data; data.load('cifar10')"
  environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
  run = subprocess.run(
    [sys.executable, "-c", code],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert f"prepare cifar10 --data-dir {tmp_path}" in run.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("mnist",), "name must be one of digits, .*'mnist'"),
    (("digits", None, 8), "image_size is for imagenet2012 only, got 8"),
    (("imagenet2012", None, 0), "image_size must be positive, got 0"),
  ],
)
def test_bad_arguments_of_load(arguments, message):
  with pytest.raises(ValueError, match=message):
    data.load(*arguments)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0, 0, 0), "batch_size must be a positive multiple .* 1, got 0"),
    ((0, 0, 1438), "batch_size must be at most 1437, .* got 1438"),
    ((0, 0, 3, 0, 2), "batch_size must be a positive multiple .* 2, got 3"),
    ((0, 0, 4, 2, 2), r"process_index must be in \[0, 2\), got 2"),
    ((-1, 0, 4), "seed must not be negative, got -1"),
    ((0, -1, 4), "start_step must not be negative, got -1"),
  ],
)
def test_bad_arguments_of_train_batches(datasets, arguments, message):
  with pytest.raises(ValueError, match=message):
    datasets["digits"].train_batches(*arguments)


def test_bad_arguments_of_test_batches(datasets):
  with pytest.raises(ValueError, match=r"batch_size must be .* got -2"):
    datasets["digits"].test_batches(-2)


def test_names_are_known_without_libraries():
  code = (
    "import sys; from sparseopt_jax import data; data.NAMES; "
    "sys.exit(bool({'sklearn', 'tensorflow_datasets'} & sys.modules.keys()))"
  )
  run = subprocess.run([sys.executable, "-c", code], check=False)
  assert run.returncode == 0


@pytest.fixture
def prepared_cifar10(tmp_path):
  """A folder with six images of CIFAR-10, prepared by TFDS, and the arrays."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
  labels = rng.integers(0, 10, 6, np.int32)
  examples = list(zip(images, labels, strict=True))
  _prepare("cifar10", tmp_path, {"train": examples[:4], "test": examples[4:]})
  return tmp_path, (images[:4], labels[:4]), (images[4:], labels[4:])


def _assert_arrays(dataset, train, test):
  for read, given in ((dataset.train, train), (dataset.test, test)):
    for array, expected in zip(read, given, strict=True):
      assert array.dtype == expected.dtype
      np.testing.assert_array_equal(array, expected)


def test_a_prepared_small_set_is_read(prepared_cifar10):
  folder, train, test = prepared_cifar10
  _assert_arrays(data.load("cifar10", folder), train, test)


def test_prepare_writes_plain_arrays_without_tensorflow(
  prepared_cifar10, monkeypatch, capsys
):
  folder, train, test = prepared_cifar10
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  assert prepare.main(["cifar10", "--data-dir", str(folder)]) == 0
  assert str(folder / "cifar10.npz") in capsys.readouterr().out
  assert sorted(path.name for path in folder.iterdir()) == [
    "cifar10",
    "cifar10.npz",
  ]
  with np.load(folder / "cifar10.npz") as arrays:
    assert set(arrays) == {
      f"{split}_{what}"
      for split in ("train", "test")
      for what in ("images", "labels")
    }
  shutil.rmtree(folder / "cifar10")
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  _assert_arrays(data.load("cifar10", folder), train, test)


def test_without_tfds_the_missing_file_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  message = f"no {tmp_path}/cifar10.npz, and cifar10 needs tensorflow-datasets"
  with pytest.raises(ModuleNotFoundError, match=message):
    data.load("cifar10", tmp_path)


def test_plain_arrays_come_before_what_tfds_prepared(prepared_cifar10):
  folder, train, test = prepared_cifar10
  others = (train[0][::-1], train[1][::-1])
  npz_source.write(npz_source.path("cifar10", folder), others, test)
  _assert_arrays(data.load("cifar10", folder), others, test)


def test_a_file_of_arrays_is_written_whole_or_not_at_all(
  prepared_cifar10, monkeypatch
):
  folder, train, test = prepared_cifar10
  file = npz_source.path("cifar10", folder)
  npz_source.write(file, train, test)
  before = file.read_bytes()

  def full(stream, **arrays):
    stream.write(b"PK")
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(npz_source.np, "savez_compressed", full)
  with pytest.raises(OSError, match="No space"):
    npz_source.write(file, test, train)
  assert file.read_bytes() == before
  assert len(list(folder.iterdir())) == 2


_IMAGES = np.zeros((4, 32, 32, 3), np.uint8)
_LABELS = np.arange(4, dtype=np.int32)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    (
      {"train_images": _IMAGES[..., 0]},
      r"images must be .*32, 3\), got uint8 ",
    ),
    ({"test_images": _IMAGES / 255}, "images must be uint8 .*got float64"),
    ({"train_labels": _LABELS[:3]}, r"labels of 4 images .*got int32 \(3,\)"),
    ({"test_labels": _LABELS.astype(np.int64)}, "must be int32 .*got int64"),
    ({"train_labels": _LABELS + 7}, r"in \[0, 10\), got \[7, 8, 9, 10\]"),
    ({"test_labels": _LABELS - 1}, r"in \[0, 10\), got \[-1, 0, 1, 2\]"),
    (
      {"test_images": _IMAGES[:0], "test_labels": _LABELS[:0]},
      r"must be there .*got \[\]",
    ),
    ({"train_labels": np.array([None] * 4)}, "allow_pickle"),
  ],
)
def test_other_arrays_are_refused(tmp_path, changed, message):
  arrays = {
    "train_images": _IMAGES,
    "train_labels": _LABELS,
    "test_images": _IMAGES,
    "test_labels": _LABELS,
  }
  np.savez(tmp_path / "cifar10.npz", **arrays)
  data.load("cifar10", tmp_path)
  np.savez(tmp_path / "cifar10.npz", **{**arrays, **changed})
  with pytest.raises(ValueError, match=message) as error:
    data.load("cifar10", tmp_path)
  assert f"{tmp_path}/cifar10.npz does not hold cifar10" in str(error.value)
  assert "run: python -m sparseopt_jax.data.prepare cifar10" in str(error.value)


@pytest.mark.parametrize(
  "damage", ["empty", "short", "flipped", "text", "lone", "array"]
)
def test_a_damaged_file_of_arrays_is_refused(tmp_path, damage):
  file = tmp_path / "cifar10.npz"
  npz_source.write(file, (_IMAGES, _LABELS), (_IMAGES, _LABELS))
  content = bytearray(file.read_bytes())
  if damage == "flipped":
    content[60:90] = bytes(30)
  whole = {
    "empty": b"",
    "short": content[: len(content) // 2],
    "flipped": content,
    "text": b"no arrays",
  }
  if damage == "lone":
    np.savez(file, train_images=_IMAGES)
  elif damage == "array":
    with file.open("wb") as stream:
      np.save(stream, _IMAGES)
  else:
    file.write_bytes(whole[damage])
  with pytest.raises(ValueError, match="does not hold cifar10"):
    data.load("cifar10", tmp_path)


def test_prepare_says_what_is_missing(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
  assert prepare.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
  assert capsys.readouterr().err == (
    "error: needs tensorflow: pip install tensorflow\n"
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("digits", "invalid choice: 'digits'"),
    ("", "required: name"),
    ("imagenet2012", "--manual-dir must name a folder with ILSVRC2012_img_tra"),
    ("imagenet2012 --manual-dir {tmp}", "lacks ILSVRC2012_img_train.tar"),
    ("cifar10 --manual-dir {tmp}/no", "/no is not a folder"),
  ],
)
def test_bad_arguments_of_prepare(tmp_path, capsys, arguments, message):
  try:
    code = prepare.main(arguments.format(tmp=tmp_path).split())
  except SystemExit as end:
    code = end.code
  assert code == 2
  assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


def test_prepare_asks_for_a_format_that_needs_no_tensorflow(
  monkeypatch, capsys, tmp_path
):
  calls = []

  class Builder:
    data_dir = "somewhere"

    def __init__(self, *args, **kwargs):
      calls.append((args, kwargs))

    def download_and_prepare(self, download_config):
      calls.append(download_config.manual_dir)

  monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(tfds, "builder", Builder)
  for split in ("train", "val"):
    (tmp_path / f"ILSVRC2012_img_{split}.tar").touch()
  arguments = ["imagenet2012", "--data-dir", "d", "--manual-dir", str(tmp_path)]
  assert prepare.main(arguments) == 0
  (args, kwargs), manual_dir = calls
  assert args == ("imagenet2012",)
  assert kwargs == {"data_dir": "d", "file_format": "array_record"}
  assert str(manual_dir) == str(tmp_path)
  assert "imagenet2012 is prepared in somewhere" in capsys.readouterr().out
