"""Compilation of what runs rarely."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jit` for what runs a few times only, where compiling takes long.

  On CPU it compiles without optimising, in a third of the time.
  """

  @functools.cache
  def compiled() -> Any:
    quick = {"xla_backend_optimization_level": 0}
    options = quick if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    return compiled()(*args)

  return call
