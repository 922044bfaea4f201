"""Stopped, killed and damaged runs end as the undisturbed one, bit for bit."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparseopt_jax import train
from sparseopt_jax.training import checkpoints
from sparseopt_jax.training import folder
from sparseopt_jax.training import records
from sparseopt_jax.training import state
from sparseopt_jax.training.errors import RunError
from sparseopt_jax.training.errors import UsageError

LAYOUTS = {
  "one device": {},
  "pmap": {"devices": 8},
  "sharded": {"devices": 8, "shard_params": True},
}


def _signal_at(step, number=signal.SIGTERM):
  """A hook that sends a signal once, as the batch `step` is drawn."""
  sent = []

  def hook(now, batch):
    if now == step and not sent:
      sent.append(now)
      signal.raise_signal(number)
    return batch

  return hook


def _poison_at(step):
  """A hook that makes a training batch end in NaN."""

  def hook(now, batch):
    if now == step:
      return {**batch, "image": np.full_like(batch["image"], 255)}
    return batch

  return hook


def _steps(path):
  return sorted(int(p.name) for p in (path / folder.CHECKPOINTS).iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Finished runs, one a layout; copy them, do not change them."""
  paths = {}

  def path_of(layout):
    if layout not in paths:
      path = tmp_path_factory.mktemp("finished") / "run"
      with pytest.MonkeyPatch.context() as patch:
        tiny.use(patch)
        assert train.main(tiny.arguments(path, **LAYOUTS[layout])) == 0
      paths[layout] = path
    return paths[layout]

  return path_of


@pytest.fixture
def finished(undisturbed):
  """A finished run on one device."""
  return undisturbed("one device")


# Batches are drawn two or three ahead of the steps.
@pytest.mark.parametrize(
  ("layout", "draw"),
  [
    ("one device", 3),
    ("one device", 10),
    ("pmap", 10),
    pytest.param("sharded", 10, marks=pytest.mark.slow),
  ],
)
def test_goes_on_within_an_epoch(
  monkeypatch, tmp_path, undisturbed, layout, draw
):
  flags = LAYOUTS[layout]
  parts = tmp_path / "parts"
  tiny.use(monkeypatch, _signal_at(draw))
  assert train.main(tiny.arguments(parts, **flags)) == 143
  assert _steps(parts)[-1] % 6, "the stop was to fall inside an epoch"
  assert train.main(tiny.arguments(parts, **flags, resume=True)) == 0
  tiny.assert_same_run(undisturbed(layout), parts)


def test_goes_on_within_an_evaluation(monkeypatch, tmp_path, finished, capsys):
  parts = tmp_path / "parts"
  tiny.use(monkeypatch, test_hook=_signal_at(1, signal.SIGINT))
  assert train.main(tiny.arguments(parts)) == 130
  assert _steps(parts) == [6]
  assert tiny.metrics(parts) == []
  assert "Sparsity at the start:" in capsys.readouterr().out
  assert train.main(tiny.arguments(parts, resume=True)) == 0
  printed = capsys.readouterr().out
  assert "--resume: goes on from step 6\n" in printed
  assert "Sparsity at step 6:" in printed
  tiny.assert_same_run(finished, parts)
  # Nothing was trained before the first line, so it tells no speed.
  first, *rest = records.read_lines(parts / folder.METRICS)
  assert first["images_per_second"] is None
  assert all(line["images_per_second"] > 0 for line in rest)


def test_goes_on_from_a_stopped_evaluation_twice(
  monkeypatch, tmp_path, finished
):
  """The second time its line is there, but the checkpoint is from before it."""
  parts = tmp_path / "parts"
  tiny.use(monkeypatch, test_hook=_signal_at(1))
  assert train.main(tiny.arguments(parts)) == 143

  def break_down(now, batch):
    if now == 9:
      raise RunError("broken down")
    return batch

  monkeypatch.undo()
  tiny.use(monkeypatch, break_down)
  assert train.main(tiny.arguments(parts, resume=True)) == 1
  assert [line["step"] for line in tiny.metrics(parts)] == [6]
  assert _steps(parts) == [6]
  monkeypatch.undo()
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(parts, resume=True)) == 0
  tiny.assert_same_run(finished, parts)


def test_a_folder_is_one_runs_at_a_time(monkeypatch, tmp_path, capsys):
  tiny.use(monkeypatch)
  parts = tmp_path / "parts"
  parts.mkdir()
  with folder.locked(parts):
    assert train.main(tiny.arguments(parts)) == 2
    assert "another process is training there" in capsys.readouterr().err
    assert _files(parts) == [folder.LOCK]
  assert train.main(tiny.arguments(parts)) == 0


def _files(path):
  return sorted(each.name for each in path.iterdir())


def test_a_second_signal_kills(monkeypatch, tmp_path):
  request = train.signals.StopRequest()
  with request:
    signal.raise_signal(signal.SIGTERM)
    assert request.number == signal.SIGTERM
    for number in (signal.SIGTERM, signal.SIGINT):
      assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_sent_twice_at_once_is_one():
  """As the command `timeout` does."""
  code = """
import os, signal, threading
from sparseopt_jax.training import signals

with signals.StopRequest() as stop:
  thread = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
  thread.start()
  signal.raise_signal(signal.SIGTERM)
  thread.join()
  print(stop.number)
"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (0, f"{int(signal.SIGTERM)}\n")


def test_handlers_are_put_back():
  before = signal.getsignal(signal.SIGINT)
  with train.signals.StopRequest():
    assert signal.getsignal(signal.SIGINT) != before
  assert signal.getsignal(signal.SIGINT) == before


def test_resume_of_a_finished_run_changes_nothing(
  monkeypatch, tmp_path, finished
):
  again = shutil.copytree(finished, tmp_path / "again")
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(again, resume=True)) == 0
  tiny.assert_same_run(finished, again)


def test_resume_without_a_checkpoint_starts_over(
  monkeypatch, tmp_path, finished, capsys
):
  fresh = tmp_path / "fresh"
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(fresh, resume=True)) == 0
  assert "there is no checkpoint yet, so this starts from step 0" in (
    capsys.readouterr().out
  )
  tiny.assert_same_run(finished, fresh)


def _data_files(path, step):
  files = (path / folder.CHECKPOINTS / str(step) / "state").rglob("*")
  return sorted(
    (f for f in files if f.is_file()), key=lambda f: f.stat().st_size
  )


def _truncate(file):
  os.truncate(file, file.stat().st_size // 2)


def _flip(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 16
  file.write_bytes(content)


@pytest.mark.parametrize("harm", [_truncate, _flip, os.remove])
def test_a_damaged_newest_checkpoint_is_skipped(
  monkeypatch, tmp_path, finished, harm
):
  parts = shutil.copytree(finished, tmp_path / "parts")
  harm(_data_files(parts, tiny.STEPS)[-1])
  tiny.use(monkeypatch)
  with pytest.warns(UserWarning, match="skipped a damaged checkpoint.*step 12"):
    assert train.main(tiny.arguments(parts, resume=True)) == 0
  assert [p.name for p in (parts / "damaged").iterdir()] == ["12-0"]
  tiny.assert_same_run(finished, parts)


def _content(path):
  return {
    str(p.relative_to(path)): p.read_bytes()
    for p in path.rglob("*")
    if p.is_file()
  }


def test_only_damaged_checkpoints_end_the_run(
  monkeypatch, tmp_path, finished, capsys
):
  parts = shutil.copytree(finished, tmp_path / "parts")
  for step in _steps(parts):
    _truncate(_data_files(parts, step)[-1])
  before = _content(parts)
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(parts, resume=True)) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: --resume: no checkpoint in")
  assert _content(parts) == before


def test_another_flag_is_refused_with_the_difference(
  monkeypatch, tmp_path, finished, capsys
):
  parts = shutil.copytree(finished, tmp_path / "parts")
  tiny.use(monkeypatch)
  arguments = tiny.arguments(parts, resume=True, momentum=0.8, seed=1)
  assert train.main(arguments) == 2
  error = capsys.readouterr().err
  assert "--momentum 0.9 became 0.8; --seed 0 became 1" in error


def test_a_flag_that_is_newer_than_the_run_has_its_default(
  monkeypatch, tmp_path, finished, capsys
):
  parts = shutil.copytree(finished, tmp_path / "parts")
  config = parts / folder.CONFIG
  flags = json.loads(config.read_text())
  del flags["gamma_sal"], flags["networks"]
  config.write_text(json.dumps(flags))
  tiny.use(monkeypatch)
  other = tiny.arguments(parts, resume=True, networks=2)
  assert train.main(other) == 2
  assert "--networks 1 became 2" in capsys.readouterr().err
  assert train.main(tiny.arguments(parts, resume=True)) == 0
  tiny.assert_same_run(finished, parts)


def test_figures_of_training_are_of_one_epoch(monkeypatch, finished):
  tiny.use(monkeypatch)
  for step in (6, 12):  # Six steps of sixteen images each.
    assert tiny.restored(finished, step).sums.examples == 6 * 16


def test_half_a_line_and_later_lines_go(tmp_path):
  path = tmp_path / folder.METRICS
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
  log = records.MetricsLog(path, last_step=2)
  log.append({"step": 3, "x": float("nan")})
  assert (
    path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "x": null}\n'
  )


@contextlib.contextmanager
def _disk():
  """Gives what fills the disk: then no file can grow beyond 100 bytes.

  The disk is empty again at once, lest pytest cannot write its own lines.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield lambda: limit(100)
  finally:
    limit(soft)


def test_a_full_disk_leaves_whole_lines(tmp_path):
  path = tmp_path / folder.METRICS
  log = records.MetricsLog(path, last_step=0)
  log.append({"step": 1, "text": "x" * 50})
  before = path.read_bytes()
  refused = pytest.raises(RunError, match=r"jsonl could not be written")
  with _disk() as fill, refused:
    fill()
    log.append({"step": 2, "text": "x" * 50})
  assert path.read_bytes() == before


def test_a_full_disk_keeps_the_earlier_checkpoint(
  monkeypatch, tmp_path, finished, capsys
):
  parts = tmp_path / "parts"
  with _disk() as fill:

    def fill_at(step, batch):
      if step == 15:  # The one of step 6 is whole, that of step 18 to come.
        fill()
      return batch

    tiny.use(monkeypatch, fill_at)
    assert train.main(tiny.arguments(parts, epochs=3)) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ")
  assert error.endswith("File too large")
  monkeypatch.undo()
  tiny.use(monkeypatch)
  assert tiny.final_state(parts, step=6)


def test_after_a_run_only_late_writes_are_ignored():
  """The threads of a write that failed may speak after the run has ended."""
  code = """
from sparseopt_jax.training import cli
class Thread:
  def __init__(self, text): self.text = text
  def __del__(self): raise RuntimeError(self.text)
cli.run(lambda: None)
Thread("Event loop is closed")
Thread("of another thread")
"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "RuntimeError: of another thread" in done.stderr
  assert "closed" not in done.stderr


def test_nan_ends_the_run_and_keeps_the_checkpoint(
  monkeypatch, tmp_path, capsys
):
  parts = tmp_path / "parts"
  tiny.use(monkeypatch, _poison_at(8))
  assert train.main(tiny.arguments(parts)) == 1
  assert "after step 9;" in capsys.readouterr().err
  assert _steps(parts) == [6]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_is_left_out_and_counted(monkeypatch, tmp_path, layout):
  parts = tmp_path / "parts"
  tiny.use(monkeypatch, _poison_at(8))
  flags = {**LAYOUTS[layout], "skip_nonfinite": True}
  assert train.main(tiny.arguments(parts, **flags)) == 0
  summary = json.loads((parts / folder.SUMMARY).read_text())
  assert summary["nonfinite_steps"] == 1
  assert summary["nonzero_outside_masks"] == 0
  assert np.isfinite(summary["test_loss"])


def test_parameters_that_are_not_finite_end_the_run(
  monkeypatch, tmp_path, capsys
):
  """Loss and gradient of the only step are finite; its update is not."""
  parts = tmp_path / "parts"
  tiny.use(monkeypatch)
  flags = {"batch_size": 96, "epochs": 1, "warmup_epochs": 0}
  large = {"learning_rate": 1e38, "weight_decay": 1e6}
  assert train.main(tiny.arguments(parts, **flags, **large)) == 1
  assert "after step 1;" in capsys.readouterr().err
  assert _steps(parts) == []


def test_an_evaluation_after_steps_left_out_is_not_lost(monkeypatch, tmp_path):
  def poison(now, batch):
    return _poison_at(now)(now, batch) if now >= 6 else batch

  flags = {"skip_nonfinite": True}
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  tiny.use(monkeypatch, poison)
  assert train.main(tiny.arguments(whole, **flags)) == 0
  evaluations = []

  def stop_in_the_second(number, batch):
    if number == 1:
      evaluations.append(number)
      if len(evaluations) == 2:
        signal.raise_signal(signal.SIGTERM)
    return batch

  monkeypatch.undo()
  tiny.use(monkeypatch, poison, stop_in_the_second)
  assert train.main(tiny.arguments(parts, **flags)) == 143
  assert [line["step"] for line in tiny.metrics(parts)] == [6]
  assert train.main(tiny.arguments(parts, **flags, resume=True)) == 0
  assert [line["step"] for line in tiny.metrics(parts)] == [6, 12]
  tiny.assert_same_run(whole, parts)


def test_lost_metrics_are_measured_again(monkeypatch, tmp_path, finished):
  parts = shutil.copytree(finished, tmp_path / "parts")
  (parts / folder.METRICS).unlink()
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(parts, resume=True)) == 0
  (line,), last = tiny.metrics(parts), tiny.metrics(finished)[-1]
  assert line == last


def test_processes_must_read_the_same_step(monkeypatch):
  steps = np.array([[12], [6]])
  gather = lambda step: steps
  monkeypatch.setattr(checkpoints.multihost_utils, "process_allgather", gather)
  checkpoints._check_agreed(12, [])  # One process.
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(
    UsageError, match=r"different steps, \[12, 6\]; step 12: x"
  ):
    checkpoints._check_agreed(6, ["step 12: x"])
  steps[1] = 12
  checkpoints._check_agreed(12, [])


def _saved(folder, best_steps, first_step):
  """Saves one checkpoint a best step, and says which are there."""
  saved = checkpoints.Checkpoints(folder, keep=1)
  with contextlib.closing(saved):
    for step, best_step in enumerate(best_steps, first_step):
      now = state.TrainState(
        step=jnp.int32(step),
        key=jnp.zeros(2, jnp.uint32),
        params={"kernel": jnp.full(3, step)},
        batch_stats={},
        opt_state={},
        sums=state.Sums.zero(),
        nonfinite_steps=jnp.int32(0),
      )
      saved.save(now, step, best_step)
      saved.wait()
  return sorted(int(p.name) for p in folder.iterdir())


def test_the_best_survives_a_restart(tmp_path):
  assert _saved(tmp_path, [1, 2, 2], first_step=1) == [2, 3]
  assert _saved(tmp_path, [2, 2], first_step=4) == [2, 5]
  assert _saved(tmp_path, [6, 6, 6], first_step=6) == [6, 8]


@pytest.mark.parametrize("stopped", [False, True])
def test_newest_and_best_are_kept(monkeypatch, tmp_path, stopped):
  parts = tmp_path / "parts"
  evaluations = []

  def spoil_all_but_the_second(number, batch):
    if number == 0:
      evaluations.append(number)
    wrong = {**batch, "label": batch["label"] + 10}
    return batch if len(evaluations) == 2 else wrong

  signals = _signal_at(28) if stopped else tiny.unchanged
  tiny.use(monkeypatch, signals, spoil_all_but_the_second)
  flags = {"epochs": 6, "keep_checkpoints": 2}
  if stopped:
    assert train.main(tiny.arguments(parts, **flags)) == 143
    flags["resume"] = True
  assert train.main(tiny.arguments(parts, **flags)) == 0
  assert _steps(parts) == [12, 30, 36]
  summary = json.loads((parts / folder.SUMMARY).read_text())
  assert summary["best_step"] == 12
  accuracies = [line["test_accuracy"] for line in tiny.metrics(parts)]
  assert summary["best_test_accuracy"] == accuracies[1] == max(accuracies)


def test_the_checkpoint_of_a_stopped_evaluation_is_kept_as_the_best(
  monkeypatch, tmp_path
):
  parts = tmp_path / "parts"
  wrong = lambda batch: {**batch, "label": batch["label"] + 10}

  def right_in(evaluation, stops):
    evaluations = []

    def hook(number, batch):
      if number == 0:
        evaluations.append(number)
      if len(evaluations) != evaluation:
        return wrong(batch)
      if stops and number == 1:
        signal.raise_signal(signal.SIGTERM)
      return batch

    return hook

  flags = {"epochs": 4, "keep_checkpoints": 1}
  tiny.use(monkeypatch, test_hook=right_in(2, stops=True))
  assert train.main(tiny.arguments(parts, **flags)) == 143
  assert _steps(parts)[-1] == 12
  monkeypatch.undo()
  tiny.use(monkeypatch, test_hook=right_in(1, stops=False))
  assert train.main(tiny.arguments(parts, **flags, resume=True)) == 0
  summary = json.loads((parts / folder.SUMMARY).read_text())
  assert summary["best_step"] == 12
  assert _steps(parts) == [12, 24]


def test_of_several_that_are_the_best_the_newest_is_kept(monkeypatch, tmp_path):
  parts = tmp_path / "parts"
  nothing_right = lambda number, batch: {**batch, "label": batch["label"] + 10}
  tiny.use(monkeypatch, test_hook=nothing_right)
  assert train.main(tiny.arguments(parts, keep_checkpoints=1)) == 0
  assert _steps(parts) == [12]
  summary = json.loads((parts / folder.SUMMARY).read_text())
  assert (summary["best_step"], summary["best_test_accuracy"]) == (12, 0.0)


def _command(path, *flags):
  words = [sys.executable, "-m", "sparseopt_jax.train", "--workdir", str(path)]
  return [*words, "--width", "4", "--epochs", "24", *flags]


def _environment(devices):
  """None of simulated devices where the command makes them itself."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "XLA_FLAGS": flags if devices else ""}


def _kill_after(seconds, command, environment):
  """Runs a command; kills it after so many seconds; whether it had to be."""
  process = subprocess.Popen(
    command,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
  return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "networks", "kills"), [(1, 1, 8), (8, 1, 3), (2, 4, 3)]
)
def test_killed_at_random_moments(tmp_path, devices, networks, kills):
  environment = _environment(devices if networks == 1 else 0)
  flags = ["--devices", str(devices), "--networks", str(networks)]
  for name in ("compiling", "whole"):
    whole = tmp_path / name
    start = time.perf_counter()
    subprocess.run(
      _command(whole, *flags), env=environment, check=True, timeout=900
    )
    duration = time.perf_counter() - start
  steps = 24 * 22
  expected = tiny.final_state(whole, steps)
  killed = 0
  for number in range(kills):
    path = tmp_path / str(number)
    part = (number + random.Random(number).random()) / kills
    moment = (0.2 + 0.75 * part) * duration
    command = _command(path, *flags, "--resume")
    killed += _kill_after(moment, command, environment)
    subprocess.run(
      command,
      env=environment,
      check=True,
      stdout=subprocess.DEVNULL,
      timeout=900,
    )
    for a, b in zip(expected, tiny.final_state(path, steps), strict=True):
      np.testing.assert_array_equal(a, b)
    for folder_of_one in [".", *(p.name for p in whole.glob("seed-*"))]:
      if networks == 1 or folder_of_one != ".":
        one, other = whole / folder_of_one, path / folder_of_one
        assert tiny.metrics(one) == tiny.metrics(other)
    shutil.rmtree(path)
  assert killed > kills / 2, "most runs were to be killed before their end"
