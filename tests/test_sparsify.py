"""sparsify in detail: what it resets, skips, forwards and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import topologies

import sparseopt_jax

STATIC = sparseopt_jax.Static()
RIGL = sparseopt_jax.RigL(20, update_every=2, drop_fraction=0.5)


def _sparsify(inner, topology=STATIC, **options):
  return sparseopt_jax.sparsify(
    inner, 0.5, topology, **{"corrected": True} | options
  )


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
  tx = _sparsify(optax.adam(0.1), topology)
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
  updates, expected_state = plain.update(corrected, opt_state.inner, params)
  expected = optax.apply_updates(params, updates)
  new_params, new_state = step(gradients, opt_state, params)
  np.testing.assert_array_equal(_mask(new_state), mask)
  np.testing.assert_allclose(
    new_params["kernel"], np.where(mask, expected["kernel"], 0), rtol=1e-6
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6)
  jax.tree.map(close, new_state.inner, expected_state)


def _counter():
  """Keeps for each weight how many steps its slot has seen."""

  def init(params):
    zeros = lambda x: jnp.zeros(x.shape, jnp.int32)
    return optax.TraceState(jax.tree.map(zeros, params))

  def update(updates, state, params=None):
    del params
    count = jax.tree.map(lambda x: x + 1, state.trace)
    return jax.tree.map(lambda g: -0.1 * g, updates), optax.TraceState(count)

  return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("told", [False, True])
def test_when_slots_start_afresh(told):
  """In a mask update, if a weight is outside or just grown; and only then."""
  topology = sparseopt_jax.RigL(10, update_every=3, drop_fraction=0.6)
  tx = _sparsify(_counter(), topology)
  params, opt_state = _start(tx)
  expected, mask = np.zeros((6, 5), int), _mask(opt_state)
  update = jax.jit(tx.update, static_argnames="update_masks")
  for i in range(9):
    due = topology.is_due(i) if told else None
    updates, opt_state = update(_tree(i), opt_state, params, update_masks=due)
    params = optax.apply_updates(params, updates)
    new_mask = _mask(opt_state)
    assert (new_mask != mask).any() == (i in (3, 6))
    if i in (3, 6):
      expected[~(mask & new_mask)] = 0
    expected += 1
    mask = new_mask
    np.testing.assert_array_equal(opt_state.inner.trace["kernel"], expected)
    np.testing.assert_array_equal(opt_state.inner.trace["bias"], i + 1)
  assert set(np.unique(expected)) == {3, 6, 9}


def test_init_of_the_inner_sees_masked_parameters():
  tx = _sparsify(optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9))
  params = _tree(0)
  opt_state = tx.init(params)
  masked = sparseopt_jax.apply_masks(params, opt_state)
  jax.tree.map(np.testing.assert_array_equal, opt_state.inner.z, masked)


def test_schedule_free_averages_are_sparse():
  topology = sparseopt_jax.RigL(10, update_every=2, drop_fraction=0.5)
  inner = optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9)
  tx = _sparsify(inner, topology)
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(6):
    params, opt_state = step(_tree(i), opt_state, params)
    average = optax.contrib.schedule_free_eval_params(opt_state.inner, params)
    assert not np.any(np.asarray(average["kernel"])[~_mask(opt_state)])
    assert np.isfinite(average["kernel"]).all()


def test_its_state_is_that_of_the_link_and_that_of_the_optimizer():
  link = sparseopt_jax.sparseopt(0.5, RIGL, corrected=True)
  tx, params = _sparsify(optax.adam(0.1), RIGL), _tree(0)
  opt_state = tx.init(params)
  expected = (link.init(params), optax.adam(0.1).init(params))
  assert isinstance(opt_state, sparseopt_jax.SparsifyState)
  jax.tree.map(np.testing.assert_array_equal, tuple(opt_state), expected)
  _, new = tx.update(params, opt_state, params)
  assert jax.tree.structure(new) == jax.tree.structure(opt_state)
  _, link_state = link.update(params, opt_state.link, params)
  jax.tree.map(np.testing.assert_array_equal, new.link, link_state)


def test_a_first_step_from_dense_parameters_lands_on_the_masks():
  """Even if the user forgot apply_masks, and NaN stood outside the masks."""
  tx = _sparsify(optax.sgd(0.1, momentum=0.9))
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
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
  tx = _sparsify(optax.chain(optax.sgd(0.1), plateau))
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(4):
    params, opt_state = step(
      _tree(i), opt_state, params, value=jnp.float32(1.0)
    )
  assert float(opt_state.inner[-1].scale) < 1.0


def test_update_masks_is_for_the_link_and_all_else_for_the_optimizer():
  seen = []

  def update(updates, state, params=None, **extra_args):
    del params
    seen.append(extra_args)
    return updates, state

  tx = _sparsify(
    optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update),
    RIGL,
  )
  params, opt_state = _start(tx)
  tx.update(params, opt_state, params, update_masks=True, value=1, grad=2)
  assert seen == [{"value": 1, "grad": 2}]


def test_clipping_inside_sees_the_corrected_gradient():
  tx = _sparsify(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)))
  params, opt_state = _start(tx)
  gradients = _tree(1)
  updates, _ = tx.update(gradients, opt_state, params)
  corrected = oracle.correct(gradients["kernel"], _mask(opt_state))
  norm = np.sqrt((corrected**2).sum() + (gradients["bias"] ** 2).sum())
  np.testing.assert_allclose(
    updates["kernel"], -corrected * 0.1 / norm, rtol=1e-5, atol=1e-8
  )


def test_before_adam_the_correction_all_but_vanishes():
  """Adam divides each weight's step by the size of its own gradient."""
  steps = []
  for corrected in (True, False):
    tx = _sparsify(optax.adam(0.1), corrected=corrected)
    params, opt_state = _start(tx)
    step, opt_state = tx.update(_tree(1), opt_state, params)
    steps.append(step["kernel"])
  fan_ins = _mask(opt_state).sum(axis=0)
  assert len(set(fan_ins.tolist())) > 1
  np.testing.assert_allclose(*steps, rtol=1e-5)


def test_clipping_in_front_sees_the_dense_gradient():
  tx = optax.chain(optax.clip_by_global_norm(0.1), _sparsify(optax.sgd(1.0)))
  params, opt_state = _start(tx)
  gradients = _tree(1)
  updates, _ = tx.update(gradients, opt_state, params)
  norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in gradients.values()))
  clipped = gradients["kernel"] * 0.1 / norm
  np.testing.assert_allclose(
    updates["kernel"],
    -oracle.correct(clipped, _mask(opt_state)),
    rtol=1e-5,
    atol=1e-8,
  )


# --- Gradients that are not finite --------------------------------------------


def _finite_chain():
  inner = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5)
  return _sparsify(inner, RIGL)


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
  tx = optax.apply_if_finite(_sparsify(optax.sgd(0.1), RIGL), 5)
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


# --- A topology with state of its own -----------------------------------------


@pytest.mark.parametrize("grow_from", ["raw", "corrected"])
def test_growth_by_all_gradients_since_the_last_mask_update(grow_from):
  every = 4
  topology = topologies.GrowBySum(
    100, every, lambda count: 0.5, grow_from=grow_from
  )
  tx = _sparsify(optax.sgd(0.01), topology)
  params, opt_state = _start(tx)
  step = _stepper(tx)
  for i in range(2 * every + 1):
    mask, weights = _mask(opt_state), params["kernel"]
    params, opt_state = step(_tree(i), opt_state, params)
    if i in (every, 2 * every):
      window = range(i - every + 1, i + 1)
      score = np.sum([np.asarray(_tree(j)["kernel"]) for j in window], 0)
      if grow_from == "corrected":
        score = score * oracle.factors(mask)[None]
      update = oracle.rigl_update(weights, mask, score, 0.5)
      assert update.remaining == 0
      np.testing.assert_array_equal(_mask(opt_state), update.certain)
    else:
      np.testing.assert_array_equal(_mask(opt_state), mask)


def test_a_state_that_is_not_finite_skips_the_mask_update():
  """Though the gradient of the call itself is finite."""
  topology = topologies.GrowBySum(100, 4, 0.5)
  tx = _sparsify(optax.apply_if_finite(optax.sgd(0.1), 5), topology)
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


def test_a_topology_keeps_what_it_likes_for_each_sparse_leaf():
  """In a dtype of its own choice, and outside the structure of parameters."""
  topology = topologies.GrowBySum(100, 4)
  tx = _sparsify(optax.sgd(0.1), topology)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _conv_and_dense(0))
  opt_state = tx.init(params)
  gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _conv_and_dense(1))
  # Call 1 begins a new sum.
  for terms in (0, 1, 1, 2):
    conv, dense = opt_state.link.topology_state
    assert conv.dtype == dense.dtype == jnp.float32
    for state, name in ((conv, "conv"), (dense, "dense")):
      wide = np.asarray(gradients[name]["kernel"], np.float32)
      np.testing.assert_array_equal(state, terms * wide)
    params, opt_state = _stepper(tx)(gradients, opt_state, params)
  plain = _sparsify(optax.sgd(0.1), RIGL).init(params)
  assert not jax.tree.leaves(plain.link.topology_state)


class _Witness(sparseopt_jax.Topology):
  """Updates the masks of call 2, and tells what it saw."""

  def __init__(self):
    self.seen = []

  def is_due(self, count):
    return count == 2

  def init(self, layer):
    assert layer.gradient is None
    assert layer.state == ()
    return jnp.zeros([], jnp.int32)

  def observe(self, layer, count):
    self.seen.append(("observe", layer, int(count)))
    return layer.state + 1

  def update_masks(self, layers, count, key):
    # Traced, so without values.
    names = [layer.path for layer in layers]
    self.seen.append(("update_masks", names, key.shape))
    return [jnp.roll(layer.mask, 1) for layer in layers]


def test_what_a_topology_sees():
  topology = _Witness()
  tx = _sparsify(
    optax.sgd(0.1), topology, sparse={"kernel": True, "bias": True}
  )
  params, opt_state = _start(tx)
  before = opt_state
  for i in range(4):
    old, gradients, topology.seen = opt_state, _tree(i), []
    told = topology.is_due(i)
    updates, opt_state = tx.update(
      gradients, opt_state, params, update_masks=told
    )
    observed = [entry for entry in topology.seen if entry[0] == "observe"]
    assert [layer.path for _, layer, _ in observed] == ["bias", "kernel"]
    for j, (_, layer, count) in enumerate(observed):
      assert count == i
      assert layer.state == i
      np.testing.assert_array_equal(layer.weight, params[layer.path])
      np.testing.assert_array_equal(layer.gradient, gradients[layer.path])
      np.testing.assert_array_equal(layer.mask, old.link.masks[layer.path])
      np.testing.assert_array_equal(layer.factor, old.link.factors[j])
    asked = [entry for entry in topology.seen if entry[0] == "update_masks"]
    expected = ("update_masks", ["bias", "kernel"], (2,))
    assert asked == ([expected] if told else [])
    assert [int(x) for x in opt_state.link.topology_state] == [i + 1] * 2
    params = optax.apply_updates(params, updates)
  for name, mask in opt_state.link.masks.items():
    rolled = np.roll(before.link.masks[name], 1)
    np.testing.assert_array_equal(mask, rolled)
    assert not np.any(params[name][~mask])


@pytest.mark.parametrize(
  "topology",
  [
    sparseopt_jax.Static(),
    sparseopt_jax.SET(20, 1),
    topologies.GrowBySum(20, 2),
  ],
)
def test_numbers_of_python_and_numpy_without_jit(topology):
  """As optax.sgd takes them; NumPy's floats are of 64 bits."""
  params = {"kernel": np.ones((4, 6)), "scale": 1.0}
  tx = _sparsify(optax.sgd(0.1, 0.9), topology)
  state = tx.init(params)
  for _ in range(3):
    updates, state = tx.update(params, state, params)
  np.testing.assert_allclose(updates["scale"], -0.271, rtol=1e-6)


# --- Accumulated gradients ----------------------------------------------------


@pytest.mark.parametrize(
  ("place", "topology"), [("outside", RIGL), ("inside", STATIC)]
)
def test_multi_steps_is_a_larger_batch(place, topology):
  """Inside, the masks see the single batches; static masks do not care."""
  k = 4
  inner = optax.chain(
    optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9)
  )
  whole = _sparsify(inner, topology)
  if place == "outside":
    tx = optax.MultiSteps(whole, k)
  else:
    several = optax.MultiSteps(inner, k).gradient_transformation()
    tx = _sparsify(several, topology)
  params, opt_state = _start(tx)
  large, large_state = _start(whole)
  step, large_step = _stepper(tx), _stepper(whole)
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
  assert (float(change) > 0) == (place == "outside")


def test_multi_steps_skips_what_is_not_finite():
  inner = _sparsify(optax.sgd(0.1), RIGL)
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


def test_update_needs_params():
  tx = _sparsify(optax.sgd(0.1))
  opt_state = tx.init(_tree(0))
  with pytest.raises(ValueError, match=r"params must be passed .*; got None"):
    tx.update(_tree(1), opt_state)


# --- Layouts of their own -----------------------------------------------------


def _conv_and_dense(seed):
  return {"conv": {"kernel": _draw(seed, 3, 3, 2, 4)}, "dense": _tree(seed)}


def _train(tx, params, steps=8):
  """Parameters, state, and the masks of the start."""
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  first = sparseopt_jax.get_masks(opt_state)
  step = _stepper(tx)
  for i in range(steps):
    drawn = _conv_and_dense(1 + i)
    gradients = {name: drawn[name] for name in params}
    params, opt_state = step(gradients, opt_state, params)
  return params, opt_state, first


def _masked(mask):
  sparse = _sparsify(optax.sgd(0.1, momentum=0.9), RIGL)
  rest = jax.tree.map(lambda x: not x, mask)
  return optax.chain(
    optax.masked(sparse, mask), optax.masked(optax.sgd(0.1), rest)
  )


def _partitioned(labels):
  sparse = _sparsify(optax.sgd(0.1, momentum=0.9), RIGL)
  return optax.partition({True: sparse, False: optax.adam(0.1)}, labels)


def _chosen(sparse):
  return _sparsify(optax.sgd(0.1, momentum=0.9), RIGL, sparse=sparse)


@pytest.mark.parametrize("make", [_masked, _partitioned, _chosen])
def test_prefix_trees(make):
  """Optax takes a prefix; then a MaskedNode stands for a whole subtree."""
  full = {
    "conv": {"kernel": True},
    "dense": {"kernel": False, "bias": False},
  }
  start = _conv_and_dense(0)
  params, opt_state, first = _train(make({"conv": True, "dense": False}), start)
  expected, _, _ = _train(make(full), start)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  mask = sparseopt_jax.get_masks(opt_state)["conv"]["kernel"]
  assert (mask != first["conv"]["kernel"]).any()
  assert not np.any(params["conv"]["kernel"][~mask])
  assert np.all(params["dense"]["kernel"] != 0)


# Of different sparsity, topology, optimiser, correction and seed.
GROUPS = {
  "conv": sparseopt_jax.sparsify(
    optax.sgd(0.1, momentum=0.9), 0.5, RIGL, corrected=True, seed=1
  ),
  "dense": sparseopt_jax.sparsify(
    optax.adam(0.1), 0.7, sparseopt_jax.SET(20, 3), corrected=False, seed=2
  ),
}
LABELS = {
  "full": {
    "conv": {"kernel": "conv"},
    "dense": {"kernel": "dense", "bias": "dense"},
  },
  "prefix": {"conv": "conv", "dense": "dense"},
}


@pytest.mark.parametrize("labels", LABELS)
def test_two_sparse_groups(labels):
  """Each trains as if it were alone."""
  start = _conv_and_dense(0)
  tx = optax.partition(GROUPS, LABELS[labels])
  params, opt_state, first = _train(tx, start)
  masks = sparseopt_jax.get_masks(opt_state)
  for name, active in (("conv", 36), ("dense", 9)):
    alone, alone_state, _ = _train(GROUPS[name], {name: start[name]})
    jax.tree.map(np.testing.assert_array_equal, params[name], alone[name])
    mask = masks[name]["kernel"]
    expected = sparseopt_jax.get_masks(alone_state)[name]["kernel"]
    np.testing.assert_array_equal(mask, expected)
    assert (mask != first[name]["kernel"]).any()
    assert mask.sum() == active
    assert not np.any(params[name]["kernel"][~mask])
  assert np.all(params["dense"]["bias"] != 0)


@pytest.mark.parametrize("labels", LABELS)
def test_masks_of_two_sparse_groups(labels):
  """They are one tree, which apply_masks and masks= take as any other."""
  params = _conv_and_dense(0)
  opt_state = optax.partition(GROUPS, LABELS[labels]).init(params)
  masks = sparseopt_jax.get_masks(opt_state)
  is_node = lambda node: isinstance(node, optax.MaskedNode)
  kinds = jax.tree.map(is_node, masks, is_leaf=is_node)
  assert kinds == {
    "conv": {"kernel": False},
    "dense": {"kernel": False, "bias": True},
  }
  got = sparseopt_jax.apply_masks(params, opt_state)
  for name in ("conv", "dense"):
    expected = np.where(masks[name]["kernel"], params[name]["kernel"], 0)
    np.testing.assert_array_equal(got[name]["kernel"], expected)
  np.testing.assert_array_equal(got["dense"]["bias"], params["dense"]["bias"])
  again = _sparsify(optax.sgd(0.1), masks=masks).init(params)
  jax.tree.map(np.testing.assert_array_equal, again.link.masks, masks)


def test_the_state_of_reduce_on_plateau_is_found_by_name():
  plateau = optax.contrib.reduce_on_plateau()
  tx = _sparsify(optax.chain(optax.sgd(0.1), plateau))
  opt_state = tx.init(_tree(0))
  assert float(optax.tree.get(opt_state, "scale")) == 1.0
  new = optax.tree.set(opt_state, scale=jnp.float32(0.5))
  assert float(new.inner[-1].scale) == 0.5
  jax.tree.map(np.testing.assert_array_equal, new.link, opt_state.link)


def _bare(inner, topology):
  return optax.chain(
    sparseopt_jax.sparseopt(0.5, topology, corrected=True), inner
  )


@pytest.mark.parametrize("kind", [sparseopt_jax.RigL, topologies.GrowBySum])
@pytest.mark.parametrize("make", [_sparsify, _bare])
def test_reverse_mode_agrees_with_forward_mode(make, kind):
  """Through mask updates, with respect to the learning rate."""

  def loss(rate):
    tx = make(optax.sgd(rate, 0.9), kind(100, 2))
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
