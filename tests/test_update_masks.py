"""The extra argument `update_masks`: the host says what is due."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import topologies

import sparseopt_jax

TOPOLOGIES = [
  sparseopt_jax.SET(update_until=9, update_every=3),
  sparseopt_jax.RigL(update_until=9, update_every=3),
  topologies.GrowBySum(update_until=9, update_every=3),
  sparseopt_jax.Magnitude(1, 8, update_every=3),
  sparseopt_jax.SRigL(9, update_every=3, drop_fraction=0.5, gamma_sal=0.9),
]


def _params():
  rng = np.random.default_rng(0)
  return {
    "a": {"kernel": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)},
    "b": {"kernel": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)},
  }


def _optimizer(topology, wrapped=True, inner=None):
  inner = optax.sgd(0.1, momentum=0.9) if inner is None else inner
  if wrapped:
    return sparseopt_jax.sparsify(inner, 0.6, topology, corrected=True)
  link = sparseopt_jax.sparseopt(0.6, topology, corrected=True)
  return optax.chain(link, inner)


def _run(topology, say_so, wrapped=True):
  tx = _optimizer(topology, wrapped)
  params = _params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)

  @functools.partial(jax.jit, static_argnums=3)
  def step(params, opt_state, gradients, update_masks):
    updates, opt_state = tx.update(
      gradients, opt_state, params, update_masks=update_masks
    )
    params = optax.apply_updates(params, updates)
    return sparseopt_jax.apply_masks(params, opt_state), opt_state

  rng = np.random.default_rng(1)
  for i in range(12):
    gradients = jax.tree.map(
      lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
    )
    told = topology.is_due(i) if say_so else None
    params, opt_state = step(params, opt_state, gradients, told)
  return params, opt_state


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_a_host_that_counts_gets_the_same(topology, wrapped):
  told = _run(topology, True, wrapped)
  counted = _run(topology, False, wrapped)
  for mine, other in zip(
    jax.tree.leaves(told), jax.tree.leaves(counted), strict=True
  ):
    assert mine.dtype == other.dtype
    if jnp.issubdtype(mine.dtype, jnp.floating):
      # Other programs, so sums of numbers of about 1 may be rounded otherwise.
      np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    else:
      np.testing.assert_array_equal(mine, other)


def test_is_due_on_the_host():
  topology = sparseopt_jax.RigL(update_until=9, update_every=3)
  due = [i for i in range(20) if topology.is_due(i)]
  assert due == [3, 6]
  assert topology.is_due(3) is True
  assert topology.is_due(4) is False
  topology = sparseopt_jax.Magnitude(4, 11, update_every=3)
  assert [i for i in range(20) if topology.is_due(i)] == [7, 10, 11]


def _program(tx, params, update_masks, platform):
  """One step of a transformation, lowered but not compiled."""
  opt_state = tx.init(params)

  def step(gradients, opt_state, params):
    return tx.update(gradients, opt_state, params, update_masks=update_masks)

  traced = jax.jit(step).trace(params, opt_state, params)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def _operations(program):
  """How often each operation stands in a program, those in functions once."""
  return collections.Counter(re.findall(r"stablehlo\.\w+|call(?= @)", program))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("topology", TOPOLOGIES[:2], ids=str)
def test_between_mask_updates_it_is_as_short_as_with_static_masks(
  topology, platform
):
  params = _params()
  static = _optimizer(sparseopt_jax.Static())
  moving = _optimizer(topology)
  texts = [
    _program(static, params, None, platform),
    _program(moving, params, False, platform),
    _program(moving, params, None, platform),
  ]
  assert ["while" in text for text in texts] == [False, False, True]
  expected, got, counted = map(_operations, texts)
  # Masks are read from `explored`, by a bitwise and; nothing else is new.
  assert got.keys() <= expected.keys() | {"stablehlo.and"}
  assert got.total() - expected.total() <= 5 * len(params)
  assert counted.total() > 4 * got.total()


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_between_mask_updates_no_slot_is_started_afresh(topology):
  """The optimiser's init, which makes fresh slots, is not so much as traced."""
  sgd, calls = optax.sgd(0.1, momentum=0.9), []

  def init(params):
    calls.append(params)
    return sgd.init(params)

  inner = optax.GradientTransformation(init, sgd.update)
  tx, params = _optimizer(topology, inner=inner), _params()
  opt_state = tx.init(params)
  traced = {}
  for update_masks in (False, True, None):
    calls.clear()
    step = functools.partial(tx.update, update_masks=update_masks)
    jax.eval_shape(step, params, opt_state, params)
    traced[update_masks] = len(calls)
  assert traced[False] == 0
  assert traced[True] == traced[None] > 0


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_between_mask_updates_the_step_is_that_of_static_masks(topology):
  params = _params()
  moving = _optimizer(topology)
  opt_state = moving.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  gradients = jax.tree.map(jnp.cos, _params())
  # From a state in which masks have just moved, and slots are not zero.
  _, opt_state = moving.update(gradients, opt_state, params, update_masks=True)
  params = sparseopt_jax.apply_masks(params, opt_state)
  masks = sparseopt_jax.get_masks(opt_state)
  inner = optax.sgd(0.1, momentum=0.9)
  static = sparseopt_jax.sparsify(inner, 0.6, masks=masks, corrected=True)
  expected = static.init(params)._replace(inner=opt_state.inner)
  got, opt_state = jax.jit(
    functools.partial(moving.update, update_masks=False)
  )(gradients, opt_state, params)
  expected, expected_state = jax.jit(static.update)(gradients, expected, params)
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  jax.tree.map(
    np.testing.assert_array_equal, opt_state.inner, expected_state.inner
  )


def test_skipped_where_a_gradient_is_not_finite():
  topology = sparseopt_jax.RigL(update_until=9, update_every=1)
  tx = _optimizer(topology)
  params = _params()
  opt_state = tx.init(params)
  before = sparseopt_jax.get_masks(opt_state)
  gradients = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
  _, opt_state = tx.update(gradients, opt_state, params, update_masks=True)
  after = sparseopt_jax.get_masks(opt_state)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert int(sparseopt_jax.sparsity_metrics(opt_state)["skipped_updates"]) == 1


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("spec", [None, jax.P(), jax.P("rows")])
def test_skipped_where_one_number_is_not_finite(spec, jitted):
  """A maximum of 4,096 floats and more loses NaN in XLA on a CPU."""
  layout = jax.NamedSharding(jax.make_mesh((4,), ("rows",)), spec or jax.P())
  place = lambda x: (
    jnp.asarray(x) if spec is None else jax.device_put(x, layout)
  )
  shapes = {"small": (8, 4), "medium": (64, 80), "large": (512, 160)}
  ones = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
  params = jax.tree.map(place, ones)
  tx = _optimizer(sparseopt_jax.RigL(update_until=9, update_every=1))
  state = optax.tree.set(tx.init(params), count=jnp.int32(1))
  update = jax.jit(tx.update) if jitted else tx.update
  _, after = update(params, state, params)
  assert after.link.updated
  for leaf, bad in itertools.product(shapes, (np.nan, np.inf, -np.inf)):
    gradient = ones[leaf].copy()
    gradient[5, 2] = bad
    _, after = update(params | {leaf: place(gradient)}, state, params)
    assert int(after.link.skipped) == 1, (leaf, bad)
    masks = map(sparseopt_jax.get_masks, (state, after))
    jax.tree.map(np.testing.assert_array_equal, *masks)


def test_eager_calls_compile_once():
  compiled = []

  def listener(event, duration, **tags):
    del duration, tags
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(event)

  tx, params = _optimizer(TOPOLOGIES[1]), _params()
  opt_state = tx.init(params)
  numbers = []
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for _ in range(9):
      before = len(compiled)
      _, opt_state = tx.update(params, opt_state, params)
      numbers.append(len(compiled) - before)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  # Of calls 0 to 8 those with number 3 and 6 update the masks.
  assert numbers[3] > 0
  assert numbers[1:3] == [0, 0]
  assert numbers[4:] == [0] * 5


@pytest.mark.parametrize("value", [1, "yes", np.int64(1)])
def test_must_be_known_while_tracing(value):
  tx = sparseopt_jax.sparseopt(0.6, TOPOLOGIES[0], corrected=True)
  params = _params()
  with pytest.raises(TypeError, match="update_masks must be a bool"):
    tx.update(params, tx.init(params), params, update_masks=value)


def test_a_bool_of_numpy_will_do():
  tx, params = _optimizer(TOPOLOGIES[0]), _params()
  opt_state = tx.init(params)
  for value in (False, True):
    got, expected = (
      tx.update(params, opt_state, params, update_masks=kind(value))
      for kind in (np.bool_, bool)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert got[1].link.updated == value


def test_a_traced_value_is_refused():
  tx = sparseopt_jax.sparseopt(0.6, TOPOLOGIES[0], corrected=True)
  params = _params()
  opt_state = tx.init(params)

  @jax.jit
  def step(due):
    return tx.update(params, opt_state, params, update_masks=due)

  with pytest.raises(TypeError, match="update_masks must be a bool"):
    step(True)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_count_that_is_set_back_resets_no_weights(wrapped):
  """A mask update of long ago was once taken for one of this call."""
  moving = _optimizer(
    sparseopt_jax.RigL(update_until=100, update_every=4), wrapped
  )
  static = _optimizer(sparseopt_jax.Static(), wrapped)
  params = _params()
  gradients = jax.tree.map(jnp.ones_like, params)
  opt_state = moving.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)

  def steps(tx, params, opt_state, number):
    for _ in range(number):
      updates, opt_state = jax.jit(tx.update)(gradients, opt_state, params)
      params = optax.apply_updates(params, updates)
      params = sparseopt_jax.apply_masks(params, opt_state)
      yield params, opt_state

  *_, (params, opt_state) = steps(moving, params, opt_state, 8)
  opt_state = optax.tree.set(opt_state, count=jnp.zeros([], jnp.int32))
  masks = sparseopt_jax.get_masks(opt_state)
  for after, _ in steps(static, params, opt_state, 8):
    for mask, old, new in zip(
      *map(jax.tree.leaves, (masks, params, after)), strict=True
    ):
      np.testing.assert_array_equal(new != old, mask)
      np.testing.assert_array_equal(new != 0, mask)
    params = after


def test_eager_and_told_on_an_explicit_mesh():
  kind = (jax.sharding.AxisType.Explicit,)
  mesh = jax.make_mesh((2,), ("rows",), axis_types=kind)
  rows = jax.NamedSharding(mesh, jax.P("rows"))
  params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
  placed = jax.device_put(params, rows)
  tx = _optimizer(TOPOLOGIES[1])
  mine = tx.update(placed, tx.init(placed), placed, update_masks=True)
  other = tx.update(params, tx.init(params), params, update_masks=True)
  jax.tree.map(np.testing.assert_array_equal, mine, other)


def test_eager_and_told_computes_no_nan():
  tx = _optimizer(TOPOLOGIES[1])
  params = _params()
  with jax.debug_nans(True):
    tx.update(params, tx.init(params), params, update_masks=True)


def test_nothing_is_dropped_beyond_the_end():
  params = _params()
  topology = sparseopt_jax.RigL(update_until=10, update_every=2)
  tx = _optimizer(topology)
  opt_state = optax.tree.set(tx.init(params), count=jnp.int32(15))
  _, after = tx.update(params, opt_state, params, update_masks=True)
  jax.tree.map(
    np.testing.assert_array_equal,
    sparseopt_jax.get_masks(opt_state),
    sparseopt_jax.get_masks(after),
  )
