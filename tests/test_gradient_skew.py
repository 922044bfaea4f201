"""The gradient-skew study: ratios and slopes against theory, bad input."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseopt_jax.studies import __main__ as command
from sparseopt_jax.studies import skew

measure = jax.jit(skew.measure, static_argnums=0)
NAMES = ("relative update", "corrected relative update")


@pytest.fixture(scope="module")
def digits():
  return skew.load("digits")


@pytest.fixture(scope="module")
def independent():
  """Independent inputs: what the theory assumes."""
  return gaussian(64)


def gaussian(inputs):
  """Gaussian images, labelled by a linear rule."""
  rng = np.random.default_rng(0)
  images = rng.standard_normal((1024, inputs))
  labels = np.argmax(images @ rng.standard_normal((inputs, 10)), axis=1)
  return skew.Examples(
    jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
  )


def mean_slope(examples, norm, start, fan_in, name, seeds):
  found = [
    skew.slopes(skew.at_initialization(examples, norm, start, seed), fan_in)[
      name
    ]
    for seed in range(seeds)
  ]
  return np.mean(found)


def test_digits_are_standardised_and_live(digits):
  assert digits.images.shape == (1437, 60)  # 4 of 64 pixels never change.
  np.testing.assert_allclose(np.mean(digits.images, axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(np.std(digits.images, axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "group_norm"])
def test_normalisation_amplifies_the_gradient(digits, norm):
  ratios = np.mean(
    [skew.uniform_ratios(digits, norm, s) for s in range(3)], axis=0
  )
  fan_ins = np.array(skew.fan_ins(60))
  theory = np.sqrt(60 / fan_ins)
  enough = fan_ins >= 10
  assert enough.sum() == 8  # up to 80 %
  np.testing.assert_allclose(ratios[enough], theory[enough], rtol=0.15)


def test_without_normalisation_it_is_not_amplified(digits):
  ratios = skew.uniform_ratios(digits, "none", 0)
  np.testing.assert_allclose(ratios, 1, atol=0.1)


def test_batch_norm_amplifies_up_to_95_percent_with_many_inputs():
  ratios = skew.uniform_ratios(gaussian(400), "batch_norm", 0)
  theory = (1 - np.array(skew.SPARSITIES)) ** -0.5
  np.testing.assert_allclose(ratios, theory, rtol=0.1)


@pytest.mark.parametrize(
  ("norm", "start", "slope"),
  [
    ("batch_norm", "he", -0.5),
    ("batch_norm", "per_neuron", 0.5),
    ("layer_norm", "he", 0.0),
    ("none", "he", 0.0),
  ],
)
def test_slopes_of_independent_inputs(independent, norm, start, slope):
  before, after = (
    mean_slope(independent, norm, start, 10, name, 3) for name in NAMES
  )
  assert before == pytest.approx(slope, abs=0.05)
  assert after == pytest.approx(slope + 0.5, abs=0.05)


def test_sparseopt_takes_the_skew_out_on_digits(digits):
  before, after = (
    mean_slope(digits, "batch_norm", "he", 10, name, 10) for name in NAMES
  )
  assert before == pytest.approx(-0.5, abs=0.05)
  assert after == pytest.approx(0.0, abs=0.05)


def test_few_inputs_lose_a_direction(independent):
  found = [
    skew.at_initialization(independent, "batch_norm", "he", seed)
    for seed in range(10)
  ]
  fan_in = np.concatenate([n.fan_in for n in found])
  logs = np.concatenate([np.log(n.corrected / n.weights) for n in found])
  usual = np.mean(logs[fan_in >= 20])
  for few, tolerance in ((2, 0.15), (3, 0.1), (4, 0.1), (6, 0.1)):
    expected = skew.few_inputs(few)
    measured = np.mean(logs[fan_in == few]) - usual
    assert measured == pytest.approx(expected, abs=tolerance)


def test_one_input_has_no_gradient_under_batch_norm(digits):
  model = skew.Mlp("batch_norm", width=8)
  key = jax.random.key(0)
  mask = skew.draw_mask(key, jnp.ones(8, jnp.int32), 60)
  params = skew.init(model, key, mask, "he")
  # Of length 1: batch norm's epsilon tells very short weights apart.
  params["hidden"]["kernel"] = mask.astype(jnp.float32)
  neurons = measure(model, params, mask, digits)
  wide = measure(model, params, jnp.ones_like(mask), digits)
  np.testing.assert_array_less(neurons.gradient, 1e-4 * wide.gradient)


def test_masks_have_the_fan_ins_asked_for():
  fan_in = skew.draw_fan_ins(jax.random.key(1), 60, 500)
  assert int(fan_in.min()) == 2
  assert int(fan_in.max()) > 50
  mask = skew.draw_mask(jax.random.key(2), fan_in, 60)
  np.testing.assert_array_equal(mask.sum(axis=0), fan_in)


def test_gradient_equals_that_derived_by_hand(digits):
  """The backward pass of batch norm and softmax in float64 NumPy."""
  model = skew.Mlp("batch_norm", width=16)
  key = jax.random.key(3)
  fan_in = skew.draw_fan_ins(key, 60, 16)
  mask = skew.draw_mask(key, fan_in, 60)
  params = skew.init(model, key, mask, "per_neuron")
  got = measure(model, params, mask, digits)

  x = np.asarray(digits.images, np.float64)
  w = np.asarray(params["hidden"]["kernel"], np.float64)
  v = np.asarray(params["output"]["kernel"], np.float64)
  z = x @ w
  sigma = np.sqrt(z.var(axis=0) + 1e-5)
  y = (z - z.mean(axis=0)) / sigma
  scores = np.exp(np.maximum(y, 0) @ v)
  error = scores / scores.sum(axis=1, keepdims=True)
  error[np.arange(len(x)), digits.labels] -= 1
  delta = (error / len(x)) @ v.T * (y > 0)
  delta = delta - delta.mean(axis=0) - y * (delta * y).mean(axis=0)
  gradient = np.where(mask, x.T @ (delta / sigma), 0)

  norm = np.linalg.norm(gradient, axis=0)
  np.testing.assert_allclose(got.gradient, norm, rtol=1e-3)
  factor = np.sqrt(fan_in * 16 / fan_in.sum())
  np.testing.assert_allclose(got.corrected, norm * factor, rtol=1e-3)
  np.testing.assert_allclose(got.weights, np.linalg.norm(w, axis=0), rtol=1e-5)


@pytest.mark.parametrize("correction", ["off", "on"])
def test_training_is_sgd_with_momentum(digits, correction):
  """Against a loop over plain Optax, masks applied by hand."""
  decay = 1e-3
  [[start, end]] = skew.along_training(
    digits, "he", correction, decay, [4], [0, 3]
  )
  model = skew.Mlp("batch_norm", skew.TRAINED_WIDTH)
  params, mask = skew._start(model, 4, digits, "he")
  before = measure(model, params, mask, digits)
  np.testing.assert_allclose(start.gradient, before.gradient, rtol=1e-3)

  fan_in = np.asarray(mask.sum(axis=0))
  scale = np.sqrt(fan_in / fan_in.mean()) if correction == "on" else 1.0
  factor = jnp.asarray(np.asarray(mask) * scale, jnp.float32)
  tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1, 0.9))
  opt_state = tx.init(params)
  gradient_of = jax.jit(jax.grad(skew.loss, 1), static_argnums=0)
  for step in range(3):
    key = jax.random.fold_in(jax.random.key(4), step)
    rows = jax.random.randint(key, (128,), 0, 1437)
    batch = skew.Examples(digits.images[rows], digits.labels[rows])
    gradient = gradient_of(model, params, batch)
    gradient["hidden"]["kernel"] *= factor
    updates, opt_state = tx.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
  after = measure(model, params, mask, digits)
  np.testing.assert_allclose(end.weights, after.weights, rtol=1e-4)
  np.testing.assert_allclose(end.outgoing, after.outgoing, rtol=1e-3)
  assert np.max(np.abs(end.outgoing - start.outgoing)) > 1e-2


@pytest.mark.parametrize(
  ("steps", "stops"),
  [
    (0, [0]),
    (7, [0, 7]),
    (10, [0, 10]),
    (100, [0, 10, 30, 100]),
    (450, [0, 10, 30, 100, 300, 450]),
  ],
)
def test_stops(steps, stops):
  assert skew.stops_until(steps) == stops


def test_the_command_leaves_its_results(digits, tmp_path, capsys):
  arguments = ["--out", str(tmp_path), "--seeds", "2", "--steps", "2"]
  assert command.main(["gradient-skew", *arguments]) == 0
  raw = json.loads((tmp_path / "gradient-skew.json").read_text())
  assert raw["dataset"] == "digits"
  assert raw["stops"] == [0, 2]
  assert raw["command"].endswith(" ".join(["gradient-skew", *arguments]))
  again = skew.uniform_ratios(digits, "batch_norm", 1)
  assert [values[1] for values in raw["ratios"]["batch_norm"].values()] == again
  for norm, start in itertools.product(
    skew.NORMALIZATIONS, skew.INITIALIZATIONS
  ):
    neurons = skew.at_initialization(digits, norm, start, 1)
    expected = skew.slopes(neurons, 2)
    found = raw["slopes"][norm][start]["2"]
    assert {name: values[1] for name, values in found.items()} == expected
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
