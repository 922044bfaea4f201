"""`curves.png`: how a run went, at one look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import PercentFormatter
import numpy as np

_TRAIN, _TEST, _THIRD = "#9aa5b1", "#1f5fa8", "#c8553d"
STYLE: Any = {
  "axes.grid": True,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlesize": "medium",
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "font.size": 10,
  "grid.alpha": 0.25,
  "legend.frameon": False,
  "lines.linewidth": 1.8,
}


def series(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
  """One figure of all lines; NaN where a line does not have it."""
  values = [line.get(name) for line in lines]
  return [float("nan") if v is None else float(v) for v in values]


def curves(lines: Sequence[dict[str, Any]]) -> bytes:
  """Plots loss, accuracy, explored weights and dead neurons by epoch.

  Args:
    lines: The lines of `metrics.jsonl`.

  Returns:
    A PNG image.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    epochs = series(lines, "epoch")
    _loss(axes[0, 0], epochs, lines)
    _accuracy(axes[0, 1], epochs, lines)
    _exploration(axes[1, 0], epochs, lines)
    _skew(axes[1, 1], epochs, lines)
    for axis in axes[1]:
      axis.set_xlabel("epoch")
      axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return png(figure)


def _loss(axis: Axes, epochs: list[float], lines: Sequence[dict]) -> None:
  axis.set_title("Cross-entropy")
  axis.plot(epochs, series(lines, "train_loss"), color=_TRAIN, label="train")
  axis.plot(epochs, series(lines, "test_loss"), color=_TEST, label="test")
  axis.set_yscale("log")
  axis.legend()


def _accuracy(axis: Axes, epochs: list[float], lines: Sequence[dict]) -> None:
  test = series(lines, "test_accuracy")
  axis.set_title(f"Accuracy: {test[-1]:.2%} on the test set at the end")
  axis.plot(
    epochs, series(lines, "train_accuracy"), color=_TRAIN, label="train"
  )
  axis.plot(epochs, test, color=_TEST, label="test")
  axis.set_ylim(max(0.0, min(sorted(test)[len(test) // 4] - 0.05, 0.9)), 1.005)
  axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  axis.legend(loc="lower right")


def _exploration(
  axis: Axes, epochs: list[float], lines: Sequence[dict]
) -> None:
  density = [1 - s for s in series(lines, "sparsity")]
  axis.set_title(f"Weights of the sparse layers: {density[-1]:.1%} are active")
  axis.fill_between(epochs, density, color=_TEST, alpha=0.25, lw=0)
  axis.plot(epochs, density, color=_TEST, label="active")
  axis.plot(
    epochs,
    series(lines, "itop_rate"),
    color=_THIRD,
    label="active at some time (ITOP rate)",
  )
  axis.set_ylim(0, 1.4 * np.nanmax(series(lines, "itop_rate")))
  axis.yaxis.set_major_formatter(PercentFormatter(1.0))
  axis.legend(loc="upper left")


def _skew(axis: Axes, epochs: list[float], lines: Sequence[dict]) -> None:
  axis.set_title("Skew of the gradient, and dead neurons")
  axis.plot(
    epochs, series(lines, "skew_angle"), color=_TEST, label="skew angle"
  )
  axis.set_ylabel("degrees")
  axis.set_ylim(0, 1.1 * np.nanmax([1.0, *series(lines, "skew_angle")]))
  right = axis.twinx()
  right.plot(
    epochs,
    series(lines, "dead_neurons"),
    color=_THIRD,
    drawstyle="steps-mid",
    label="dead neurons (right)",
  )
  most = np.nanmax([4.0, *series(lines, "dead_neurons")])
  right.set_ylim(0, 1.1 * most)
  right.yaxis.set_major_locator(MaxNLocator(integer=True))
  right.grid(False)
  right.spines["right"].set_visible(True)
  handles = [*axis.get_lines(), *right.get_lines()]
  axis.legend(handles=handles, loc="lower right")


def comparison(
  groups: Mapping[str, tuple[Sequence[int], Sequence[Sequence[float]]]],
) -> bytes:
  """Plots test accuracy of groups of runs, with the spread over seeds.

  Args:
    groups: {label: (epochs, one list of accuracies a run)}.

  Returns:
    A PNG image.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for index, (label, (epochs, runs)) in enumerate(groups.items()):
      _band(left, f"C{index}", label, epochs, np.array(runs))
      final = [run[-1] for run in runs]
      right.scatter([index] * len(final), final, color=f"C{index}", alpha=0.6)
      right.hlines(
        np.mean(final), index - 0.25, index + 0.25, color=f"C{index}"
      )
    left.set_title("Test accuracy: mean, and range over seeds")
    left.set_xlabel("epoch")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=1 + (len(groups) > 3))
    right.set_title("At the end, each seed")
    right.set_xticks([])
    right.set_xlim(-0.5, len(groups) - 0.5)
    for axis in (left, right):
      axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return png(figure)


def _band(
  axis: Axes, color: str, label: str, epochs: Sequence[int], runs: np.ndarray
) -> None:
  axis.plot(epochs, runs.mean(axis=0), color=color, label=label)
  axis.fill_between(
    epochs, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.2, lw=0
  )


def png(figure: Figure) -> bytes:
  """A figure as a file."""
  image = io.BytesIO()
  figure.savefig(image, dpi=130)
  return image.getvalue()
