"""What every study leaves: raw results as JSON, a table and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import math
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from sparseopt_jax.training import plots
from sparseopt_jax.training import records
from sparseopt_jax.training import telling
from sparseopt_jax.training.errors import UsageError


def interval(values: Sequence[float]) -> tuple[float, float]:
  """The mean, and half the width of its 95 % confidence interval.

  Args:
    values: Independent, say one a seed.

  Returns:
    By Student's t distribution; the second is NaN for a single value, and both
    are for none, or if any value is.
  """
  if not values or any(map(math.isnan, values)):
    return math.nan, math.nan
  mean = statistics.fmean(values)
  if len(values) < 2:
    return mean, math.nan
  error = statistics.stdev(values) / math.sqrt(len(values))
  return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def percent(value: Sequence[float]) -> str:
  """An `interval` of fractions, in percent."""
  return number([100 * x for x in value])


def number(value: Sequence[float]) -> str:
  """An `interval`; one number alone without its width."""
  if math.isnan(value[0]):
    return "-"
  mean, half = value
  return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def make(folder: pathlib.Path) -> None:
  """Makes the folder of `--out`; raises UsageError where that fails."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"--out {folder}: {error.strerror}") from None


def piece(path: pathlib.Path, measure: Any, *args: Any, **options: Any) -> Any:
  """What is in a JSON file.

  If it is not there, `measure(*args, **options)` is written to it first, and
  the seconds that this took are printed.
  """
  if not path.is_file():
    start = time.perf_counter()
    found = measure(*args, **options)
    found = jax.tree.map(lambda x: np.asarray(x).tolist(), found)
    records.write_json(path, found)
    print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)
  return _numbers(json.loads(path.read_text()))


def _numbers(value: Any) -> Any:
  """JSON knows no NaN: null."""
  if isinstance(value, dict):
    return {key: _numbers(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_numbers(item) for item in value]
  return math.nan if value is None else value


class Report(NamedTuple):
  """What a study has found.

  Attributes:
    raw: The results.
    table: For people.
    figure: Draws them, if there is something to draw; called in the package's
      style.
  """

  raw: dict[str, Any]
  table: str
  figure: Callable[[], Figure] | None = None

  def save(self, folder: pathlib.Path, name: str, command: str) -> None:
    """Writes NAME.json, NAME.txt and perhaps NAME.png, and prints the table.

    Args:
      folder: Made if it is not there.
      name: The study.
      command: What was run; with it come versions and device.
    """
    make(folder)
    content = {"command": command, **telling.surroundings(), **self.raw}
    records.write_json(folder / f"{name}.json", content)
    records.write_bytes(folder / f"{name}.txt", f"{self.table}\n".encode())
    kinds = ".json, .txt"
    if self.figure is not None:
      kinds += ", .png"
      with matplotlib.rc_context(plots.STYLE):
        records.write_bytes(folder / f"{name}.png", plots.png(self.figure()))
    print(f"{self.table}\n{folder / name}{kinds}")
