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


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard-params"]], ids=["pmap", "jit"])
def test_two_processes_equal_one(tmp_path, x64, flags):
  one, two = tmp_path / "one", tmp_path / "two"
  assert _codes([_start(one, *flags, devices=8)]) == [0]
  assert _codes(_start_two(two, *flags)) == [0, 0]
  _assert_close(one, two)
  lines = tiny.metrics(two)
  assert [line["epoch"] for line in lines] == [1, 2, 3]
  assert min(line["mask_change"] for line in lines[:2]) > 0


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path, x64):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert _codes(_start_two(whole)) == [0, 0]
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
    tiny.final_state(whole, STEPS), tiny.final_state(parts, STEPS), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert tiny.metrics(whole) == tiny.metrics(parts)


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
