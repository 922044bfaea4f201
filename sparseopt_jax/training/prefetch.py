"""Batches that are on the device before the step asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import queue
import threading
import time
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
_END = object()


class Prefetch(Generic[In, Out]):
  """Draws and places items in a thread, a few ahead of the reader.

  Args:
    items: What to draw from, in order.
    put: Applied to each item in the thread.
    depth: How many items may be ready at once.

  Attributes:
    waited: Seconds that the reader has waited for an item, in total.
  """

  def __init__(
    self, items: Iterable[In], put: Callable[[In], Out], depth: int = 2
  ) -> None:
    self.waited = 0.0
    self._ready: queue.Queue = queue.Queue(depth)
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._fill, args=(items, put), daemon=True
    )
    self._thread.start()

  def _fill(self, items: Iterable[In], put: Callable[[In], Out]) -> None:
    try:
      for item in items:
        if not self._offer((put(item), None)):
          return
      self._offer((_END, None))
    except BaseException as error:  # Raised again in the reader.
      self._offer((_END, error))

  def _offer(self, entry: tuple[object, BaseException | None]) -> bool:
    while not self._closed.is_set():
      try:
        self._ready.put(entry, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __iter__(self) -> Iterator[Out]:
    return self

  def __next__(self) -> Out:
    start = time.perf_counter()
    item, error = self._ready.get()
    self.waited += time.perf_counter() - start
    if error is not None:
      raise error
    if item is _END:
      raise StopIteration
    return item

  def close(self) -> None:
    """Ends the thread; what it had ready is lost."""
    self._closed.set()
    self._thread.join()
