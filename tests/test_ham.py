"""HAM against the oracle, alone and inside of `sparsify`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax
from sparseopt_jax.studies import ham


def _draw(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _tree(seed):
  return {"kernel": _draw(seed, 6, 4), "bias": _draw(seed + 1, 4)}


def test_a_weight_at_zero_stays_there_at_any_gradient():
  params = {"kernel": jnp.zeros((2, 2))}
  gradients = {"kernel": jnp.array([[np.nan, np.inf], [-np.inf, 1.0]])}
  tx = ham.ham(optax.set_to_zero(), 0.1)
  updates, _ = tx.update(gradients, tx.init(params), params)
  np.testing.assert_array_equal(updates["kernel"], 0)


def test_a_schedule_in_float64_under_strict_promotion():
  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    params = {"kernel": _draw(0, 6, 4, dtype=jnp.float64)}
    schedule = lambda count: jnp.float32(0.1)
    tx = ham.ham(optax.sgd(0.1), schedule)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["kernel"].dtype == jnp.float64


def test_matches_the_oracle_with_momentum_and_a_schedule():
  schedule = optax.linear_schedule(0.1, 0.02, 4)
  base = optax.sgd(schedule, momentum=0.9)
  tx = ham.ham(base, schedule, alpha=3.0, beta=0.2)
  params = _tree(0)
  state, base_state = tx.init(params), base.init(params)
  update = jax.jit(tx.update)
  for t in range(5):
    gradients = _tree(10 + t)
    base_updates, base_state = base.update(gradients, base_state, params)
    updates, state = update(gradients, state, params)
    expected = {
      name: oracle.ham(
        params[name], base_updates[name], gradients[name], schedule(t), 3.0, 0.2
      )
      for name in params
    }
    params = optax.apply_updates(params, updates)
    for name in params:
      np.testing.assert_allclose(params[name], expected[name], rtol=2e-5)
  assert int(state.count) == 5
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(close, state.inner_state, base_state)


def test_exponent_is_clamped():
  tx = ham.ham(optax.identity(), 1.0, alpha=1e6, beta=0.0)
  params = {"kernel": jnp.array([[1.0, -1.0, 1.0]])}
  gradient = {"kernel": jnp.array([[1e-3, 1e-3, -1e-3]])}
  updates, _ = tx.update(gradient, tx.init(params), params)
  stepped = np.array([[1.001, -0.999, 0.999]])
  factor = np.exp([[-5.0, 5.0, 5.0]])
  got = optax.apply_updates(params, updates)["kernel"]
  np.testing.assert_allclose(got, stepped * factor, rtol=1e-5)


def test_zeros_and_leaves_of_one_axis_are_left_alone():
  tx = ham.ham(optax.sgd(0.1), 0.1)
  params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.ones(2)}
  gradient = {"kernel": jnp.zeros((2, 2)), "bias": jnp.full(2, 0.5)}
  updates, _ = tx.update(gradient, tx.init(params), params)
  np.testing.assert_array_equal(updates["kernel"], 0.0)
  np.testing.assert_array_equal(updates["bias"], np.float32(-0.05))


def test_without_alpha_and_beta_it_is_the_base_optimiser_bit_for_bit():
  base = optax.adam(0.1)
  tx = ham.ham(base, 0.1, alpha=0.0, beta=0.0)
  params, gradient = _tree(0), _tree(2)
  got, _ = tx.update(gradient, tx.init(params), params)
  expected, _ = base.update(gradient, base.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
  tx = ham.ham(optax.sgd(0.1, momentum=0.9), 0.1)
  params = {"kernel": _draw(0, 6, 4, dtype=dtype)}
  state = tx.init(params)
  updates, new_state = tx.update(params, state, params)
  assert updates["kernel"].dtype == dtype
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(new_state) == dtypes(state)


def test_inside_of_sparsify():
  """The gradient of the multiplicative step is masked and corrected."""
  topology = sparseopt_jax.RigL(8, update_every=2, drop_fraction=0.5)
  base = optax.sgd(0.05, momentum=0.9)
  tx = sparseopt_jax.sparsify(
    ham.ham(base, 0.05, alpha=2.0, beta=0.1), 0.5, topology, corrected=True
  )
  params = _tree(0)
  state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, state)
  update = jax.jit(tx.update)
  base_state = base.init(params)
  changes = 0
  for t in range(6):
    gradients = _tree(10 + t)
    old = np.asarray(sparseopt_jax.get_masks(state)["kernel"])
    updates, state = update(gradients, state, params)
    new = np.asarray(sparseopt_jax.get_masks(state)["kernel"])
    stays = old & new
    corrected = np.where(new, oracle.correct(gradients["kernel"], old), 0.0)
    seen = jnp.asarray(np.where(stays, corrected, 0.0), jnp.float32)
    restarted = jax.tree.map(
      lambda slot, stays=stays: (
        jnp.where(stays, slot, 0) if slot.shape == stays.shape else slot
      ),
      base_state,
    )
    given = {"kernel": seen, "bias": gradients["bias"]}
    base_updates, base_state = base.update(given, restarted, params)
    expected = oracle.ham(
      params["kernel"], base_updates["kernel"], seen, 0.05, 2.0, 0.1
    )
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
      params["kernel"], np.where(stays, expected, 0.0), rtol=2e-5, atol=1e-7
    )
    changes += bool((old != new).any())
  assert changes == 2


def test_extra_arguments_reach_the_base_optimiser():
  tx = ham.ham(
    optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), 0.1
  )
  params = _tree(0)
  tx.update(params, tx.init(params), params, value=jnp.float32(1.0))
