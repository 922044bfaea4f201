"""The training step under jit, vmap over seeds, scan, cond and donation."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax

STEPS = 7
SEEDS = jnp.array([0, 1, 2], jnp.int32)
FORMS = ("wrapped", "bare")


def _batch(step):
  return jax.random.normal(jax.random.fold_in(jax.random.key(9), step), (16, 6))


def _params(seed):
  a, b = jax.random.split(jax.random.key(seed))
  return {
    "hidden": {"kernel": jax.random.normal(a, (6, 8))},
    "head": {"kernel": jax.random.normal(b, (8, 3)), "bias": jnp.zeros(3)},
  }


def _loss(params, inputs):
  hidden = inputs @ params["hidden"]["kernel"]
  centred = hidden - hidden.mean(0, keepdims=True)
  hidden = centred * lax.rsqrt(hidden.var(0, keepdims=True) + 1e-5)
  outputs = jnp.maximum(hidden, 0) @ params["head"]["kernel"]
  outputs += params["head"]["bias"][None]
  return jnp.mean((outputs - inputs[:, :3]) ** 2)


OTHERS = {
  "Magnitude": sparseopt_jax.Magnitude(0, STEPS - 1, 3, 0.2),
  "SRigL": sparseopt_jax.SRigL(STEPS, 3, 0.5, gamma_sal=0.9),
}


def _optimizer(seed, form="wrapped", drop_fraction=0.5, topology=None):
  topology = topology or sparseopt_jax.RigL(2 * STEPS, 3, drop_fraction)
  inner = optax.chain(
    optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9)
  )
  options = {"corrected": True, "seed": seed}
  if form == "wrapped":
    return sparseopt_jax.sparsify(inner, 0.6, topology, **options)
  return optax.chain(sparseopt_jax.sparseopt(0.6, topology, **options), inner)


def _link(seed):
  return sparseopt_jax.sparseopt(0.6, corrected=True, seed=seed)


def _start(tx, seed):
  params = _params(seed)
  opt_state = tx.init(params)
  return sparseopt_jax.apply_masks(params, opt_state), opt_state


def _step(tx, form, carry, step):
  params, opt_state = carry
  gradients = jax.grad(_loss)(params, _batch(step))
  updates, opt_state = tx.update(gradients, opt_state, params)
  params = optax.apply_updates(params, updates)
  if form == "bare":
    params = sparseopt_jax.apply_masks(params, opt_state)
  return params, opt_state


def _train_by_scan(seed, form="wrapped", drop_fraction=0.5):
  tx = _optimizer(seed, form, drop_fraction)

  def body(carry, step):
    carry = _step(tx, form, carry, step)
    return carry, sparseopt_jax.sparsity_metrics(carry[1])

  return lax.scan(body, _start(tx, seed), jnp.arange(STEPS))


def _train_by_loop(seed, form="wrapped"):
  tx = _optimizer(seed, form)
  step = jax.jit(lambda carry, i: _step(tx, form, carry, i))
  carry = _start(tx, seed)
  for i in range(STEPS):
    carry = step(carry, i)
  assert step._cache_size() == 1
  return carry


def _assert_same_run(got, expected):
  for a, b in zip(got, expected, strict=True):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, a, b)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got[0]))
  masks = [sparseopt_jax.get_masks(run[1]) for run in (got, expected)]
  jax.tree.map(np.testing.assert_array_equal, *masks)


@pytest.fixture(scope="module")
def loops():
  """Runs in a Python loop, one for each seed."""
  return [_train_by_loop(int(seed)) for seed in SEEDS]


@pytest.mark.parametrize("form", FORMS)
def test_scan_over_steps(form, loops):
  carry, metrics = jax.jit(_train_by_scan, static_argnums=1)(0, form)
  expected = loops[0] if form == "wrapped" else _train_by_loop(0, form)
  _assert_same_run(carry, expected)
  moved = np.flatnonzero(np.diff(metrics["itop_rate"]) > 0) + 1
  np.testing.assert_array_equal(moved, [3, 6])
  assert np.all(metrics["sparsity"] == metrics["sparsity"][0])


def test_vmap_over_seeds(loops):
  (params, opt_state), _ = jax.jit(jax.vmap(_train_by_scan))(SEEDS)
  for i in range(len(SEEDS)):
    mine = jax.tree.map(lambda x, i=i: x[i], (params, opt_state))
    _assert_same_run(mine, loops[i])
  checksums = jax.vmap(sparseopt_jax.masks_checksum)(opt_state)
  assert len(set(np.asarray(checksums).tolist())) == len(SEEDS)


@pytest.mark.parametrize("name", OTHERS)
def test_vmap_over_seeds_of_other_topologies(name):
  def train(seed):
    tx = _optimizer(seed, topology=OTHERS[name])
    body = lambda i, carry: _step(tx, "wrapped", carry, i)
    return lax.fori_loop(0, STEPS, body, _start(tx, seed))

  together = jax.jit(jax.vmap(train))(SEEDS)
  for i, seed in enumerate(SEEDS):
    mine = jax.tree.map(lambda x, i=i: x[i], together)
    _assert_same_run(mine, jax.jit(train)(seed))
  masks = jax.vmap(lambda seed: _optimizer(seed).init(_params(seed)))(SEEDS)
  before, after = map(sparseopt_jax.get_masks, (masks, together[1]))
  assert (before["hidden"]["kernel"] != after["hidden"]["kernel"]).any()


def test_vmap_over_typed_keys():
  keys = jax.random.split(jax.random.key(0), 3)
  init = lambda key: _link(key).init(_params(0))
  states = jax.vmap(init)(keys)
  for i, key in enumerate(keys):
    mine = jax.tree.map(lambda x, i=i: x[i], states)
    jax.tree.map(np.testing.assert_array_equal, mine, init(key))


def test_mask_updates_run_only_when_due():
  """Under vmap as well, where a cond would run both branches in each step."""
  calls = []

  def fraction(count):
    jax.debug.callback(lambda c: calls.append(int(c)), count)
    return 0.5

  def start(seed):
    return _start(_optimizer(seed, drop_fraction=fraction), seed)

  @jax.jit
  @jax.vmap
  def step(seed, carry):
    # From the carry, so that each instance has a count of its own.
    count = carry[1].link.count
    tx = _optimizer(seed, drop_fraction=fraction)
    return _step(tx, "wrapped", carry, count)

  carry = jax.vmap(start)(SEEDS)
  for _ in range(STEPS):
    carry = step(SEEDS, carry)
  jax.block_until_ready(carry)
  jax.effects_barrier()
  assert sorted(calls) == [3] * len(SEEDS) + [6] * len(SEEDS)


def test_cond_around_a_step():
  tx = _optimizer(0)

  @jax.jit
  def step(carry, i):
    take = lambda carry: _step(tx, "wrapped", carry, i)
    return lax.cond(i % 2 == 0, take, lambda carry: carry, carry)

  carry = _start(tx, 0)
  for i in range(2 * STEPS):
    carry = step(carry, i)
  expected = _start(tx, 0)
  plain = jax.jit(lambda carry, i: _step(tx, "wrapped", carry, i))
  for i in range(STEPS):
    expected = plain(expected, 2 * i)
  _assert_same_run(carry, expected)


def test_jit_of_everything_with_a_traced_seed(loops):
  @jax.jit
  def train(seed):
    body = lambda i, carry: _step(_optimizer(seed), "wrapped", carry, i)
    return lax.fori_loop(0, STEPS, body, _start(_optimizer(seed), seed))

  _assert_same_run(train(SEEDS[1]), loops[1])


def test_eager_equals_jit(loops):
  tx = _optimizer(0)
  carry = _start(tx, 0)
  for i in range(STEPS):
    carry = _step(tx, "wrapped", carry, i)
  _assert_same_run(carry, loops[0])


def test_donated_buffers():
  """Neither the user's key nor given masks belong to the state."""
  key = jax.random.PRNGKey(3)
  masks = sparseopt_jax.get_masks(_optimizer(0).init(_params(0)))
  topology = sparseopt_jax.RigL(STEPS, 3, 0.5)
  for given in (None, masks):
    options = {"corrected": True, "masks": given, "seed": key}
    inner = optax.sgd(0.1, momentum=0.9)
    tx = sparseopt_jax.sparsify(inner, 0.6, topology, **options)

    def step(carry, i, tx=tx):
      return _step(tx, "wrapped", carry, i)

    carry = _start(tx, 0)
    step = jax.jit(step, donate_argnums=0)
    for i in range(STEPS):
      carry = step(carry, i)
  assert not key.is_deleted()
  assert not any(mask.is_deleted() for mask in jax.tree.leaves(masks))


def test_seeds():
  checksum = lambda seed: int(
    sparseopt_jax.masks_checksum(_link(seed).init(_params(0)))
  )
  assert checksum(7) == checksum(np.int64(7)) == checksum(jnp.array(7))
  assert checksum(jax.random.PRNGKey(7)) == checksum(7)
  assert checksum(jax.random.key(7)) != checksum(jax.random.key(8))
  assert len({checksum(seed) for seed in range(5)}) == 5
