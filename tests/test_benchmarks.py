"""The benchmarks run, and their arithmetic is right."""

import itertools
import json

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from sparseopt_jax import data
from sparseopt_jax.benchmarks import __main__ as command
from sparseopt_jax.benchmarks import compilation
from sparseopt_jax.benchmarks import input_pipeline
from sparseopt_jax.benchmarks import timing


@pytest.fixture
def no_cache():
  # JAX looks at the folder once, at its first compilation.
  folder = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_compilation_cache_dir", folder)
  compilation_cache.reset_cache()


def _run(arguments, tmp_path, capsys):
  output = tmp_path / "figures.json"
  assert command.main([*arguments, "--output", str(output)]) == 0
  printed = capsys.readouterr().out
  figures = json.loads(output.read_text())
  assert figures["versions"]["jax"] in printed
  assert all(name in printed for name in figures["rows"])
  return figures["rows"]


@pytest.mark.parametrize(
  "arguments",
  [
    pytest.param(["optimizer", "--model", "resnet8"], marks=pytest.mark.slow),
    ["mask-update", "--model", "resnet8"],
    pytest.param(
      ["training-step", "--model", "resnet8", "--batch-size", "4"],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_steps(arguments, tmp_path, capsys):
  rows = _run([*arguments, "--repeats", "2"], tmp_path, capsys)
  names = ["plain", "static", "SET", "RigL", "SET, told", "RigL, told"]
  assert list(rows)[:6] == names
  assert rows["plain"]["ratio"] == 1.0


@pytest.mark.slow
def test_first_call(tmp_path, capsys, no_cache):
  arguments = ["compile", "--model", "resnet8", "--repeats", "1"]
  rows = _run(arguments, tmp_path, capsys)
  assert rows["RigL"]["ratio"] > rows["static"]["ratio"] > 0.5
  plain, static = rows["plain"]["kernels"], rows["static"]["kernels"]
  assert plain <= static < plain + 5
  assert rows["RigL"]["kernels"] > rows["SET"]["kernels"] > static
  assert rows["RigL, told"]["kernels"] == rows["static"]["kernels"]


def test_kernels_are_counted(no_cache):
  """XLA on a CPU makes a kernel for each result of its own shape."""

  def program(a, b):
    return a + 1, b * 2, b.sum()

  lowered = jax.jit(program).lower(np.ones(3), np.ones((5, 7)))
  assert compilation.count_kernels(lowered) == 3


def test_first_call_refuses_a_cache(capsys):
  assert command.main(["compile", "--model", "resnet8"]) == 2
  assert "CACHE_DIR unset" in capsys.readouterr().err


def test_memory(tmp_path, capsys):
  rows = _run(["memory", "--model", "resnet8"], tmp_path, capsys)
  assert rows["plain"]["state_bytes_a_parameter"] == 0
  # A byte a weight for the mask, where it moves another for what was explored,
  # and per neuron a factor.
  for name, size in {"static": 1.0, "SET": 2.0, "RigL": 2.0}.items():
    assert size <= rows[name]["state_bytes_a_parameter"] < size + 0.1


def test_networks(tmp_path, capsys):
  arguments = ["networks", "--model", "perceptron", "--width", "8"]
  small = ["--batch-size", "4", "--steps", "2", "--repeats", "2"]
  many = ["--networks", "2", "4", "--devices", "2"]
  rows = _run([*arguments, *small, *many], tmp_path, capsys)
  assert list(rows) == ["1", "2", "4"]
  assert rows["1"]["times_one"] == 1
  for row in rows.values():
    low, high = row["times_one_quartiles"]
    assert 0 < low <= row["times_one"] <= high
    assert row["first_call_seconds"] > 0
  assert rows["4"]["state_megabytes"] > 3.9 * rows["1"]["state_megabytes"]


def test_input(tmp_path, capsys):
  arguments = ["input", "--model", "resnet8", "--batch-size", "8"]
  rows = _run([*arguments, "--repeats", "2"], tmp_path, capsys)
  jpeg, step = rows.values()
  expected = jpeg["images_per_second"] / step["images_per_second"]
  assert jpeg["times_the_step"] == expected
  assert jpeg["images_per_second_a_core"] > 0
  # ImageNet's have about 110 kilobytes on average.
  assert 90 < jpeg["kilobytes_an_image"] < 130
  assert 0 <= step["input_wait"] < 1


def test_input_is_that_of_imagenet(tmp_path):
  """The files that are made are JPEG of 500 x 375, read by the loader."""
  input_pipeline.prepare_jpegs(tmp_path, 4)
  dataset = data.load("imagenet2012", tmp_path)
  assert dataset.num_train == 4
  assert dataset.train[0]["image"].shape == (375, 500, 3)
  (batch,) = itertools.islice(dataset.train_batches(0, 0, 4), 1)
  assert batch["image"].shape == (4, 224, 224, 3)
  assert sorted(batch["label"]) == [0, 1, 2, 3]


def test_ratios_are_taken_round_by_round():
  # The machine is twice as slow in the second round; the ratio stays.
  plain = timing.Times(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
  other = timing.Times(np.array([3.0, 6.0]), np.array([2.0, 4.0]))
  times = {"plain": plain, "other": other}
  wall = timing.ratios(times, "plain", "wall")["other"]
  assert (wall["ratio"], wall["ratio_quartiles"]) == (3.0, [3.0, 3.0])
  assert wall["milliseconds"] == 4500.0
  assert timing.ratios(times, "plain", "cpu")["other"]["ratio"] == 3.0


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("optimizer --sparsity 1", "--sparsity must be in [0, 1), got 1.0"),
    ("optimizer --repeats 0", "--repeats must be at least 1, got 0"),
    ("optimizer --model vgg", "invalid choice: 'vgg'"),
    ("training-step --batch-size 0", "--batch-size must be at least 1"),
    ("training-step --precision half", "invalid choice: 'half'"),
    ("training-step --image-size 0", "--image-size must be at least 1, got 0"),
    ("networks --sizes 3", "unrecognized arguments: --sizes 3"),
    (
      "networks --networks 3 --devices 2",
      "--networks must be 1 or a multiple of --devices 2, got 3",
    ),
    ("tensorflow", "tensorflow is missing: pip install tensorflow-cpu"),
    ("networks --steps 79", "--steps must be at most 78"),
    ("memory --repeats 3", "unrecognized arguments: --repeats 3"),
    ("memory --output none/a.json", "--output none/a.json: there is no such"),
    ("memory --output .", "--output . is there already"),
  ],
)
def test_bad_input(line, message, capsys):
  assert command.main(line.split()) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
