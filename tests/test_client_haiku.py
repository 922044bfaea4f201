"""Client code: Haiku with batch norm."""

import clients
import jax
import jax.numpy as jnp
import optax
import pytest

import sparseopt_jax

hk = pytest.importorskip("haiku")


def _net(images, train):
  x = images.reshape(images.shape[0], -1)
  for _ in range(2):
    x = hk.Linear(128, with_bias=False)(x)
    norm = hk.BatchNorm(True, True, decay_rate=0.9)
    x = jax.nn.relu(norm(x, is_training=train))
  return hk.Linear(10)(x)


def test_haiku():
  images, labels = clients.digits()
  net = hk.without_apply_rng(hk.transform_with_state(_net))
  # Batch norm follows these two.
  is_hidden = lambda path, leaf: path in ("linear/w", "linear_1/w")
  tx = sparseopt_jax.sparsify(
    optax.sgd(0.1, momentum=0.9),
    0.8,
    sparseopt_jax.RigL(update_until=50, update_every=10),
    corrected=is_hidden,
  )
  params, state = net.init(jax.random.key(0), images[:1], True)
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  masks = sparseopt_jax.get_masks(opt_state)

  @jax.jit
  def train_step(params, state, opt_state, images, labels):
    def loss(params):
      logits, new_state = net.apply(params, state, images, True)
      losses = optax.softmax_cross_entropy_with_integer_labels
      return losses(logits, labels).mean(), new_state

    gradients, state = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state

  for batch in clients.batches(epochs=4):
    params, state, opt_state = train_step(params, state, opt_state, *batch)

  logits, _ = net.apply(params, state, images, False)
  assert jnp.mean(logits.argmax(-1) == labels) > 0.9
  new_masks = sparseopt_jax.get_masks(opt_state)
  clients.assert_sparse(params, masks, new_masks, 0.8)
  lines = sparseopt_jax.sparsity_table(opt_state).split("\n")[1:-1]
  corrected = {line.split()[0]: line.split()[-1] for line in lines}
  assert corrected == {
    "linear/w": "yes",
    "linear_1/w": "yes",
    "linear_2/w": "no",
  }
