"""SIGTERM and SIGINT: the first asks the loop to stop, the second kills."""

from __future__ import annotations

import signal
import time
from types import FrameType
from types import TracebackType
from typing import Any

import numpy as np

# Seconds after the first signal in which another is taken for the same: the
# command `timeout` sends its signal twice.
_ONE_SIGNAL = 0.25


class Interrupted(Exception):
  """The run stopped at a signal, after a checkpoint.

  Args:
    number: The signal's.
    again: What to type to go on.

  Attributes:
    exit_code: 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT.
  """

  def __init__(self, number: int, again: str) -> None:
    super().__init__(
      f"stopped by {signal.Signals(number).name}; go on with {again}"
    )
    self.exit_code = 128 + number


class StopRequest:
  """Remembers the first signal; a context manager.

  Soon after the first signal both have their default action again, so that a
  second one ends the process at once, even in the middle of a compilation.

  Attributes:
    EVERY: Several processes compare notes when this divides the count.
    number: The signal's number, or 0.
  """

  EVERY = 10

  def __init__(self) -> None:
    self.number = 0
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> StopRequest:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._remember)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _remember(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.number:
      return
    self.number = number
    time.sleep(_ONE_SIGNAL)
    for each in self._previous:
      signal.signal(each, signal.SIG_DFL)

  def agreed(self, count: int) -> int:
    """The signal that all processes stop at now, or 0.

    In several processes they have to stop after the same step, or one would
    wait for the others for ever; so they compare notes now and then.

    Args:
      count: Of steps, or of calls in an evaluation; the same in all processes.

    Returns:
      The largest number that any process was sent.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
      return self.number
    if count % self.EVERY:
      return 0
    numbers = multihost_utils.process_allgather(np.int32(self.number))
    return int(np.max(numbers))
