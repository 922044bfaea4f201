"""What one network leaves in its folder: figures, a summary, curves."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from sparseopt_jax.training import folder as folder_lib
from sparseopt_jax.training import plots
from sparseopt_jax.training import records
from sparseopt_jax.training import telling
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.state import TrainState


class Results:
  """The files of one network; written by the first process alone.

  Args:
    folder: Where they lie.
    identity: `folder.identity` of this network.
    last_step: Lines of `metrics.jsonl` after it are removed.
    tensorboard: Whether to write event files too.

  Attributes:
    folder: As given.
    identity: As given.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    identity: dict[str, Any],
    last_step: int,
    tensorboard: bool,
  ) -> None:
    self.folder = folder
    self.identity = identity
    self._first = jax.process_index() == 0
    self._log = records.MetricsLog(
      folder / folder_lib.METRICS, last_step, self._first, tensorboard
    )

  @property
  def lines(self) -> list[dict[str, Any]]:
    """What is in `metrics.jsonl`."""
    return self._log.lines

  @property
  def seconds(self) -> float:
    """Seconds that the run has taken up to the last line."""
    return self._log.seconds

  @property
  def last_step(self) -> int | None:
    """The step of the last line."""
    return self._log.lines[-1]["step"] if self._log.lines else None

  @property
  def best(self) -> dict[str, Any]:
    """The line of highest test accuracy; of several, the last."""
    return max(self._log.lines, key=_rank)

  def append(
    self, state: TrainState, figures: dict[str, Any]
  ) -> dict[str, Any]:
    """Adds a line to `metrics.jsonl`, and returns it.

    Args:
      state: The network's.
      figures: `step`, `epoch`, those of the test set, and of speed.
    """
    train_loss, train_accuracy = state.sums.means()
    line = {
      **figures,
      "train_loss": train_loss,
      "train_accuracy": train_accuracy,
      "nonfinite_steps": int(state.nonfinite_steps),
      **telling.sparsity_figures(state.opt_state),
    }
    self._log.append(line)
    return line

  def summarise(
    self, state: TrainState, config: Config, command: str
  ) -> dict[str, Any]:
    """Writes `summary.json` and `curves.png`; returns the summary."""
    lines = self._log.lines
    last = {k: v for k, v in lines[-1].items() if k != "layers"}
    summary = {
      **last,
      "best_test_accuracy": self.best["test_accuracy"],
      "best_step": self.best["step"],
      **telling.sparse_counts(state),
      "devices": config.devices,
      "networks": config.networks,
      "processes": jax.process_count(),
      **telling.surroundings(),
      "command": command,
      "config": self.identity,
    }
    if self._first:
      records.write_json(self.folder / folder_lib.SUMMARY, summary)
      image = plots.curves(lines)
      records.write_bytes(self.folder / folder_lib.CURVES, image)
    return summary

  def close(self) -> None:
    """Closes the event files."""
    self._log.close()


def _rank(line: dict[str, Any]) -> tuple[float, int]:
  return line["test_accuracy"], line["step"]
