"""The trainer's step against the same network in TensorFlow.

RigL's own code is of TensorFlow; this is what its users have on a CPU: masked
convolutions of a ResNet of the CIFAR family, batch normalisation, SGD with
momentum. Masks stand still on both sides.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from sparseopt_jax.benchmarks import networks
from sparseopt_jax.benchmarks import timing
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

_DEPTHS = {"resnet8": 1, "resnet14": 2, "resnet20": 3}


def run(config: Config, repeats: int, steps: int) -> dict[str, dict[str, Any]]:
  """Images a second, and ratios of CPU time to the trainer's step.

  The trainer's step also crops and flips; TensorFlow gets images as they are.

  Args:
    config: What to train.
    repeats: Rounds of measurement, in which all take turns.
    steps: Steps that are timed together.

  Raises:
    UsageError: TensorFlow is not installed.
  """
  if importlib.util.find_spec("tensorflow") is None:
    raise UsageError("tensorflow is missing: pip install tensorflow-cpu")
  call, state = networks.program(config, steps)
  calls, states = {"sparseopt-jax": call}, {"sparseopt-jax": state}
  for name, compiled in (("tensorflow", False), ("tensorflow, XLA", True)):
    step = _step(config, compiled)

    def several(state: Any, step: Any = step) -> Any:
      for _ in range(steps):
        loss = step()
      loss.numpy()  # Waits.
      return state

    calls[name], states[name] = several, ()
  times = timing.interleave(calls, states, repeats=repeats, calls=1)
  rows = timing.ratios(times, "sparseopt-jax", "cpu")
  for name, row in rows.items():
    row["milliseconds"] /= steps
    speed = steps * config.batch_size / np.median(times[name].wall)
    row["images_per_second"] = float(speed)
  return rows


def _step(config: Config, compiled: bool) -> Any:
  """A function of nothing that takes a step and returns the loss."""
  import tensorflow as tf

  network = _Network(config)
  rng = np.random.default_rng(0)
  shape = (config.batch_size, 32, 32, 3)
  images = tf.constant(rng.normal(size=shape).astype(np.float32))
  labels = tf.constant(rng.integers(0, 100, config.batch_size))

  @tf.function(jit_compile=compiled)
  def step() -> Any:
    with tf.GradientTape() as tape:
      losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels, network(images)
      )
      loss = tf.reduce_mean(losses)
    variables = network.variables
    gradients = tape.gradient(loss, variables)
    for variable, momentum, gradient in zip(
      variables, network.momenta, gradients, strict=True
    ):
      momentum.assign(0.9 * momentum + gradient)
      variable.assign_sub(0.1 * momentum)
    return loss

  return step


class _Network:
  """The network of `sparseopt_jax.models`, with batch statistics.

  Variables are made in the first call, in the order of their use; layers of
  one shape share a mask.
  """

  def __init__(self, config: Config) -> None:
    self._tf = importlib.import_module("tensorflow")
    self.variables: list[Any] = []
    self.momenta: list[Any] = []
    self._masks: dict[tuple[int, ...], Any] = {}
    self._density = 1 - config.sparsity
    self._blocks = _DEPTHS[config.model]
    self._width = config.width or 16
    self._rng = np.random.default_rng(0)
    self._made = False
    self(np.zeros((1, 32, 32, 3), np.float32))
    self._made = True

  def __call__(self, images: Any) -> Any:
    self._next = 0
    x = self._tf.nn.relu(self._conv(images, self._width, 3, 1))
    for stage in range(3):
      for block in range(self._blocks):
        stride = 2 if stage and not block else 1
        x = self._block(x, self._width * 2**stage, stride)
    x = self._tf.reduce_mean(x, (1, 2))
    return x @ self._masked((x.shape[-1], 100)) + self._variable((100,), 0.0)

  def _block(self, x: Any, features: int, stride: int) -> Any:
    y = self._tf.nn.relu(self._conv(x, features, 3, stride))
    y = self._conv(y, features, 3, 1)
    if x.shape[1:] != y.shape[1:]:
      x = self._conv(x, features, 1, stride)
    return self._tf.nn.relu(x + y)

  def _conv(self, x: Any, features: int, size: int, stride: int) -> Any:
    """A masked convolution and batch normalisation."""
    kernel = self._masked((size, size, x.shape[-1], features))
    margin = (size - 1) // 2
    padding = [[0, 0], [margin, margin], [margin, margin], [0, 0]]
    y = self._tf.nn.conv2d(x, kernel, stride, padding)
    scale = self._variable((features,), 1.0)
    offset = self._variable((features,), 0.0)
    mean, variance = self._tf.nn.moments(y, (0, 1, 2))
    return self._tf.nn.batch_normalization(
      y, mean, variance, offset, scale, 1e-5
    )

  def _masked(self, shape: tuple[int, ...]) -> Any:
    if shape not in self._masks:
      mask = self._rng.random(shape) < self._density
      self._masks[shape] = self._tf.constant(mask.astype(np.float32))
    return self._variable(shape, None) * self._masks[shape]

  def _variable(self, shape: tuple[int, ...], value: float | None) -> Any:
    """The next variable; He-initialised if no value is given."""
    if not self._made:
      deviation = np.sqrt(2 / np.prod(shape[:-1]))
      first = self._rng.normal(0, deviation, shape)
      if value is not None:
        first = np.full(shape, value)
      self.variables.append(self._tf.Variable(first.astype(np.float32)))
      self.momenta.append(self._tf.Variable(np.zeros(shape, np.float32)))
    self._next += 1
    return self.variables[self._next - 1]
