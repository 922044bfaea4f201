"""Command lines: arguments to dataclasses, errors to one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import io
import logging
import re
import sys
import threading
from typing import NoReturn, TypeVar

from sparseopt_jax.training.errors import RunError
from sparseopt_jax.training.errors import UsageError

T = TypeVar("T")
_EXTRAS = {
  "flax": "train",
  "matplotlib": "train",
  "orbax": "train",
  "safetensors": "train",
  "sklearn": "train",
  "tqdm": "train",
  "tyro": "train",
  "array_record": "tfds",
  "grain": "tfds",
  "PIL": "tfds",
}
_NO_FRAME = str.maketrans("│╭╮╰╯", "     ")


class Parser(argparse.ArgumentParser):
  """An argparse parser whose errors are UsageErrors, hence one line."""

  def error(self, message: str) -> NoReturn:
    raise UsageError(message)


def parse(
  default: T, arguments: Sequence[str], prog: str, epilog: str = ""
) -> T:
  """Changes a dataclass by a command line; `--help` prints and exits.

  Args:
    default: What the flags that are not given are taken from.
    arguments: The command line without the program's name.
    prog: The program's name.
    epilog: Added to the help text.

  Returns:
    An instance of the same dataclass.

  Raises:
    UsageError: What tyro says about a bad command line, on one line.
  """
  import tyro

  box = io.StringIO()
  try:
    with contextlib.redirect_stderr(box):
      return tyro.cli(
        type(default),
        args=list(arguments),
        prog=prog,
        description=f"{(default.__doc__ or '').splitlines()[0]}{epilog}",
        default=default,
      )
  except SystemExit as end:
    if not end.code:
      raise
    raise UsageError(_unboxed(box.getvalue())) from None


def _unboxed(box: str) -> str:
  """What is between the first two rules of tyro's frame, on one line.

  Before it comes a title. Without Unicode, the rules are of ASCII.
  """
  title, *paragraphs = re.split("[─-]{3,}", box.translate(_NO_FRAME))
  message = " ".join((paragraphs or [title])[0].split())
  return message[:1].lower() + message[1:]


def run(main: Callable[[], None]) -> int:
  """Calls `main`; what went wrong becomes a line on stderr and an exit code."""
  try:
    with _quiet_threads():
      main()
  except UsageError as error:
    return _fail(error, 2)
  except RunError as error:
    return _fail(error, 1)
  except ModuleNotFoundError as error:
    return missing(error)
  return 0


def missing(error: ModuleNotFoundError) -> int:
  """Says which extra to install; raises the error if there is none."""
  package = (error.name or "").partition(".")[0]
  if package not in _EXTRAS:
    raise error
  return _fail(
    UsageError(
      f"{package} is missing: pip install 'sparseopt-jax[{_EXTRAS[package]}]'"
    ),
    2,
  )


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
  """Background threads that fail print no tracebacks of their own.

  Prefetching and checkpointing raise their threads' errors again where they are
  waited for; there is nothing more to say.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  hook = threading.excepthook
  threading.excepthook = lambda args: None
  _ignore_late_writes()
  try:
    yield
  finally:
    threading.excepthook = hook


@functools.cache
def _ignore_late_writes() -> None:
  """Ignores the other writes of a checkpoint that could not be written.

  TensorStore's threads report each to an event loop that Orbax has closed at
  the first error. They may do so after `main`, so this hook stays.
  """
  hook = sys.unraisablehook

  def ignore(args: sys.UnraisableHookArgs) -> None:
    if str(args.exc_value) != "Event loop is closed":
      hook(args)

  sys.unraisablehook = ignore


def _fail(error: Exception, code: int) -> int:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return code
