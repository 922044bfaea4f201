"""Many runs of the trainer, a few at a time.

Runs that differ in nothing but the seed are the networks of one program. A run
that is done is never done again, one that was stopped goes on from its last
checkpoint, and the order does not matter: the folders are all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shlex
import signal
import threading
import traceback
from typing import Any, NamedTuple

from sparseopt_jax import compare
from sparseopt_jax.studies import report
from sparseopt_jax.training import config as config_lib
from sparseopt_jax.training import folder as folder_lib
from sparseopt_jax.training import signals
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import RunError

_FIRST = concurrent.futures.FIRST_COMPLETED
_NOT_SHOWN = ("workdir", "resume", "keep_checkpoints", "data_dir")
_stopped = False


class Cell(NamedTuple):
  """What is trained.

  Attributes:
    config: The flags.
    factory: Makes the optimiser where no flag tells it, with the arguments of
      `training.optimizer.create`; a function of a module, so that it can be
      sent to a worker.
  """

  config: Config
  factory: Callable[..., Any] | None = None


def run(
  cells: Mapping[str, Cell], folder: pathlib.Path, jobs: int
) -> dict[str, compare.Run]:
  """Trains what is not there yet.

  Args:
    cells: {name: what to train}. Where it says `seedK`, and others are named
      alike, they are trained together.
    folder: Of all the runs.
    jobs: How many programs to train at a time, each in a process of its own;
      0 trains none.

  Returns:
    The runs that are complete, by name.

  Raises:
    UsageError: A folder holds a run of other flags, or cannot be made.
    RunError: A run failed.
    signals.Interrupted: A signal came; the same command goes on from there.
  """
  found = collect(cells, folder)
  missing = {name: cells[name] for name in cells if name not in found}
  if not missing or not jobs:
    return found
  report.make(folder)
  print(f"{len(found)} of {len(cells)} runs are there")
  _train_all(_programs(missing, folder, jobs), folder, jobs)
  return collect(cells, folder)


def _programs(
  cells: Mapping[str, Cell], folder: pathlib.Path, jobs: int
) -> dict[str, Cell]:
  """What to train, by the name of its folder.

  What was begun goes on as it is. The rest is trained together, if its images
  are in memory: what is alike, of consecutive seeds, in as many programs as
  there are jobs or more.
  """
  found: dict[str, Cell] = {}
  rest = {}
  for name, cell in cells.items():
    alone, *together = _places(folder, name)
    if (alone / folder_lib.CONFIG).is_file():
      found[name] = cell
    elif together:
      seeds = re.search(r"seeds(\d+)-(\d+)", together[0].parent.name)
      assert seeds is not None
      first, last = map(int, seeds.groups())
      size = last - first + 1
      begun = dataclasses.replace(cell.config, seed=first, networks=size)
      found[together[0].parent.name] = cell._replace(config=begun)
    else:
      rest[name] = cell
  for names in _groups(rest, most=-(-len(rest) // jobs)):
    cell = rest[names[0]]
    config = dataclasses.replace(cell.config, networks=len(names))
    found[_joined_name(names[0], config)] = cell._replace(config=config)
  return found


def _groups(cells: Mapping[str, Cell], most: int) -> list[list[str]]:
  """Names of runs to train together."""
  groups: list[list[str]] = []
  last: dict[str, tuple[int, list[str]]] = {}
  configs = {name: cell.config for name, cell in cells.items()}
  for name, config in sorted(configs.items(), key=lambda item: item[1].seed):
    kind = name.replace(f"seed{config.seed}", "seed")
    seed, group = last.get(kind, (-1, []))
    follows = kind != name and seed + 1 == config.seed
    in_memory = config.dataset != "imagenet2012"
    if not (follows and in_memory and 0 < len(group) < most):
      groups.append(group := [])
    group.append(name)
    last[kind] = config.seed, group
  order = list(cells)
  return sorted(groups, key=lambda group: order.index(group[0]))


def _joined_name(name: str, config: Config) -> str:
  """`seed0` becomes `seeds0-4`."""
  if config.networks == 1:
    return name
  last = config.seed + config.networks - 1
  return name.replace(f"seed{config.seed}", f"seeds{config.seed}-{last}")


def _places(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Where a run may lie: by itself, or among the networks of another."""
  found = [folder / name]
  before, is_named, rest = name.partition("seed")
  if is_named:
    seed = "".join(itertools.takewhile(str.isdecimal, rest))
    after = re.escape(rest.removeprefix(seed))
    alike = re.compile(rf"{re.escape(before)}seeds\d+-\d+{after}")
    found += [
      path
      for path in sorted(folder.glob(f"*/seed-{seed}"))
      if alike.fullmatch(path.parent.name)
    ]
  return found


def collect(
  cells: Mapping[str, Cell], folder: pathlib.Path
) -> dict[str, compare.Run]:
  """The runs that are complete, by name."""
  found = {}
  for name, cell in cells.items():
    for path in _places(folder, name):
      if is_complete(cell, path):
        found[name] = compare.read(path)
        break
  return found


def is_complete(cell: Cell, path: pathlib.Path) -> bool:
  """Whether a folder holds the end of this run.

  Raises:
    UsageError: It holds a run of other flags, or of another optimiser.
  """
  if not (path / folder_lib.SUMMARY).is_file():
    return False
  folder_lib.check(path, folder_lib.identity(*cell), resume=True)
  return True


def _train_all(
  programs: Mapping[str, Cell], folder: pathlib.Path, jobs: int
) -> None:
  # Several processes share an accelerator only if none takes all its memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  pool = concurrent.futures.ProcessPoolExecutor(
    jobs, multiprocessing.get_context("spawn"), _begin_worker
  )
  with signals.StopRequest() as stop, pool:
    futures = {
      pool.submit(_train, cell, folder / name): name
      for name, cell in programs.items()
    }
    failed = _wait_for(futures, stop)
  if stop.number:
    raise signals.Interrupted(stop.number, "the same command")
  if failed:
    names = ", ".join(failed)
    raise RunError(f"{len(failed)} runs failed, see their .log files: {names}")


def _wait_for(
  names: Mapping[concurrent.futures.Future, str], stop: signals.StopRequest
) -> list[str]:
  """Says how each run ends; passes a signal on. Returns the failed ones."""
  pending, failed, told = set(names), [], False
  while pending:
    done, pending = concurrent.futures.wait(pending, 0.5, _FIRST)
    for future in done:
      if future.exception():
        failed.append(names[future])
      line = future.exception() or future.result()
      count = len(names) - len(pending)
      print(f"[{count}/{len(names)}] {names[future]}: {line}", flush=True)
    if stop.number and not told:
      told = True
      for worker in multiprocessing.active_children():
        worker.terminate()
  return failed


def _begin_worker() -> None:
  """In a worker: the signal is for the run under way, not for the process.

  It is in a session of its own, so that the signal reaches it once. A worker
  without a run that died of it would take the others with it.
  """
  os.setsid()
  signal.signal(signal.SIGTERM, _begin_no_more)
  threading.Thread(target=_end_with_the_command, daemon=True).start()


def _end_with_the_command() -> None:
  """In a worker: without the command, its run would go on for nobody."""
  command = multiprocessing.parent_process()
  assert command is not None
  command.join()
  os._exit(1)


def _begin_no_more(number: int, frame: Any) -> None:
  global _stopped
  del number, frame
  _stopped = True


def _train(cell: Cell, path: pathlib.Path) -> str:
  """In a worker: trains one run, unless a signal has come."""
  global _stopped
  from sparseopt_jax import train

  config = dataclasses.replace(
    cell.config, workdir=str(path), resume=True, keep_checkpoints=1
  )
  log = path.with_name(f"{path.name}.log")
  log.parent.mkdir(parents=True, exist_ok=True)
  with (
    log.open("a") as file,
    contextlib.redirect_stdout(file),
    contextlib.redirect_stderr(file),
    signals.StopRequest() as stop,
  ):
    if _stopped:
      return "not begun"
    try:
      command = _command(config, cell.factory)
      summaries = train.train(config, stop, command, cell.factory)
    except signals.Interrupted as end:
      _stopped = True
      return str(end)
    except Exception:
      traceback.print_exc()
      raise
  from sparseopt_jax.training import telling

  return telling.result_line(summaries)


def _command(config: Config, factory: Callable[..., Any] | None) -> str:
  """The command that trains this run alone."""
  command = f"python -m sparseopt_jax.train {shlex.join(flags(config))}"
  if factory is None:
    return command
  return f"{command} (optimiser: {factory.__module__}.{factory.__name__})"


def flags(config: Config) -> list[str]:
  """The flags by which a run differs from the trainer's defaults."""
  words: list[str] = []
  default = Config()
  for field in dataclasses.fields(Config):
    value = getattr(config, field.name)
    if value == getattr(default, field.name) or field.name in _NOT_SHOWN:
      continue
    name = config_lib.flag(field.name)
    if isinstance(value, bool):
      words.append(name)
    elif isinstance(value, tuple):
      words += [name, *map(str, value)]
    else:
      words += [name, str(value)]
  return words


def trained_on(
  folder: pathlib.Path, names: Iterable[str]
) -> list[dict[str, Any]]:
  """Devices and versions that these complete runs have come from."""
  found: list[dict[str, Any]] = []
  for name in names:
    files = [path / folder_lib.SUMMARY for path in _places(folder, name)]
    summary = json.loads(next(filter(pathlib.Path.is_file, files)).read_text())
    one = {key: summary[key] for key in ("device", "platform", "versions")}
    if one not in found:
      found.append(one)
  return found
