"""What creates a sharded state of `optax.adamw` creates ours.

Four recipes on four devices, each with a mesh axis on the input axis of a
kernel: per-neuron arrays have length 1 there and could not be laid out so.
"""

import functools

from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sparseopt_jax

INPUTS = jax.ShapeDtypeStruct((2, 8), jnp.float32)
# The first axis of each kernel is that of its inputs.
SPECS = {"Dense_0/kernel": P("model", None), "Dense_1/kernel": P(None, "model")}
TOPOLOGY = sparseopt_jax.RigL(100, update_every=2, drop_fraction=0.5)


def _mesh(kind=jax.sharding.AxisType.Auto):
  return jax.make_mesh((4,), ("model",), (kind,), devices=jax.devices()[:4])


def _optimizers():
  adamw = optax.adamw(1e-2)
  sparse = sparseopt_jax.sparsify(adamw, 0.5, TOPOLOGY, corrected=True)
  return {"adamw": adamw, "sparsify": sparse}


class _Net(nn.Module):
  box: str

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    names = [("model", None), (None, "model")]
    if self.box == "logical":
      names = [("embed", "mlp"), ("mlp", "embed")]
      partitioning = nn.with_logical_partitioning
    else:
      partitioning = nn.with_partitioning
    x = nn.Dense(12, kernel_init=partitioning(init, names[0]))(x)
    return nn.Dense(8, kernel_init=partitioning(init, names[1]))(nn.relu(x))


def _named(tree):
  """Arrays by path, the attributes of boxes left out."""
  pairs = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path).removesuffix("/value"): leaf for path, leaf in pairs}


def _assert_laid_out(opt_state, mesh):
  """Whatever is shaped like a kernel lies like it, masks among it."""
  found = 0
  for name, array in _named(opt_state).items():
    for path, spec in SPECS.items():
      if name.endswith(path):
        expected = NamedSharding(mesh, spec)
        assert array.sharding.is_equivalent_to(expected, array.ndim), name
        found += 1
  return found


def _train(tx, params, opt_state, steps=5):
  """Through two mask updates."""
  params = sparseopt_jax.apply_masks(params, opt_state)
  before = _named(sparseopt_jax.get_masks(opt_state))
  step = jax.jit(tx.update)
  for i in range(steps):
    noise = lambda p, i=i: jnp.cos(p + i + jnp.arange(p.size).reshape(p.shape))
    gradients = jax.tree.map(noise, params)
    updates, opt_state = step(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
  after = _named(sparseopt_jax.get_masks(opt_state))
  for name, mask in after.items():
    assert mask.sum() == before[name].sum()
    assert not np.asarray(_named(params)[name])[~np.asarray(mask)].any()
  assert any((after[name] != before[name]).any() for name in after)
  return params, opt_state


@pytest.mark.parametrize("box", ["mesh", "logical"])
def test_boxes_of_linen(box):
  mesh = _mesh()
  model = _Net(box)
  counts = {}
  for name, tx in _optimizers().items():

    def create(key, tx=tx):
      variables = model.init(key, jnp.zeros(INPUTS.shape))
      return train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=tx
      )

    abstract = jax.eval_shape(create, jax.random.key(0))
    if box == "mesh":
      shardings = nn.get_sharding(abstract, mesh)
    else:
      rules = (("embed", "model"), ("mlp", None))
      specs = nn.get_partition_spec(abstract)
      shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    counts[name] = _assert_laid_out(state.opt_state, mesh)
  # Two moments of two kernels; and masks and what was explored.
  assert counts == {"adamw": 4, "sparsify": 8}
  _, opt_state = _train(tx, state.params, state.opt_state)
  _assert_laid_out(opt_state, mesh)


class _NnxNet(nnx.Module):
  def __init__(self, rngs):
    init = nnx.initializers.lecun_normal()
    split = functools.partial(nnx.with_partitioning, init)
    self.Dense_0 = nnx.Linear(
      8, 12, kernel_init=split(("model", None)), rngs=rngs
    )
    self.Dense_1 = nnx.Linear(
      12, 8, kernel_init=split((None, "model")), rngs=rngs
    )

  def __call__(self, x):
    return self.Dense_1(nnx.relu(self.Dense_0(x)))


def test_nnx_optimizer_under_a_mesh():
  mesh = _mesh()
  counts = {}
  with jax.set_mesh(mesh):
    for name, tx in _optimizers().items():

      @nnx.jit
      def create(tx=tx):
        net = _NnxNet(nnx.Rngs(0))
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        state = nnx.state(optimizer)
        specs = nnx.get_partition_spec(state)
        nnx.update(optimizer, jax.lax.with_sharding_constraint(state, specs))
        return net, optimizer

      net, optimizer = create()
      counts[name] = _assert_laid_out(optimizer.opt_state, mesh)
    assert counts == {"adamw": 4, "sparsify": 8}
    masked = sparseopt_jax.apply_masks(
      nnx.state(net, nnx.Param), optimizer.opt_state
    )
    nnx.update(net, masked)

    @nnx.jit
    def step(net, optimizer, x):
      loss = lambda net: jnp.mean((net(x) - x) ** 2)
      optimizer.update(net, nnx.grad(loss)(net))

    before = _named(sparseopt_jax.get_masks(optimizer.opt_state))
    x = jax.random.normal(jax.random.key(1), INPUTS.shape)
    for _ in range(5):
      step(net, optimizer, x)
    after = _named(sparseopt_jax.get_masks(optimizer.opt_state))
  params = _named(nnx.state(net, nnx.Param))
  for name, mask in after.items():
    assert mask.sum() == before[name].sum()
    assert not np.asarray(params[name])[~np.asarray(mask)].any()
  assert any((after[name] != before[name]).any() for name in after)


def test_specs_mapped_over_the_state():
  mesh = _mesh()
  params = {
    "Dense_0": {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)},
    "Dense_1": {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)},
  }
  specs = {
    name: {"kernel": SPECS[f"{name}/kernel"], "bias": P()} for name in params
  }
  counts = {}
  for name, tx in _optimizers().items():
    abstract = jax.eval_shape(tx.init, params)
    mapped = optax.tree.map_params(
      tx,
      lambda _, spec: NamedSharding(mesh, spec),
      abstract,
      specs,
      transform_non_params=lambda _: NamedSharding(mesh, P()),
      # As for Optax's own states with MaskedNodes.
      is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    opt_state = jax.jit(tx.init, out_shardings=mapped)(params)
    counts[name] = _assert_laid_out(opt_state, mesh)
  assert counts == {"adamw": 4, "sparsify": 8}
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  _train(tx, jax.device_put(params, shardings), opt_state)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_an_abstract_init_gives_what_a_concrete_one_gives(kind):
  params = {"kernel": jnp.ones((8, 12), kind), "bias": jnp.ones(12, kind)}
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  for name, tx in _optimizers().items():
    expected = tx.init(jax.tree.map(jnp.zeros_like, params))
    got = tx.init(abstract)
    assert jax.tree.structure(got) == jax.tree.structure(expected), name
    jax.tree.map(np.testing.assert_array_equal, got, expected)
