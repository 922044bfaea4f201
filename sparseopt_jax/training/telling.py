"""What a run says about itself: progress bar, sparsity figures, summary."""

from __future__ import annotations

from collections.abc import Sequence
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

import sparseopt_jax
from sparseopt_jax import _paths
from sparseopt_jax.metrics import on_host
from sparseopt_jax.training import runtime
from sparseopt_jax.training import skew
from sparseopt_jax.training.state import TrainState
from sparseopt_jax.training.state import has_masks

_PACKAGES = (
  "sparseopt-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
)


def say(text: str) -> None:
  """Prints in the first process; above the progress bar, if there is one.

  Where nobody reads on, as after `| head`, the run goes on without a word: its
  records are in files.
  """
  if jax.process_index() != 0:
    return
  try:
    tqdm.tqdm.write(text)
    sys.stdout.flush()
  except BrokenPipeError:
    with open(os.devnull, "w") as nowhere:
      os.dup2(nowhere.fileno(), sys.stdout.fileno())


class Progress:
  """A bar with loss, accuracy, images/s and time left; silent in a file.

  Args:
    total: Steps of the run.
    done: Steps done already.
    batch_size: Images in a step, of all networks.
  """

  def __init__(self, total: int, done: int, batch_size: int) -> None:
    self._bar = tqdm.tqdm(
      total=total * batch_size,
      initial=done * batch_size,
      unit="img",
      unit_scale=True,
      dynamic_ncols=True,
      mininterval=0.5,
      disable=None if jax.process_index() == 0 else True,
    )
    self._batch_size = batch_size

  def steps(self, count: int, loss: float, accuracy: float) -> None:
    """So many more steps are done; loss and accuracy are of the last one."""
    self._bar.set_postfix(
      loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False
    )
    self._bar.update(count * self._batch_size)

  def close(self) -> None:
    """Leaves the bar as it is."""
    self._bar.close()


class Speed:
  """Images per second of training, evaluations left out.

  Args:
    batch_size: Images in a step.
    seconds_before: Seconds that the run took before it was resumed.

  Attributes:
    started: Whether `start` has been called.
  """

  def __init__(self, batch_size: int, seconds_before: float) -> None:
    self.started = False
    self._batch_size = batch_size
    self._born = time.perf_counter() - seconds_before

  def start(self, step: int, waited: float) -> None:
    """Counts from here; `waited` as in `Feed`."""
    self.started = True
    self._from = (step, waited, time.perf_counter())

  def figures(self, step: int, waited: float) -> dict[str, float | None]:
    """Speed since `start`, the share of it spent on waiting for images, and
    the seconds of the whole run; without a step there is no speed."""
    now = time.perf_counter()
    seconds = {"seconds": now - self._born}
    if not self.started or step == self._from[0]:
      return {"images_per_second": None, "input_wait": None, **seconds}
    first_step, waited_before, then = self._from
    images = (step - first_step) * self._batch_size
    return {
      "images_per_second": images / (now - then),
      "input_wait": (waited - waited_before) / (now - then),
      **seconds,
    }


def epoch_line(lines: Sequence[dict[str, Any]], epochs: int) -> str:
  """The lines of `metrics.jsonl` of one epoch, one a network, for people."""

  def mean(name: str) -> float:
    return statistics.fmean(line[name] for line in lines)

  speeds = [line["images_per_second"] for line in lines]
  return (
    f"epoch {lines[0]['epoch']}/{epochs}: "
    f"train {mean('train_loss'):.3f} {mean('train_accuracy'):.1%}, "
    f"test {mean('test_loss'):.3f} {mean('test_accuracy'):.1%}"
    + _range([line["test_accuracy"] for line in lines])
    + ("" if None in speeds else f", {sum(speeds):.0f} images/s")
  )


def _range(accuracies: Sequence[float]) -> str:
  """The lowest and the highest; nothing for one network."""
  if len(accuracies) == 1:
    return ""
  return f" ({min(accuracies):.1%} to {max(accuracies):.1%})"


def result_line(summaries: Sequence[dict[str, Any]]) -> str:
  """The summaries of a run, one a network, for people."""

  def mean(name: str) -> float:
    return statistics.fmean(each[name] for each in summaries)

  networks = f"{len(summaries)} networks: " if len(summaries) > 1 else ""
  return (
    f"{networks}test accuracy {mean('test_accuracy'):.2%}"
    + _range([each["test_accuracy"] for each in summaries])
    + f", best {mean('best_test_accuracy'):.2%}, "
    f"density {mean('density'):.2%}, {summaries[0]['seconds']:.0f} s"
  )


_metrics = runtime.quick_jit(sparseopt_jax.sparsity_metrics)


def sparsity_figures(state: TrainState) -> dict[str, Any]:
  """`sparsity_metrics` as Python numbers, and `layers`: figures of each.

  A layer's `fan_in_spread` is the standard deviation of its neurons' fan-ins
  over their mean; the neurons of a Flax kernel lie along its last axis. A dense
  run has sparsity 0, ITOP rate 1 and no layers. With `--measure-skew` there are
  the slopes of `skew.figures`.
  """
  opt_state = state.opt_state
  if not has_masks(opt_state):
    return {"sparsity": 0.0, "itop_rate": 1.0, "dead_neurons": 0, "layers": {}}
  metrics = jax.device_get(_metrics(opt_state))
  figures = {name: value.item() for name, value in metrics.items()}
  masks = _masks(opt_state).items()
  figures["layers"] = {path: _layer(mask) for path, mask in masks}
  if isinstance(opt_state, skew.SkewState):
    slopes = skew.figures(opt_state, state.params)
    for path, slope in slopes.pop("layers").items():
      figures["layers"][path]["skew_slope"] = slope
    figures |= slopes
  return figures


def _masks(opt_state: Any) -> dict[str, np.ndarray]:
  masks = _paths.by_name(sparseopt_jax.get_masks(opt_state))
  return {path: on_host(mask) for path, mask in masks.items()}


def _layer(mask: np.ndarray) -> dict[str, float]:
  fan_in = mask.reshape(-1, mask.shape[-1]).sum(axis=0)
  mean = fan_in.mean().item()
  return {
    "sparsity": 1 - fan_in.sum().item() / mask.size,
    "dead_neurons": int(np.count_nonzero(fan_in == 0)),
    "fan_in_spread": fan_in.std().item() / mean if mean else 0.0,
  }


def sparse_counts(state: TrainState) -> dict[str, Any]:
  """Counts from masks: sparse weights, the active ones, and what is amiss."""
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  if not has_masks(state.opt_state):
    return {"parameters": parameters, "density": 1.0}
  size = active = outside = 0
  params = _paths.by_name(state.params)
  for path, mask in _masks(state.opt_state).items():
    size += mask.size
    active += np.sum(mask).item()
    outside += np.sum((on_host(params[path]) != 0) & ~mask).item()
  return {
    "parameters": parameters,
    "sparse_weights": size,
    "active_weights": active,
    "density": active / size,
    "nonzero_outside_masks": outside,
  }


def surroundings() -> dict[str, Any]:
  """Versions and devices."""
  return {
    "versions": {
      "python": platform.python_version(),
      **{name: _version(name) for name in _PACKAGES},
    },
    "device": jax.devices()[0].device_kind,
    "platform": jax.devices()[0].platform,
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None  # A checkout that is on the path but not installed.
