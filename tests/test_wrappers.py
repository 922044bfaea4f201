"""keep_params_sparse in detail: what it resets, skips, forwards and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax

keep = sparseopt_jax.keep_params_sparse


def _draw(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def _tree(seed):
  return {"kernel": _draw(seed, 6, 5), "bias": _draw(seed + 1000, 5)}


def _mask(opt_state):
  return np.asarray(sparseopt_jax.get_masks(opt_state)["kernel"])


def _skipped(opt_state):
  return int(sparseopt_jax.sparsity_metrics(opt_state)["skipped_updates"])


def _start(tx, seed=0):
  params = _tree(seed)
  opt_state = tx.init(params)
  return sparseopt_jax.apply_masks(params, opt_state), opt_state


def _stepper(tx):
  @jax.jit
  def step(gradients, opt_state, params, **extra_args):
    updates, opt_state = tx.update(gradients, opt_state, params, **extra_args)
    return optax.apply_updates(params, updates), opt_state

  return step


# --- What a mask update does to weights and slots -----------------------------


def test_a_weight_dropped_and_grown_at_once_has_not_changed():
  topology = sparseopt_jax.RigL(10, update_every=1, drop_fraction=0.5)
  tx = keep(
    optax.chain(sparseopt_jax.sparseopt(0.5, topology), optax.adam(0.1))
  )
  params, opt_state = _start(tx)
  step = _stepper(tx)
  params, opt_state = step(_tree(1), opt_state, params)
  # Only active weights have a gradient to speak of, so they all come back.
  mask = _mask(opt_state)
  gradients = _tree(2)
  gradients["kernel"] = jnp.where(mask, gradients["kernel"] + 10, 1e-3)
  plain = optax.adam(0.1)
  corrected = gradients | {
    "kernel": jnp.asarray(
      oracle.correct(gradients["kernel"], mask), jnp.float32
    )
  }
  updates, expected_state = plain.update(corrected, opt_state[1], params)
  expected = optax.apply_updates(params, updates)
  new_params, new_state = step(gradients, opt_state, params)
  np.testing.assert_array_equal(_mask(new_state), mask)
  np.testing.assert_allclose(
    new_params["kernel"], np.where(mask, expected["kernel"], 0), rtol=1e-6
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6)
  jax.tree.map(close, new_state[1], expected_state)


def test_init_of_the_inner_sees_masked_parameters():
  tx = keep(
    optax.contrib.schedule_free(
      optax.chain(sparseopt_jax.sparseopt(0.5), optax.sgd(0.1)), 0.1, b1=0.9
    )
  )
  params = _tree(0)
  opt_state = tx.init(params)
  masked = sparseopt_jax.apply_masks(params, opt_state)
  jax.tree.map(np.testing.assert_array_equal, opt_state.z, masked)


def test_schedule_free_averages_are_sparse():
  topology = sparseopt_jax.RigL(10, update_every=2, drop_fraction=0.5)
  tx = keep(
    optax.contrib.schedule_free(
      optax.chain(sparseopt_jax.sparseopt(0.5, topology), optax.sgd(0.1)),
      0.1,
      b1=0.9,
    )
  )
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(6):
    params, opt_state = step(_tree(i), opt_state, params)
    average = optax.contrib.schedule_free_eval_params(opt_state, params)
    assert not np.any(np.asarray(average["kernel"])[~_mask(opt_state)])
    assert np.isfinite(average["kernel"]).all()


def test_it_adds_no_state():
  inner = optax.chain(sparseopt_jax.sparseopt(0.5), optax.adam(0.1))
  states = [tx.init(_tree(0)) for tx in (inner, keep(inner))]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  tx = keep(inner)
  params = _tree(0)
  _, new = tx.update(params, states[1], params)
  assert jax.tree.structure(new) == jax.tree.structure(states[1])


def test_a_first_step_from_dense_parameters_lands_on_the_masks():
  """Even if the user forgot apply_masks, and NaN stood outside the masks."""
  tx = keep(
    optax.chain(sparseopt_jax.sparseopt(0.5), optax.sgd(0.1, momentum=0.9))
  )
  params = _tree(0)
  opt_state = tx.init(params)
  new, _ = _stepper(tx)(_tree(1), opt_state, params)
  assert not np.any(np.asarray(new["kernel"])[~_mask(opt_state)])
  outside = jnp.asarray(~_mask(opt_state))
  broken = params | {"kernel": jnp.where(outside, jnp.nan, params["kernel"])}
  masked = sparseopt_jax.apply_masks(broken, opt_state)
  expected = sparseopt_jax.apply_masks(params, opt_state)
  jax.tree.map(np.testing.assert_array_equal, masked, expected)


def test_extra_arguments_are_forwarded():
  tx = keep(
    optax.chain(
      sparseopt_jax.sparseopt(0.5),
      optax.sgd(0.1),
      optax.contrib.reduce_on_plateau(factor=0.5, patience=1),
    )
  )
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(4):
    params, opt_state = step(
      _tree(i), opt_state, params, value=jnp.float32(1.0)
    )
  assert float(opt_state[-1].scale) < 1.0


def test_clipping_after_the_link_sees_the_corrected_gradient():
  params = _tree(0)
  chain = optax.chain(
    sparseopt_jax.sparseopt(0.5), optax.clip_by_global_norm(0.1), optax.sgd(1.0)
  )
  tx = keep(chain)
  params, opt_state = _start(tx)
  gradients = _tree(1)
  updates, _ = tx.update(gradients, opt_state, params)
  corrected = oracle.correct(gradients["kernel"], _mask(opt_state))
  norm = np.sqrt((corrected**2).sum() + (gradients["bias"] ** 2).sum())
  np.testing.assert_allclose(
    updates["kernel"], -corrected * 0.1 / norm, rtol=1e-5, atol=1e-8
  )


# --- Gradients that are not finite --------------------------------------------


RIGL = sparseopt_jax.RigL(20, update_every=2, drop_fraction=0.5)


def _finite_chain():
  return keep(
    optax.chain(
      sparseopt_jax.sparseopt(0.5, RIGL),
      optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5),
    )
  )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["active", "inactive", "bias"])
def test_no_mask_update_follows_a_gradient_that_is_not_finite(bad, where):
  tx = _finite_chain()
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(2):
    params, opt_state = step(_tree(i), opt_state, params)
  mask = _mask(opt_state)
  gradients = _tree(2)
  if where == "bias":
    gradients["bias"] = gradients["bias"].at[1].set(bad)
  else:
    at = np.argwhere(mask if where == "active" else ~mask)[0]
    gradients["kernel"] = gradients["kernel"].at[tuple(at)].set(bad)
  new_params, opt_state = step(gradients, opt_state, params)
  np.testing.assert_array_equal(_mask(opt_state), mask)
  assert _skipped(opt_state) == 1
  if where != "inactive":
    jax.tree.map(np.testing.assert_array_equal, new_params, params)
  assert np.isfinite(new_params["kernel"]).all()
  # The next one that is due goes ahead.
  for i in range(3, 5):
    new_params, opt_state = step(_tree(i), opt_state, new_params)
  assert (_mask(opt_state) != mask).any()
  assert _skipped(opt_state) == 1
  assert not np.any(np.asarray(new_params["kernel"])[~_mask(opt_state)])


def test_apply_if_finite_outside_puts_the_whole_step_off():
  tx = optax.apply_if_finite(
    keep(optax.chain(sparseopt_jax.sparseopt(0.5, RIGL), optax.sgd(0.1))), 5
  )
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(2):
    params, opt_state = step(_tree(i), opt_state, params)
  mask = _mask(opt_state)
  bad = jax.tree.map(lambda x: x * jnp.nan, _tree(2))
  same, opt_state = step(bad, opt_state, params)
  jax.tree.map(np.testing.assert_array_equal, same, params)
  np.testing.assert_array_equal(_mask(opt_state), mask)
  _, opt_state = step(_tree(3), opt_state, params)
  assert (_mask(opt_state) != mask).any()
  assert _skipped(opt_state) == 0


# --- Accumulated gradients ----------------------------------------------------


@pytest.mark.parametrize("grow_from", ["raw", "corrected"])
def test_growth_from_the_mean_gradient_of_the_last_calls(grow_from):
  k, every = 3, 4
  topology = sparseopt_jax.RigL(
    100, every, lambda count: 0.5, grow_from=grow_from, accumulate=k
  )
  tx = keep(
    optax.chain(sparseopt_jax.sparseopt(0.5, topology), optax.sgd(0.01))
  )
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(2 * every + 1):
    mask, weights = _mask(opt_state), params["kernel"]
    params, opt_state = step(_tree(i), opt_state, params)
    if i in (every, 2 * every):
      window = [np.asarray(_tree(j)["kernel"]) for j in range(i - k + 1, i + 1)]
      score = np.mean(window, 0)
      if grow_from == "corrected":
        score = score * oracle.factors(mask)[None]
      update = oracle.rigl_update(weights, mask, score, 0.5)
      assert update.remaining == 0
      np.testing.assert_array_equal(_mask(opt_state), update.certain)
    else:
      np.testing.assert_array_equal(_mask(opt_state), mask)


def test_a_bad_gradient_in_the_window_skips_the_mask_update():
  topology = sparseopt_jax.RigL(100, 4, 0.5, accumulate=3)
  tx = keep(
    optax.chain(
      sparseopt_jax.sparseopt(0.5, topology),
      optax.apply_if_finite(optax.sgd(0.1), 5),
    )
  )
  params, opt_state = _start(tx)
  step = _stepper(tx)
  mask = _mask(opt_state)
  for i in range(5):
    gradients = _tree(i)
    if i == 2:
      gradients["kernel"] = gradients["kernel"].at[0, 0].set(jnp.nan)
    params, opt_state = step(gradients, opt_state, params)
  np.testing.assert_array_equal(_mask(opt_state), mask)
  assert _skipped(opt_state) == 1
  for i in range(5, 9):
    params, opt_state = step(_tree(i), opt_state, params)
  assert (_mask(opt_state) != mask).any()
  assert _skipped(opt_state) == 1


def test_accumulated_ties_are_ties():
  """Sums of the same three numbers in any order are equal, means need not be.

  The sum is exactly 0, so what grows is drawn, and not found by rounding noise.
  """
  mask = np.zeros((8, 12), bool)
  mask[:2] = True
  topology = sparseopt_jax.RigL(100, 3, accumulate=3)
  link = sparseopt_jax.sparseopt(0.5, topology, masks={"kernel": mask})
  orders = np.random.default_rng(0).permuted(
    np.tile([5.0, -3.0, -2.0], (96, 1)), axis=1
  )
  params = {"kernel": jnp.ones(mask.shape)}
  state, update = link.init(params), jax.jit(link.update)
  for step in range(4):
    gradients = {"kernel": jnp.float32(orders[:, step - 1].reshape(8, 12))}
    _, state = update(gradients, state, params)
  np.testing.assert_array_equal(state.gradient_sum["kernel"], 0)


@pytest.mark.parametrize(
  "topology",
  [
    sparseopt_jax.Static(),
    sparseopt_jax.SET(20, 1),
    sparseopt_jax.RigL(20, 2, accumulate=2),
  ],
)
def test_numbers_of_python_and_numpy_without_jit(topology):
  """As optax.sgd takes them; NumPy's floats are of 64 bits."""
  params = {"kernel": np.ones((4, 6)), "scale": 1.0}
  tx = sparseopt_jax.keep_params_sparse(
    optax.chain(sparseopt_jax.sparseopt(0.5, topology), optax.sgd(0.1, 0.9))
  )
  state = tx.init(params)
  for _ in range(3):
    updates, state = tx.update(params, state, params)
  np.testing.assert_allclose(updates["scale"], -0.271, rtol=1e-6)


def test_accumulated_scores_are_wide_enough():
  topology = sparseopt_jax.RigL(100, 4, accumulate=2)
  link = sparseopt_jax.sparseopt(0.5, topology)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _tree(0))
  state = link.init(params)
  assert state.gradient_sum["kernel"].dtype == jnp.float32
  assert state.gradient_sum["bias"] == optax.MaskedNode()
  plain = sparseopt_jax.sparseopt(0.5, sparseopt_jax.RigL(100, 4)).init(params)
  assert not jax.tree.leaves(plain.gradient_sum)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_multi_steps_is_a_larger_batch(place):
  k = 4
  chain = optax.chain(
    sparseopt_jax.sparseopt(0.5, RIGL),
    optax.add_decayed_weights(1e-2),
    optax.sgd(0.1, momentum=0.9),
  )
  inner = keep(chain)
  if place == "outside":
    tx = optax.MultiSteps(inner, k)
  else:
    tx = keep(optax.MultiSteps(chain, k).gradient_transformation())
  params, opt_state = _start(tx)
  large, large_state = _start(inner)
  step, large_step = _stepper(tx), _stepper(inner)
  for i in range(5):
    parts = [_tree(k * i + j) for j in range(k)]
    for part in parts:
      params, opt_state = step(part, opt_state, params)
      assert not np.any(np.asarray(params["kernel"])[~_mask(opt_state)])
    mean = jax.tree.map(lambda *x: sum(x) / k, *parts)
    large, large_state = large_step(mean, large_state, large)
    np.testing.assert_array_equal(_mask(opt_state), _mask(large_state))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, params, large)
  change = sparseopt_jax.sparsity_metrics(large_state)["mask_change"]
  assert float(change) > 0


def test_multi_steps_skips_what_is_not_finite():
  inner = keep(optax.chain(sparseopt_jax.sparseopt(0.5, RIGL), optax.sgd(0.1)))
  tx = optax.MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite)
  params, opt_state = _start(tx)
  step = _stepper(tx)
  bad = jax.tree.map(lambda x: x * jnp.inf, _tree(0))
  for i in range(8):
    params, opt_state = step(bad if i % 4 == 1 else _tree(i), opt_state, params)
    assert np.isfinite(params["kernel"]).all()
    assert not np.any(np.asarray(params["kernel"])[~_mask(opt_state)])
  assert _skipped(opt_state) == 0


# --- Refusals -----------------------------------------------------------------


def test_exactly_one_link():
  with pytest.raises(
    ValueError, match=r"inner must hold exactly one .*; got 0"
  ):
    keep(optax.sgd(0.1)).init(_tree(0))
  two = optax.chain(sparseopt_jax.sparseopt(0.5), sparseopt_jax.sparseopt(0.5))
  with pytest.raises(
    ValueError, match=r"inner must hold exactly one .*; got 2"
  ):
    keep(two).init(_tree(0))


def test_update_needs_params():
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.5)
  opt_state = tx.init(_tree(0))
  with pytest.raises(ValueError, match="params must be passed"):
    tx.update(_tree(1), opt_state)


# --- Layouts of their own -----------------------------------------------------


def _conv_and_dense(seed):
  return {"conv": {"kernel": _draw(seed, 3, 3, 2, 4)}, "dense": _tree(seed)}


def _final(tx, steps=8):
  params = _conv_and_dense(0)
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  first = sparseopt_jax.get_masks(opt_state)["conv"]["kernel"]
  step = _stepper(tx)
  for i in range(steps):
    params, opt_state = step(_conv_and_dense(1 + i), opt_state, params)
  mask = sparseopt_jax.get_masks(opt_state)["conv"]["kernel"]
  assert (mask != first).any()
  assert not np.any(params["conv"]["kernel"][~mask])
  return params, opt_state


def _masked_link(mask):
  link = optax.masked(sparseopt_jax.sparseopt(0.5, RIGL), mask)
  return keep(optax.chain(link, optax.sgd(0.1, momentum=0.9)))


def _partitioned(labels):
  sparse = optax.chain(
    sparseopt_jax.sparseopt(0.5, RIGL), optax.sgd(0.1, momentum=0.9)
  )
  return keep(optax.partition({True: sparse, False: optax.adam(0.1)}, labels))


@pytest.mark.parametrize("make", [_masked_link, _partitioned])
def test_prefix_trees_inside(make):
  """Optax takes a prefix; then a MaskedNode stands for a whole subtree."""
  full = {
    "conv": {"kernel": True},
    "dense": {"kernel": False, "bias": False},
  }
  params, _ = _final(make({"conv": True, "dense": False}))
  expected, _ = _final(make(full))
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_wrapped_twice_is_wrapped_once():
  chain = optax.chain(
    sparseopt_jax.sparseopt(0.5, RIGL), optax.sgd(0.1, momentum=0.9)
  )
  got, expected = _final(keep(keep(chain))), _final(keep(chain))
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_state_of_reduce_on_plateau_is_found_by_name():
  tx = keep(
    optax.chain(
      sparseopt_jax.sparseopt(0.5),
      optax.sgd(0.1),
      optax.contrib.reduce_on_plateau(),
    )
  )
  opt_state = tx.init(_tree(0))
  assert float(optax.tree.get(opt_state, "scale")) == 1.0
  new = optax.tree.set(opt_state, scale=jnp.float32(0.5))
  jax.tree.map(np.testing.assert_array_equal, new[0], opt_state[0])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("wrap", [keep, lambda tx: tx])
def test_reverse_mode_agrees_with_forward_mode(wrap, accumulate):
  """Through mask updates, with respect to the learning rate."""
  topology = sparseopt_jax.RigL(100, 2, accumulate=accumulate)

  def loss(rate):
    tx = wrap(
      optax.chain(sparseopt_jax.sparseopt(0.5, topology), optax.sgd(rate, 0.9))
    )
    params, opt_state = _start(tx)

    def step(carry, _):
      params, opt_state = carry
      gradients = jax.tree.map(lambda x: x * x + x, params)
      updates, opt_state = tx.update(gradients, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, opt_state), None, length=5)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

  reverse = jax.jit(jax.grad(loss))(0.01)
  _, forward = jax.jit(lambda rate: jax.jvp(loss, (rate,), (1.0,)))(0.01)
  assert abs(float(reverse)) > 1
  np.testing.assert_allclose(reverse, forward, rtol=1e-5)
