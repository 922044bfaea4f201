"""Whole runs of the transformation against the oracle, step by step."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax

EVERY = 5
PARAMS = {
  "Conv_0/kernel": (3, 3, 2, 8),
  "Conv_1/kernel": (3, 3, 8, 8),
  "Dense_0/kernel": (8, 10),
  "Dense_0/bias": (10,),
}
SPARSE = [path for path in PARAMS if path.endswith("kernel")]
SHAPES = {path: PARAMS[path] for path in SPARSE}
COUNTS = oracle.active_counts(SHAPES, oracle.erk(SHAPES, 0.8))
# From a sparsity of 0.4, but for layers that end denser.
FIRST = {p: max(COUNTS[p], round(0.6 * np.prod(SHAPES[p]))) for p in SPARSE}
TOPOLOGIES = {
  "static": (sparseopt_jax.Static(), oracle.Topology()),
  "set": (
    sparseopt_jax.SET(1_000, EVERY),
    oracle.Topology("set", 1_000, EVERY),
  ),
  "rigl": (
    sparseopt_jax.RigL(1_000, EVERY),
    oracle.Topology("rigl", 1_000, EVERY),
  ),
  "rigl_corrected": (
    sparseopt_jax.RigL(1_000, EVERY, grow_from="corrected"),
    oracle.Topology("rigl", 1_000, EVERY, grow_from="corrected"),
  ),
  "magnitude": (
    sparseopt_jax.Magnitude(3, 22, EVERY, 0.4),
    oracle.Topology(
      *("magnitude", 22, EVERY),
      begin_step=3,
      counts={p: (FIRST[p], COUNTS[p]) for p in SPARSE},
    ),
  ),
}
TOPOLOGIES |= {
  name: (
    sparseopt_jax.SRigL(1_000, EVERY, alpha, gamma_sal=gamma),
    oracle.Topology(
      *("srigl", 1_000, EVERY, alpha),
      counts={p: (COUNTS[p], COUNTS[p]) for p in SPARSE},
      gamma=gamma,
    ),
  )
  for name, alpha, gamma in [("srigl", 0.3, 0.0), ("srigl_ablated", 0.5, 0.9)]
}
CONSTANT = [name for name in TOPOLOGIES if name != "magnitude"]
UNSTRUCTURED = [name for name in CONSTANT if not name.startswith("srigl")]


def random_params(seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {p: rng.normal(size=s).astype(dtype) for p, s in PARAMS.items()}


def random_gradients(step, dtype=np.float32, ties=False):
  rng = np.random.default_rng(1_000 + step)
  gradients = {p: rng.normal(size=s) for p, s in PARAMS.items()}
  if ties:  # few distinct values, many zeros: a dead input, say
    gradients = {p: np.round(g) / 4 for p, g in gradients.items()}
    gradients["Conv_1/kernel"][:, :, 2:] = 0
  return {p: g.astype(dtype) for p, g in gradients.items()}


def as_numpy(tree):
  return {path: np.array(leaf) for path, leaf in tree.items()}


def masks_of(opt_state):
  masks = sparseopt_jax.get_masks(opt_state)
  return {path: np.array(masks[path]) for path in SPARSE}


def start(topology, **kwargs):
  tx = sparseopt_jax.sparsify(
    optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9)),
    0.8,
    topology,
    corrected=True,
    **kwargs,
  )

  @jax.jit
  def step(params, opt_state, gradients):
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return tx, step


def run_both(name, steps, *, ties=False, dtype=np.float32, follow=True):
  """Compares every step; `follow` gives the oracle the package's parameters."""
  topology, oracle_topology = TOPOLOGIES[name]
  tx, step = start(topology)
  params = random_params(dtype=dtype)
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  run = oracle.Run(
    as_numpy(params),
    masks_of(opt_state),
    oracle_topology,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=1e-2,
    dtype=np.float64,
  )
  for t in range(steps):
    gradients = random_gradients(t, dtype, ties)
    if follow:
      run.params = {
        p: w.astype(np.float64) for p, w in as_numpy(params).items()
      }
    params, opt_state = step(params, opt_state, gradients)
    record = run.step(gradients, chosen=masks_of(opt_state))
    for path, mask in masks_of(opt_state).items():
      np.testing.assert_array_equal(mask, record.masks[path], err_msg=f"{t}")
      assert np.all(np.asarray(params[path])[~mask] == 0)
  return params, opt_state, record


# Corrected scores are rounded, so exact ties would be broken by the rounding.
RUNS = [(name, False) for name in TOPOLOGIES]
RUNS += [("set", True), ("rigl", True), ("srigl_ablated", True)]


@pytest.mark.parametrize(("name", "ties"), RUNS)
def test_masks_and_parameters_agree_with_oracle(name, ties):
  params, opt_state, record = run_both(name, 41, ties=ties)
  for path in PARAMS:
    np.testing.assert_allclose(
      params[path], record.params[path], rtol=2e-5, atol=1e-6
    )
  trace = optax.tree.get(opt_state, "trace")
  for path in PARAMS:
    np.testing.assert_allclose(
      trace[path], record.momentum[path], rtol=1e-4, atol=1e-5
    )
  metrics = sparseopt_jax.sparsity_metrics(opt_state)
  assert int(metrics["dead_neurons"]) == sum(
    np.sum(oracle.fan_ins(record.masks[path]) == 0) for path in SPARSE
  )
  np.testing.assert_allclose(metrics["itop_rate"], record.itop_rate, rtol=1e-6)
  np.testing.assert_allclose(
    metrics["mask_change"], record.mask_change, rtol=1e-6
  )


def test_float64_run_stays_with_the_oracle_on_its_own():
  with jax.enable_x64(True):
    params, _, record = run_both("rigl", 41, dtype=np.float64, follow=False)
    for path in PARAMS:
      # The factors are stored in float32.
      np.testing.assert_allclose(
        params[path], record.params[path], rtol=1e-5, atol=1e-7
      )


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTANT)
def test_a_thousand_steps_agree_with_the_oracle(name):
  run_both(name, 1_000, ties=(name, True) in RUNS)


@pytest.mark.slow
def test_a_thousand_steps_of_gradual_pruning_agree_with_the_oracle(monkeypatch):
  counts = TOPOLOGIES["magnitude"][1].counts
  both = (
    sparseopt_jax.Magnitude(100, 901, EVERY, 0.4),
    oracle.Topology("magnitude", 901, EVERY, begin_step=100, counts=counts),
  )
  monkeypatch.setitem(TOPOLOGIES, "magnitude", both)
  *_, record = run_both("magnitude", 1_000)
  assert {path: record.masks[path].sum() for path in SPARSE} == COUNTS


@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_number_of_active_weights_never_changes(name):
  tx, step = start(TOPOLOGIES[name][0])
  params = random_params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for t in range(31):
    params, opt_state = step(params, opt_state, random_gradients(t))
    masks = masks_of(opt_state)
    assert {path: mask.sum() for path, mask in masks.items()} == COUNTS


def _fan_ins_of_a_run(name, steps, **options):
  """The fan-ins of all live neurons of each layer, after each step."""
  tx, step = start(TOPOLOGIES[name][0], **options)
  params = random_params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for t in range(steps):
    masks = masks_of(opt_state)
    yield {p: oracle.fan_ins(mask) for p, mask in masks.items()}, opt_state
    params, opt_state = step(params, opt_state, random_gradients(t))


def test_constant_fan_in_without_ablation():
  """From the first masks on; then the correction is the identity."""
  nearest = {p: round(COUNTS[p] / PARAMS[p][-1]) for p in SPARSE}
  masks = set()
  for fan_ins, opt_state in _fan_ins_of_a_run("srigl", 22):
    assert {p: set(f) for p, f in fan_ins.items()} == {
      p: {nearest[p]} for p in SPARSE
    }
    masks.add(int(sparseopt_jax.masks_checksum(opt_state)))
    assert all(np.all(factor == 1) for factor in opt_state.link.factors)
  assert len(masks) == 5


def test_constant_fan_in_gives_the_gradient_back_bit_for_bit():
  topology = sparseopt_jax.SRigL(100, 1, 0.5, gamma_sal=0.0)
  link = sparseopt_jax.sparseopt(0.8, topology, corrected=True)
  params = random_params()
  state = link.init(params)
  update = jax.jit(link.update)
  for t in range(4):
    gradients = random_gradients(t)
    before = sparseopt_jax.get_masks(state)
    got, state = update(gradients, state, params)
    after = sparseopt_jax.get_masks(state)
    for path in SPARSE:
      stays = np.asarray(before[path] & after[path])
      expected = np.where(stays, gradients[path], np.float32(0))
      np.testing.assert_array_equal(got[path], expected)
      assert t == 0 or not stays.all()


def test_ablated_neurons_stay_so_and_the_others_share_their_weights():
  dead = {p: np.zeros(PARAMS[p][-1], bool) for p in SPARSE}
  for fan_ins, opt_state in _fan_ins_of_a_run("srigl_ablated", 32):
    for path, factor in zip(SPARSE, opt_state.link.factors, strict=True):
      f, inputs = fan_ins[path], int(np.prod(PARAMS[path][:-1]))
      assert not f[dead[path]].any()
      dead[path] = f == 0
      live = f[f > 0]
      expected = oracle.constant_fan_in(COUNTS[path], live.size, inputs)
      assert set(live) == {expected}
      assert abs(f.sum() - COUNTS[path]) <= live.size / 2
      np.testing.assert_allclose(
        np.ravel(factor), np.where(f, np.sqrt(f.size / live.size), 0), rtol=1e-6
      )
  # Convolutions have lost neurons; the denser classifier could not.
  assert dead["Conv_1/kernel"].any()


def test_ablation_by_layer():
  gamma = lambda path, leaf: 0.0 if path == "Conv_1/kernel" else 0.9
  topology = sparseopt_jax.SRigL(1_000, EVERY, 0.5, gamma_sal=gamma)
  tx, step = start(topology)
  params = random_params()
  opt_state = tx.init(params)
  for t in range(32):
    params, opt_state = step(params, opt_state, random_gradients(t))
  fan_ins = {p: oracle.fan_ins(m) for p, m in masks_of(opt_state).items()}
  assert fan_ins["Conv_1/kernel"].all()
  assert not fan_ins["Conv_0/kernel"].all()


def test_gradual_pruning_by_the_cubic():
  """The counts of all layers, against the equation in exact fractions."""
  tx, step = start(TOPOLOGIES["magnitude"][0])
  params = random_params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  counts = [{path: mask.sum() for path, mask in masks_of(opt_state).items()}]
  for t in range(35):
    params, opt_state = step(params, opt_state, random_gradients(t))
    masks = masks_of(opt_state)
    counts.append({path: mask.sum() for path, mask in masks.items()})
  assert counts[0] == FIRST
  assert FIRST["Dense_0/kernel"] == COUNTS["Dense_0/kernel"] > 0.6 * 80
  due = [t for t in range(35) if counts[t + 1] != counts[t]]
  assert due == [8, 13, 18, 22]
  for t in due:
    left = fractions.Fraction(22 - t, 22 - 3) ** 3
    for path in SPARSE:
      expected = COUNTS[path] + left * (FIRST[path] - COUNTS[path])
      assert 0 <= expected - counts[t + 1][path] < 1
  assert counts[-1] == COUNTS


def test_the_state_holds_what_its_fields_say():
  corrected = lambda path, leaf: path.startswith("Conv")
  topology = sparseopt_jax.RigL(1_000, 3, drop_fraction=0.5)
  tx = sparseopt_jax.sparseopt(0.8, topology, corrected=corrected)
  params, update = random_params(), jax.jit(tx.update)
  state = tx.init(params)
  masks = masks_of(state)
  explored = {path: 3 * mask.astype(int) for path, mask in masks.items()}
  for t in range(8):
    _, state = update(random_gradients(t), state, params)
    new = masks_of(state)
    is_due = t in (3, 6)
    assert (int(state.count), bool(state.updated)) == (t + 1, is_due)
    for path, before in masks.items():
      if is_due:
        assert np.any(new[path] != before)
        once = (explored[path] > 0).astype(int)
        explored[path] = np.where(new[path], 2 + before, once)
      np.testing.assert_array_equal(state.explored[path], explored[path])
    masks = new
  assert isinstance(state.masks["Dense_0/bias"], optax.MaskedNode)
  for path, factor in zip(SPARSE, state.factors, strict=True):
    assert factor.shape == (1,) * (len(PARAMS[path]) - 1) + PARAMS[path][-1:]
    if corrected(path, None):
      want = oracle.factors(masks[path])
      np.testing.assert_allclose(factor.reshape(-1), want, rtol=1e-6)
    else:
      want = oracle.fan_ins(masks[path]) > 0
      np.testing.assert_array_equal(factor.reshape(-1), want)
      assert factor.dtype == jnp.bool_


def dense(shapes, sparsity):
  del sparsity
  return dict.fromkeys(shapes, 1.0)


def test_dense_masks_leave_gradients_alone_bit_for_bit():
  tx = sparseopt_jax.sparseopt(
    0.8, sparseopt_jax.RigL(1_000, 3), corrected=True, distribution=dense
  )
  params, update = random_params(), jax.jit(tx.update)
  opt_state = tx.init(params)
  for t in range(7):
    gradients = random_gradients(t)
    updates, opt_state = update(gradients, opt_state, params)
    for path in PARAMS:
      np.testing.assert_array_equal(updates[path], gradients[path])


def test_dense_masks_are_plain_sgd_bit_for_bit():
  # Not under jit, where XLA fuses multiplications into additions as it likes.
  plain = optax.chain(
    optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9)
  )
  topology = sparseopt_jax.RigL(1_000, 3)
  sparse = sparseopt_jax.sparsify(
    plain, 0.8, topology, corrected=True, distribution=dense
  )
  trajectories = []
  for tx in (plain, sparse):
    params = random_params()
    opt_state = tx.init(params)
    for t in range(7):
      updates, opt_state = tx.update(random_gradients(t), opt_state, params)
      params = optax.apply_updates(params, updates)
    trajectories.append(params)
  for path in PARAMS:
    np.testing.assert_array_equal(trajectories[0][path], trajectories[1][path])


def test_equal_fan_in_is_uncorrected_bit_for_bit():
  masks = {path: optax.MaskedNode() for path in PARAMS}
  kernel = np.zeros(PARAMS["Conv_1/kernel"], bool)
  kernel[0, :, :3] = True
  masks["Conv_1/kernel"] = kernel
  params = random_params()
  # The link alone: XLA may round what follows in a larger program otherwise.
  tx = sparseopt_jax.sparseopt(0.5, corrected=True, masks=masks)
  opt_state = tx.init(params)
  update = jax.jit(tx.update)
  for t in range(5):
    gradients = random_gradients(t)
    updates, opt_state = update(gradients, opt_state, params)
    for path in PARAMS:
      want = gradients[path]
      if path == "Conv_1/kernel":
        want = np.where(kernel, want, 0)
      np.testing.assert_array_equal(updates[path], want)


def test_layers_that_are_not_corrected_keep_their_gradient():
  corrected = lambda path, leaf: path.startswith("Conv")
  tx = sparseopt_jax.sparseopt(0.5, corrected=corrected)
  params = random_params()
  opt_state = tx.init(params)
  gradients = random_gradients(0)
  updates, _ = tx.update(gradients, opt_state, params)
  for path, mask in masks_of(opt_state).items():
    if path.startswith("Conv"):
      want = oracle.correct(gradients[path], mask)
      np.testing.assert_allclose(updates[path], want, rtol=1e-6)
    else:
      want = np.where(mask, gradients[path], 0)
      np.testing.assert_array_equal(updates[path], want)
  bias = "Dense_0/bias"
  np.testing.assert_array_equal(updates[bias], gradients[bias])


def test_masks_differ_between_layers_seeds_and_updates():
  params = {"a": np.ones((32, 32), np.float32), "b": np.ones((32, 32))}
  masks = [
    sparseopt_jax.sparseopt(0.5, corrected=True, seed=seed).init(params).masks
    for seed in (0, 1)
  ]
  drawn = [masks[0]["a"], masks[0]["b"], masks[1]["a"], masks[1]["b"]]
  for i in range(4):
    for j in range(i):
      # Independent halves agree in half of the 1,024 places, +- 16.
      assert 412 < int(jnp.sum(drawn[i] == drawn[j])) < 612


def test_random_masks_are_uniform():
  params = {"kernel": np.ones((20, 10), np.float32)}

  def init(seed):
    tx = sparseopt_jax.sparseopt(0.9, corrected=True, seed=seed)
    return sparseopt_jax.get_masks(tx.init(params))

  masks = jax.vmap(init)(jnp.arange(2_000))
  rate = np.mean(np.asarray(masks["kernel"]), axis=0)
  # 200 places, standard error sqrt(.1 * .9 / 2000) = .0067
  np.testing.assert_allclose(rate, 0.1, atol=0.03)
  assert 0.8 < np.std(rate) / 0.0067 < 1.2


def test_set_grows_uniformly_among_the_inactive():
  # One active weight is dropped in each update; it may come back.
  params = {"kernel": np.arange(1.0, 41.0, dtype=np.float32).reshape(8, 5)}
  masks = {"kernel": params["kernel"] > 20}

  def grown(seed):
    topology = sparseopt_jax.SET(10, 1, drop_fraction=lambda count: 0.05)
    tx = sparseopt_jax.sparseopt(
      0.5, topology, corrected=True, masks=masks, seed=seed
    )
    opt_state = tx.init(params)
    for _ in range(2):
      _, opt_state = tx.update(params, opt_state, params)
    return sparseopt_jax.get_masks(opt_state)["kernel"] & ~masks["kernel"]

  counts = np.sum(np.asarray(jax.vmap(grown)(jnp.arange(2_100))), axis=0)
  came_back = 2_100 - counts.sum()
  # 21 candidates, 100 each, standard deviation sqrt(100 * 20 / 21) = 9.8
  assert abs(came_back - 100) < 45
  assert np.all(np.abs(counts[params["kernel"] <= 20] - 100) < 45)


def test_nothing_is_dropped_in_float64_where_the_fraction_is_zero():
  """Also where an active weight at index 0 is exactly 0."""
  mask = np.random.default_rng(0).random((96, 128)) < 0.1
  mask[0, 0] = True
  topology = sparseopt_jax.RigL(100, 1, drop_fraction=0.0)
  with jax.enable_x64(True):
    params = {"kernel": jnp.zeros(mask.shape)}
    tx = sparseopt_jax.sparseopt(
      0.9, topology, corrected=True, masks={"kernel": mask}
    )
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
      _, opt_state = update(params, opt_state, params)
    got = sparseopt_jax.get_masks(opt_state)["kernel"]
  np.testing.assert_array_equal(got, mask)


@pytest.mark.parametrize(
  ("dtype", "value", "skipped"),
  [
    ("float64", 1e39, 0),
    ("float64", np.inf, 1),
    ("complex64", complex(1, np.inf), 1),
    ("complex64", complex(1, -1), 0),
  ],
)
def test_finite_is_told_in_the_gradients_own_dtype(dtype, value, skipped):
  with jax.enable_x64(dtype == "float64"):
    params = {"kernel": jnp.ones((6, 5)), "other": jnp.ones(3, dtype)}
    gradients = params | {"other": params["other"].at[1].set(value)}
    tx = sparseopt_jax.sparseopt(
      0.5, sparseopt_jax.RigL(100, 1), corrected=True
    )
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
      _, opt_state = update(gradients, opt_state, params)
    metrics = sparseopt_jax.sparsity_metrics(opt_state)
  assert int(metrics["skipped_updates"]) == skipped


def _checksum(seed):
  tx = sparseopt_jax.sparseopt(0.5, corrected=True, seed=seed)
  return int(sparseopt_jax.masks_checksum(tx.init({"k": jnp.ones((64, 64))})))


def test_every_bit_of_a_seed_counts():
  seeds = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 1, 2**40 + 1, -1]
  checksums = [_checksum(seed) for seed in seeds]
  assert len(set(checksums)) == len(seeds)
  with jax.enable_x64(True):
    assert [_checksum(seed) for seed in seeds] == checksums


def test_seeds_from_numpy_are_those_of_python_and_jax():
  for number in (np.array(3), np.int64(3), np.int32(3), np.uint8(3)):
    assert _checksum(number) == _checksum(3)
  words = np.array([1, 2], np.uint32)
  assert _checksum(words) == _checksum(jnp.asarray(words))
