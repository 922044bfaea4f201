"""What the trainer asks of JAX and of the C library: memory, compilation."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import functools
import os
import pathlib
import sys
from typing import Any

import jax

from sparseopt_jax.models import convolution

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_CACHE = "jax_compilation_cache_dir"
# The trainer's programs on a CPU have 0.2 to 0.6 MB each.
_CACHE_BYTES = 2**30


def prepare() -> None:
  """Keeps pages and compiled programs; to be called before JAX computes.

  Compiled programs are kept in JAX's persistent cache, in the folder that
  `JAX_COMPILATION_CACHE_DIR` names or else in the user's cache folder. There
  those of longest ago go, beyond 1 GiB.
  """
  keep_pages()
  if getattr(jax.config, _CACHE) is None:
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(caches):  # Not where there is no home.
      folder = pathlib.Path(caches, "sparseopt-jax", "compiled")
      trim(folder, _CACHE_BYTES)
      jax.config.update(_CACHE, str(folder))


def trim(folder: pathlib.Path, most: int) -> None:
  """Removes the files that were read longest ago, until so many bytes are left.

  JAX's own limit takes a lock for each access, and an entry that a killed run
  left half written ends the caching of all later runs.
  """
  with contextlib.suppress(OSError):  # No folder yet, or another run trims.
    files = [(file.stat(), file) for file in folder.iterdir()]
    for stat, file in sorted(files, key=lambda f: f[0].st_atime, reverse=True):
      most -= stat.st_size
      if most < 0:
        file.unlink()


def keep_pages() -> None:
  """Lets the process keep the memory that it has freed, with glibc.

  XLA on a CPU allocates its temporaries anew in each step; where glibc gives
  the pages back in between, a fifth of the time goes into getting them again.
  """
  if not sys.platform.startswith("linux"):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:  # musl has none.
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    # Older versions take at most 32 MiB.
    mallopt(_MMAP_THRESHOLD, 2**31 - 1) or mallopt(_MMAP_THRESHOLD, 2**25)
    mallopt(_ARENA_MAX, 1)


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jit` for what runs a few times only, where compiling takes long.

  On CPU it compiles without optimising, in a third of the time.
  """

  @functools.cache
  def compiled() -> Any:
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=_on_cpu(quick))

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    return compiled()(*args)

  return call


def step_options() -> dict[str, Any] | None:
  """Compiler options of programs with convolutions and their gradients."""
  return _on_cpu(convolution.BARRIER_OPTIONS)


def _on_cpu(options: dict[str, Any]) -> dict[str, Any] | None:
  return options if jax.default_backend() == "cpu" else None
