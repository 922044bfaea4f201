"""The command: bad input, files, recipes, data sets that are not there."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import re
import resource
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

# What is given, and what the one line has to say.
BAD = [
  ("--dataset mnist2", "--dataset must be one of digits,.*got mnist2"),
  ("--model resnet21", "--model must be one of resnet8,.*got resnet21"),
  ("--width 0", "--width must be at least 1, got 0"),
  ("--width wide", "--width.*wide"),
  ("--sparsity 1.0", r"--sparsity must be in \[0, 1\), got 1.0"),
  ("--sparsity -0.1", r"--sparsity must be in \[0, 1\), got -0.1"),
  ("--sparsity nan", r"--sparsity must be in \[0, 1\), got nan"),
  ("--sparsity most", "--sparsity.*most"),
  ("--topology random", "random.*--topology"),
  ("--correction maybe", "maybe.*--correction"),
  ("--grow-from noise", "noise.*--grow-from"),
  ("--distribution erdos", "erdos.*--distribution"),
  ("--update-every 0", "--update-every must be at least 1, got 0"),
  ("--update-until 1.5", r"--update-until must be in \[0, 1\], got 1.5"),
  ("--drop-fraction 2", r"--drop-fraction must be in \[0, 1\], got 2"),
  ("--epochs -1", "--epochs must be at least 1, got -1"),
  ("--epochs 1.5", "--epochs.*1.5"),
  ("--epochs", "missing value.*--epochs"),
  ("--batch-size 0", "--batch-size must be at least 1, got 0"),
  (
    "--batch-size 65 --devices 2",
    "--batch-size must be a multiple of --devices 2 .* got 65",
  ),
  ("--accumulate 3", "--batch-size must be a multiple .*--accumulate 3, got"),
  ("--learning-rate 0", "--learning-rate must be finite and above 0, got 0"),
  ("--learning-rate inf", "--learning-rate must be finite.*got inf"),
  ("--momentum 1", r"--momentum must be in \[0, 1\), got 1"),
  ("--weight-decay -1", "--weight-decay must be finite and at least 0, got -1"),
  ("--warmup-epochs 30", "--warmup-epochs must be below --epochs 30, got 30"),
  ("--label-smoothing 1", r"--label-smoothing must be in \[0, 1\), got 1"),
  ("--seed -1", r"--seed must be in \[0, 2\^32\), got -1"),
  ("--precision float8", "float8.*--precision"),
  ("--keep-checkpoints 0", "--keep-checkpoints must be at least 1, got 0"),
  ("--image-size 64", "--image-size is for imagenet2012, got 64 for digits"),
  ("--resume", "--resume needs the --workdir"),
  ("--recipe fast", "--recipe must be one of .*got 'fast'"),
  ("--fast", "unrecognized options: --fast"),
  ("more", "unrecognized options: more"),
  (
    "--process-id 0",
    "--coordinator, --process-id and --process-count go together",
  ),
  (
    "--coordinator here --process-id 0 --process-count 2 --workdir {tmp}",
    "--coordinator must be host:port, got here",
  ),
  (
    "--coordinator a:1 --process-id 2 --process-count 2 --workdir {tmp}",
    r"--process-id must be in \[0, 2\), got 2",
  ),
  (
    "--coordinator a:1 --process-id 0 --process-count 2 --workdir {tmp}",
    "--devices must be a multiple of --process-count 2, got 1",
  ),
  ("--workdir {tmp}/file/run", "--workdir .*file/run cannot be written"),
  ("--workdir {tmp}/run", "--workdir .*run holds a run already"),
  (
    "--workdir {tmp}/run --resume --seed 1 --width 8",
    "run of other flags: --seed 0 became 1; --width None became 8",
  ),
  ("--workdir {tmp}/broken --resume", "config.json cannot be read"),
  ("--workdir {tmp}/list --resume", "config.json does not hold a run's flags"),
  ("--workdir {tmp}/lost --resume", "has checkpoints but no config.json"),
]
# These need JAX, a data set or a network to be known.
BAD_LATE = [
  ("--devices 64 --workdir {tmp}/new", "--devices 64 cannot be had: JAX sees"),
  (
    "--batch-size 2000 --workdir {tmp}/new",
    "--batch-size must be at most 1437",
  ),
  ("--dense-layers Conv_9 --workdir {tmp}/new", "'Conv_9' matches none of"),
  ("--dense-layers * --workdir {tmp}/new", "leaves no layer to be sparse"),
  (
    "--dataset cifar10 --data-dir {tmp} --workdir {tmp}/new",
    "cifar10 is not prepared in .*run: python -m sparseopt_jax.data.prepare",
  ),
]


@pytest.fixture
def folders(tmp_path):
  """Work folders in all states of disrepair."""
  (tmp_path / "file").write_text("")
  for name, content in {
    "run": json.dumps(Config().identity()),
    "broken": "{",
    "list": "[]",
  }.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / folder.CONFIG).write_text(content)
  (tmp_path / "lost" / folder.CHECKPOINTS).mkdir(parents=True)
  return tmp_path


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[f for f, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(folders, capsys, flags, message):
  assert train.main(flags.format(tmp=folders).split()) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert re.fullmatch(rf"error: .*{message}.*\n", captured.err)


@pytest.mark.parametrize(
  ("flags", "message"), BAD_LATE, ids=[f for f, _ in BAD_LATE]
)
def test_bad_input_that_needs_more_to_know(folders, capsys, flags, message):
  assert train.main(flags.format(tmp=folders).split()) == 2
  assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
  assert not (folders / "new").exists(), "an empty folder was left behind"


def _cpu_seconds():
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def _run(arguments, cwd):
  """Runs the command in a process of its own: what it says, and CPU seconds."""
  before = _cpu_seconds()
  package = pathlib.Path(train.__file__).parent.parent
  done = subprocess.run(
    [sys.executable, "-m", "sparseopt_jax.train", *arguments],
    env={**os.environ, "PYTHONPATH": str(package)},
    cwd=cwd,
    capture_output=True,
    text=True,
  )
  return done, _cpu_seconds() - before


@pytest.mark.parametrize(
  "flags", ["--sparsity 1.0", "--fast", "--dense-layers Conv_9 --workdir {tmp}"]
)
def test_bad_input_ends_a_process_soon(tmp_path, flags):
  done, seconds = _run(flags.format(tmp=tmp_path / "new").split(), tmp_path)
  assert done.returncode == 2
  assert done.stdout == ""
  assert re.fullmatch("error: .*\n", done.stderr)
  # CPU time, because a machine that is busy otherwise proves nothing.
  assert seconds < 8
  assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_end_a_process_soon(tmp_path):
  run = tmp_path / "run"
  done, _ = _run(["--workdir", str(run), "--epochs", "1"], tmp_path)
  assert done.returncode == 0
  for file in (run / folder.CHECKPOINTS).rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  done, seconds = _run(
    ["--workdir", str(run), "--epochs", "1", "--resume"], tmp_path
  )
  assert done.returncode == 2
  assert re.fullmatch("error: --resume: every checkpoint.*\n", done.stderr)
  assert seconds < 8


def test_flags_are_checked_before_heavy_imports(tmp_path):
  code = (
    "import sys; from sparseopt_jax import train;"
    "assert train.main(['--sparsity', '1']) == 2;"
    "heavy = {'flax', 'orbax', 'matplotlib', 'sklearn', 'tensorflow'};"
    "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
  )
  package = pathlib.Path(train.__file__).parent.parent
  environment = {**os.environ, "PYTHONPATH": str(package)}
  subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_training_modules_need_neither_tyro_nor_tfds():
  code = (
    "import sys; sys.modules.update(tyro=None, tensorflow_datasets=None);"
    "from sparseopt_jax import compare, export, train;"
    "from sparseopt_jax.training import build, loop;"
    "print(train.main(['--epochs', '1']))"
  )
  package = pathlib.Path(train.__file__).parent.parent
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONPATH": str(package)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "2\n"
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
    assert set(figures) == {"sparsity", "dead_neurons"}


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


_CIFAR = ["--dataset", "cifar100", "--model", "resnet20"]
_IMAGENET = ["--dataset", "imagenet2012", "--model", "resnet50"]


# ResNet-50 takes a minute or two to compile.
@pytest.mark.parametrize(
  "flags",
  [
    pytest.param(_CIFAR, id="cifar100"),
    pytest.param(
      [*_IMAGENET, "--image-size", "64"], id="imagenet", marks=pytest.mark.slow
    ),
  ],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_on_mocks(tmp_path, flags, devices):
  common = ["--epochs", "1", "--batch-size", "4", "--update-every", "1"]
  with tfds.testing.mock_data(num_examples=4):
    code = train.main(
      [*flags, *common, "--devices", str(devices), "--workdir", str(tmp_path)]
    )
  assert code == 0
  summary = json.loads((tmp_path / folder.SUMMARY).read_text())
  assert summary["step"] == 1
  assert abs(summary["density"] - 0.1) < 1e-3
  assert summary["nonzero_outside_masks"] == 0
