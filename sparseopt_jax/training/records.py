"""The files of a run that people and programs read while it goes on.

All are written whole or not at all: small files beside their place and then
renamed, lines of `metrics.jsonl` in one write each.
"""

from __future__ import annotations

from collections.abc import Iterator
import errno
import json
import math
import os
import pathlib
from typing import Any

from sparseopt_jax.training.errors import RunError


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file; raises RunError where that fails."""
  write_bytes(path, (json.dumps(_jsonable(content), indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes a file; raises RunError where that fails."""
  beside = path.with_name(path.name + ".tmp")
  try:
    with beside.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    beside.replace(path)
  except OSError as error:
    beside.unlink(missing_ok=True)
    raise RunError(f"{path} could not be written: {error.strerror}") from error


def _jsonable(value: Any) -> Any:
  """JSON knows no NaN and no infinity: null."""
  if isinstance(value, dict):
    return {key: _jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_jsonable(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The whole lines of a `metrics.jsonl`; a broken one is left out."""
  lines = []
  for line in path.read_bytes().split(b"\n"):
    try:
      entry = json.loads(line)
    except ValueError:
      continue
    if isinstance(entry, dict) and isinstance(entry.get("step"), int):
      lines.append(entry)
  return lines


class MetricsLog:
  """`metrics.jsonl`: one JSON object for each evaluation.

  Args:
    path: The file.
    last_step: Lines of later steps are removed: the run goes on from there and
      writes them again.
    writes: False in all processes but the first.
    tensorboard: Whether to write event files beside the file too.

  Attributes:
    lines: What is in the file.
  """

  def __init__(
    self,
    path: pathlib.Path,
    last_step: int,
    writes: bool = True,
    tensorboard: bool = False,
  ) -> None:
    old = read_lines(path) if path.exists() else []
    self.lines = [line for line in old if line["step"] <= last_step]
    self._path = path
    self._writes = writes
    self._events: Any = None
    if writes:
      write_bytes(path, b"".join(_encode(line) for line in self.lines))
    if writes and tensorboard:
      import tensorboardX

      self._events = tensorboardX.SummaryWriter(
        str(path.parent / "tensorboard"), purge_step=last_step + 1
      )

  @property
  def seconds(self) -> float:
    """Seconds that the run has taken up to the last line."""
    return self.lines[-1]["seconds"] if self.lines else 0.0

  @property
  def last_step(self) -> int | None:
    """The step of the last line."""
    return self.lines[-1]["step"] if self.lines else None

  def append(self, line: dict[str, Any]) -> None:
    """Adds one line; it is whole and on the disk when this returns."""
    self.lines.append(line)
    if self._writes:
      _append(self._path, _encode(line))
    if self._events is not None:
      for name, value in _scalars(line):
        self._events.add_scalar(name, value, line["step"])
      self._events.flush()

  def close(self) -> None:
    """Closes the event files."""
    if self._events is not None:
      self._events.close()


def _append(path: pathlib.Path, content: bytes) -> None:
  """One write; where the disk is full, none."""
  with path.open("ab", buffering=0) as file:
    size = file.tell()
    try:
      if file.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      os.fsync(file.fileno())
    except OSError as error:
      file.truncate(size)
      raise RunError(
        f"{path} could not be written: {error.strerror}"
      ) from error


def _scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
  for name, value in line.items():
    if isinstance(value, dict):
      for inner, number in _scalars(value):
        yield f"{name}/{inner}", number
    elif value is not None:
      yield name, value


def _encode(line: dict[str, Any]) -> bytes:
  return (json.dumps(_jsonable(line)) + "\n").encode()
