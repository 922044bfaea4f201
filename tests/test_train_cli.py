"""The command: bad input, files, recipes, data sets that are not there."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny

from sparseopt_jax import train
from sparseopt_jax.training import config as config_lib
from sparseopt_jax.training import folder
from sparseopt_jax.training import plots
from sparseopt_jax.training import recipes
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

_WITHOUT_TYRO_AND_TFDS = """
import pathlib, sys

class Blocker:
  names = ("tyro", "tensorflow_datasets", "array_record", "grain")
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in self.names:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import numpy as np
from sparseopt_jax import compare, export, train
from sparseopt_jax.data import npz_source
from sparseopt_jax.training import build, loop, signals
from sparseopt_jax.training.config import Config

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (32, 28, 28, 1), np.uint8)
split = images, rng.integers(0, 10, 32, np.int32)
npz_source.write(pathlib.Path("fashion_mnist.npz"), split, split)
config = Config(
  dataset="fashion_mnist", data_dir=".", width=4, epochs=1, batch_size=16,
  warmup_epochs=0, workdir="run",
)
with signals.StopRequest() as stop:
  (summary,) = train.train(config, stop, "a program")
print(summary["step"], round(summary["density"], 2))
print(export.main(["run", "model", "--data-dir", "."]))
print(train.main(["--epochs", "1"]))
"""


def test_training_needs_neither_tyro_nor_tfds(tmp_path):
  package = pathlib.Path(train.__file__).parent.parent
  done = subprocess.run(
    [sys.executable, "-c", _WITHOUT_TYRO_AND_TFDS],
    env={**os.environ, "PYTHONPATH": str(package)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  trained, exported, *codes = done.stdout.splitlines()[-4:]
  assert trained == "2 0.1", done.stderr
  assert exported.startswith("model: ")
  assert codes == ["0", "2"]
  assert "error: tyro is missing: pip install" in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a finished tiny run, and what it printed."""
  path = tmp_path_factory.mktemp("finished") / "run"
  printed = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    draw = plots.curves
    tiny.use(patch)
    patch.setattr(plots, "curves", draw)
    with contextlib.redirect_stdout(printed):
      assert train.main(tiny.arguments(path, tensorboard=True)) == 0
  return path, printed.getvalue()


def test_metrics_have_a_line_an_epoch(run):
  lines = tiny.metrics(run[0])
  assert [line["step"] for line in lines] == [6, 12]
  assert [line["epoch"] for line in lines] == [1, 2]
  whole = json.loads((run[0] / folder.METRICS).read_text().splitlines()[0])
  assert set(whole) >= {
    "step",
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "sparsity",
    "itop_rate",
    "images_per_second",
  }
  assert set(whole["layers"]) == {
    "Conv_0/kernel",
    "Conv_1/kernel",
    "Dense_0/kernel",
  }
  for figures in whole["layers"].values():
    assert set(figures) == {"sparsity", "dead_neurons", "fan_in_spread"}


def test_figures_come_from_the_masks(run):
  with pytest.MonkeyPatch.context() as patch:
    tiny.use(patch)
    state = tiny.restored(run[0])
  masks = [np.asarray(m) for m in jax.tree.leaves(tiny.masks(state))]
  active, size = (sum(int(f(m)) for m in masks) for f in (np.sum, np.size))
  summary = json.loads((run[0] / folder.SUMMARY).read_text())
  assert summary["active_weights"] == active
  assert summary["sparse_weights"] == size
  assert summary["density"] == active / size
  assert summary["nonzero_outside_masks"] == 0
  assert summary["parameters"] == sum(
    x.size for x in jax.tree.leaves(state.params)
  )
  dead = [int(np.sum(~m.any(axis=tuple(range(m.ndim - 1))))) for m in masks]
  last = tiny.metrics(run[0])[-1]
  assert [x["dead_neurons"] for x in last["layers"].values()] == dead
  np.testing.assert_allclose(
    [x["sparsity"] for x in last["layers"].values()],
    [1 - m.mean() for m in masks],
    rtol=1e-6,
  )
  fan_ins = [m.sum(axis=tuple(range(m.ndim - 1))) for m in masks]
  np.testing.assert_allclose(
    [x["fan_in_spread"] for x in last["layers"].values()],
    [f.std() / f.mean() for f in fan_ins],
    rtol=1e-6,
  )


def test_summary_says_how_and_where(run):
  summary = json.loads((run[0] / folder.SUMMARY).read_text())
  assert summary["test_accuracy"] == tiny.metrics(run[0])[-1]["test_accuracy"]
  assert summary["best_test_accuracy"] >= summary["test_accuracy"]
  assert summary["versions"]["jax"] == jax.__version__
  assert summary["device"] == jax.devices()[0].device_kind
  assert summary["seconds"] > 0
  command = summary["command"].split()
  assert command[:3] == ["python", "-m", "sparseopt_jax.train"]
  assert command[3:] == tiny.arguments(run[0], tensorboard=True)
  config = json.loads((run[0] / folder.CONFIG).read_text())
  assert config == summary["config"]
  assert Config.from_identity(config).identity() == config


def test_curves_are_an_image(run):
  image = (run[0] / folder.CURVES).read_bytes()
  assert image.startswith(b"\x89PNG")
  assert len(image) > 20_000


def test_curves_of_a_dense_run_that_left_out_every_step():
  line = {"epoch": 1, "train_loss": None, "train_accuracy": None}
  line |= {"test_loss": 2.3, "test_accuracy": 0.1, "sparsity": 0.0}
  line |= {"itop_rate": 1.0, "dead_neurons": 0}
  assert plots.curves([line]).startswith(b"\x89PNG")


def test_tables_are_printed_at_start_and_end(run):
  assert run[1].count("Conv_1/kernel") == 2
  assert "Sparsity at the start:" in run[1]
  assert "Sparsity at the end:" in run[1]
  assert "epoch 2/2: train" in run[1]


def test_tensorboard_has_the_figures(run):
  from tensorboardX.proto import event_pb2

  (path,) = (run[0] / "tensorboard").iterdir()
  content, found = path.read_bytes(), {}
  while content:  # Records: 8 bytes of length, 4 of CRC, the event, 4 of CRC.
    length = int.from_bytes(content[:8], "little")
    event = event_pb2.Event.FromString(content[12 : 12 + length])
    for value in event.summary.value:
      found[value.tag, event.step] = value.simple_value
    content = content[16 + length :]
  for line in tiny.metrics(run[0]):
    for tag in ("test_accuracy", "itop_rate"):
      np.testing.assert_allclose(found[tag, line["step"]], line[tag], rtol=1e-6)
  assert ("layers/Conv_1/kernel/dead_neurons", 12) in found


def test_tensorboard_has_to_be_there(monkeypatch, tmp_path, capsys):
  tiny.use(monkeypatch)
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert train.main(tiny.arguments(tmp_path / "run", tensorboard=True)) == 2
  assert "--tensorboard needs: pip install" in capsys.readouterr().err


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path):
  """As `| head -1` does."""
  path = tmp_path / "run"
  package = pathlib.Path(train.__file__).parent.parent
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "sparseopt_jax.train", "--workdir", str(path)),
      *("--width", "4", "--epochs", "1"),
    ],
    env={**os.environ, "PYTHONPATH": str(package)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    assert str(path) in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
  assert process.returncode == 0
  assert (path / folder.SUMMARY).exists()


def test_free_flags_may_change_on_resume(monkeypatch, tmp_path, run):
  again = shutil.copytree(run[0], tmp_path / "again")
  tiny.use(monkeypatch)
  flags = {"resume": True, "keep_checkpoints": 1, "data_dir": tmp_path}
  assert train.main(tiny.arguments(again, **flags)) == 0


def test_help_explains_every_flag_and_recipe(capsys):
  with pytest.raises(SystemExit) as end:
    train.main(["--help"])
  assert end.value.code == 0
  text = capsys.readouterr().out
  for field in dataclasses.fields(Config):
    assert config_lib.flag(field.name) in text
  for name, recipe in recipes.RECIPES.items():
    assert name in text
    assert " ".join(recipe.cost.split()[:3]) in text


def test_flags_by_hand_win_over_the_recipe():
  config = train.parse(["--epochs", "7", "--recipe", "cifar100-resnet20"])
  assert config.dataset == "cifar100"
  assert config.model == "resnet20"
  assert config.epochs == 7
  same = train.parse(["--recipe=cifar100-resnet20", "--epochs=7"])
  assert same.identity() == config.identity()


def test_flags_of_a_recipe_need_no_effect():
  config = train.parse(["--recipe", "cifar100-resnet20", "--topology=dense"])
  assert config.topology == "dense"


@pytest.mark.parametrize(("every", "silent"), [(4, True), (9, False)])
def test_a_run_too_short_for_its_topology_says_so(
  monkeypatch, tmp_path, capsys, every, silent
):
  """Updates are due before step round(0.75 * 12) = 9."""
  tiny.use(monkeypatch)
  flags = {"update_every": every, "update_until": 0.75}
  assert train.main(tiny.arguments(tmp_path / "run", **flags)) == 0
  first = capsys.readouterr().out.splitlines()[0]
  assert ("the masks will not change" not in first) == silent
  lines = tiny.metrics(tmp_path / "run")
  assert (lines[-1]["itop_rate"] > 1 - lines[-1]["sparsity"] + 1e-6) == silent


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_can_be_used(name):
  recipe = recipes.RECIPES[name]
  assert recipe.config().dataset in name.replace("imagenet", "imagenet2012")
  assert recipe.cost
  assert recipe.reaches


def test_processes_come_from_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
  monkeypatch.setenv("JAX_PROCESS_ID", "1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  arguments = ["--workdir", str(tmp_path), "--devices", "2"]
  config = train.parse(arguments)
  assert config.coordinator == "host:1"
  assert (config.process_id, config.process_count) == (1, 2)
  monkeypatch.setenv("JAX_PROCESS_ID", "one")
  with pytest.raises(UsageError, match=r"JAX_PROCESS_ID .* got 'one'"):
    train.parse(arguments)


def test_the_default_folder_says_what_is_in_it():
  config = train.parse(["--seed", "3", "--sparsity", "0.95"])
  name = pathlib.Path(config.workdir)
  assert name.parent == pathlib.Path("runs")
  assert name.name.startswith("digits-resnet8-rigl-0.95-seed3-")


# What is given by hand: the data are few, and masks are to change. ResNet-50
# takes a minute or two to compile.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "examples", "by_hand"),
  [
    ("cifar100-resnet20", 128, {"epochs": 2, "update_every": 1}),
    ("cifar100-resnet20", 4, {"epochs": 1, "batch_size": 4, "devices": 2}),
    (
      "imagenet-resnet50",
      8,
      {"epochs": 6, "batch_size": 8, "image_size": 64, "update_every": 2},
    ),
  ],
)
def test_recipes_run_on_mocks(tmp_path, name, examples, by_hand):
  arguments = ["--recipe", name, "--data-dir", str(tmp_path)]
  for field, value in by_hand.items():
    arguments += [config_lib.flag(field), str(value)]
  path = tmp_path / "run"
  with tfds.testing.mock_data(num_examples=examples):
    assert train.main([*arguments, "--workdir", str(path)]) == 0
  summary = json.loads((path / folder.SUMMARY).read_text())
  config = recipes.RECIPES[name].config()
  assert summary["config"] == {**config.identity(), **by_hand}
  batch_size = summary["config"]["batch_size"]
  assert summary["step"] == by_hand["epochs"] * (examples // batch_size)
  assert abs(summary["sparsity"] - config.sparsity) < 1e-3
  assert summary["nonzero_outside_masks"] == 0
  changed = "update_every" in by_hand
  assert (summary["itop_rate"] > 1 - summary["sparsity"] + 1e-3) == changed
