"""Client code: a dict of arrays, and the whole training in one `lax.scan`."""

import clients
import jax
import jax.numpy as jnp
import optax

import sparseopt_jax


def _apply(params, x):
  for i in range(2):
    x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"][None])
  return x @ params["w2"] + params["b2"][None]


def _init(key):
  shapes = [(64, 128), (128, 128), (128, 10)]
  keys, params = jax.random.split(key, 3), {}
  for i, shape in enumerate(shapes):
    scale = (2 / shape[0]) ** 0.5
    params[f"w{i}"] = scale * jax.random.normal(keys[i], shape)
    params[f"b{i}"] = jnp.zeros(shape[1])
  return params


def test_one_scan():
  images, labels = clients.digits()
  images = images.reshape(-1, 64)
  tx = sparseopt_jax.sparsify(
    optax.adam(3e-3),
    0.8,
    sparseopt_jax.SET(update_until=60, update_every=10),
    corrected=False,
  )

  def loss(params, places):
    logits = _apply(params, jnp.asarray(images)[places])
    targets = jnp.asarray(labels)[places]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean()

  def train_step(carry, key):
    params, opt_state = carry
    places = jax.random.randint(key, (128,), 0, len(labels))
    gradients = jax.grad(loss)(params, places)
    updates, opt_state = tx.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  @jax.jit
  def train(key):
    params = _init(key)
    opt_state = tx.init(params)
    params = sparseopt_jax.apply_masks(params, opt_state)
    masks = sparseopt_jax.get_masks(opt_state)
    keys = jax.random.split(key, 100)
    (params, opt_state), _ = jax.lax.scan(train_step, (params, opt_state), keys)
    return params, masks, sparseopt_jax.get_masks(opt_state)

  params, masks, new_masks = train(jax.random.key(0))
  accuracy = jnp.mean(_apply(params, images).argmax(-1) == labels)
  assert accuracy > 0.9
  clients.assert_sparse(params, masks, new_masks, 0.8)
