"""The study `early-skew`: against the trainer, and by hand."""

import json
import math

import numpy as np
import pytest
import tiny

from sparseopt_jax import train
from sparseopt_jax.studies import __main__ as command
from sparseopt_jax.studies import early_skew
from sparseopt_jax.studies import grid
from sparseopt_jax.training import signals
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

STEPS = 6  # An epoch of the tiny run.


@pytest.mark.parametrize("correction", ["off", "on"])
@pytest.mark.parametrize("topology", ["static", "rigl"])
def test_the_steps_are_those_of_the_trainer(
  topology, correction, tmp_path, monkeypatch
):
  tiny.use(monkeypatch)
  config = Config(
    **tiny.FLAGS,
    topology=topology,
    correction=correction,
    measure_skew=True,
    workdir=str(tmp_path),
  )
  found = early_skew.measure(config, STEPS)
  with signals.StopRequest() as stop:
    train.train(config, stop, "the trainer")
  epoch = tiny.metrics(tmp_path)[0]
  assert epoch["step"] == STEPS
  assert len(found["weight_slope"]) == STEPS
  assert found["weight_slope"][-1] == pytest.approx(
    epoch["weight_slope"], abs=2e-4
  )
  # The epoch's line is of the gradient before SparseOpt.
  added = 0.5 if correction == "on" else 0.0
  gradient = np.subtract(found["skew_slope"], added)
  if topology == "static":
    assert np.mean(gradient) == pytest.approx(epoch["skew_slope"], abs=2e-4)
  else:  # The fourth step changes the masks.
    before, after = (epoch[f"skew_slope_{x}"] for x in ("before", "after"))
    assert gradient[3:5] == pytest.approx([before, after], abs=2e-4)


def test_both_arms_start_from_the_same_gradient(monkeypatch):
  tiny.use(monkeypatch)
  off, on = (
    early_skew.measure(Config(**tiny.FLAGS, correction=each), 1)
    for each in ("off", "on")
  )
  (before,), (after,) = off["skew_slope"], on["skew_slope"]
  assert after - before == pytest.approx(0.5, abs=2e-4)


def test_there_are_no_more_steps_than_the_training_has(monkeypatch):
  tiny.use(monkeypatch)
  with pytest.raises(UsageError, match="--steps must be at most 12, got 13"):
    early_skew.measure(Config(**tiny.FLAGS), 13)


def test_windows_and_their_means_by_hand():
  assert early_skew.windows(300)[1:4] == [(2, 10), (11, 30), (31, 100)]
  assert early_skew.windows(10) == [(1, 1), (2, 10)]
  slopes = {
    "baseline": [[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 3.0, 4.0]],
    "SparseOpt": [[1.5, 4.0, 5.0, 6.0], [3.5, 4.0, 5.0, math.nan]],
  }
  results = {"static-97, rate 0.1": dict.fromkeys(early_skew.FIGURES, slopes)}
  lines = early_skew.table(results, 4).splitlines()
  assert lines[0].endswith("  step 1  steps 2 to 4")
  # t of one degree of freedom: 12.7062.
  half = 12.7062 * np.std([1.0, 3.0], ddof=1) / np.sqrt(2)
  assert f"2.00 ± {half:.2f}" in lines[1]
  assert lines[1].endswith("3.00 ± 0.00")
  assert lines[2].endswith(" -")
  assert "0.50 ± 0.00" in lines[3]


class Stopped(Exception):
  """A signal, say."""


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
  calls = []

  def measure(config, steps):
    if len(calls) == 3:
      raise Stopped
    calls.append((config.correction, config.seed, config.learning_rate))
    slopes = [config.seed + config.learning_rate, math.nan][:steps]
    figures = dict.fromkeys(early_skew.FIGURES, slopes)
    return {"flags": grid.flags(config), **figures}

  monkeypatch.setattr(early_skew, "measure", measure)
  out = ["--out", str(tmp_path)]
  words = ["early-skew", *out, "--conditions", "static-97", "--seeds", "2"]
  words += ["--steps", "2", "--learning-rates", "0.2", ".2"]
  with pytest.raises(Stopped):
    command.main(words)
  assert not (tmp_path / "early-skew.json").exists()
  done, calls[:] = list(calls), []
  assert command.main(words) == 0
  every = [(arm, seed, 0.2) for arm in ("off", "on") for seed in (0, 1)]
  assert done + calls == every
  raw = json.loads((tmp_path / "early-skew.json").read_text())
  slopes = raw["results"]["static-97, rate 0.2"]["skew_slope"]
  expected = [[0.2, None], [1.2, None]]
  assert slopes == {"baseline": expected, "SparseOpt": expected}
  assert (tmp_path / "early-skew.png").stat().st_size > 10_000
  capsys.readouterr()
  # The names of the files do not tell the width.
  assert command.main([*words, "--width", "4"]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert "is of other flags" in error
