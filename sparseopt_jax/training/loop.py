"""The training loop: steps, evaluations, checkpoints, records.

The host never waits for a step that it has just started: the figures of a step
are read a few steps later, when they are there.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
import contextlib
import pathlib
from typing import Any

import jax

import sparseopt_jax
from sparseopt_jax.training import compiling
from sparseopt_jax.training import folder as folder_lib
from sparseopt_jax.training import optimizer
from sparseopt_jax.training import plots
from sparseopt_jax.training import records
from sparseopt_jax.training import telling
from sparseopt_jax.training.checkpoints import Checkpoints
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import RunError
from sparseopt_jax.training.parallel import Layout
from sparseopt_jax.training.prefetch import Prefetch
from sparseopt_jax.training.signals import Interrupted
from sparseopt_jax.training.signals import StopRequest
from sparseopt_jax.training.state import Sums
from sparseopt_jax.training.state import TrainState
from sparseopt_jax.training.state import has_masks
from sparseopt_jax.training.step import StepMetrics
from sparseopt_jax.training.step import Task


class Run:
  """One training run in one folder.

  Args:
    config: What was asked for.
    identity: `folder.identity`, for the files.
    task: Model, data set and optimiser.
    layout: Where arrays live.
    folder: The work folder.
    stop: Says when a signal has come.
  """

  def __init__(
    self,
    config: Config,
    identity: dict[str, Any],
    task: Task,
    layout: Layout,
    folder: pathlib.Path,
    stop: StopRequest,
  ) -> None:
    self._config = config
    self._identity = identity
    self._dataset = task.dataset
    self._layout = layout
    self._folder = folder
    self._stop = stop
    self._train_step = layout.compile_train(task)
    self._eval_step = layout.compile_eval(task)
    self._epoch_steps = task.dataset.steps_per_epoch(config.batch_size)
    self._total_steps = config.epochs * self._epoch_steps
    self._updates_masks = optimizer.mask_updates(config, self._total_steps)
    self._share = (jax.process_index(), jax.process_count())
    self._first = jax.process_index() == 0

  def train(
    self, create: Callable[[], TrainState], command: str
  ) -> dict[str, Any]:
    """Runs to the end, from the start or, with `resume`, from a checkpoint.

    Args:
      create: Gives the state before step 0.
      command: The command line, for the summary.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      Interrupted: A signal came; the state is in a checkpoint.
      RunError: The loss is not finite, or a file could not be written.
      UsageError: All checkpoints are damaged.
    """
    with contextlib.ExitStack() as stack:
      if self._first:
        stack.enter_context(folder_lib.locked(self._folder))
        # Another process may have been here since the folder was prepared.
        folder_lib.check(self._folder, self._identity, self._config.resume)
        records.write_json(self._folder / folder_lib.CONFIG, self._identity)
      state = self._train(create)
      summary = self._summarise(state, command)
    telling.say(f"{telling.result_line(summary)}: {self._folder}")
    return summary

  def _train(self, create: Callable[[], TrainState]) -> TrainState:
    self._checkpoints = Checkpoints(
      self._folder / folder_lib.CHECKPOINTS, self._config.keep_checkpoints
    )
    with contextlib.closing(self._checkpoints):
      state = self._begin(create)
      step = int(state.step)
      self._show_table(f"step {step}" if step else "the start", state)
      with contextlib.closing(self._log):
        state = self._run_steps(state)
      self._checkpoints.wait()
    self._show_table("the end", state)
    return state

  def _begin(self, create: Callable[[], TrainState]) -> TrainState:
    restored = None
    if self._config.resume:
      target = self._layout.target(jax.eval_shape(create))
      restored = self._checkpoints.restore(target)
      telling.say(
        "--resume: there is no checkpoint yet, so this starts from step 0"
        if restored is None
        else f"--resume: goes on from step {int(restored.step)}"
      )
    state = self._layout.put(restored or compiling.quick_jit(create)())
    self._log = records.MetricsLog(
      self._folder / folder_lib.METRICS,
      last_step=int(state.step),
      writes=self._first,
      tensorboard=self._config.tensorboard,
    )
    return state

  def _run_steps(self, state: TrainState) -> TrainState:
    step = int(state.step)
    progress = telling.Progress(
      self._total_steps, step, self._config.batch_size
    )
    batches = self._prefetch_from(step)
    with contextlib.closing(progress), contextlib.closing(batches):
      self._watch = _Watch(progress, self._config.skip_nonfinite)
      speed = telling.Speed(self._config.batch_size, self._log.seconds)
      if step and step % self._epoch_steps == 0:
        state = self._resume_epoch_end(state, step, speed)
      while step < self._total_steps:
        self._stop_if_asked(state, step)
        state, metrics = self._train_step(
          state, next(batches), self._updates_masks(step)
        )
        step += 1
        self._watch.push(step, metrics)
        if not speed.started:  # The first step compiles: not counted.
          jax.block_until_ready(metrics)
          speed.start(step, batches.waited)
        if step % self._epoch_steps == 0:
          self._watch.drain()
          figures = speed.figures(step, batches.waited)
          state = self._end_epoch(state, step, figures)
          speed.start(step, batches.waited)
    return state

  def _resume_epoch_end(
    self, state: TrainState, step: int, speed: telling.Speed
  ) -> TrainState:
    """Evaluates, unless the run did before it was stopped.

    A checkpoint that a signal forced during an evaluation comes before it.
    """
    if self._log.lines and self._log.lines[-1]["step"] == step:
      return state._replace(sums=self._layout.put(Sums.zero()))
    return self._end_epoch(state, step, speed.figures(step, 0.0))

  def _prefetch_from(self, step: int) -> Prefetch:
    batches = self._dataset.train_batches(
      self._config.seed, step, self._config.batch_size, *self._share
    )
    return Prefetch(batches, self._layout.put_batch)

  def _stop_if_asked(self, state: TrainState, count: int) -> None:
    number = self._stop.agreed(count)
    if number:
      self._watch.drain()
      self._checkpoints.save(state, self._best_step())
      self._checkpoints.wait()
      raise Interrupted(
        number, f"the same flags and --resume --workdir {self._folder}"
      )

  def _end_epoch(
    self, state: TrainState, step: int, speed: dict[str, float | None]
  ) -> TrainState:
    """Evaluates, writes the figures, then a checkpoint that follows them."""
    train_loss, train_accuracy = state.sums.means()
    test_loss, test_accuracy = self._evaluate(state)
    self._layout.check_replicas(state)
    line = {
      "step": step,
      "epoch": step // self._epoch_steps,
      "train_loss": train_loss,
      "train_accuracy": train_accuracy,
      "test_loss": test_loss,
      "test_accuracy": test_accuracy,
      "nonfinite_steps": int(state.nonfinite_steps),
      **telling.sparsity_figures(state.opt_state),
      **speed,
    }
    self._log.append(line)
    telling.say(telling.epoch_line(line, self._config.epochs))
    state = state._replace(sums=self._layout.put(Sums.zero()))
    self._checkpoints.save(state, self._best_step())
    return state

  def _evaluate(self, state: TrainState) -> tuple[float, float]:
    """Loss and accuracy over the whole test set, each example once."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    sums = self._layout.put(Sums.zero())
    batches = Prefetch(
      self._dataset.test_batches(self._config.batch_size, *self._share),
      self._layout.put_batch,
    )
    with contextlib.closing(batches):
      for count, batch in enumerate(batches):
        self._stop_if_asked(state, count)
        sums = self._eval_step(variables, sums, batch)
    return sums.means()

  def _show_table(self, when: str, state: TrainState) -> None:
    if has_masks(state.opt_state):
      table = sparseopt_jax.sparsity_table(state.opt_state)
      telling.say(f"Sparsity at {when}:\n{table}")

  def _best_step(self) -> int | None:
    lines = self._log.lines
    return max(lines, key=_rank)["step"] if lines else None

  def _summarise(self, state: TrainState, command: str) -> dict[str, Any]:
    lines = self._log.lines
    last = {k: v for k, v in lines[-1].items() if k != "layers"}
    best = max(lines, key=_rank)
    summary = {
      **last,
      "best_test_accuracy": best["test_accuracy"],
      "best_step": best["step"],
      **telling.sparse_counts(state),
      "devices": self._config.devices,
      "processes": jax.process_count(),
      **telling.surroundings(),
      "command": command,
      "config": self._identity,
    }
    if self._first:
      records.write_json(self._folder / folder_lib.SUMMARY, summary)
      image = plots.curves(lines)
      records.write_bytes(self._folder / folder_lib.CURVES, image)
    return summary


def _rank(line: dict[str, Any]) -> tuple[float, int]:
  """The best has the highest test accuracy; of several, it is the last."""
  return line["test_accuracy"], line["step"]


class _Watch:
  """Looks at the figures of each step, a few steps later.

  Args:
    progress: Shows them.
    skip_nonfinite: Whether NaN and infinity are to be expected.
  """

  _BEHIND = 4

  def __init__(self, progress: telling.Progress, skip_nonfinite: bool) -> None:
    self._progress = progress
    self._skip_nonfinite = skip_nonfinite
    self._pending: collections.deque[tuple[int, StepMetrics]] = (
      collections.deque()
    )

  def push(self, step: int, metrics: StepMetrics) -> None:
    """Remembers a step's figures and looks at an older one's."""
    self._pending.append((step, metrics))
    if len(self._pending) > self._BEHIND:
      self._look()

  def drain(self) -> None:
    """Waits for all steps; raises RunError at one that is not finite."""
    while self._pending:
      self._look()

  def _look(self) -> None:
    step, metrics = self._pending.popleft()
    loss, accuracy, finite = (x.item() for x in jax.device_get(metrics))
    if not finite and not self._skip_nonfinite:
      raise RunError(
        f"NaN or infinity in the loss ({loss:g}), the gradient or the network "
        f"after step {step}; the last good checkpoint is kept "
        "(--skip-nonfinite leaves such steps out)"
      )
    self._progress.step(loss, accuracy)
