"""The study of Adam: jumps by hand, training by a plain loop, and resuming."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax
from sparseopt_jax.studies import __main__ as command
from sparseopt_jax.studies import adam
from sparseopt_jax.studies import regrowth
from sparseopt_jax.studies import regrowth_tasks

WIDTH, STEP, AGES = 20, 6, 12


# --- Jumps --------------------------------------------------------------------


def adam_by_hand(way, key):
  """Steps of grown over old weights; masks by the bare link, Adam in NumPy."""
  topology = sparseopt_jax.SET(STEP + 1, STEP, lambda count: 0.3)
  link = sparseopt_jax.sparseopt(0.9, topology, corrected=False, seed=key)
  w = np.array(jax.random.normal(key, (WIDTH, WIDTH)) / 10, np.float64)
  update = jax.jit(link.update)
  state = link.init({"kernel": jnp.asarray(w, jnp.float32)})
  before = np.asarray(state.masks["kernel"])
  w *= before
  m, v = np.zeros_like(w), np.zeros_like(w)
  age = np.zeros(w.shape, int)
  ratios = []
  for i in range(STEP + 1 + AGES):
    noise = jax.random.normal(jax.random.fold_in(key, i), (WIDTH, WIDTH))
    _, state = update(
      {"kernel": noise}, state, {"kernel": jnp.asarray(w, jnp.float32)}
    )
    mask = np.asarray(state.masks["kernel"])
    old, grown = mask & before, mask & ~before
    g = np.asarray(noise, np.float64) * (old if i == STEP else mask)
    if i == STEP:
      for slot in (m, v, age):
        slot[~old] = 0
    m, v, age = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, age + (g != 0)
    if i == STEP and way == "layer mean":
      v[grown] = v[old].mean()
    t = np.maximum(age, 1) if way == "SMET" else i + 1
    u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    if way == "SMET":
      u *= np.minimum(t / 10, 1)
    w = np.where(mask, w - 1e-3 * u, 0)
    if i > STEP:
      ratios.append(np.abs(u[grown]).mean() / np.abs(u[old]).mean())
  assert 8 < grown.sum() <= 12  # SET may grow again what it dropped.
  return ratios


@pytest.mark.parametrize("way", regrowth.WAYS)
def test_the_jump_is_that_of_adam_by_hand(way):
  found = regrowth.jump("adam", way, 2, WIDTH, STEP, AGES)
  keys = jax.random.split(jax.random.key(0), 2)
  expected = [adam_by_hand(way, key) for key in keys]
  np.testing.assert_allclose(found, expected, rtol=1e-3)


# --- Training -----------------------------------------------------------------


def load(data_dir):
  """Gaussian inputs, labelled by a linear rule."""
  del data_dir
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 16))
  y = np.argmax(x @ rng.normal(size=(16, 4)), axis=1)
  x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)
  return (x[:200], y[:200]), (x[200:], y[200:])


def init(key):
  one, two = jax.random.split(key)
  draw = jax.random.normal
  return {"a": draw(one, (16, 24)) / 4, "b": draw(two, (24, 4)) / 5}


def batch(key, data):
  rows = jax.random.randint(key, (32,), 0, 200)
  return jax.tree.map(lambda x: x[rows], data[0])


def logits(params, x):
  return jax.nn.relu(x @ params["a"]) @ params["b"]


def loss(params, examples):
  x, y = examples
  each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
  return jnp.mean(each)


def evaluate(params, data):
  x, y = data[1]
  right = jnp.argmax(logits(params, x), axis=1) == y
  return loss(params, data[1]), jnp.mean(right)


TINY = regrowth_tasks.Task(
  load=load,
  init=init,
  batch=batch,
  loss=loss,
  evaluate=evaluate,
  is_text=False,
  sparsity=0.5,
  steps=110,
  update_every=25,
  seeds=2,
  rates=(0.03,),
)


@pytest.mark.slow
def test_training_is_that_of_a_plain_loop():
  """Zero is `sparsify` around AdamW, mask updates decided on the device."""
  data = load(None)
  found = regrowth.train(TINY, "RigL", "zero", 2, 0.03, data)

  key = jax.random.key(1)
  schedule = optax.warmup_cosine_decay_schedule(0.0, 0.03, 11, 110)
  tx = sparseopt_jax.sparsify(
    optax.adamw(schedule, weight_decay=0.01),
    0.5,
    sparseopt_jax.RigL(82, 25),
    corrected=False,
    seed=key,
  )
  params = init(key)
  state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, state)

  @jax.jit
  def step(params, state, examples):
    value, grads = jax.value_and_grad(loss)(params, examples)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  losses = []
  for i in range(110):
    examples = batch(jax.random.fold_in(key, i), data)
    params, state, value = step(params, state, examples)
    losses.append(float(value))
  ratios = [
    np.array(losses[at - 4 : at + 21]) / np.mean(losses[at - 4 : at + 1])
    for at in (25, 50, 75)
  ]
  around = np.prod(ratios, axis=0) ** (1 / 3)
  test_loss, accuracy = evaluate(params, data)
  np.testing.assert_allclose(found["around"][1], around, rtol=1e-3)
  np.testing.assert_allclose(found["test_loss"][1], test_loss, rtol=1e-3)
  np.testing.assert_allclose(found["test_accuracy"][1], accuracy)


def test_text_is_windows_and_the_character_after_each():
  task = regrowth_tasks.TASKS["text"]
  data = task.load(None)
  text = np.asarray(data.train)
  for key in jax.random.split(jax.random.key(0), 3):
    inputs, labels = map(np.asarray, task.batch(key, data))
    assert inputs.shape == labels.shape == (32, 32)
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    whole = np.append(inputs[5], labels[5, -1]).astype(np.uint8).tobytes()
    assert whole in text.astype(np.uint8).tobytes()
  # At first logits are normal with variance 1: log(128) + 1/2 on average.
  params = jax.jit(task.init)(jax.random.key(1))
  bits, accuracy = jax.jit(task.evaluate)(params, data)
  assert bits == pytest.approx(7 + 0.5 / np.log(2), abs=0.5)
  assert accuracy < 0.2


def test_ratios_of_the_loss_by_hand():
  around = [list(range(1, 26)), [2.0] * 25]  # steps -4 to 20
  result = {"around": around, "test_loss": [], "test_accuracy": []}
  found = adam.summary(result)
  assert found["first_step"] == [7 / 6, 1]
  assert found["five_steps"] == [9, 2]
  assert found["around"][:3] == [1.5, 2, 2.5]


def test_the_best_rate_is_of_the_finite_ones(monkeypatch):
  monkeypatch.setattr(regrowth_tasks, "TASKS", {"tiny": TINY})
  accuracies = {"0.4": [0.9, np.nan], "0.1": [0.5, 0.7], "0.2": [0.6, 0.8]}
  rates = {k: {"SMET": {"test_accuracy": v}} for k, v in accuracies.items()}
  assert adam.best_rate("tiny", rates, "SMET") == "0.2"
  text = dataclasses.replace(TINY, is_text=True)
  monkeypatch.setattr(regrowth_tasks, "TASKS", {"tiny": text})
  rates = {k: {"SMET": {"test_loss": v}} for k, v in accuracies.items()}
  assert adam.best_rate("tiny", rates, "SMET") == "0.1"


# --- Command ------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
  """The command on one optimiser, topology and tiny task; its exit code."""
  monkeypatch.setattr(regrowth_tasks, "TASKS", {"tiny": TINY})
  one = {"adam": (lambda: optax.adam(1e-3), ("zero",))}
  monkeypatch.setattr(regrowth, "OPTIMIZERS", one)
  monkeypatch.setattr(regrowth, "TOPOLOGIES", {"RigL": sparseopt_jax.RigL})
  monkeypatch.setattr(adam, "_JUMP", {**adam._JUMP, "width": 20, "step": 5})
  words = ["adam", "--out", str(tmp_path), "--tasks", "tiny"]
  return lambda *flags: command.main([*words, *flags])


class Stopped(Exception):
  """A signal, say."""


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch, capsys):
  train, calls = regrowth.train, []

  def count(task, topology, way, *rest, stop_at):
    if len(calls) == stop_at:
      raise Stopped
    calls.append((topology, way))
    return train(task, topology, way, *rest)

  stopped = functools.partial(count, stop_at=2)
  monkeypatch.setattr(regrowth, "train", stopped)
  with pytest.raises(Stopped):
    run()
  assert not (tmp_path / "adam.json").exists()
  monkeypatch.setattr(regrowth, "train", functools.partial(count, stop_at=3))
  assert run() == 0
  assert calls == [("RigL", way) for way in ("zero", "layer mean", "SMET")]
  first = json.loads((tmp_path / "adam.json").read_text())
  assert run() == 0
  assert json.loads((tmp_path / "adam.json").read_text()) == first
  assert (tmp_path / "adam.png").stat().st_size > 10_000

  cells = first["training"]["tiny"]["RigL"]["0.03"]
  expected = train(TINY, "RigL", "SMET", 2, 0.03, load(None))
  for name in ("test_loss", "test_accuracy"):
    np.testing.assert_allclose(cells["SMET"][name], expected[name], rtol=1e-6)
  change = 100 * np.subtract(
    expected["test_accuracy"], cells["zero"]["test_accuracy"]
  )
  # t of one degree of freedom: 12.7062.
  half = 12.7062 * np.std(change, ddof=1) / np.sqrt(2)
  assert f"{np.mean(change):+.2f} ± {half:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flags", "named"),
  [
    (["--seeds", "0"], "--seeds"),
    (["--steps", "99"], "--steps"),
    (["--rates", "0.1", "0"], "--rates"),
    (["--tasks", "iris"], "--tasks"),
  ],
)
def test_bad_input_is_one_line(run, capsys, flags, named):
  assert run(*flags) == 2
  error = capsys.readouterr().err
  assert named in error
  assert error.count("\n") == 1


def test_a_missing_data_set_is_one_line(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(regrowth, "OPTIMIZERS", {})
  flags = ["--tasks", "fashion_mnist", "--data-dir", str(tmp_path)]
  assert command.main(["adam", "--out", str(tmp_path), *flags]) == 2
  assert "--tasks fashion_mnist" in capsys.readouterr().err


def test_a_damaged_data_set_is_one_line(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(regrowth, "OPTIMIZERS", {})
  (tmp_path / "fashion_mnist.npz").write_bytes(b"no images")
  flags = ["--tasks", "fashion_mnist", "--data-dir", str(tmp_path)]
  assert command.main(["adam", "--out", str(tmp_path), *flags]) == 2
  error = capsys.readouterr().err
  assert "--tasks fashion_mnist" in error
  assert error.count("\n") == 1
