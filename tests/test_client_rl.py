"""Client code: sparse reinforcement learning in one program.

An actor-critic that balances a pole. Environment, rollout and update stand in
one `lax.scan`, and `jax.vmap` trains several seeds at once, each with its own
masks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax

ENVIRONMENTS, STEPS, UPDATES = 16, 16, 1_000
SPARSITY = 0.8


# --- The environment ----------------------------------------------------------


def reset(key: jax.Array) -> jax.Array:
  """Position, velocity, angle, angular velocity, and the number of steps."""
  start = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
  return jnp.append(start, 0.0)


def move(state: jax.Array, action: jax.Array, key: jax.Array) -> tuple:
  """Pushes the cart left or right; starts again where the pole has fallen."""
  velocity, angle, spin, steps = state[1:]
  force = jnp.where(action == 1, 10.0, -10.0)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  push = (force + 0.05 * spin**2 * sin) / 1.1
  turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
  speed_up = push - 0.05 * turn * cos / 1.1
  change = jnp.stack([velocity, speed_up, spin, turn])
  new = jnp.append(state[:4] + 0.02 * change, steps + 1)
  has_fallen = (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 0.21)
  ends = has_fallen | (new[4] >= 500)
  return jnp.where(ends, reset(key), new), ends


# --- The agent ----------------------------------------------------------------


def init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  sizes = {"hidden_0": (4, 64), "hidden_1": (64, 64), "out": (64, 3)}
  keys = jax.random.split(key, len(sizes))
  scaled = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
  return {
    name: {"kernel": scaled(key, shape), "bias": jnp.zeros(shape[1:])}
    for key, (name, shape) in zip(keys, sizes.items(), strict=True)
  }


def apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits of the two actions, and the value."""
  dense = lambda layer, x: (
    jnp.dot(x, layer["kernel"])
    + jnp.expand_dims(layer["bias"], range(x.ndim - 1))
  )
  x = jnp.tanh(dense(params["hidden_0"], x))
  x = jnp.tanh(dense(params["hidden_1"], x))
  out = dense(params["out"], x)
  return out[..., :2], out[..., 2]


def loss(params: Any, rollout: Any, last: jax.Array) -> jax.Array:
  """Advantage actor-critic, with an entropy bonus."""
  states, actions, ends = rollout
  logits, values = apply(params, states[..., :4])

  def backwards(target, step):
    end, value = step
    target = 1.0 + 0.99 * jnp.where(end, 0.0, target)
    return 0.95 * target + 0.05 * value, target

  _, bootstrap = apply(params, last[..., :4])
  inputs = (ends, values)
  _, targets = jax.lax.scan(backwards, bootstrap, inputs, reverse=True)
  advantages = jax.lax.stop_gradient(targets) - values
  log_probs = jax.nn.log_softmax(logits)
  taken = jnp.take_along_axis(log_probs, actions[..., None], -1)[..., 0]
  entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
  policy = -taken * jax.lax.stop_gradient(advantages)
  return jnp.mean(policy + 0.5 * advantages**2 - 0.01 * entropy)


# --- Training -----------------------------------------------------------------


def sparse(seed: jax.Array) -> optax.GradientTransformationExtraArgs:
  topology = sparseopt_jax.RigL(update_until=UPDATES * 3 // 4, update_every=50)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
  return sparseopt_jax.sparsify(
    optimizer, SPARSITY, topology, corrected=False, seed=seed
  )


def train(key: jax.Array) -> tuple[Any, Any, Any, jax.Array]:
  """Returns parameters, masks before and after, and lengths of episodes."""
  key_params, key_masks, key_env, key = jax.random.split(key, 4)
  params = init(key_params)
  tx = sparse(key_masks)  # Each seed its own masks.
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  first_masks = sparseopt_jax.get_masks(opt_state)
  states = jax.vmap(reset)(jax.random.split(key_env, ENVIRONMENTS))

  def act(carry, key):
    params, states = carry
    key_action, key_reset = jax.random.split(key)
    logits, _ = apply(params, states[:, :4])
    actions = jax.random.categorical(key_action, logits)
    keys = jax.random.split(key_reset, ENVIRONMENTS)
    new_states, ends = jax.vmap(move)(states, actions, keys)
    return (params, new_states), (states, actions, ends)

  def update(carry, key):
    params, opt_state, states = carry
    keys = jax.random.split(key, STEPS)
    (_, states), rollout = jax.lax.scan(act, (params, states), keys)
    gradients = jax.grad(loss)(params, rollout, states)
    updates, opt_state = tx.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, opt_state, states), jnp.sum(rollout[2])

  carry = (params, opt_state, states)
  carry, ends = jax.lax.scan(update, carry, jax.random.split(key, UPDATES))
  params, opt_state, _ = carry
  # Steps over ends, in each quarter of the training.
  ends = jnp.maximum(ends.reshape(4, -1).sum(1), 1)
  lengths = ENVIRONMENTS * STEPS * UPDATES / 4 / ends
  return params, first_masks, sparseopt_jax.get_masks(opt_state), lengths


@pytest.mark.slow
def test_an_agent_for_each_seed():
  keys = jax.random.split(jax.random.key(0), 4)
  params, first, last, lengths = jax.jit(jax.vmap(train))(keys)
  # All learn; a cart that is pushed at random falls after some 20 steps.
  assert np.all(lengths[:, -1] > 100)
  assert np.all(lengths[:, -1] > 2.5 * lengths[:, 0])
  for name in params:
    kernel, mask = params[name]["kernel"], last[name]["kernel"]
    assert mask.shape == kernel.shape
    assert not np.any(kernel[~mask])
    counts = mask.sum((1, 2))
    np.testing.assert_array_equal(counts, first[name]["kernel"].sum((1, 2)))
  # Every seed has masks of its own, and they have moved.
  masks = np.asarray(last["hidden_1"]["kernel"]).reshape(4, -1)
  assert len(np.unique(masks, axis=0)) == 4
  assert np.all((masks != first["hidden_1"]["kernel"].reshape(4, -1)).any(1))
  active = sum(x.sum() for x in jax.tree.leaves(last))
  assert active == 4 * round((1 - SPARSITY) * (4 * 64 + 64 * 64 + 64 * 3))
