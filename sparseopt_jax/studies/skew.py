r"""Gradient skew in a two-layer perceptron, on real images.

A hidden layer of which each neuron sees some of the inputs, a normalisation, a
ReLU, and a dense layer on top. Batch normalisation divides the output of
neuron :math:`i` by its standard deviation :math:`\sigma_i`, and so its gradient
:math:`g_i`. With weights of variance :math:`v`, inputs of unit variance and
:math:`f_i` active inputs out of :math:`N`, :math:`\sigma_i^2 = v f_i`. In units
of the density :math:`1 - s_i = f_i / N` this predicts

- equal fan-ins: gradients :math:`(1 - s)^{-1/2}` times the dense layer's;
- unequal ones, and :math:`v` the same for all neurons (He): the norm of
  :math:`g_i` over the active weights does not depend on :math:`s_i`, the norm
  of :math:`w_i` goes with :math:`(1 - s_i)^{1/2}`, so the relative update
  :math:`\lVert g_i \rVert / \lVert w_i \rVert` with :math:`(1 - s_i)^{-1/2}`.

SparseOpt multiplies :math:`g_i` by a multiple of :math:`(1 - s_i)^{1/2}`: its
slopes in a log-log plot are those without it plus 1/2, exactly.

What has to be seen to, or understood:

- A pixel that never changes has no gradient under batch normalisation, and
  inputs of different variance give neurons of equal fan-in different
  :math:`\sigma_i`. Constant pixels are left out, the others standardised.
- The loss does not change with the length of :math:`w_i` under batch
  normalisation, so :math:`g_i` has only :math:`f_i - 1` directions left: with
  one input it is exactly 0, with two or three it is clearly smaller than the
  rule says. `few_inputs` gives the amount for independent inputs; correlated
  ones, such as pixels side by side, lose more.
- :math:`\sigma_i` of few inputs is close to 0 in some neurons, and :math:`1 /
  \sigma_i^2` has no finite mean for two independent inputs: root mean squares
  over neurons are then those of a few neurons.

References:
  Adnan et al., "SparseOpt: Addressing Normalization-induced Gradient Skew in
  Sparse Training", 2026. Evci et al., "Gradient Flow in Sparse Neural Networks
  and How Lottery Tickets Win", 2022, for the initialisation by each neuron's
  own fan-in.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import itertools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

import sparseopt_jax
from sparseopt_jax import data

DATASETS = ("digits", "fashion_mnist")
NORMALIZATIONS = ("batch_norm", "layer_norm", "group_norm", "none")
INITIALIZATIONS = ("he", "per_neuron")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
# Slopes are taken over neurons with at least so many active inputs.
FAN_INS = (2, 10)
UPDATE = "relative update"
CORRECTIONS = ("off", "on")
WEIGHT_DECAYS = (0.0, 5e-4)
# The width of the hidden layer: gradients of many neurons cost little, training
# costs more.
WIDTH, TRAINED_WIDTH = 1024, 128

_IMAGES = 10_000
_MEASURED = 2_048  # images of which gradients are measured
_BATCH, _LEARNING_RATE = 128, 0.1


class Examples(NamedTuple):
  """Images as inputs of a dense layer.

  Attributes:
    images: float32 (n, N), each column with mean 0 and variance 1.
    labels: int32 (n,).
  """

  images: jax.Array
  labels: jax.Array


class Neurons(NamedTuple):
  """The hidden layer, a number for each neuron, all (width,).

  Attributes:
    fan_in: Active inputs.
    density: 1 - s_i.
    gradient: Norm of the gradient over the active weights.
    corrected: The same after SparseOpt.
    weights: Norm of the weights.
    outgoing: Norm of the weights to the outputs, times batch norm's scale.
  """

  fan_in: jax.Array | np.ndarray
  density: jax.Array | np.ndarray
  gradient: jax.Array | np.ndarray
  corrected: jax.Array | np.ndarray
  weights: jax.Array | np.ndarray
  outgoing: jax.Array | np.ndarray


class Mlp(nn.Module):
  """Dense, normalisation, ReLU, dense; batch norm by batch statistics.

  Attributes:
    normalization: One of `NORMALIZATIONS`.
    width: Neurons of the hidden layer.
    classes: Outputs.
  """

  normalization: str
  width: int = WIDTH
  classes: int = 10

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    init = nn.initializers.he_normal()
    x = nn.Dense(self.width, use_bias=False, kernel_init=init, name="hidden")(
      images
    )
    if self.normalization == "batch_norm":
      x = nn.BatchNorm(use_running_average=False)(x)
    elif self.normalization == "layer_norm":
      x = nn.LayerNorm()(x)
    elif self.normalization == "group_norm":
      x = nn.GroupNorm(num_groups=8)(x)
    return nn.Dense(self.classes, name="output")(nn.relu(x))


def load(dataset: str, data_dir: str | None = None) -> Examples:
  """Training images without constant pixels, the others standardised.

  Args:
    dataset: One of `DATASETS`.
    data_dir: As for `sparseopt_jax.data.load`, whose errors it raises too.

  Returns:
    At most 10,000 examples.
  """
  found = data.load(dataset, data_dir)
  count = min(found.num_train, _IMAGES)
  batch = next(found.train_batches(seed=0, start_step=0, batch_size=count))
  pixels = batch["image"].reshape(count, -1).astype(np.float64)
  spread = pixels.std(axis=0)
  varies = spread > 0
  images = (pixels - pixels.mean(axis=0))[:, varies] / spread[varies]
  return Examples(jnp.asarray(images, jnp.float32), jnp.asarray(batch["label"]))


def draw_fan_ins(key: jax.Array, inputs: int, width: int) -> jax.Array:
  """Fan-ins with log-uniform densities from 0.03 to 1, at least 2.

  Args:
    key: A random key.
    inputs: The dense fan-in.
    width: Number of neurons.

  Returns:
    int32 (width,).
  """
  low, high = np.log(1 - SPARSITIES[-1]), 0.0
  density = jnp.exp(jax.random.uniform(key, (width,), minval=low, maxval=high))
  return jnp.maximum(jnp.round(density * inputs), 2).astype(jnp.int32)


def draw_mask(key: jax.Array, fan_in: jax.Array, inputs: int) -> jax.Array:
  """Gives each neuron so many inputs at random; bool (inputs, width)."""
  shape = (inputs, fan_in.shape[0])
  order = jnp.argsort(jax.random.uniform(key, shape), axis=0)
  return jnp.argsort(order, axis=0) < fan_in[None, :]


def init(
  model: Mlp, key: jax.Array, mask: jax.Array, initialization: str
) -> dict[str, Any]:
  """Parameters, with zeros outside the mask of the hidden layer.

  Args:
    model: The network.
    key: A random key.
    mask: bool (inputs, width).
    initialization: "he": variance 2 / N. "per_neuron": 2 / f_i.

  Returns:
    `{"hidden": {"kernel": ...}, "output": ..., ...}`.
  """
  params = model.init(key, jnp.zeros((2, mask.shape[0])))["params"]
  kernel = jnp.where(mask, params["hidden"]["kernel"], 0.0)
  if initialization == "per_neuron":
    density = jnp.mean(mask, axis=0, keepdims=True)
    kernel /= jnp.sqrt(density)
  return {**params, "hidden": {"kernel": kernel}}


def loss(model: Mlp, params: dict[str, Any], examples: Examples) -> jax.Array:
  """Mean cross-entropy."""
  logits, _ = model.apply(
    {"params": params}, examples.images, mutable=["batch_stats"]
  )
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
  )


def hidden_gradient(
  model: Mlp, params: dict[str, Any], examples: Examples
) -> jax.Array:
  """The dense gradient of the hidden layer's weights, (inputs, width)."""
  head = Examples(*(array[:_MEASURED] for array in examples))
  gradient = jax.grad(loss, argnums=1)(model, params, head)
  return gradient["hidden"]["kernel"]


def measure(
  model: Mlp, params: dict[str, Any], mask: jax.Array, examples: Examples
) -> Neurons:
  """What each neuron's gradient is, before SparseOpt and after it."""
  gradient = hidden_gradient(model, params, examples)
  norm = functools.partial(jnp.linalg.norm, axis=0)
  scale = params.get("BatchNorm_0", {}).get("scale", 1.0)
  return Neurons(
    fan_in=jnp.sum(mask, axis=0),
    density=1 - sparseopt_jax.neuron_sparsity(mask),
    gradient=norm(jnp.where(mask, gradient, 0.0)),
    corrected=norm(sparseopt_jax.correct(gradient, mask)),
    weights=norm(params["hidden"]["kernel"]),
    outgoing=norm(params["output"]["kernel"].T) * jnp.abs(scale),
  )


@functools.partial(jax.jit, static_argnums=0)
def _root_mean_square(
  model: Mlp, seed: jax.Array, fan_in: jax.Array, examples: Examples
) -> jax.Array:
  """Of the dense gradient, where each neuron has `fan_in` inputs."""
  init_key, mask_key = jax.random.split(jax.random.key(seed))
  inputs = examples.images.shape[1]
  mask = draw_mask(mask_key, jnp.full(model.width, fan_in), inputs)
  params = init(model, init_key, mask, "he")
  return jnp.sqrt(jnp.mean(hidden_gradient(model, params, examples) ** 2))


def uniform_ratios(
  examples: Examples, normalization: str, seed: int
) -> list[float]:
  """Sparse over dense gradient where all neurons have the same fan-in.

  Args:
    examples: As `load` gives them.
    normalization: One of `NORMALIZATIONS`.
    seed: Of the weights and masks.

  Returns:
    For each of `SPARSITIES` the root mean square over all weights of the hidden
    layer's dense gradient, as a ratio to that of the network without zeros.
  """
  model = Mlp(normalization)
  inputs = examples.images.shape[1]
  dense, *sparse = [
    float(_root_mean_square(model, seed, fan_in, examples))
    for fan_in in (inputs, *fan_ins(inputs))
  ]
  return [each / dense for each in sparse]


def ratios(
  examples: Examples, normalization: str, seeds: Sequence[int]
) -> dict[str, list[float]]:
  """{sparsity: one a seed} of `uniform_ratios`."""
  found = [uniform_ratios(examples, normalization, seed) for seed in seeds]
  columns = zip(SPARSITIES, zip(*found, strict=True), strict=True)
  return {str(sparsity): list(column) for sparsity, column in columns}


def fan_ins(inputs: int) -> list[int]:
  """The fan-ins that come closest to `SPARSITIES`, at least 1."""
  return [max(round((1 - s) * inputs), 1) for s in SPARSITIES]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _start(
  model: Mlp, seed: jax.Array, examples: Examples, initialization: str
) -> tuple[dict[str, Any], jax.Array]:
  init_key, *mask_keys = jax.random.split(jax.random.key(seed), 3)
  inputs = examples.images.shape[1]
  fan_in = draw_fan_ins(mask_keys[0], inputs, model.width)
  mask = draw_mask(mask_keys[1], fan_in, inputs)
  return init(model, init_key, mask, initialization), mask


_measure = jax.jit(measure, static_argnums=0)


def at_initialization(
  examples: Examples, normalization: str, initialization: str, seed: int
) -> Neurons:
  """The neurons of a layer with fan-ins drawn by `draw_fan_ins`.

  Args:
    examples: As `load` gives them.
    normalization: One of `NORMALIZATIONS`.
    initialization: One of `INITIALIZATIONS`.
    seed: Of the weights, fan-ins and masks.
  """
  model = Mlp(normalization)
  params, mask = _start(model, seed, examples, initialization)
  return jax.device_get(_measure(model, params, mask, examples))


def slopes(neurons: Neurons, fan_in: int) -> dict[str, float]:
  """Least squares of logarithms against log(1 - s_i).

  Args:
    neurons: What was measured.
    fan_in: Neurons with fewer active inputs are left out.

  Returns:
    The slope of the gradient's norm and of the relative update
    ||g_i|| / ||w_i||, each before SparseOpt and after it, and of the norms of
    the weights and of the outgoing weights.
  """
  some = Neurons(*(each[neurons.fan_in >= fan_in] for each in neurons))
  fit = lambda y: float(np.polyfit(np.log(some.density), np.log(y), 1)[0])
  return {
    "gradient": fit(some.gradient),
    "corrected gradient": fit(some.corrected),
    UPDATE: fit(some.gradient / some.weights),
    f"corrected {UPDATE}": fit(some.corrected / some.weights),
    "weights": fit(some.weights),
    "outgoing": fit(some.outgoing),
  }


def few_inputs(fan_in: int) -> float:
  r"""Expected log of a neuron's relative update, as a deviation from the rule.

  For independent Gaussian inputs under batch normalisation and He
  initialisation, :math:`\lVert g_i \rVert^2 \lVert w_i \rVert^2` is chi-square
  with :math:`f_i - 1` degrees of freedom, and :math:`\lVert w_i \rVert^2` is
  with :math:`f_i`.

  Args:
    fan_in: :math:`f_i`, at least 2.

  Returns:
    :math:`E \log (\lVert g_i \rVert / \lVert w_i \rVert) + \tfrac12 \log f_i`,
    less its limit for large :math:`f_i`.
  """
  half = special.digamma((fan_in - 1) / 2) / 2 - special.digamma(fan_in / 2)
  return float(half + (np.log(fan_in) - np.log(2)) / 2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
  model: Mlp,
  correction: str,
  params: dict[str, Any],
  mask: jax.Array,
  weight_decay: float,
  seed: jax.Array,
  stops: jax.Array,
  examples: Examples,
) -> Neurons:
  """Trains one network; arrays of the result have a first axis of `stops`."""
  masks: dict[str, Any] = jax.tree.map(lambda _: optax.MaskedNode(), params)
  masks["hidden"]["kernel"] = mask
  tx = sparseopt_jax.sparsify(
    optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.sgd(_LEARNING_RATE, momentum=0.9),
    ),
    sparsity=0.0,  # Not used: masks are given.
    corrected=correction == "on",
    sparse=lambda path, _: path == "hidden/kernel",
    masks=masks,
  )

  def step(count: jax.Array, carry: tuple) -> tuple:
    params, opt_state = carry
    key = jax.random.fold_in(jax.random.key(seed), count)
    batch = jax.random.randint(key, (_BATCH,), 0, examples.labels.shape[0])
    gradient = jax.grad(loss, argnums=1)(
      model, params, Examples(*(array[batch] for array in examples))
    )
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def until(carry: tuple, bounds: jax.Array) -> tuple[tuple, Neurons]:
    carry = lax.fori_loop(bounds[0], bounds[1], step, carry)
    return carry, measure(model, carry[0], mask, examples)

  starts = jnp.concatenate([jnp.zeros_like(stops[:1]), stops[:-1]])
  bounds = jnp.stack([starts, stops], axis=1)
  return lax.scan(until, (params, tx.init(params)), bounds)[1]


def stops_until(steps: int) -> list[int]:
  """0, 10, 30, 100, 300, ... and the last step."""
  powers = range(1, len(str(steps)) + 1)
  marks = [first * 10**power for power in powers for first in (1, 3)]
  return [
    0,
    *(mark for mark in marks if mark < steps),
    *([steps] * (steps > 0)),
  ]


def along_training(
  examples: Examples,
  initialization: str,
  correction: str,
  weight_decay: float,
  seeds: Sequence[int],
  stops: Sequence[int],
) -> list[list[Neurons]]:
  """Trains by SGD with momentum, batch norm and static masks.

  Args:
    examples: As `load` gives them.
    initialization: One of `INITIALIZATIONS`.
    correction: Whether SparseOpt is "on" or "off".
    weight_decay: Of all parameters.
    seeds: One network each.
    stops: Numbers of steps after which to measure, ascending.

  Returns:
    For each seed and stop the neurons.
  """
  model = Mlp("batch_norm", TRAINED_WIDTH)
  seed = jnp.asarray(seeds)
  params, mask = jax.vmap(
    lambda seed: _start(model, seed, examples, initialization)
  )(seed)
  train = jax.vmap(
    functools.partial(_train, model, correction),
    in_axes=(0, 0, None, 0, None, None),
  )
  found = jax.device_get(
    train(params, mask, weight_decay, seed, jnp.asarray(stops), examples)
  )
  return [
    [Neurons(*(array[i, j] for array in found)) for j in range(len(stops))]
    for i in range(len(seeds))
  ]


def by_seed(found: Sequence[Neurons]) -> dict[str, dict[str, list[float]]]:
  """Slopes of several networks.

  Args:
    found: The neurons of each.

  Returns:
    {least fan-in: {slope: one a network}}, see `slopes`.
  """
  result = {}
  for fan_in in FAN_INS:
    each = [slopes(neurons, fan_in) for neurons in found]
    result[str(fan_in)] = {name: [s[name] for s in each] for name in each[0]}
  return result


def _deviations(found: Sequence[Neurons]) -> dict[str, list[float]]:
  """{fan-in: log relative update after SparseOpt, less that of many inputs}.

  One mean for each network that has such neurons: those of one network share
  their inputs, so they do not count singly.
  """
  result: dict[str, list[float]] = {}
  for neurons in found:
    logs = np.log(neurons.corrected / neurons.weights)
    usual = np.mean(logs[neurons.fan_in >= 20])
    for few in (2, 3, 4, 6, 10):
      chosen = logs[neurons.fan_in == few]
      if chosen.size:
        result.setdefault(str(few), []).append(float(np.mean(chosen) - usual))
  return result


def measure_all(examples: Examples, seeds: int, steps: int) -> dict[str, Any]:
  """All figures of the study.

  Args:
    examples: As `load` gives them.
    seeds: How many networks for each figure.
    steps: Length of the training.

  Returns:
    - `ratios`: {normalisation: {sparsity: one a seed}}, see `uniform_ratios`.
    - `slopes`: {normalisation: {initialisation: {least fan-in: {slope: one a
      seed}}}}, see `slopes`.
    - `few_inputs`: {fan-in: one a seed}, see the function of that name.
    - `training`: {initialisation: {correction: {weight decay: at each of
      `stops` {least fan-in: {slope: one a seed}}}}}.
    - `neurons`: those of seed 0, batch norm and He initialisation.
  """
  stops = stops_until(steps)
  found = {
    (norm, start): [
      at_initialization(examples, norm, start, seed) for seed in range(seeds)
    ]
    for norm, start in itertools.product(NORMALIZATIONS, INITIALIZATIONS)
  }
  skewed = found["batch_norm", "he"]
  return {
    "inputs": examples.images.shape[1],
    "seeds": seeds,
    "stops": stops,
    "ratios": {n: ratios(examples, n, range(seeds)) for n in NORMALIZATIONS},
    "slopes": {
      norm: {start: by_seed(found[norm, start]) for start in INITIALIZATIONS}
      for norm in NORMALIZATIONS
    },
    "few_inputs": _deviations(skewed),
    "training": {
      start: {
        on: {
          str(decay): _by_stop(
            along_training(examples, start, on, decay, range(seeds), stops)
          )
          for decay in WEIGHT_DECAYS
        }
        for on in CORRECTIONS
      }
      for start in INITIALIZATIONS
    },
    "neurons": {k: v.tolist() for k, v in skewed[0]._asdict().items()},
  }


def _by_stop(runs: Sequence[Sequence[Neurons]]) -> list[dict[str, Any]]:
  return [by_seed(at_stop) for at_stop in zip(*runs, strict=True)]
