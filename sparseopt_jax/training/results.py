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


class Results(records.MetricsLog):
  """The files of one network; written by the first process alone.

  Args:
    folder: Where they lie.
    identity: `folder.identity` of this network.
    last_step: Lines of `metrics.jsonl` after it are removed.
    tensorboard: Whether to write event files too.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    identity: dict[str, Any],
    last_step: int,
    tensorboard: bool,
  ) -> None:
    self._folder = folder
    self._identity = identity
    self._first = jax.process_index() == 0
    file = folder / folder_lib.METRICS
    super().__init__(file, last_step, self._first, tensorboard)

  def measure(
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
      **telling.sparsity_figures(state),
    }
    self.append(line)
    return line

  def summarise(
    self, state: TrainState, config: Config, command: str
  ) -> dict[str, Any]:
    """Writes `summary.json` and `curves.png`; returns the summary."""
    last = {k: v for k, v in self.lines[-1].items() if k != "layers"}
    # Of several that are the best, the last.
    best = max(self.lines, key=lambda x: (x["test_accuracy"], x["step"]))
    summary = {
      **last,
      "best_test_accuracy": best["test_accuracy"],
      "best_step": best["step"],
      **telling.sparse_counts(state),
      "devices": config.devices,
      "networks": config.networks,
      "processes": jax.process_count(),
      **telling.surroundings(),
      "command": command,
      "config": self._identity,
    }
    if self._first:
      records.write_json(self._folder / folder_lib.SUMMARY, summary)
      image = plots.curves(self.lines)
      records.write_bytes(self._folder / folder_lib.CURVES, image)
    return summary
