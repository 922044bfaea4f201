"""A network and a data set so small that a test can train them many times."""

from collections.abc import Callable, Generator
import contextlib
import dataclasses
import functools
import json
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax
from sparseopt_jax import data
from sparseopt_jax import models
from sparseopt_jax.data import in_memory
from sparseopt_jax.training import build
from sparseopt_jax.training import checkpoints
from sparseopt_jax.training import folder
from sparseopt_jax.training import plots
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.state import TrainState

# Two epochs of six steps, mask updates at steps 3, 6 and 9.
FLAGS = {
  "epochs": 2,
  "batch_size": 16,
  "sparsity": 0.6,
  "update_every": 3,
  "update_until": 0.9,
  "learning_rate": 0.05,
}
_FOR_DENSE = ("epochs", "batch_size", "learning_rate")
STEPS = 12
# What may differ between two runs of the same flags.
TIMINGS = ("seconds", "images_per_second", "input_wait")


class Net(nn.Module):
  """Two convolutions with batch norm and a classifier; float64 if asked."""

  dtype: str
  axis_name: str | None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    x = images
    for features in (4, 6):
      x = nn.Conv(features, (3, 3), (2, 2), use_bias=False, dtype=self.dtype)(x)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        dtype=self.dtype,
        axis_name=self.axis_name,
      )(x)
      x = nn.relu(x)
    return nn.Dense(10, dtype=self.dtype)(x.reshape(x.shape[0], -1))


def create(name, num_classes, *, dtype="float32", axis_name=None, **others):
  """In place of `sparseopt_jax.models.create`."""
  del name, num_classes, others
  return Net(dtype, axis_name)


def unchanged(number: int, batch: dict) -> dict:
  del number
  return batch


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Digits(in_memory.InMemory):
  """96 digits to train on and 40 for testing, with hooks on the batches.

  A training batch of white images alone gives NaN. With a hook, batches are
  drawn one by one; without, the digits live on the device.
  """

  train_hook: Callable = unchanged
  test_hook: Callable = unchanged

  def arrays(self):
    hooks = self.train_hook, self.test_hook
    return super().arrays() if hooks == (unchanged, unchanged) else None

  def preprocess(self, images, dtype=np.float32):
    white = jnp.mean(images, dtype=jnp.float32) > 150  # Real ones: about 80.
    poison = jnp.where(white, jnp.nan, 0.0)
    return super().preprocess(images, dtype) + poison.astype(dtype)

  def _train_batches(self, seed, start_step, batch_size, rows) -> Generator:
    batches = super()._train_batches(seed, start_step, batch_size, rows)
    for step, batch in enumerate(batches, start_step):
      yield self.train_hook(step, batch)

  def _test_batches(self, num_batches, batch_size, rows) -> Generator:
    batches = super()._test_batches(num_batches, batch_size, rows)
    for number, batch in enumerate(batches):
      yield self.test_hook(number, batch)


@functools.cache
def _whole() -> in_memory.InMemory:
  return data.load("digits")


def digits(**hooks: Callable) -> Digits:
  """The data set above."""
  whole = _whole()
  fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
  small = {
    "num_train": 96,
    "num_test": 40,
    "train": tuple(x[:96] for x in whole.train),
    "test": tuple(x[:40] for x in whole.test),
  }
  return Digits(**{**fields, **small, **hooks})


def use(monkeypatch, train_hook=unchanged, test_hook=unchanged) -> None:
  """Makes `sparseopt_jax.train` use the network and data set above."""
  _whole()  # Before `data.load` is replaced.
  dataset = digits(train_hook=train_hook, test_hook=test_hook)
  monkeypatch.setattr(models, "create", create)
  monkeypatch.setattr(data, "load", lambda *args: dataset)
  monkeypatch.setattr(plots, "curves", lambda lines: b"")  # A second a run.


def arguments(workdir: pathlib.Path, **flags) -> list[str]:
  """A command line of `FLAGS`, changed by `flags`."""
  words = ["--workdir", str(workdir)]
  if flags.get("topology") == "dense":
    flags = {name: FLAGS[name] for name in _FOR_DENSE} | flags
  else:
    flags = FLAGS | flags
  for name, value in flags.items():
    words.append(f"--{name.replace('_', '-')}")
    if value is not True:
      words.append(str(value))
  return words


def restored(workdir: pathlib.Path, step: int = STEPS) -> TrainState:
  """A run's checkpoint."""
  config = Config.from_identity(folder.read_config(workdir))
  layout = build.devices(config)
  _, create = build.task(config, layout)
  target = layout.target(jax.eval_shape(create, np.uint32(config.seed)))
  saved = checkpoints.Checkpoints(workdir / folder.CHECKPOINTS, keep=None)
  with contextlib.closing(saved):
    return saved.read(step, target)


def final_state(workdir: pathlib.Path, step: int = STEPS) -> list[np.ndarray]:
  """All arrays of a run's checkpoint."""
  return [np.asarray(x) for x in jax.tree.leaves(restored(workdir, step))]


def masks(state: TrainState) -> dict:
  """The masks in a checkpoint."""
  return sparseopt_jax.get_masks(state.opt_state)


def metrics(workdir: pathlib.Path) -> list[dict]:
  """The lines of `metrics.jsonl` without timings; each must be whole."""
  text = (workdir / folder.METRICS).read_text()
  assert not text or text.endswith("\n")
  lines = [json.loads(line) for line in text.splitlines()]
  return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
  """The same bits in the last checkpoint, and the same figures."""
  for a, b in zip(final_state(one), final_state(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert metrics(one) == metrics(other)
