"""The gradient-skew study: ratios and slopes against theory, bad input."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseopt_jax.studies import __main__ as command
from sparseopt_jax.studies import gradient_skew

RUNS = ("without SparseOpt", "with SparseOpt")
measure = jax.jit(gradient_skew.measure, static_argnums=3)


@pytest.fixture(scope="module")
def digits():
  return gradient_skew.load("digits")


@pytest.fixture(scope="module")
def independent():
  """Independent inputs: what the theory assumes."""
  return gaussian(64)


def gaussian(inputs):
  """Gaussian images, labelled by a linear rule."""
  rng = np.random.default_rng(0)
  images = rng.standard_normal((1024, inputs))
  labels = np.argmax(images @ rng.standard_normal((inputs, 10)), axis=1)
  return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


def mean_slopes(examples, norm, start, seeds):
  found = gradient_skew.slopes(
    [
      gradient_skew.at_initialization(examples, norm, start, seed)
      for seed in range(seeds)
    ]
  )
  return [np.mean(found[run]) for run in RUNS]


def test_digits_are_standardised_and_live(digits):
  images, labels = digits
  assert images.shape == (1437, 60)  # 4 of 64 pixels never change.
  assert labels.shape == (1437,)
  np.testing.assert_allclose(np.mean(images, axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(np.std(images, axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch norm", "layer norm"])
def test_normalisation_amplifies_the_gradient(digits, norm):
  ratios = gradient_skew.ratios(digits, norm, range(3)).values()
  fan_ins = np.array([54, 48, 42, 36, 30, 24, 18, 12])
  enough = np.mean(list(ratios), axis=1)[:8]  # up to 80 %
  np.testing.assert_allclose(enough, np.sqrt(60 / fan_ins), rtol=0.15)


def test_without_normalisation_it_is_not_amplified(digits):
  ratios = gradient_skew.ratios(digits, "none", [0])
  np.testing.assert_allclose(list(ratios.values()), 1, atol=0.1)


def test_batch_norm_amplifies_up_to_97_percent_with_many_inputs():
  ratios = gradient_skew.ratios(gaussian(400), "batch norm", [0])
  for sparsity, [ratio] in ratios.items():
    theory = (1 - float(sparsity[:-1]) / 100) ** -0.5
    assert ratio == pytest.approx(theory, rel=0.1)


@pytest.mark.parametrize(
  ("norm", "start", "slope"),
  [
    ("batch norm", "He", -0.5),
    ("batch norm", "per neuron", 0.5),
    ("layer norm", "He", 0.0),
    ("none", "He", 0.0),
  ],
)
def test_slopes_of_independent_inputs(independent, norm, start, slope):
  without, corrected = mean_slopes(independent, norm, start, 3)
  assert without == pytest.approx(slope, abs=0.05)
  assert corrected == pytest.approx(slope + 0.5, abs=0.05)


def test_sparseopt_takes_the_skew_out_on_digits(digits):
  without, corrected = mean_slopes(digits, "batch norm", "He", 10)
  assert without == pytest.approx(-0.5, abs=0.05)
  assert corrected == pytest.approx(0.0, abs=0.05)


def test_one_input_has_no_gradient_under_batch_norm(digits):
  params, mask = gradient_skew.start(0, 60, 8, fan_in=1)
  # Of length 1: batch norm's epsilon tells very short weights apart.
  params["hidden"] = mask.astype(jnp.float32)
  neurons = measure(params, mask, digits, "batch norm")
  wide = measure(params, jnp.ones_like(mask), digits, "batch norm")
  np.testing.assert_array_less(neurons.gradient, 1e-4 * wide.gradient)


def test_masks_have_the_fan_ins_asked_for():
  params, mask = gradient_skew.start(1, 60, 500)
  fan_in = np.sort(np.sum(mask, axis=0))
  assert fan_in[0] == 2
  assert fan_in[-1] > 50
  # Log-uniform: as many in each of two ranges of the same ratio.
  low, high = np.sum(fan_in < 10.4), np.sum(fan_in > 10.4)
  assert abs(low - high) < 4 * np.sqrt(500 * 0.5 * 0.5)
  np.testing.assert_array_equal(np.asarray(params["hidden"]) != 0, mask)
  _, mask = gradient_skew.start(1, 60, 500, fan_in=7)
  np.testing.assert_array_equal(np.sum(mask, axis=0), 7)
  assert np.all(np.sum(mask, axis=1) > 0)


@pytest.mark.parametrize(("start", "scale"), [("He", 60), ("per neuron", 15)])
def test_variance_of_the_weights(start, scale):
  params, mask = gradient_skew.start(0, 60, 1024, start, fan_in=15)
  weights = np.asarray(params["hidden"])[np.asarray(mask)]
  assert np.var(weights) == pytest.approx(2 / scale, rel=0.05)


class FlaxMlp(nn.Module):
  """The same network of Flax's layers."""

  norm: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(16, use_bias=False, name="hidden")(x)
    if self.norm == "batch norm":
      x = nn.BatchNorm(use_running_average=False, name="norm")(x)
    elif self.norm == "layer norm":
      x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
    return nn.Dense(10, name="output")(nn.relu(x))


@pytest.mark.parametrize("norm", ["batch norm", "layer norm", "none"])
def test_the_network_is_that_of_flax(digits, norm):
  images, labels = digits
  params, _ = gradient_skew.start(0, 60, 16)
  params["scale"] = jnp.linspace(0.5, 2.0, 16)[None]
  params["shift"] = jnp.linspace(-0.3, 0.4, 16)[None]
  params["bias"] = jnp.linspace(-1.0, 1.0, 10)[None]
  theirs = {
    "hidden": {"kernel": params["hidden"]},
    "output": {"kernel": params["output"], "bias": params["bias"][0]},
  }
  if norm != "none":
    theirs["norm"] = {"scale": params["scale"][0], "bias": params["shift"][0]}

  def loss(theirs):
    logits, _ = FlaxMlp(norm).apply(
      {"params": theirs}, images, mutable=["batch_stats"]
    )
    chosen = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
    return -jnp.mean(chosen)

  value, gradient = jax.value_and_grad(loss)(theirs)
  got = jax.grad(gradient_skew.loss)(params, digits, norm)
  same = float(gradient_skew.loss(params, digits, norm))
  assert same == pytest.approx(float(value), rel=1e-5)
  np.testing.assert_allclose(
    got["hidden"], gradient["hidden"]["kernel"], rtol=1e-3, atol=1e-6
  )
  np.testing.assert_allclose(
    got["output"], gradient["output"]["kernel"], rtol=1e-3, atol=1e-6
  )
  if norm != "none":
    np.testing.assert_allclose(
      got["scale"][0], gradient["norm"]["scale"], rtol=1e-3, atol=1e-6
    )


def test_gradient_equals_that_derived_by_hand(digits):
  """The backward pass of batch norm and softmax in float64 NumPy."""
  params, mask = gradient_skew.start(3, 60, 16, "per neuron")
  got = measure(params, mask, digits, "batch norm")

  images, labels = digits
  x = np.asarray(images, np.float64)
  w = np.asarray(params["hidden"], np.float64)
  v = np.asarray(params["output"], np.float64)
  z = x @ w
  sigma = np.sqrt(z.var(axis=0) + 1e-5)
  y = (z - z.mean(axis=0)) / sigma
  scores = np.exp(np.maximum(y, 0) @ v)
  error = scores / scores.sum(axis=1, keepdims=True)
  error[np.arange(len(x)), labels] -= 1
  delta = (error / len(x)) @ v.T * (y > 0)
  delta = delta - delta.mean(axis=0) - y * (delta * y).mean(axis=0)
  dense = x.T @ (delta / sigma)

  fan_in = np.sum(mask, axis=0)
  norm = np.linalg.norm(np.where(mask, dense, 0), axis=0)
  np.testing.assert_array_equal(got.fan_in, fan_in)
  np.testing.assert_allclose(got.gradient, norm, rtol=1e-3)
  np.testing.assert_allclose(
    got.dense, np.linalg.norm(dense, axis=0), rtol=1e-3
  )
  factor = np.sqrt(fan_in * 16 / fan_in.sum())
  np.testing.assert_allclose(got.corrected, norm * factor, rtol=1e-3)
  np.testing.assert_allclose(got.weights, np.linalg.norm(w, axis=0), rtol=1e-5)


@pytest.mark.parametrize("corrected", [False, True])
def test_training_is_sgd_with_momentum(digits, corrected):
  """Against a loop over plain Optax, masks applied by hand."""
  [_, [start], _, [end]] = gradient_skew.along_training(
    digits, corrected, [4], [0, 0, 1, 3]
  )
  params, mask = gradient_skew.start(4, 60, gradient_skew.TRAINED_WIDTH)
  before = measure(params, mask, digits, "batch norm")
  np.testing.assert_allclose(start.gradient, before.gradient, rtol=1e-3)

  fan_in = np.asarray(mask.sum(axis=0))
  scale = np.sqrt(fan_in / fan_in.mean()) if corrected else 1.0
  factor = jnp.asarray(np.asarray(mask) * scale, jnp.float32)
  tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9))
  opt_state = tx.init(params)
  gradient_of = jax.jit(jax.grad(gradient_skew.loss), static_argnums=2)
  for step in range(3):
    key = jax.random.fold_in(jax.random.key(4), step)
    rows = jax.random.randint(key, (128,), 0, 1437)
    batch = (digits[0][rows], digits[1][rows])
    gradient = gradient_of(params, batch, "batch norm")
    gradient["hidden"] *= factor
    updates, opt_state = tx.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
  after = measure(params, mask, digits, "batch norm")
  np.testing.assert_allclose(end.weights, after.weights, rtol=3e-5)
  np.testing.assert_allclose(end.gradient, after.gradient, rtol=1e-3)
  assert np.max(np.abs(end.weights - start.weights)) > 1e-2


def slope(fan_in, norm):
  """Of neurons with ten inputs and more, by NumPy's lstsq."""
  some = np.asarray(fan_in) >= 10
  x = np.log(np.asarray(fan_in, np.float64)[some])
  y = np.log(np.asarray(norm, np.float64)[some])
  rows = np.stack([x, np.ones_like(x)], axis=1)
  return np.linalg.lstsq(rows, y)[0][0]


@pytest.mark.slow
def test_the_command_leaves_its_results(digits, tmp_path, capsys):
  arguments = ["--out", str(tmp_path), "--seeds", "2", "--steps", "2"]
  assert command.main(["gradient-skew", *arguments]) == 0
  raw = json.loads((tmp_path / "gradient-skew.json").read_text())
  assert raw["dataset"] == "digits"
  assert raw["command"].endswith(" ".join(["gradient-skew", *arguments]))
  # One a seed, in their order: the second network of each.
  for norm in ("batch norm", "layer norm", "none"):
    for start in ("He", "per neuron"):
      neurons = gradient_skew.at_initialization(digits, norm, start, 1)
      found = raw["slopes"][f"{norm}, {start}"]
      for run, gradient in zip(
        RUNS, (neurons.gradient, neurons.corrected), strict=True
      ):
        expected = slope(neurons.fan_in, gradient / neurons.weights)
        assert found[run][1] == pytest.approx(expected, abs=1e-5)
  dense, sparse = (
    gradient_skew.at_initialization(digits, "batch norm", "He", 1, fan_in)
    for fan_in in (60, 30)
  )
  expected = np.sqrt(np.sum(sparse.dense**2) / np.sum(dense.dense**2))
  found = raw["ratios"]["batch norm"]["50%"]
  assert found[1] == pytest.approx(expected, rel=1e-5)
  assert raw["stops"] == [0, 2]
  training = raw["training"]
  assert list(training["update with SparseOpt"]) == ["step 0", "step 2"]
  without, corrected = (training[f"update {run}"]["step 0"] for run in RUNS)
  np.testing.assert_allclose(np.subtract(corrected, without), 0.5, atol=1e-5)
  [[_, neurons]] = gradient_skew.along_training(digits, True, [0, 1], [2])
  for what, norm in (
    ("update", neurons.corrected / neurons.weights),
    ("weights", neurons.weights),
  ):
    found = training[f"{what} with SparseOpt"]["step 2"]
    expected = slope(neurons.fan_in, norm)
    assert found[1] == pytest.approx(expected, abs=1e-5)
  text = (tmp_path / "gradient-skew.txt").read_text()
  assert text.strip() in capsys.readouterr().out
  image = (tmp_path / "gradient-skew.png").read_bytes()
  assert image.startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    (["--seeds", "x"], "invalid int value: 'x'"),
    (["--steps", "-1"], "--steps must not be negative, got -1"),
    (["--dataset", "mnist"], "invalid choice: 'mnist'"),
    (["--dataset", "fashion_mnist", "--data-dir", "."], "is not prepared in ."),
    (["--out", "file"], "--out file: File exists"),
    (["--width", "3"], "unrecognized arguments"),
  ],
)
def test_bad_input_is_one_line(flags, words, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").touch()
  assert command.main(["gradient-skew", *flags]) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1
