"""The studies of trained networks: statistics, reports, whole runs."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import pickle
import shlex
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import sparseopt_jax
from sparseopt_jax import compare
from sparseopt_jax import inspection
from sparseopt_jax.data import npz_source
from sparseopt_jax.studies import __main__ as command
from sparseopt_jax.studies import ablations
from sparseopt_jax.studies import baseline
from sparseopt_jax.studies import cells
from sparseopt_jax.studies import convergence
from sparseopt_jax.studies import grid
from sparseopt_jax.studies import paired
from sparseopt_jax.studies import paper_tables
from sparseopt_jax.studies import report
from sparseopt_jax.studies import topologies
from sparseopt_jax.training import cli
from sparseopt_jax.training import folder as folder_lib
from sparseopt_jax.training import optimizer
from sparseopt_jax.training import recipes
from sparseopt_jax.training import runtime
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

PACKAGE = pathlib.Path(sparseopt_jax.__file__).parent.parent
TINY = ["--width", "4", "--seeds", "1"]
CONVERGENCE = ["convergence", "--conditions", "rigl-95", "--budgets", "2"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Noise in the place of Fashion-MNIST."""
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  splits = [
    (
      rng.integers(0, 256, (count, 28, 28, 1), np.uint8),
      rng.integers(0, 10, count, np.int32),
    )
    for count in (256, 128)
  ]
  npz_source.write(npz_source.path("fashion_mnist", folder), *splits)
  return folder


def run_of(accuracies, seed=0, **last):
  """A run with these test accuracies, one an epoch."""
  layers = {
    "Conv_0/kernel": {"fan_in_spread": 0.25, "dead_neurons": 1},
    "Dense_0/kernel": {"fan_in_spread": 0.75, "dead_neurons": 2},
  }
  figures = {"itop_rate": 0.5, "dead_neurons": 2, "seconds": 1.0}
  figures |= {"layers": layers, **last}
  lines = [
    {
      "step": 2 * epoch,
      "epoch": epoch,
      "test_accuracy": accuracy,
      "train_accuracy": accuracy + 0.05,
      **figures,
    }
    for epoch, accuracy in enumerate(accuracies, 1)
  ]
  return compare.Run({"seed": seed}, lines)


def leave(folder, config, accuracies, factory=None, **last):
  """Leaves the files of a finished run."""
  lines = run_of(accuracies, **last).lines
  folder.mkdir(parents=True)
  text = "".join(f"{json.dumps(line)}\n" for line in lines)
  (folder / folder_lib.METRICS).write_text(text)
  identity = folder_lib.identity(config, factory)
  (folder / folder_lib.CONFIG).write_text(json.dumps(identity))
  summary = {"device": "abacus", "platform": "wood", "versions": {}}
  (folder / folder_lib.SUMMARY).write_text(json.dumps(summary))


STUDIES = "sparseopt_jax.studies"


def arguments(study, out, *words):
  """What a study gets."""
  parser = cli.Parser()
  parser.add_argument("--out", type=pathlib.Path)
  study.add_flags(parser)
  return parser.parse_args(["--out", str(out), *words])


def forbid_training(monkeypatch):
  def fail(*args):
    raise AssertionError("something is trained")

  monkeypatch.setattr(grid, "_train_all", fail)


# --- Statistics ---------------------------------------------------------------


def test_interval_is_that_of_scipy():
  values = [0.81, 0.84, 0.80, 0.87, 0.83]
  mean, half = report.interval(values)
  low, high = stats.t.interval(
    0.95, len(values) - 1, np.mean(values), stats.sem(values)
  )
  assert mean == pytest.approx(0.83)
  assert (mean - half, mean + half) == pytest.approx((low, high))


def test_interval_by_hand():
  # Standard deviation sqrt(2), standard error 1; t of 1 degree: 12.706.
  mean, half = report.interval([1.0, 3.0])
  assert (mean, half) == pytest.approx((2.0, 12.7062), rel=1e-5)
  assert report.interval([5.0])[0] == 5.0
  assert math.isnan(report.interval([5.0])[1])
  assert all(map(math.isnan, report.interval([1.0, math.nan])))


def test_figures_as_text():
  assert report.percent((0.5, 0.0125)) == "50.00 ± 1.25"
  assert report.number((0.5, math.nan)) == "0.50"
  assert report.number(report.interval([])) == "-"


def test_epochs_to_is_interpolated():
  run = run_of([0.4, 0.6, 0.5, 0.9])
  assert convergence.epochs_to(run, 0.2) == pytest.approx(0.5)
  assert convergence.epochs_to(run, 0.4) == pytest.approx(1.0)
  assert convergence.epochs_to(run, 0.5) == pytest.approx(1.5)
  assert convergence.epochs_to(run, 0.7) == pytest.approx(3.5)
  assert math.isnan(convergence.epochs_to(run, 0.95))
  assert convergence.epochs_to(run, 0.0) == 0.0


def test_compare_pairs_by_hand():
  pairs = [
    (run_of([0.4, 0.8]), run_of([0.6, 1.0], itop_rate=0.7)),
    (run_of([0.4, 0.6]), run_of([0.4, 0.5], dead_neurons=4)),
  ]
  found = convergence.compare_pairs(pairs)
  assert found["seeds"] == 2
  assert found["final"]["baseline"][0] == pytest.approx(0.7)
  assert found["final"]["sparseopt"][0] == pytest.approx(0.75)
  # Of 0.2 and -0.1: standard error 0.15.
  expected = pytest.approx((0.05, 0.15 * 12.7062), rel=1e-4)
  assert found["final"]["difference"] == expected
  assert found["final"]["raw"] == [[0.8, 1.0], [0.6, 0.5]]
  assert found["train"]["difference"][0] == pytest.approx(0.05)
  # After the first epoch of two.
  assert found["early"]["epoch"] == 1
  assert found["early"]["difference"][0] == pytest.approx(0.1)
  # To 0.4 and 0.3: 1 and 2/3 of an epoch, .75 and .75 of one.
  assert found["half"]["raw"][0] == pytest.approx([1, 2 / 3])
  assert found["half"]["raw"][1] == pytest.approx([0.75, 0.75])
  explored = found["along"]["itop_rate"]
  assert explored["SparseOpt"][-1][0] == pytest.approx(0.6)
  # Of 0.2 and 0: standard error 0.1.
  gained = pytest.approx((0.1, 0.1 * 12.7062), rel=1e-4)
  assert explored["difference"][-1] == gained
  # Of 0 and 2: standard error 1.
  dead = found["dead_neurons"]["difference"]
  assert dead == pytest.approx((1, 12.7062), rel=1e-4)


@pytest.mark.parametrize(
  ("budget", "epoch"), [(1, 1), (4, 2), (5, 3), (20, 10), (200, 10)]
)
def test_early_is_epoch_ten_or_half_of_the_budget(budget, epoch):
  assert convergence.early_epoch(budget) == epoch


def test_the_skew_along_training_is_that_of_the_updates():
  """SparseOpt adds 1/2 to the slope of the gradient."""
  slopes = {"skew_slope": -0.5, "skew_slope_after": -0.25}
  slopes["skew_slope_before"] = None  # No mask update.
  pairs = [(run_of([0.4, 0.8], **slopes), run_of([0.6, 1.0], **slopes))] * 2
  found = convergence.along(pairs)
  assert found["skew_slope"] == {
    "baseline": [(-0.5, 0.0)] * 2,
    "SparseOpt": [(0.0, 0.0)] * 2,
    "difference": [(0.5, 0.0)] * 2,
  }
  assert found["skew_slope_after"]["SparseOpt"] == [(0.25, 0.0)] * 2
  assert np.isnan(found["skew_slope_before"]["baseline"]).all()
  assert found["fan_in_spread"]["baseline"] == [(0.5, 0.0)] * 2


# --- Convergence --------------------------------------------------------------


@pytest.fixture(scope="module")
def converged(data_dir, tmp_path_factory):
  """A folder in which the study has run to its end."""
  out = tmp_path_factory.mktemp("converged")
  assert command.main(places(out, data_dir)) == 0
  return out


def places(out, data_dir):
  return [*CONVERGENCE, *TINY, "--out", str(out), "--data-dir", str(data_dir)]


def results(out, name="convergence"):
  found = json.loads((out / f"{name}.json").read_text())
  return {k: v for k, v in found.items() if k != "command"}


@pytest.mark.slow
def test_convergence_end_to_end(converged, data_dir, monkeypatch):
  found = results(converged)
  row = found["results"]["rigl-95, 2"]
  folder = converged / "rigl-95-on-2epochs-lr0.1-seed0"
  summary = json.loads((folder / folder_lib.SUMMARY).read_text())
  assert row["final"]["raw"][0][1] == summary["test_accuracy"]
  assert summary["command"].startswith("python -m sparseopt_jax.train --data")
  slope, _ = row["along"]["skew_slope"]["SparseOpt"][-1]
  assert slope == pytest.approx(summary["skew_slope"] + 0.5)
  assert (converged / "convergence.png").read_bytes()[:4] == b"\x89PNG"
  table = (converged / "convergence.txt").read_text()
  assert "rigl-95, 2, SparseOpt" in table
  # Again: nothing to train, and nothing else to report.
  forbid_training(monkeypatch)
  assert command.main(places(converged, data_dir)) == 0
  assert results(converged) == found


@pytest.mark.slow
def test_convergence_goes_on_after_sigterm(converged, data_dir, tmp_path):
  words = [sys.executable, "-m", "sparseopt_jax.studies"]
  environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
  first = subprocess.Popen(
    [*words, *places(tmp_path, data_dir)],
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not list(tmp_path.glob("*/" + folder_lib.CONFIG)):
    assert first.poll() is None
    time.sleep(0.05)
  first.send_signal(signal.SIGTERM)
  _, error = first.communicate(timeout=600)
  assert first.returncode == 143
  assert "go on with the same command" in error
  assert not list(tmp_path.glob("rigl-*-seed0/" + folder_lib.SUMMARY))
  assert command.main(places(tmp_path, data_dir)) == 0
  assert results(tmp_path)["results"] == results(converged)["results"]


@pytest.mark.slow
def test_the_plan_for_an_accelerator_stops_in_time_and_goes_on(tmp_path):
  rng = np.random.default_rng(0)
  splits = [
    (
      rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
      rng.integers(0, 100, count, np.int32),
    )
    for count in (256, 128)
  ]
  npz_source.write(npz_source.path("cifar100", tmp_path), *splits)
  out = tmp_path / "out"
  tiny = ["--model", "resnet8", "--width", "4", "--seeds", "2", "--budgets"]
  # The script's `python` is this one.
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"

  def run(minutes, budget):
    place = PACKAGE / "sparseopt_jax" / "studies" / "cifar100.sh"
    return subprocess.run(
      [place, tmp_path, out, minutes, *tiny, budget],
      env={**os.environ, "PYTHONPATH": str(PACKAGE), "PATH": path},
      capture_output=True,
      text=True,
      timeout=900,
    )

  # Time is up at once.
  assert "no run is there" in run("0", "2").stderr
  whole = run("9", "2")
  assert whole.returncode == 0, whole.stderr
  assert list(results(out)["results"]) == ["rigl-95, 2", "rigl-97, 2"]
  assert results(out)["results"]["rigl-97, 2"]["seeds"] == 2
  # Time is up before 10,000 epochs are over; what was finished is reported.
  begun = time.monotonic()
  stopped = run("1", "10000")
  assert stopped.returncode == 2
  assert 50 < time.monotonic() - begun < 150
  assert "stopped by SIGTERM" in stopped.stdout
  (checkpoints,) = out.glob("rigl-97-off-10000epochs-*/checkpoints")
  assert list(checkpoints.iterdir())


def test_convergence_reports_what_is_there(tmp_path, monkeypatch, capsys):
  forbid_training(monkeypatch)
  words = "--conditions rigl-95 set-90 --budgets 1 2 --learning-rate 0.3"
  words = ["--out", str(tmp_path), "--report", *words.split()]
  assert command.main(["convergence", *words]) == 2
  assert "no run is there" in capsys.readouterr().err

  args = arguments(convergence, *words[1:])
  # A baseline without its partner is not reported.
  config, _ = convergence.runs_of(args, "rigl-95", 2)[3]
  leave(tmp_path / cells.name(config), config, [0.1, 0.1])
  assert command.main(["convergence", *words]) == 2
  assert "no pair of runs is complete" in capsys.readouterr().err
  accuracies = itertools.count(50)
  for pair in convergence.runs_of(args, "rigl-95", 2)[:3]:
    for config in pair:
      assert config.learning_rate == 0.3
      place = tmp_path / cells.name(config)
      leave(place, config, [0.4, next(accuracies) / 100])
  assert command.main(["convergence", *words]) == 0
  found = results(tmp_path)
  assert list(found["results"]) == ["rigl-95, 2"]
  row = found["results"]["rigl-95, 2"]["final"]
  assert row["raw"] == [[0.50, 0.51], [0.52, 0.53], [0.54, 0.55]]
  assert row["difference"] == pytest.approx([0.01, 0.0], abs=1e-9)
  assert "7 of 40 runs" in capsys.readouterr().out


def test_the_learning_rate_is_the_recipes_unless_it_is_given():
  def rate(*words):
    args = arguments(convergence, "out", *words)
    (pair,) = convergence.runs_of(args, "rigl-95", 5)[:1]
    rates = {config.learning_rate for config in pair}
    assert rates == {cells.learning_rate(args)}
    return rates

  recipe = recipes.RECIPES["cifar100-resnet20"]
  words = ["--recipe", "cifar100-resnet20"]
  assert rate() == {0.1}
  assert rate(*words) == {recipe.config().learning_rate}
  assert rate(*words, "--learning-rate", "0.7") == {0.7}


# --- The baseline -------------------------------------------------------------


def test_the_grid_of_the_baseline(tmp_path, monkeypatch, capsys):
  forbid_training(monkeypatch)
  args = arguments(baseline, tmp_path)
  found = {}
  for variant in baseline.variants([0.1, 0.2]):
    name, cell = variant.cell(args, "rigl-95", 0)
    config = cell.config
    assert config.correction == "off"
    accuracy = config.learning_rate
    accuracy += 0.4 * (config.shortcut == "3x3")
    accuracy += 0.04 * (config.dense_layers == ("Dense_0/*",))
    found[name] = accuracy
    leave(tmp_path / name, config, [0.05, accuracy])
  assert len(found) == len(set(found.values())) == 8
  best = max(found, key=found.get)
  assert best == "rigl-95-off-2epochs-lr0.2-seed0-3x3-dense"
  words = ["--out", str(tmp_path), "--report"]
  words += ["--learning-rates", "0.1", "0.2", "0.4"]
  assert command.main(["baseline", *words]) == 0
  rows = results(tmp_path, "baseline")["results"]["rigl-95"]
  best = max(rows, key=lambda label: rows[label]["test_accuracy"][0])
  assert best == "0.2, shortcuts 3x3, dense classifier"
  assert rows[best]["test_accuracy"][0] == pytest.approx(0.64)
  assert "8 of 12 runs" in capsys.readouterr().out


def test_two_variants_of_one_name_are_refused(tmp_path, monkeypatch):
  """Else both would report the same run."""
  forbid_training(monkeypatch)
  args = arguments(ablations, tmp_path)
  variants = [
    paired.Variant("one", None, paired.OFF | {"distribution": kind})
    for kind in ("erk", "uniform")
  ]
  with pytest.raises(AssertionError, match="two variants named rigl-95-off"):
    paired.study(args, {"rigl-95": "rigl-95"}, variants, {}, "")


# --- The grid -----------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_an_optimiser_of_its_own(data_dir, tmp_path, monkeypatch):
  words = [*TINY, "--epochs", "1", "--data-dir", str(data_dir)]
  args = arguments(ablations, tmp_path, *words)
  (variant,) = [v for v in ablations.VARIANTS if v.label == "SparseOpt and HAM"]
  _, cell = variant.cell(args, "static-90", 0)
  assert cell.factory is ablations.ham
  every = {"one": cell}
  runs = grid.run(every, tmp_path, 1)
  assert len(runs["one"].lines) == 1
  summary = json.loads((tmp_path / "one" / folder_lib.SUMMARY).read_text())
  assert summary["command"].endswith(
    "(optimiser: sparseopt_jax.studies.ablations.ham)"
  )
  assert summary["nonzero_outside_masks"] == 0
  assert "Traceback" not in (tmp_path / "one.log").read_text()
  forbid_training(monkeypatch)
  assert grid.run(every, tmp_path, 1) == runs
  (trained,) = grid.trained_on(tmp_path, runs)
  assert trained["platform"] == "cpu"


@pytest.mark.slow
def test_seeds_are_trained_together(data_dir, tmp_path, monkeypatch):
  words = [*TINY, "--epochs", "1", "--data-dir", str(data_dir)]
  args = arguments(ablations, "out", *words)
  args.model, args.width = "perceptron", 8

  def of(*seeds):
    found = [
      cells.config(args, "static-90", seed, correction="off") for seed in seeds
    ]
    return {cells.name(config): grid.Cell(config) for config in found}

  together, alone = tmp_path / "together", tmp_path / "alone"
  stem = "static-90-off-1epochs-lr0.1-seed"
  runs = grid.run(of(0, 1, 3), together, 1)
  assert list(runs) == [f"{stem}{seed}" for seed in (0, 1, 3)]
  assert sorted(p.name for p in together.iterdir() if p.is_dir()) == [
    f"{stem}3",
    f"{stem}s0-1",
  ]
  (run,) = grid.run(of(1), alone, 1).values()
  assert run.flags == runs[f"{stem}1"].flags
  for figure in ("train_loss", "test_accuracy"):
    expected = pytest.approx(run.lines[-1][figure], rel=1e-4)
    assert runs[f"{stem}1"].lines[-1][figure] == expected
  assert len(grid.trained_on(together, runs)) == 1
  # More seeds: those that are there stay.
  more = grid.run(of(0, 1, 2, 3), together, 1)
  assert len(more) == 4
  assert {name: more[name] for name in runs} == runs
  forbid_training(monkeypatch)
  assert grid.run(of(0, 1, 2, 3), together, 1) == more


@pytest.mark.parametrize("condition", ["srigl-95", "magnitude-95"])
@pytest.mark.slow
def test_conditions_of_other_topologies(data_dir, tmp_path, condition):
  words = [*TINY, "--epochs", "1", "--data-dir", str(data_dir)]
  args = arguments(ablations, tmp_path, *words)
  config = cells.config(args, condition, 0)
  name = cells.name(config)
  assert name == f"{condition}-on-1epochs-lr0.1-seed0"
  runs = grid.run({name: grid.Cell(config)}, tmp_path, 1)
  (line,) = runs[name].lines
  assert line["sparsity"] == pytest.approx(0.95, abs=0.02)


def test_what_was_begun_goes_on_as_it_is(tmp_path):
  kind = "static-90-off-1epochs-lr0.1-seed"

  def programs(seeds, jobs=1, **changes):
    cells_of = {
      f"{kind}{seed}": grid.Cell(
        dataclasses.replace(CONFIG, seed=seed, **changes)
      )
      for seed in seeds
    }
    found = grid._programs(cells_of, tmp_path, jobs)
    return {
      name.removeprefix(kind): (cell.config.seed, cell.config.networks)
      for name, cell in found.items()
    }

  assert programs(range(5)) == {"s0-4": (0, 5)}
  assert programs(range(5), jobs=2) == {"s0-2": (0, 3), "s3-4": (3, 2)}
  assert programs([1, 2, 5]) == {"s1-2": (1, 2), "5": (5, 1)}
  streamed = programs(range(2), dataset="imagenet2012")
  assert streamed == {"0": (0, 1), "1": (1, 1)}
  # Begun: a program of seeds 0 to 4, of which two are done, and seed 6 alone.
  (tmp_path / f"{kind}s0-4" / "seed-3").mkdir(parents=True)
  (tmp_path / f"{kind}6").mkdir()
  (tmp_path / f"{kind}6" / folder_lib.CONFIG).touch()
  begun = {"s0-4": (0, 5), "6": (6, 1)}
  assert programs([3, 6, 7, 8]) == {**begun, "s7-8": (7, 2)}


def test_runs_of_another_optimiser_are_refused(tmp_path):
  config = dataclasses.replace(CONFIG, correction="off")
  leave(tmp_path / "one", config, [0.5])
  assert grid.is_complete(grid.Cell(config), tmp_path / "one")
  with pytest.raises(
    UsageError, match=r"optimizer None became .*ablations.ham"
  ):
    grid.is_complete(grid.Cell(config, ablations.ham), tmp_path / "one")


_TWO_RUNS = """
import argparse, pathlib, sys
from sparseopt_jax.studies import cells, grid
from sparseopt_jax.training import cli

def make(epochs):
  words = ["--data-dir", sys.argv[1], "--width", "4"]
  parser = cli.Parser()
  cells.add_flags(parser)
  args = parser.parse_args(words)
  return grid.Cell(cells.config(args, "static-90", 0, epochs=epochs))

if __name__ == "__main__":
  runs = {"short": make(1), "long": make(100_000)}
  grid.run(runs, pathlib.Path(sys.argv[2]), 2)
"""


@contextlib.contextmanager
def one_of_two_runs(data_dir, folder):
  """A command whose short run is over, while its long one goes on."""
  script = folder / "two_runs.py"
  script.write_text(_TWO_RUNS)
  environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
  words = list(map(str, [sys.executable, script, data_dir, folder]))
  process = subprocess.Popen(
    words, env=environment, stdout=subprocess.PIPE, text=True
  )
  metrics = folder / "long" / folder_lib.METRICS
  try:
    while not (
      (folder / "short" / folder_lib.SUMMARY).exists()
      and metrics.exists()
      and len(metrics.read_text().splitlines()) > 1
    ):
      assert process.poll() is None
      time.sleep(0.05)
    yield process
  finally:
    process.kill()


@pytest.mark.slow
def test_a_signal_lets_the_last_run_write_its_checkpoint(data_dir, tmp_path):
  """Another worker is idle by then, and must not take it with it."""
  with one_of_two_runs(data_dir, tmp_path) as process:
    time.sleep(1)  # for the worker of the short run to be idle
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
  assert "long: stopped by SIGTERM" in said
  assert "Traceback" not in (tmp_path / "long.log").read_text()


@pytest.mark.slow
def test_no_run_outlives_its_command(data_dir, tmp_path):
  with one_of_two_runs(data_dir, tmp_path) as process:
    process.kill()
    # What it says ends when the last of its workers has.
    process.communicate(timeout=60)
  assert process.returncode == -signal.SIGKILL


def test_factories_can_be_sent_to_workers():
  for variant in ablations.VARIANTS:
    assert pickle.loads(pickle.dumps(variant.factory)) is variant.factory


# --- Ablations ----------------------------------------------------------------

CONFIG = Config(
  sparsity=0.5, topology="rigl", update_every=2, warmup_epochs=0.0, epochs=1
)
CORRECTED = inspection.BatchNormalized(("Conv_0/kernel", "Conv_1/kernel"))


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(1)
  shapes = {
    "Conv_0": {"kernel": (3, 3, 1, 4)},
    "Conv_1": {"kernel": (3, 3, 4, 6)},
    "Dense_0": {"kernel": (6, 10), "bias": (10,)},
  }
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def create(factory, params, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  return factory(config, params, 100, CORRECTED, 0)


def first_update(tx, params):
  """(update, masked params, gradient, masks) of the first step."""
  state = tx.init(params)
  masks = jax.tree.map(
    np.asarray,
    sparseopt_jax.get_masks(state),
  )
  params = sparseopt_jax.apply_masks(params, state)
  grads = jax.tree.map(jnp.cos, params)
  updates, _ = runtime.quick_jit(tx.update)(grads, state, params)
  return updates, params, grads, masks


def factors(mask):
  """The correction in float64 NumPy."""
  fan_in = mask.sum(axis=tuple(range(mask.ndim - 1)))
  return np.sqrt(fan_in * len(fan_in) / fan_in.sum())


def steps(tx, params, count=6):
  state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, state)
  step = runtime.quick_jit(tx.update)
  for _ in range(count):
    grads = jax.tree.map(jnp.cos, params)
    updates, state = step(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize("correction", ["on", "off"])
def test_the_parts_make_the_trainers_optimiser(params, correction):
  masking, *inner = create(ablations._parts, params, correction=correction)
  rebuilt = sparseopt_jax.sparsify(optax.chain(*inner), **masking)
  expected = steps(
    create(optimizer.create, params, correction=correction), params
  )
  jax.tree.map(np.testing.assert_array_equal, steps(rebuilt, params), expected)


def test_normalized_steps_have_the_same_length(params):
  for correction in ("on", "off"):
    tx = create(
      ablations.normalized,
      params,
      topology="static",
      correction=correction,
      weight_decay=0.0,
    )
    updates, *_ = first_update(tx, params)
    length = float(optax.tree.norm(updates))
    expected = CONFIG.learning_rate * ablations.GRADIENT_NORM
    assert length == pytest.approx(expected, rel=1e-5)


def test_decay_before_the_link_is_scaled(params):
  tx = create(
    ablations.decay_first, params, topology="static", weight_decay=0.3
  )
  updates, sparse, grads, masks = first_update(tx, params)
  name = "Conv_1"
  mask, w, g = (np.array(t[name]["kernel"]) for t in (masks, sparse, grads))
  expected = -0.1 * np.where(mask, factors(mask) * (g + 0.3 * w), 0)
  np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-4)


def test_ham_gets_the_corrected_gradient(params):
  tx = create(ablations.ham, params, topology="static", weight_decay=0.0)
  updates, sparse, grads, masks = first_update(tx, params)
  mask, w, g = (
    np.array(t["Conv_1"]["kernel"], np.float64) for t in (masks, sparse, grads)
  )
  g = g * factors(mask) * mask
  stepped = w - 0.1 * g
  exponent = -0.1 * (200 * np.sign(stepped) * g + 1e-3)
  expected = stepped * np.exp(np.clip(exponent, -5, 5)) - w
  np.testing.assert_allclose(
    updates["Conv_1"]["kernel"], expected, rtol=1e-4, atol=1e-6
  )


def rescaled(mask, factors):
  """Minus the corrected gradient times factors, as an optimiser."""
  corrected = inspection.BatchNormalized(("kernel",))
  tx = sparseopt_jax.sparsify(
    optax.chain(ablations.scale_by_factors(), optax.scale(-1.0)),
    0.5,
    corrected=corrected,
    masks={"kernel": jnp.asarray(mask)},
  )
  return ablations.with_factors(tx, corrected, factors)


def test_dead_neurons_are_left_out():
  """sqrt(f_i n_live / nnz), dead neurons or not."""
  rng = np.random.default_rng(2)
  mask = rng.random((12, 8)) < 0.4
  mask[:, [1, 5, 6]] = False
  params = {"kernel": jnp.asarray(rng.normal(size=mask.shape), jnp.float32)}
  tx = rescaled(mask, ablations.live_share)
  updates, _, grads, _ = first_update(tx, params)
  fan_in = mask.sum(axis=0)
  factor = np.sqrt(fan_in * 5 / fan_in.sum())
  expected = np.where(mask, -factor * np.array(grads["kernel"]), 0)
  np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("of_mask", "exponent"),
  [(ablations.inverse, -0.5), (ablations.inverse_root, 0.25)],
)
def test_corrections_of_another_exponent(of_mask, exponent):
  """f_i n_out / nnz to the exponent, 1/2 for the correction."""
  rng = np.random.default_rng(4)
  mask = rng.random((12, 8)) < 0.4
  mask[:, 3] = False
  params = {"kernel": jnp.asarray(rng.normal(size=mask.shape), jnp.float32)}
  tx = rescaled(mask, of_mask)
  updates, _, grads, _ = first_update(tx, params)
  fan_in = np.maximum(mask.sum(axis=0), 1)
  factor = (fan_in * 8 / mask.sum()) ** exponent
  expected = np.where(mask, -np.array(grads["kernel"]) * factor, 0)
  np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [sparseopt_jax.RigL, sparseopt_jax.SET])
def test_neurons_are_kept_alive(kind):
  """None loses its last input, in updates that drop nearly everything."""
  rng = np.random.default_rng(6)
  weights = rng.normal(size=(3, 4, 32)) * np.geomspace(1e-3, 1, 32)
  params = {"kernel": jnp.asarray(weights, jnp.float32)}
  topology = kind(99, 1, drop_fraction=optax.constant_schedule(0.7))

  def live(topology):
    tx = sparseopt_jax.sparsify(
      optax.scale(-0.0), 0.7, topology, corrected=True
    )
    state = tx.init(params)
    found = [state]
    for _ in range(4):
      # Inputs of the last neurons grow, those of the first never.
      _, state = tx.update(params, state, params)
      found.append(state)
    masks = [sparseopt_jax.get_masks(each)["kernel"] for each in found]
    assert len({int(mask.sum()) for mask in masks}) == 1
    return [int(mask.any(axis=(0, 1)).sum()) for mask in masks]

  dying, kept = (
    live(topology),
    live(ablations.changed(topology, ablations.KeepAlive)),
  )
  assert dying[0] == kept[0] > dying[-1]
  assert kept == sorted(kept)


def test_one_weight_of_each_neuron_is_kept_alive():
  """Of two equal ones the first, as in a neuron that has just been grown."""
  weight = jnp.array([[1.0, 0.0, -3.0], [-2.0, 0.0, 3.0], [4.0, 0.0, 0.0]])
  mask = jnp.array([[True, True, True], [True, True, True], [False] * 3])
  layer = sparseopt_jax.Layer(
    "kernel", 0, 0, (0,), np.array(6), True, weight, mask
  )
  rigl = sparseopt_jax.RigL(99, drop_fraction=0.2)
  topology = ablations.changed(rigl, ablations.KeepAlive)
  assert (topology.update_until, topology.drop_fraction) == (99, 0.2)
  np.testing.assert_array_equal(
    topology.drop_scores(layer),
    [[1.0, np.inf, np.inf], [np.inf, 0.0, 3.0], [4.0, 0.0, 0.0]],
  )
  static = sparseopt_jax.Static()
  assert ablations.changed(static, ablations.KeepAlive) is static


def test_what_is_dropped_relative_to_its_neuron():
  """Scaling a neuron changes nothing; one without weights scores 0."""
  rng = np.random.default_rng(7)
  weight = rng.normal(size=(3, 5, 4)).astype(np.float32)
  mask = rng.random(weight.shape) < 0.6
  mask[..., 3] = False
  topology = ablations.changed(sparseopt_jax.SET(99), ablations.RelativeDrop)

  def scores(weight):
    layer = sparseopt_jax.Layer(
      "kernel",
      0,
      0,
      (0, 1),
      np.array(9),
      True,
      jnp.asarray(weight * mask),
      mask,
    )
    return np.asarray(topology.drop_scores(layer))

  found = scores(weight)
  for neuron in range(3):
    w = np.where(mask, weight, 0)[..., neuron]
    rms = np.sqrt(np.sum(w**2) / mask[..., neuron].sum())
    np.testing.assert_allclose(found[..., neuron], w / rms, rtol=1e-5)
  np.testing.assert_array_equal(found[..., 3], 0)
  scaled = scores(weight * np.array([1, 8, 0.25, 1], np.float32))
  np.testing.assert_allclose(scaled, found, rtol=1e-5)


def test_factors_are_of_the_masks_before_the_update(params):
  """As the correction's are, in the step of a mask update too."""
  found = []

  def factors(mask):
    found.append(np.asarray(mask))
    return jnp.ones(())

  corrected = inspection.BatchNormalized(("Conv_1/kernel",))
  tx = sparseopt_jax.sparsify(
    optax.chain(ablations.scale_by_factors(), optax.sgd(0.1)),
    0.5,
    sparseopt_jax.RigL(99, 1),
    corrected=corrected,
  )
  tx = ablations.with_factors(tx, corrected, factors)
  state, expected = tx.init(params), []
  for _ in range(3):
    masks = sparseopt_jax.get_masks(state)
    expected.append(np.asarray(masks["Conv_1"]["kernel"]))
    _, state = tx.update(params, state, params)
  assert np.any(expected[1] != expected[2])
  np.testing.assert_array_equal(found, expected)


def test_growth_is_by_the_gradient_without_factors(params):
  """Of weights that were just dropped, too."""
  found = []
  for factory in (ablations.inverted, optimizer.create):
    tx = create(factory, params, update_every=1)
    state = tx.init(params)
    for _ in range(3):
      _, state = tx.update(params, state, params)
    found.append(sparseopt_jax.get_masks(state))
  jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
  "factory",
  [
    ablations.normalized,
    ablations.ham,
    ablations.decay_first,
    ablations.live_mean,
    ablations.kept_alive,
    ablations.relative_drop,
    ablations.inverted,
    ablations.halved,
  ],
)
def test_variants_stay_sparse_over_mask_updates(params, factory):
  tx = create(factory, params)
  state = tx.init(params)
  masks = sparseopt_jax.get_masks(state)
  sparse = sparseopt_jax.apply_masks(params, state)
  step = runtime.quick_jit(tx.update)
  for _ in range(5):
    updates, state = step(jax.tree.map(jnp.cos, sparse), state, sparse)
    sparse = optax.apply_updates(sparse, updates)
  later = sparseopt_jax.get_masks(state)
  pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(later), strict=True)
  assert any(np.any(old != new) for old, new in pairs)
  for name in params:
    kernel, mask = sparse[name]["kernel"], later[name]["kernel"]
    assert mask.sum() == masks[name]["kernel"].sum()
    np.testing.assert_array_equal(np.array(kernel)[~np.array(mask)], 0)


def test_ablations_report_what_is_there(tmp_path, monkeypatch):
  forbid_training(monkeypatch)
  accuracies = {
    "baseline": (0.80, 0.82, 0.84),
    "SparseOpt": (0.81, 0.83),
    "normalised baseline": (0.7, 0.7, 0.7),
    "normalised SparseOpt": (0.72, 0.70, 0.74),
    "SparseOpt and HAM": (0.9,),
  }
  assert {v.label for v in ablations.VARIANTS} > set(accuracies)

  args = arguments(ablations, tmp_path)
  for variant in ablations.VARIANTS:
    for seed, accuracy in enumerate(accuracies.get(variant.label, ())):
      name, cell = variant.cell(args, "rigl-95", seed)
      train = 0.9 if variant.label == "SparseOpt" else 0.8
      leave(
        tmp_path / name,
        cell.config,
        [0.5, accuracy],
        cell.factory,
        train_accuracy=train,
      )
  words = ["ablations", "--out", str(tmp_path), "--report"]
  assert command.main(words) == 0
  found = results(tmp_path, "ablations")["results"]["rigl-95"]
  assert list(found) == [
    "baseline",
    "SparseOpt",
    "normalised baseline",
    "normalised SparseOpt",
    "SparseOpt and HAM",
  ]
  # Pairs of two seeds; the third baseline has no partner.
  assert found["baseline"]["test_accuracy"][0] == pytest.approx(0.82)
  assert found["SparseOpt"]["difference"] == pytest.approx([0.01, 0], abs=1e-9)
  # Of 0.02, 0.00 and 0.04: standard error 0.02 / sqrt(3); t of 2 degrees: 4.30.
  assert found["normalised SparseOpt"]["difference"] == pytest.approx(
    [0.02, 4.30265 * 0.02 / 3**0.5], rel=1e-4
  )
  assert found["SparseOpt"]["train_difference"] == pytest.approx(
    [0.1, 0], abs=1e-9
  )
  assert found["SparseOpt and HAM"]["difference"] == [None, None]
  assert found["SparseOpt and HAM"]["test_accuracy"] == [0.9, None]


def test_ablations_compare_with_one_another():
  labels = [variant.label for variant in ablations.VARIANTS]
  assert len(set(labels)) == len(labels)
  for variant in ablations.VARIANTS:
    assert variant.against in (None, *labels)

  args = arguments(ablations, "out")
  names = [v.cell(args, "rigl-95", 0)[0] for v in ablations.VARIANTS]
  assert len(set(names)) == len(names)
  assert names[:2] == [
    "rigl-95-off-4epochs-lr0.1-seed0",
    "rigl-95-on-4epochs-lr0.1-seed0",
  ]


# --- Topologies ---------------------------------------------------------------


def test_topologies_are_compared_on_a_recipe():
  words = ["--recipe", "cifar100-resnet20", "--width", "4", "--seeds", "2"]
  args = arguments(topologies, "out", *words)
  found = {
    variant.label: [
      variant.cell(args, "rigl-95", seed)[1].config for seed in (0, 1)
    ]
    for variant in topologies.VARIANTS
  }
  for label, runs in found.items():
    assert [config.seed for config in runs] == [0, 1]
    for config in runs:
      assert (config.dataset, config.model) == ("cifar100", "resnet20")
      assert (config.width, config.epochs) == (4, args.epochs)
      if label != "dense":
        assert config.sparsity == 0.95
      on = config.correction == "on"
      assert label == "dense" or on == (label == "RigL, SparseOpt")
  kinds = [runs[0].topology for runs in found.values()]
  assert kinds == ["rigl", "rigl", "srigl", "magnitude", "static", "dense"]
  assert cells.described(args) == "resnet20 of width 4 on cifar100"


@pytest.mark.slow
def test_topologies_end_to_end(tmp_path):
  words = ["topologies", "--recipe", "digits", "--model", "perceptron"]
  words += ["--epochs", "2", "--sparsities", "90", "--seeds", "2"]
  assert command.main([*words, "--out", str(tmp_path)]) == 0
  rows = results(tmp_path, "topologies")["results"]["90 %"]
  assert list(rows) == [variant.label for variant in topologies.VARIANTS]
  for label, row in rows.items():
    assert row["test_accuracy"][0] > 0.5
    raw = row["raw"]
    if label != "RigL":
      others = rows["RigL"]["raw"]["test_accuracy"]
      for seed, change in raw["difference"].items():
        own = raw["test_accuracy"][seed]
        assert change == pytest.approx(own - others[seed])


# --- The paper's tables -------------------------------------------------------


def pair_of(*place):
  (found,) = [
    pair
    for pair in paper_tables.pairs()
    if (pair.recipe, pair.topology, pair.sparsity, pair.epochs) == place
  ]
  return found


@pytest.mark.parametrize(
  ("place", "published"),
  [
    (("cifar100-resnet20", "rigl", 0.90, 200), (None, None, 0.19)),
    (("cifar100-resnet20", "rigl", 0.95, 100), (55.80, 56.80, 1.00)),
    (("cifar100-resnet20", "rigl", 0.95, 500), (61.45, 61.74, 0.29)),
    (("cifar100-resnet20", "rigl", 0.97, 200), (None, None, 2.14)),
    (("imagenet-resnet50", "rigl", 0.90, 90), (73.88, 74.41, 0.53)),
    (("imagenet-resnet50", "set", 0.90, 270), (75.17, 74.85, -0.32)),
    (("imagenet-resnet50", "rigl", 0.97, 90), (69.94, 71.15, 1.21)),
    (("imagenet-resnet50", "set", 0.97, 270), (72.65, 72.73, 0.08)),
  ],
)
def test_published_figures(place, published):
  pair = pair_of(*place)
  assert (pair.baseline, pair.sparseopt, pair.gain) == published


def test_the_commands_train_pairs_of_the_tables(tmp_path, capsys):
  """The flags of convergence are those that a finished run is found by."""
  assert len(paper_tables.pairs()) == 12 + 18
  assert command.main(["paper-tables", "--out", str(tmp_path)]) == 0
  lines = capsys.readouterr().out.splitlines()
  lines = [line for line in lines if line.startswith("python")]
  assert len(lines) == 2
  for line in lines:
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", STUDIES, "convergence"]
    args = arguments(convergence, "out", *words[4:])
    for condition in args.conditions:
      (pair, *_) = convergence.runs_of(args, condition, args.budgets[0])
      topology, sparsity = condition.split("-")
      place = args.recipe, topology, int(sparsity) / 100, args.budgets[0]
      for config, correction in zip(pair, ("off", "on"), strict=True):
        wanted = pair_of(*place).config(correction).identity()
        assert {**config.identity(), "measure_skew": False} == wanted


def test_paper_tables_collect_finished_runs(tmp_path, capsys):
  pair = pair_of("cifar100-resnet20", "rigl", 0.95, 100)
  baseline, sparseopt = pair.config("off"), pair.config("on")
  runs = tmp_path / "runs"
  for seed, accuracy in enumerate((0.55, 0.56, 0.60)):
    config = dataclasses.replace(baseline, seed=seed)
    leave(runs / f"b{seed}", config, [0.1, accuracy])
  for seed, accuracy in ((1, 0.58), (2, 0.61), (7, 0.99)):
    config = dataclasses.replace(sparseopt, seed=seed, measure_skew=True)
    leave(runs / f"s{seed}", config, [0.1, accuracy])
  other = dataclasses.replace(baseline, weight_decay=1e-3)
  leave(runs / "other", other, [0.9])
  leave(tmp_path / "alone", dataclasses.replace(baseline, seed=9), [0.57])
  words = ["paper-tables", "--out", str(tmp_path / "out"), "--runs"]
  assert command.main([*words, str(runs), str(tmp_path / "alone")]) == 0
  found = results(tmp_path / "out", "paper-tables")
  with_own = [row for row in found["pairs"] if any(row["seeds"].values())]
  (row,) = with_own
  assert row["label"] == "rigl-95, 100 epochs"
  # Of 55, 56, 60 and 57: standard error sqrt(14 / 3) / 2; t of 3: 3.18.
  half = 3.18245 * (14 / 3) ** 0.5 / 2
  assert row["own"]["baseline"] == pytest.approx([57.0, half], rel=1e-4)
  # Of 2 and 1: standard error 0.5.
  assert row["own"]["gain"] == pytest.approx([1.5, 0.5 * 12.7062], rel=1e-4)
  assert row["seeds"] == {"baseline": 4, "sparseopt": 3, "gain": 2}
  printed = capsys.readouterr().out
  assert "7 of 8 finished runs have the flags of a pair" in printed
  assert "57.00 ± 3.44" in printed


# --- Bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("convergence --seeds 0", "--seeds must be at least 1, got 0"),
    ("convergence --conditions dense", "got 'dense'"),
    ("convergence --model vgg", "--model must be one of"),
    ("convergence --learning-rates 1", "unrecognized arguments: --learning"),
    ("baseline --epochs 0", "--epochs must be in [1, 2^31), got 0"),
    ("baseline --condition dense", "got 'dense'"),
    ("baseline --learning-rates 0.1 0", "--learning-rate must be finite and"),
    ("baseline --report", "--out runs/studies: no run is there; leave out"),
    ("ablations --learning-rate 0", "--learning-rate must be finite and above"),
    ("ablations --jobs 0", "--jobs must be at least 1, got 0"),
    ("ablations --width 0", "--width must be in [1, 1024], got 0"),
    ("ablations --conditions set95", "got 'set95'"),
    ("ablations --variants baseline sgd", "invalid choice: 'sgd' (choose from"),
    ("ablations --report", "no run is there; leave out --report"),
    ("convergence --budgets 0", "--epochs must be in [1, 2^31), got 0"),
    ("convergence --learning-rate -1", "--learning-rate must be finite and"),
    ("convergence --report", "no run is there; leave out --report to train"),
    ("convergence --out file", "--out file: File exists"),
    ("paper-tables --runs nowhere", "--runs nowhere is not a folder"),
    ("paper-tables --runs broken", "config.json cannot be read"),
    ("paper-tables --out file", "--out file: File exists"),
    ("paper-tables --seeds 3", "unrecognized arguments: --seeds 3"),
  ],
)
def test_bad_input(line, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  forbid_training(monkeypatch)
  (tmp_path / "file").touch()
  (tmp_path / "broken" / "run").mkdir(parents=True)
  (tmp_path / "broken" / "run" / folder_lib.SUMMARY).write_text("{}")
  before = sorted(tmp_path.rglob("*"))
  assert command.main(line.split()) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert message in error
  assert error.count("\n") == 1
  assert sorted(tmp_path.rglob("*")) == before


def test_ablations_keep_the_dense_layers_of_a_recipe():
  args = arguments(ablations, "out", "--recipe", "cifar100-resnet20")
  recipe = recipes.RECIPES["cifar100-resnet20"].config()
  assert recipe.dense_layers
  for variant in ablations.VARIANTS:
    wanted = variant.changes.get("dense_layers", recipe.dense_layers)
    _, cell = variant.cell(args, "rigl-95", 0)
    assert cell.config.dense_layers == wanted


def test_runs_of_other_flags_are_refused(tmp_path, capsys):
  args = arguments(ablations, tmp_path)
  name, cell = ablations.VARIANTS[0].cell(args, "rigl-95", 0)
  leave(tmp_path / name, cell.config, [0.5])
  words = ["ablations", "--out", str(tmp_path), "--report", "--width", "16"]
  assert command.main(words) == 2
  assert "is a run of other flags: --width 8 became 16" in (
    capsys.readouterr().err
  )
