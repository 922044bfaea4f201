"""The training loop: steps, evaluations, checkpoints, records.

The host asks for as many steps at a time as take about a second, and never
waits for those that it has just asked for: their figures are read when the next
ones are under way.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
import contextlib
import statistics
import time
from typing import Any

import jax
import numpy as np

import sparseopt_jax
from sparseopt_jax.training import feed as feed_lib
from sparseopt_jax.training import folder as folder_lib
from sparseopt_jax.training import optimizer
from sparseopt_jax.training import runtime
from sparseopt_jax.training import telling
from sparseopt_jax.training.checkpoints import Checkpoints
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import RunError
from sparseopt_jax.training.parallel import Layout
from sparseopt_jax.training.results import Results
from sparseopt_jax.training.signals import Interrupted
from sparseopt_jax.training.signals import StopRequest
from sparseopt_jax.training.state import Sums
from sparseopt_jax.training.state import TrainState
from sparseopt_jax.training.state import has_masks
from sparseopt_jax.training.step import StepMetrics
from sparseopt_jax.training.step import Task


class Run:
  """One training run, of one network or several.

  Args:
    config: What was asked for.
    folders: Where it writes, and what decides what it computes.
    task: Model, data set and optimiser.
    layout: Where arrays live.
    stop: Says when a signal has come.
  """

  def __init__(
    self,
    config: Config,
    folders: folder_lib.Folders,
    task: Task,
    layout: Layout,
    stop: StopRequest,
  ) -> None:
    self._config = config
    self._folders = folders
    self._dataset = task.dataset
    self._layout = layout
    self._stop = stop
    self._train_steps = layout.compile_train(task)
    self._eval_steps = layout.compile_eval(task)
    self._epoch_steps = task.steps_per_epoch
    self._total_steps = config.epochs * self._epoch_steps
    self._updates_masks = optimizer.mask_updates(config, self._total_steps)
    self._seeds = range(config.seed, config.seed + config.networks)
    self._first = jax.process_index() == 0

  def train(
    self, create: Callable[[Any], TrainState], command: str
  ) -> list[dict[str, Any]]:
    """Runs to the end, from the start or, with `resume`, from a checkpoint.

    Args:
      create: Gives the state before step 0 of a network, by its seed.
      command: The command line, for the summary.

    Returns:
      The summary of each network, as in `summary.json`.

    Raises:
      Interrupted: A signal came; the state is in a checkpoint.
      RunError: The loss is not finite, or a file could not be written. Of
        several networks, those that are finite are finished first.
      UsageError: All checkpoints are damaged.
    """
    with contextlib.ExitStack() as stack:
      if self._first:
        stack.enter_context(folder_lib.locked(self._folders.run))
        # Another process may have been here since the folder was prepared.
        self._folders.check(self._config.resume)
        self._folders.write_configs()
      states = self._layout.split(self._train(create))
      summaries, broken = [], []
      for seed, each, state in zip(
        self._seeds, self._results, states, strict=True
      ):
        if len(states) > 1 and not _is_finite(state):
          broken.append(str(seed))
        else:
          summaries.append(each.summarise(state, self._config, command))
    if summaries:
      telling.say(f"{telling.result_line(summaries)}: {self._folders.run}")
    if broken:
      raise RunError(
        f"NaN or infinity in the network(s) of seed {', '.join(broken)}; the "
        "others are finished"
      )
    return summaries

  def _train(self, create: Callable[[Any], TrainState]) -> Any:
    self._checkpoints = Checkpoints(
      self._folders.run / folder_lib.CHECKPOINTS, self._config.keep_checkpoints
    )
    with contextlib.closing(self._checkpoints):
      step, state = self._begin(create)
      self._show_table(f"step {step}" if step else "the start", state)
      with contextlib.ExitStack() as stack:
        for each in self._results:
          stack.enter_context(contextlib.closing(each))
        state = self._run_steps(step, state)
      self._checkpoints.wait()
    self._show_table("the end", state)
    return state

  def _begin(self, create: Callable[[Any], TrainState]) -> tuple[int, Any]:
    step, joined = 0, None
    if self._config.resume:
      seed = np.uint32(self._config.seed)
      target = self._layout.target(jax.eval_shape(create, seed))
      step, joined = self._checkpoints.restore(target)
      telling.say(
        "--resume: there is no checkpoint yet, so this starts from step 0"
        if joined is None
        else f"--resume: goes on from step {step}"
      )
    if joined is None:
      first = runtime.quick_jit(create)
      states = [jax.device_get(first(np.uint32(s))) for s in self._seeds]
      joined = self._layout.joined(states)
    self._results = [
      Results(folder, identity, step, self._config.tensorboard)
      for folder, identity in self._folders.networks
    ]
    return step, self._layout.put(joined)

  def _run_steps(self, step: int, state: Any) -> Any:
    batch_size, networks = self._config.batch_size, self._config.networks
    progress = telling.Progress(self._total_steps, step, batch_size * networks)
    self._feed = self._open_feed(step)
    with contextlib.closing(progress), contextlib.closing(self._feed):
      self._watch = _Watch(progress, self._layout, self._config)
      speed = telling.Speed(batch_size, self._results[0].seconds)
      if step and step % self._epoch_steps == 0:
        self._resume_epoch_end(state, step, speed)
      while step < self._total_steps:
        self._stop_if_asked(state, step, step)
        examples, first, count = self._feed.train(step)
        count, update_masks = self._next_steps(step, count)
        state, metrics = self._train_steps(
          state, examples, np.int32(first), np.int32(count), update_masks
        )
        step += count
        self._watch.push(count, metrics)
        if not speed.started:  # The first step compiles: not counted.
          self._watch.drain()
          speed.start(step, self._feed.waited)
        if step % self._epoch_steps == 0:
          self._watch.drain()
          figures = speed.figures(step, self._feed.waited)
          self._end_epoch(state, step, figures)
          speed.start(step, self._feed.waited)
    return state

  def _open_feed(self, step: int) -> feed_lib.Feed:
    size = self._config.batch_size
    if self._dataset.arrays() is None:
      return feed_lib.Streamed(
        self._dataset, self._layout, self._config.seed, size, step
      )
    return feed_lib.Resident(self._dataset, self._layout, self._seeds, size)

  def _next_steps(self, step: int, most: int) -> tuple[int, bool | None]:
    """How many steps to take in one call, and `update_masks` of them all."""
    update_masks = self._updates_masks(step)
    most = min(most, self._grain(step))
    count = 1
    while count < most and self._updates_masks(step + count) == update_masks:
      count += 1
    return count, update_masks

  def _grain(self, step: int) -> int:
    """At most so many steps before the host looks up."""
    if jax.process_count() == 1:
      return self._watch.grain
    # All processes compare notes after the same steps.
    return StopRequest.EVERY - step % StopRequest.EVERY

  def _resume_epoch_end(
    self, state: Any, step: int, speed: telling.Speed
  ) -> None:
    """Evaluates, unless the run did before it was stopped.

    A checkpoint that a signal forced during an evaluation comes before it.
    """
    if any(each.last_step != step for each in self._results):
      self._end_epoch(state, step, speed.figures(step, 0.0))

  def _stop_if_asked(self, state: Any, step: int, count: int) -> None:
    number = self._stop.agreed(count)
    if number:
      self._watch.drain()
      self._save(state, step)
      self._checkpoints.wait()
      raise Interrupted(
        number, f"the same flags and --resume --workdir {self._folders.run}"
      )

  def _save(self, state: Any, step: int) -> None:
    """All networks; the best is that of the highest mean test accuracy."""
    means = [
      (statistics.fmean(line["test_accuracy"] for line in row), row[0]["step"])
      for row in zip(*(each.lines for each in self._results), strict=False)
    ]
    best_step = max(means)[1] if means else None
    self._checkpoints.save(self._layout.gathered(state), step, best_step)

  def _end_epoch(
    self, state: Any, step: int, speed: dict[str, float | None]
  ) -> None:
    """Evaluates, writes the figures, then a checkpoint that follows them."""
    sums = self._layout.split(self._evaluate(state, step))
    self._layout.check_replicas(state)
    lines = []
    states = self._layout.split(state)
    for each, own, tested in zip(self._results, states, sums, strict=True):
      test_loss, test_accuracy = tested.means()
      figures = {
        "step": step,
        "epoch": step // self._epoch_steps,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        **speed,
      }
      if each.last_step == step:  # Stopped between two networks' lines.
        continue
      lines.append(each.measure(own, figures))
    telling.say(telling.epoch_line(lines, self._config.epochs))
    self._save(state, step)

  def _evaluate(self, state: Any, step: int) -> Any:
    """Loss and accuracy over the whole test set, each example once."""
    zeros = [Sums.zero() for _ in self._seeds]
    sums = self._layout.put(self._layout.joined(zeros))
    calls = 0
    with contextlib.closing(self._feed.test()) as parts:
      for examples, batches in parts:
        first = 0
        while first < batches:
          self._stop_if_asked(state, step, calls)
          count = min(batches - first, self._grain(0))
          sums = self._eval_steps(
            state, sums, examples, np.int32(first), np.int32(count)
          )
          first, calls = first + count, calls + 1
    return sums

  def _show_table(self, when: str, state: Any) -> None:
    """Of the first network."""
    opt_state = self._layout.split(state)[0].opt_state
    if has_masks(opt_state):
      table = sparseopt_jax.sparsity_table(opt_state)
      whose = f" of seed {self._seeds[0]}" if len(self._seeds) > 1 else ""
      telling.say(f"Sparsity{whose} at {when}:\n{table}")


def _is_finite(state: TrainState) -> bool:
  """Whether a network's parameters are, on the host."""
  leaves = map(np.asarray, jax.tree.leaves(state.params))
  return all(np.isfinite(leaf).all() for leaf in leaves)


class _Watch:
  """Looks at the figures of each call, some calls later.

  Args:
    progress: Shows them.
    layout: Of the figures.
    config: What is trained.

  Attributes:
    grain: Steps that take about a second.
  """

  _MOST = 1024

  def __init__(
    self, progress: telling.Progress, layout: Layout, config: Config
  ) -> None:
    self.grain = 1
    self._told: set[int] = set()
    self._progress = progress
    self._layout = layout
    self._config = config
    self._looked = time.perf_counter()
    self._pending: collections.deque[tuple[int, StepMetrics]] = (
      collections.deque()
    )

  def push(self, count: int, metrics: StepMetrics) -> None:
    """Remembers the figures of so many steps, and looks at older ones."""
    self._pending.append((count, metrics))
    while len(self._pending) > (4 if count == 1 else 1):
      self._look()

  def drain(self) -> None:
    """Waits for all steps; raises RunError at one that is not finite."""
    while self._pending:
      self._look()

  def _look(self) -> None:
    count, metrics = self._pending.popleft()
    each = jax.device_get(self._layout.split(metrics))
    if not self._config.skip_nonfinite:
      for index, one in enumerate(each):
        if not one.finite:
          self._tell(index, one)
    loss, accuracy = np.mean([(m.loss, m.accuracy) for m in each], axis=0)
    self._progress.steps(count, loss, accuracy)
    self._adapt(count)

  def _adapt(self, count: int) -> None:
    now = time.perf_counter()
    seconds, self._looked = now - self._looked, now
    if count == self.grain and seconds < 0.5:
      self.grain = min(2 * self.grain, self._MOST)
    elif seconds > 2:
      self.grain = max(self.grain // 2, 1)

  def _tell(self, index: int, metrics: StepMetrics) -> None:
    """One network that is not finite ends the run; one of several does not."""
    what = (
      f"NaN or infinity in the loss ({metrics.loss:g}), the gradient or the"
    )
    advice = "(--skip-nonfinite leaves such steps out)"
    if self._config.networks == 1:
      raise RunError(
        f"{what} network after step {metrics.step}; the last good checkpoint "
        f"is kept {advice}"
      )
    if index not in self._told:
      self._told.add(index)
      seed = self._config.seed + index
      telling.say(
        f"{what} network of seed {seed} by step {metrics.step}; the others go "
        f"on {advice}"
      )
