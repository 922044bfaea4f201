"""Several processes on one machine train as one process does."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from sparseopt_jax import train
from sparseopt_jax.training import folder

# Sixty-six steps, mask updates every eight.
FLAGS = "--width 4 --epochs 3 --update-every 8 --precision float64 --devices 8"
STEPS = 66


_COMMAND = ("-m", "sparseopt_jax.train")
# The command, in which one of several processes fails after an epoch.
_FAILING = """
import sys
from sparseopt_jax import train
from sparseopt_jax.training import errors, feed

train_batches = feed.Resident.train

def fail(self, step):
  if step >= 22 and sys.argv[-1] == {number!r}:
    raise errors.RunError("no more power")
  return train_batches(self, step)

feed.Resident.train = fail
sys.exit(train.main(sys.argv[1:]))
"""


def _start(path, *flags, devices, program=_COMMAND):
  """Starts the command with so many simulated devices."""
  package = pathlib.Path(train.__file__).parent.parent
  return subprocess.Popen(
    [
      *(sys.executable, *program),
      *("--workdir", str(path), *FLAGS.split(), *flags),
    ],
    env={
      **os.environ,
      "PYTHONPATH": str(package),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    },
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def _start_two(path, *flags, program=_COMMAND):
  """Starts two processes with four devices each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  together = ["--coordinator", coordinator, "--process-count", "2", *flags]
  return [
    _start(
      path, *together, "--process-id", str(number), devices=4, program=program
    )
    for number in range(2)
  ]


def _codes(processes):
  return [(p.communicate(timeout=600), p.returncode)[1] for p in processes]


def _assert_close(one, other):
  """Equal integers, masks among them, and parameters within 1e-5."""
  for a, b in zip(
    tiny.final_state(one, STEPS), tiny.final_state(other, STEPS), strict=True
  ):
    assert a.dtype == b.dtype
    if np.issubdtype(a.dtype, np.floating):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    else:
      np.testing.assert_array_equal(a, b)


@pytest.fixture
def x64():
  """What reading a float64 state sets, set back."""
  yield
  import jax

  jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A run of two processes, to the end."""
  path = tmp_path_factory.mktemp("two") / "run"
  assert _codes(_start_two(path)) == [0, 0]
  return path


def _assert_equals_one(two, one, *flags):
  assert _codes([_start(one, *flags, devices=8)]) == [0]
  _assert_close(one, two)
  lines = tiny.metrics(two)
  assert [line["epoch"] for line in lines] == [1, 2, 3]
  assert min(line["mask_change"] for line in lines[:2]) > 0


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, two, x64):
  _assert_equals_one(two, tmp_path / "one")


@pytest.mark.slow
def test_two_processes_equal_one_with_shards(tmp_path, x64):
  path, flag = tmp_path / "two", "--shard-params"
  assert _codes(_start_two(path, flag)) == [0, 0]
  _assert_equals_one(path, tmp_path / "one", flag)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path, two, x64):
  parts = tmp_path / "parts"
  processes = _start_two(parts)
  metrics = parts / folder.METRICS
  while not metrics.exists() or metrics.stat().st_size == 0:
    assert processes[0].poll() is None
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  assert _codes(processes) == [143, 143]
  steps = [int(p.name) for p in (parts / folder.CHECKPOINTS).iterdir()]
  assert 22 < max(steps) < STEPS
  assert _codes(_start_two(parts, "--resume")) == [0, 0]
  for a, b in zip(
    tiny.final_state(two, STEPS), tiny.final_state(parts, STEPS), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert tiny.metrics(two) == tiny.metrics(parts)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_one_that_fails_alone_ends_both_and_says_which(tmp_path, number):
  program = "-c", _FAILING.format(number=str(number))
  processes = _start_two(tmp_path / "run", program=program)
  said = processes[number].communicate(timeout=600)[1]
  start = time.monotonic()
  processes[1 - number].communicate(timeout=600)
  assert time.monotonic() - start < 30
  assert f"error: process {number} of 2: no more power\n" in said
  assert processes[number].returncode == 1
  assert processes[1 - number].returncode
