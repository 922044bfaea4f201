"""Client code: linen with batch norm, and Flax's `TrainState`."""

import clients
from flax import linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

import sparseopt_jax
from sparseopt_jax import inspection


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    for features in (8, 16):
      x = nn.Conv(features, (3, 3), (2, 2), use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


class TrainState(train_state.TrainState):
  batch_stats: dict


@jax.jit
def train_step(state, images, labels):
  def loss(params):
    logits, new = state.apply_fn(
      {"params": params, "batch_stats": state.batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new["batch_stats"]

  gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
  return state.apply_gradients(grads=gradients, batch_stats=batch_stats)


def test_linen():
  images, labels = clients.digits()
  net = Net()
  tx = sparseopt_jax.sparsify(
    optax.sgd(0.1, momentum=0.9),
    0.8,
    sparseopt_jax.RigL(update_until=50, update_every=10),
    corrected=inspection.batch_normalized(net, images[:1], train=False),
  )
  variables = net.init(jax.random.key(0), images[:1], train=True)
  state = TrainState.create(apply_fn=net.apply, tx=tx, **variables)
  params = sparseopt_jax.apply_masks(state.params, state.opt_state)
  state = state.replace(params=params)
  masks = sparseopt_jax.get_masks(state.opt_state)

  for batch in clients.batches(epochs=6):
    state = train_step(state, *batch)

  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits = net.apply(variables, images, train=False)
  assert jnp.mean(logits.argmax(-1) == labels) > 0.9
  new_masks = sparseopt_jax.get_masks(state.opt_state)
  clients.assert_sparse(state.params, masks, new_masks, 0.8)
