"""Several processes: how they find each other, and how one that fails ends."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import sys
import time
import traceback

import jax

from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import RunError
from sparseopt_jax.training.errors import UsageError
from sparseopt_jax.training.signals import Interrupted

# After so many seconds of silence a process counts as dead; JAX waits 100.
_HEARTBEAT = 30
# For others that fail at the same time to say so too.
_PAUSE = 2


def join(config: Config) -> None:
  """Waits for the other processes, if there are any."""
  if config.coordinator is None:
    return
  # It would take SIGTERM for itself.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    config.coordinator,
    config.process_count,
    config.process_id,
    heartbeat_timeout_seconds=_HEARTBEAT,
  )


@contextlib.contextmanager
def failing_at_once(config: Config) -> Iterator[None]:
  """Ends a process of several that fails, with a line that says which it is.

  An ordinary exit would wait for the others, and they for this one, for
  minutes. Once it is gone, they fail too.
  """
  try:
    yield
  except Interrupted:  # All processes stop together.
    raise
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    if not isinstance(error, RunError | UsageError):
      traceback.print_exc()
    what = " ".join(str(error).split()) or type(error).__name__
    print(
      f"error: process {config.process_id} of {config.process_count}: {what}",
      file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # Process 0 goes last: without the service that it runs, JAX aborts.
    time.sleep(_PAUSE if config.process_id else 2 * _PAUSE)
    os._exit(2 if isinstance(error, UsageError) else 1)
