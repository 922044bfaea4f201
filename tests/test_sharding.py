"""Eight devices, laid out in every way, give the masks of one device."""

import functools

import jax
from jax import lax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sparseopt_jax

STEPS = 5
TOPOLOGIES = {
  "RigL": sparseopt_jax.RigL(10, update_every=2, drop_fraction=0.5),
  "SET": sparseopt_jax.SET(10, update_every=2, drop_fraction=0.5),
  "Magnitude": sparseopt_jax.Magnitude(0, 4, update_every=2),
  "SRigL": sparseopt_jax.SRigL(10, 2, drop_fraction=0.5, gamma_sal=0.9),
}
# Two layers of one shape are laid out differently: along inputs and outputs.
SPECS = {
  "a": {"kernel": P(None, "model")},
  "b": {"kernel": P("model", None), "bias": P()},
  "c": {"kernel": P("model", None)},
  "d": {"kernel": P(None, None, "model", "data")},
}


def _tree(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "a": {"kernel": draw(8, 16)},
    "b": {"kernel": draw(16, 8), "bias": draw(8)},
    "c": {"kernel": draw(8, 16)},
    "d": {"kernel": draw(3, 3, 4, 2)},
  }


def _mesh(axis_type):
  devices = mesh_utils.create_device_mesh((2, 4))
  return jax.sharding.Mesh(
    devices, ("data", "model"), axis_types=(axis_type,) * 2
  )


def _shardings(mesh):
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def _optimizer(topology):
  inner = optax.chain(optax.add_decayed_weights(1e-3), optax.adam(0.1))
  return sparseopt_jax.sparsify(
    inner, 0.6, TOPOLOGIES[topology], corrected=True, seed=5
  )


def _run(tx, params, opt_state, place):
  """Lays gradients out by ``place``; returns the masks of all steps too."""
  update = jax.jit(tx.update)
  params = sparseopt_jax.apply_masks(params, opt_state)
  masks = []
  for i in range(STEPS):
    updates, opt_state = update(place(_tree(10 + i)), opt_state, params)
    params = optax.apply_updates(params, updates)
    masks.append(jax.device_get(sparseopt_jax.get_masks(opt_state)))
  return params, opt_state, masks


@functools.cache
def _one_device(topology):
  tx = _optimizer(topology)
  params = jax.tree.map(jnp.asarray, _tree(0))
  run = _run(tx, params, tx.init(params), lambda tree: tree)
  first, last = run[2][0], run[2][-1]
  assert (first["a"]["kernel"] != last["a"]["kernel"]).any()
  return run


def _assert_same(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got[2], expected[2])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, jax.device_get(got[0]), jax.device_get(expected[0]))


def _assert_laid_out_as_parameters(opt_state, shardings):
  """Masks, what was explored, and moments."""
  link, (_, (adam, _)) = opt_state
  named = {"masks": link.masks, "explored": link.explored}
  named |= {"mu": adam.mu, "nu": adam.nu}
  for name, tree in named.items():
    for layer, leaves in shardings.items():
      array, want = tree[layer]["kernel"], leaves["kernel"]
      same = array.sharding.is_equivalent_to(want, array.ndim)
      assert same, (name, layer, array.sharding)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_sharded_parameters(topology):
  mesh = _mesh(AxisType.Auto)
  shardings = _shardings(mesh)
  place = lambda tree: jax.device_put(tree, shardings)
  tx = _optimizer(topology)
  params = place(_tree(0))
  opt_state = tx.init(params)
  _assert_laid_out_as_parameters(opt_state, shardings)
  got = _run(tx, params, opt_state, place)
  _assert_laid_out_as_parameters(got[1], shardings)
  _assert_same(got, _one_device(topology))
  sparseopt_jax.assert_replicas_agree(got[1])
  assert sparseopt_jax.masks_checksum(got[1]) == sparseopt_jax.masks_checksum(
    _one_device(topology)[1]
  )


def test_init_under_jit():
  """Layouts follow with the first step, as those of Optax's own states do."""
  mesh = _mesh(AxisType.Auto)
  shardings = _shardings(mesh)
  place = lambda tree: jax.device_put(tree, shardings)
  tx = _optimizer("RigL")
  params = place(_tree(0))
  got = _run(tx, params, jax.jit(tx.init)(params), place)
  _assert_laid_out_as_parameters(got[1], shardings)
  _assert_same(got, _one_device("RigL"))


@pytest.mark.parametrize(
  ("topology", "in_context"),
  [
    ("RigL", True),
    ("RigL", False),
    ("SET", True),
    ("Magnitude", True),
    ("SRigL", True),
  ],
)
def test_explicit_axes(topology, in_context):
  mesh = _mesh(AxisType.Explicit)
  shardings = _shardings(mesh)
  place = lambda tree: jax.device_put(tree, shardings)
  tx = _optimizer(topology)

  def run():
    params = place(_tree(0))
    # Without jax.set_mesh, JAX cannot tell the devices of jit(init).
    init = jax.jit(tx.init) if in_context else tx.init
    opt_state = init(params)
    _assert_laid_out_as_parameters(opt_state, shardings)
    return _run(tx, params, opt_state, place)

  if in_context:
    with jax.set_mesh(mesh):
      got = run()
  else:
    got = run()
  _assert_laid_out_as_parameters(got[1], shardings)
  _assert_same(got, _one_device(topology))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_magnitude_masks(axis_type):
  mesh = _mesh(axis_type)
  shardings = _shardings(mesh)
  prune = lambda params: sparseopt_jax.magnitude_masks(params, 0.6)
  masks = prune(jax.device_put(_tree(0), shardings))
  jax.tree.map(np.testing.assert_array_equal, masks, prune(_tree(0)))
  with jax.set_mesh(mesh):
    masks = jax.jit(prune)(jax.device_put(_tree(0), shardings))
  jax.tree.map(np.testing.assert_array_equal, masks, prune(_tree(0)))


def test_state_is_not_bound_to_a_device_its_parameters_are_free_of():
  """Else the state could not follow when the parameters move."""
  params = jax.tree.map(jnp.asarray, _tree(0))
  opt_state = _optimizer("RigL").init(params)
  assert not any(leaf.committed for leaf in jax.tree.leaves(opt_state))
  mesh = _mesh(AxisType.Auto)
  moved = jax.device_put(params, NamedSharding(mesh, P()))
  jax.jit(_optimizer("RigL").update)(moved, opt_state, moved)
  there = jax.device_put(params, jax.devices()[3])
  state = _optimizer("RigL").init(there)
  for tree in (state.link.masks, state.link.explored):
    assert tree["a"]["kernel"].devices() == {jax.devices()[3]}


# --- Data parallel ------------------------------------------------------------


def _loss(params, inputs):
  """Its gradient is the mean of the inputs, whatever the order of the sum."""
  products = jax.tree.map(lambda p, x: jnp.sum(p[None] * x), params, inputs)
  return sum(jax.tree.leaves(products)) / len(inputs["a"]["kernel"])


def _dense_params():
  return {name: {"kernel": _tree(0)[name]["kernel"]} for name in "ab"}


def _inputs(step):
  rng = np.random.default_rng(step)
  draw = lambda p: rng.integers(-9, 10, (32, *p.shape)).astype(np.float32)
  return jax.tree.map(draw, _dense_params())


def _data_parallel_step(tx, average, params, opt_state, inputs):
  gradients = average(jax.grad(_loss)(params, inputs))
  updates, opt_state = tx.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


@functools.cache
def _one_device_on_all_data(topology):
  tx = _optimizer(topology)
  step = jax.jit(
    functools.partial(_data_parallel_step, tx, lambda gradients: gradients)
  )
  params = jax.tree.map(jnp.asarray, _dense_params())
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(STEPS):
    params, opt_state = step(params, opt_state, _inputs(i))
  return params, opt_state


def _assert_same_as_on_all_data(params, opt_state, topology="RigL"):
  expected_params, expected_state = _one_device_on_all_data(topology)
  masks = map(sparseopt_jax.get_masks, (opt_state, expected_state))
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, masks))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, jax.device_get(params), jax.device_get(expected_params))


def _mean_over_data(gradients):
  return lax.pmean(gradients, "data")


def _sharded_step(tx, average, check_vma):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  return jax.jit(
    jax.shard_map(
      functools.partial(_data_parallel_step, tx, average),
      mesh=mesh,
      in_specs=(P(), P(), P("data")),
      out_specs=P(),
      check_vma=check_vma,
    )
  )


def _mean_of_sum(gradients):
  """With check_vma, AD has summed the gradient over the devices already."""
  return jax.tree.map(lambda g: g / 8, gradients)


@pytest.mark.parametrize(
  ("check_vma", "average"), [(True, _mean_of_sum), (False, _mean_over_data)]
)
def test_shard_map(check_vma, average):
  tx = _optimizer("RigL")
  step = _sharded_step(tx, average, check_vma)
  params = jax.tree.map(jnp.asarray, _dense_params())
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(STEPS):
    params, opt_state = step(params, opt_state, _inputs(i))
  _assert_same_as_on_all_data(params, opt_state)
  sparseopt_jax.assert_replicas_agree(opt_state)


def test_forgotten_average_in_shard_map_is_found():
  tx = _optimizer("RigL")
  step = _sharded_step(tx, lambda gradients: gradients, check_vma=False)
  params = jax.tree.map(jnp.asarray, _dense_params())
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(STEPS):
    params, opt_state = step(params, opt_state, _inputs(i))
  with pytest.raises(AssertionError, match="Average the gradients"):
    sparseopt_jax.assert_replicas_agree(opt_state)


def _replicated(tree):
  return jax.tree.map(lambda x: jnp.stack([x] * 8), tree)


@pytest.mark.parametrize(
  ("topology", "averaged"),
  [("RigL", True), ("RigL", False), ("Magnitude", True), ("SRigL", True)],
)
def test_pmap(topology, averaged):
  tx = _optimizer(topology)
  average = _mean_over_data if averaged else lambda gradients: gradients
  step = jax.pmap(
    functools.partial(_data_parallel_step, tx, average), axis_name="data"
  )
  params = jax.tree.map(jnp.asarray, _dense_params())
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  params, opt_state = _replicated(params), _replicated(opt_state)
  sparseopt_jax.assert_replicas_agree(opt_state)
  for i in range(STEPS):
    inputs = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), _inputs(i))
    params, opt_state = step(params, opt_state, inputs)
  if averaged:
    sparseopt_jax.assert_replicas_agree(opt_state)
    first = jax.tree.map(lambda x: x[0], (params, opt_state))
    _assert_same_as_on_all_data(*first, topology)
  else:
    with pytest.raises(AssertionError, match="Average the gradients"):
      sparseopt_jax.assert_replicas_agree(opt_state)


def test_batch_sharded_over_data_and_parameters_over_model():
  mesh = _mesh(AxisType.Auto)
  specs = {"a": {"kernel": P(None, "model")}, "b": {"kernel": P("model", None)}}
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  tx = _optimizer("RigL")
  step = jax.jit(
    functools.partial(_data_parallel_step, tx, lambda gradients: gradients)
  )
  params = jax.device_put(_dense_params(), shardings)
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(STEPS):
    inputs = jax.device_put(_inputs(i), NamedSharding(mesh, P("data")))
    params, opt_state = step(params, opt_state, inputs)
  _assert_same_as_on_all_data(params, opt_state)
  layout = opt_state.link.masks["a"]["kernel"].sharding
  assert layout.is_equivalent_to(shardings["a"]["kernel"], 2)
  sparseopt_jax.assert_replicas_agree(opt_state)
