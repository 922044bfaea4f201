"""The work folder: whether a run may start in it, or go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

from sparseopt_jax.training import records
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.config import differences
from sparseopt_jax.training.errors import UsageError

try:
  import fcntl
except ImportError:  # Windows has no such locks.
  fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"
_FILES = (CONFIG, METRICS, SUMMARY, CURVES, CHECKPOINTS)
LOCK = ".lock"


def default(config: Config) -> str:
  """A name that says what is trained and when, in the folder `runs`."""
  what = [config.dataset, config.model, config.topology]
  if config.topology != "dense":
    what.append(f"{config.sparsity:g}")
  what += [f"seed{config.seed}"]
  if config.networks > 1:
    what += [f"{config.networks}networks"]
  what += [time.strftime("%Y%m%d-%H%M%S")]
  what += [str(os.getpid())]  # Others may start in the same second.
  return str(pathlib.Path("runs", "-".join(what)))


def identity(
  config: Config, create_optimizer: Callable[..., Any] | None = None
) -> dict[str, Any]:
  """What decides what a run computes: flags, and an optimiser of its own."""
  fields = config.identity()
  if create_optimizer is not None:
    name = f"{create_optimizer.__module__}.{create_optimizer.__qualname__}"
    fields["optimizer"] = name
  return fields


class Folders(NamedTuple):
  """Where a run writes.

  Attributes:
    run: The work folder, with the checkpoints.
    identity: `identity` of the run.
    networks: The folder of each network and the `identity` of the run that
      trains it alone. One network alone has the work folder itself, several
      have folders `seed-K` in it.
  """

  run: pathlib.Path
  identity: dict[str, Any]
  networks: list[tuple[pathlib.Path, dict[str, Any]]]

  def check(self, resume: bool) -> None:
    """Raises UsageError if the run must not write there."""
    check(self.run, self.identity, resume)
    for path, wanted in self.networks:
      check(path, wanted, resume)

  def write_configs(self) -> None:
    """Makes the networks' folders, and writes what decides what is computed."""
    for path, content in [(self.run, self.identity), *self.networks]:
      try:
        path.mkdir(exist_ok=True)
      except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}") from None
      records.write_json(path / CONFIG, content)


def folders(
  config: Config, create_optimizer: Callable[..., Any] | None = None
) -> Folders:
  """Where a run writes, `config.workdir` filled in."""
  assert config.workdir is not None
  run = pathlib.Path(config.workdir)
  whole = identity(config, create_optimizer)
  if config.networks == 1:
    return Folders(run, whole, [(run, whole)])
  alone = [config.of_network(index) for index in range(config.networks)]
  return Folders(
    run,
    whole,
    [(run / f"seed-{c.seed}", identity(c, create_optimizer)) for c in alone],
  )


@contextlib.contextmanager
def prepared(
  config: Config, create_optimizer: Callable[..., Any] | None = None
) -> Iterator[Folders]:
  """Makes the work folder; refuses one that this run must not write in.

  Where the body of the `with` raises, a folder that is still empty goes again.

  Args:
    config: What was asked for, `workdir` filled in.
    create_optimizer: In place of the trainer's, as for `identity`.

  Yields:
    The folder, and those of its networks.

  Raises:
    UsageError: If it cannot be written, if it holds a run and `--resume` is not
      given, or if it holds a run of other flags.
  """
  found = folders(config, create_optimizer)
  whole = joint_run(found.run)
  if whole is not None:
    raise UsageError(
      f"--workdir {found.run} is that of one network of the run {whole}; "
      "--resume there goes on with all of them"
    )
  _check_writable(found.run)
  found.check(config.resume)
  try:
    yield found
  except BaseException:
    with contextlib.suppress(OSError):
      found.run.rmdir()
    raise


def joint_run(folder: pathlib.Path) -> pathlib.Path | None:
  """The run of several networks that a network's folder belongs to, or None."""
  place = folder.resolve()
  if not re.fullmatch(r"seed-\d+", place.name):
    return None
  if not (place.parent / CONFIG).is_file():
    return None
  several = read_config(place.parent)["networks"] > 1
  return place.parent if several else None


def _check_writable(folder: pathlib.Path) -> None:
  probe = folder / f".write-test-{os.getpid()}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise UsageError(
      f"--workdir {folder} cannot be written: {error.strerror}"
    ) from None


def check(folder: pathlib.Path, wanted: dict[str, Any], resume: bool) -> None:
  """Raises UsageError if a run with this `identity` must not write there."""
  if resume:
    _check_same_run(wanted, folder)
    return
  found = _files(folder)
  if CONFIG in found or CHECKPOINTS in found:
    raise UsageError(
      f"--workdir {folder} holds a run already: --resume goes on with it"
    )
  if found:
    raise UsageError(
      f"--workdir {folder} holds files of the same names as a run's: "
      f"{', '.join(found)}"
    )


def _files(folder: pathlib.Path) -> list[str]:
  return [name for name in _FILES if (folder / name).exists()]


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Keeps two processes from writing the files of one run, where it can.

  Raises:
    UsageError: Another process is training in this folder, or the lock's file
      cannot be written.
  """
  try:
    file = (folder / LOCK).open("a")
  except OSError as error:
    raise UsageError(
      f"--workdir {folder} cannot be written: {error.strerror}"
    ) from None
  with file:
    try:
      if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UsageError(
        f"--workdir {folder}: another process is training there"
      ) from None
    except OSError:
      pass  # A file system without locks.
    yield


def _check_same_run(wanted: dict[str, Any], folder: pathlib.Path) -> None:
  if not (folder / CONFIG).exists():
    found = _files(folder)
    if found:
      raise UsageError(
        f"--resume: {folder} has {', '.join(found)} but no {CONFIG}, so it "
        "cannot be told whether the flags are the same"
      )
    return
  if not (folder / CHECKPOINTS).is_dir() and (folder / CHECKPOINTS).exists():
    raise UsageError(f"--resume: {folder / CHECKPOINTS} is not a folder")
  different = differences(read_config(folder), wanted)
  if different:
    raise UsageError(
      f"--resume: {folder} is a run of other flags: {'; '.join(different)}"
    )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The `identity` of the run in a folder.

  A flag that is newer than the run has its default: a new flag must have the
  old course for its default.

  Raises:
    UsageError: If there is none, or it cannot be read.
  """
  path = folder / CONFIG
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UsageError(f"{path} cannot be read: {error}") from None
  if not isinstance(content, dict):
    raise UsageError(f"{path} does not hold a run's flags")
  return {**Config().identity(), **content}


def read_network(folder: pathlib.Path) -> dict[str, Any]:
  """The `identity` of the run in a folder, which has one network.

  Raises:
    UsageError: As `read_config`; or the run has several networks.
  """
  found = read_config(folder)
  if found["networks"] > 1:
    raise UsageError(
      f"{folder} is a run of {found['networks']} networks; give their folders, "
      f"such as {folder / 'seed-'}{found['seed']}"
    )
  return found
