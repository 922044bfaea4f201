"""Client code: Equinox, with `eqx.filter`; neurons lie along the first axis."""

import clients
import jax
import jax.numpy as jnp
import optax
import pytest

import sparseopt_jax

eqx = pytest.importorskip("equinox")


def test_equinox():
  images, labels = clients.digits()
  tx = sparseopt_jax.sparsify(
    optax.adam(3e-3),
    0.8,
    sparseopt_jax.RigL(update_until=50, update_every=10),
    corrected=False,
    output_axis=0,
  )
  model = eqx.nn.MLP(64, 10, 128, 2, key=jax.random.key(0))
  opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
  model = sparseopt_jax.apply_masks(model, opt_state)
  masks = sparseopt_jax.get_masks(opt_state)

  @eqx.filter_jit
  def train_step(model, opt_state, images, labels):
    def loss(model):
      logits = jax.vmap(model)(images.reshape(-1, 64))
      losses = optax.softmax_cross_entropy_with_integer_labels
      return losses(logits, labels).mean()

    gradients = eqx.filter_grad(loss)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(gradients, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state

  for batch in clients.batches(epochs=6):
    model, opt_state = train_step(model, opt_state, *batch)

  logits = jax.vmap(model)(images.reshape(-1, 64))
  assert jnp.mean(logits.argmax(-1) == labels) > 0.9
  params = eqx.filter(model, eqx.is_inexact_array)
  new_masks = sparseopt_jax.get_masks(opt_state)
  clients.assert_sparse(params, masks, new_masks, 0.8)
  # 128 neurons of 64 inputs: as many factors as neurons.
  assert opt_state.link.factors[0].shape == (128, 1)
