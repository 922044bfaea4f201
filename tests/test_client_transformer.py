"""Client code: a small transformer, its blocks stacked by `nn.scan`."""

import clients
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax

WORDS, LENGTH, WIDTH, HEADS, LAYERS = 12, 16, 32, 4, 2


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, mask):
    y = nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
    x = x + y
    y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
    return x + nn.Dense(WIDTH)(y), None


class Transformer(nn.Module):
  scan: bool = True

  @nn.compact
  def __call__(self, words):
    table = self.param(
      "pos_embedding", nn.initializers.normal(0.1), (1, LENGTH, WIDTH)
    )
    x = nn.Embed(WORDS, WIDTH)(words)
    x = x + jnp.broadcast_to(table[:, : words.shape[1]], x.shape)
    if not self.scan:
      for i in range(LAYERS):
        x, _ = Block(name=f"block_{i}")(x, nn.make_causal_mask(words))
      return nn.Dense(WORDS, name="head")(nn.LayerNorm()(x))
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=LAYERS,
    )
    x, _ = blocks(name="blocks")(x, nn.make_causal_mask(words))
    return nn.Dense(WORDS, name="head")(nn.LayerNorm()(x))


def sentences(key):
  """Four words, again and again: from the fifth on, one can know them."""
  return jnp.tile(jax.random.randint(key, (64, 4), 0, WORDS), (1, LENGTH // 4))


def loss(params, words):
  logits = Transformer().apply({"params": params}, words[:, :-1])
  losses = optax.softmax_cross_entropy_with_integer_labels
  return losses(logits[:, 3:], words[:, 4:]).mean()


@pytest.mark.slow
def test_transformer():
  params = Transformer().init(jax.random.key(0), sentences(jax.random.key(0)))
  params = params["params"]
  tx = sparseopt_jax.sparsify(
    optax.adamw(3e-3),
    0.9,
    sparseopt_jax.RigL(update_until=150, update_every=20),
    corrected=False,  # No batch norm.
    # In the blocks, the first axis counts layers.
    stacked=lambda path, leaf: int(path.startswith("blocks/")),
  )
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  masks = sparseopt_jax.get_masks(opt_state)

  def train_step(carry, key):
    params, opt_state = carry
    gradients = jax.grad(loss)(params, sentences(key))
    updates, opt_state = tx.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  train = jax.jit(lambda *args: jax.lax.scan(train_step, *args)[0])
  keys = jax.random.split(jax.random.key(1), 200)
  params, opt_state = train((params, opt_state), keys)

  test = sentences(jax.random.key(2))
  assert loss(params, test) < 0.1 * np.log(WORDS)
  new_masks = sparseopt_jax.get_masks(opt_state)
  clients.assert_sparse(params, masks, new_masks, 0.9)
  # Attention, feed-forward layers and the head are sparse, and no table.
  first, last = clients.by_path(masks), clients.by_path(new_masks)
  attention = "blocks/MultiHeadDotProductAttention_0"
  assert set(last) == {
    *(f"{attention}/{x}/kernel" for x in ("query", "key", "value", "out")),
    "blocks/Dense_0/kernel",
    "blocks/Dense_1/kernel",
    "head/kernel",
  }
  # Each layer of a stack keeps its own count, and moves by itself.
  for path in set(last) - {"head/kernel"}:
    axes = tuple(range(1, last[path].ndim))
    counts = last[path].sum(axes)
    np.testing.assert_array_equal(counts, first[path].sum(axes))
    assert np.all((last[path] != first[path]).any(axes))
  # A neuron is a feature of a head, or a column.
  factors = dict(zip(last, opt_state.link.factors, strict=True))
  heads = (LAYERS, 1, HEADS, WIDTH // HEADS)
  assert factors[f"{attention}/query/kernel"].shape == heads
  assert factors[f"{attention}/out/kernel"].shape == (LAYERS, 1, 1, WIDTH)


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_a_stack_counts_as_its_twin_does_without_one(distribution):
  """Active weights and neurons, attention's among them."""
  words, states = sentences(jax.random.key(0)), []
  for scan in (True, False):
    link = sparseopt_jax.sparseopt(
      0.9,
      corrected=False,
      distribution=distribution,
      stacked=lambda path, leaf: int(path.startswith("blocks/")),
    )
    init = Transformer(scan).init
    params = jax.eval_shape(init, jax.random.key(0), words)["params"]
    states.append(link.init(params))
  masks, twin_masks = (clients.by_path(state.masks) for state in states)
  neurons, twin_neurons = (
    dict(zip(clients.by_path(state.masks), state.factors, strict=True))
    for state in states
  )
  for path, mask in masks.items():
    if path == "head/kernel":
      assert mask.sum() == twin_masks[path].sum()
      continue
    for i in range(LAYERS):
      twin = path.replace("blocks/", f"block_{i}/")
      assert mask[i].sum() == twin_masks[twin].sum()
      assert neurons[path][i].shape == twin_neurons[twin].shape
  assert len(twin_masks) == LAYERS * (len(masks) - 1) + 1
