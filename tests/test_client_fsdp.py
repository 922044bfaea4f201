"""Client code: parameters and optimiser state sharded over eight devices."""

import clients
from flax import linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sparseopt_jax
from sparseopt_jax import inspection


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    x = x.reshape(x.shape[0], -1)
    for _ in range(2):
      x = nn.Dense(128, use_bias=False)(x)
      norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
      x = nn.relu(norm(x))
    return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
  batch_stats: dict


def fully_sharded(state, mesh):
  """Each array is split along its first axis that eight divides."""

  def spec(x):
    fits = [size % mesh.size == 0 for size in x.shape]
    return P(*[None] * fits.index(True), "data") if any(fits) else P()

  return jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), state)


def _train(num_devices):
  images, _ = clients.digits()
  mesh = jax.make_mesh(
    (num_devices,),
    ("data",),
    (jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )
  net = Net()
  tx = sparseopt_jax.sparsify(
    optax.adamw(3e-3),
    0.8,
    sparseopt_jax.RigL(update_until=40, update_every=10),
    corrected=inspection.batch_normalized(net, images[:1], train=False),
  )

  def create(key):
    variables = net.init(key, images[:1])
    state = TrainState.create(apply_fn=net.apply, tx=tx, **variables)
    params = sparseopt_jax.apply_masks(state.params, state.opt_state)
    return state.replace(params=params)

  # No device ever holds the whole state.
  key = jax.random.key(0)
  shardings = fully_sharded(jax.eval_shape(create, key), mesh)
  state = jax.jit(create, out_shardings=shardings)(key)
  # Copied, since the state is donated.
  first = jax.tree.map(jnp.copy, sparseopt_jax.get_masks(state.opt_state))

  def train_step(state, images, labels):
    def loss(params):
      variables = {"params": params, "batch_stats": state.batch_stats}
      logits, new = net.apply(variables, images, mutable=["batch_stats"])
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), new["batch_stats"]

    gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats)

  rows = NamedSharding(mesh, P("data"))
  train_step = jax.jit(
    train_step,
    in_shardings=(shardings, rows, rows),
    out_shardings=shardings,
    donate_argnums=0,
  )
  for batch in clients.batches(epochs=4):
    state = train_step(state, *batch)
  return net, state, first


@pytest.mark.slow
def test_fsdp():
  net, state, masks = _train(8)
  images, labels = clients.digits()
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits = net.apply(jax.device_get(variables), images, train=False)
  assert np.mean(logits.argmax(-1) == labels) > 0.9
  new_masks = sparseopt_jax.get_masks(state.opt_state)
  clients.assert_sparse(state.params, masks, new_masks, 0.8)
  sparseopt_jax.assert_replicas_agree(state.opt_state)
  # Masks and moments lie where their parameters lie.
  adam = state.opt_state.inner[0]
  for tree in (state.params, new_masks, adam.mu, adam.nu):
    kernel = tree["Dense_0"]["kernel"]
    assert {x.data.shape for x in kernel.addressable_shards} == {(8, 128)}
  # The first masks are those of one device; gradients differ by rounding.
  _, one_device, one_masks = _train(1)
  one_masks = clients.by_path(one_masks)
  for path, mask in clients.by_path(masks).items():
    np.testing.assert_array_equal(mask, one_masks[path])
  one_masks = clients.by_path(sparseopt_jax.get_masks(one_device.opt_state))
  for path, mask in clients.by_path(new_masks).items():
    assert np.mean(mask == one_masks[path]) > 0.95
