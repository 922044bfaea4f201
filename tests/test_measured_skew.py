"""`training.skew`: against NumPy's least squares."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax
from sparseopt_jax import train
from sparseopt_jax.training import skew

SHAPES = {"conv": (3, 3, 8, 12), "dense": (40, 10), "head": (30, 6)}
MEASURED = ("conv", "dense")


def _draw(rng: np.random.Generator) -> dict:
  return {
    name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    for name, shape in SHAPES.items()
  }


def _points(mask, gradient, weight) -> tuple[np.ndarray, np.ndarray]:
  """Log density and log relative update of the neurons that count."""
  x, y = [], []
  for column in range(mask.shape[-1]):
    active = mask[..., column]
    if active.sum() < 5:
      continue
    up = np.linalg.norm(np.float64(gradient[..., column][active]))
    down = np.linalg.norm(np.float64(weight[..., column][active]))
    x.append(np.log(active.mean()))
    y.append(np.log(up / down))
  return np.array(x), np.array(y)


def _slope(layers: list[list[tuple[np.ndarray, np.ndarray]]]) -> float:
  """One slope, and an intercept for each layer and step: least squares."""
  groups = [points for step in layers for points in step]
  rows, targets = [], []
  for index, (x, y) in enumerate(groups):
    one_hot = np.zeros((len(x), len(groups)))
    one_hot[:, index] = 1
    rows.append(np.column_stack([x, one_hot]))
    targets.append(y)
  found, *_ = np.linalg.lstsq(
    np.concatenate(rows), np.concatenate(targets), rcond=None
  )
  return float(found[0])


@pytest.mark.parametrize("kind", [sparseopt_jax.SET, sparseopt_jax.RigL])
def test_slopes_are_those_of_least_squares(kind):
  rng = np.random.default_rng(0)
  plain = sparseopt_jax.sparsify(
    optax.sgd(0.1, 0.9), 0.7, kind(20, 3), corrected=True
  )
  paths = [f"{name}/kernel" for name in MEASURED]
  tx = skew.measured(plain, paths, steps_per_epoch=5)
  update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
  params = _draw(rng)
  state, plain_state = tx.init(params), plain.init(params)
  params = sparseopt_jax.apply_masks(params, state)
  seen = {"all": [], "before": [], "after": []}
  was_due = False
  for step in range(10):
    if step == 5:
      seen = {"all": [], "before": [], "after": []}
    masks = sparseopt_jax.get_masks(state)
    grads = _draw(rng)
    points = [
      _points(
        *(np.asarray(tree[name]["kernel"]) for tree in (masks, grads, params))
      )
      for name in MEASURED
    ]
    updates, state = update(grads, state, params)
    expected, plain_state = plain_update(grads, plain_state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    params = optax.apply_updates(params, updates)
    seen["all"].append(points)
    is_due = step in (3, 6, 9)
    if is_due:
      seen["before"].append(points)
    if was_due:
      seen["after"].append(points)
    was_due = is_due
  found = skew.figures(state, params)
  for name, key in (
    ("skew_slope", "all"),
    ("skew_slope_before", "before"),
    ("skew_slope_after", "after"),
  ):
    assert found[name] == pytest.approx(_slope(seen[key]), abs=1e-4), name
  masks = sparseopt_jax.get_masks(state)
  sizes = [
    _points(mask, weight, np.ones(mask.shape))
    for name in MEASURED
    for mask, weight in [
      [np.asarray(tree[name]["kernel"]) for tree in (masks, params)]
    ]
  ]
  assert found["weight_slope"] == pytest.approx(_slope([sizes]), abs=1e-4)
  assert set(found["layers"]) == set(paths)
  for index, path in enumerate(paths):
    mine = [[step[index]] for step in seen["all"]]
    assert found["layers"][path] == pytest.approx(_slope(mine), abs=1e-4)


def test_there_is_no_slope_where_fan_ins_are_equal():
  params = {"kernel": jnp.ones((16, 4))}
  mask = {"kernel": jnp.arange(16)[:, None] < jnp.full((1, 4), 8)}
  tx = skew.measured(
    sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, corrected=True, masks=mask),
    ["kernel"],
    steps_per_epoch=10,
  )
  state = tx.init(params)
  grads = {"kernel": jnp.arange(64.0).reshape(16, 4)}
  _, state = tx.update(grads, state, params)
  assert skew.figures(state, params) == {
    "skew_slope": None,
    "skew_slope_before": None,
    "skew_slope_after": None,
    "weight_slope": None,
    "layers": {"kernel": None},
  }


@pytest.mark.slow
def test_a_run_records_slopes_and_is_otherwise_the_same(tmp_path):
  flags = [
    "--epochs",
    "2",
    "--width",
    "8",
    "--warmup-epochs",
    "0",
    "--correction",
    "off",
  ]
  for name, more in (("with", ["--measure-skew"]), ("without", [])):
    assert train.main([*flags, *more, "--workdir", str(tmp_path / name)]) == 0
  lines = {
    name: [
      json.loads(line)
      for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("with", "without")
  }
  for one, other in zip(lines["with"], lines["without"], strict=True):
    assert one["test_loss"] == other["test_loss"]
    assert isinstance(one["skew_slope"], float)
    assert "skew_slope" not in other
    assert "skew_slope" not in one["layers"]["Dense_0/kernel"]
  # Batch normalisation skews the gradient at the start of a training.
  assert lines["with"][0]["skew_slope"] < 0
