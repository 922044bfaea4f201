"""Metrics against counts made in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax

PARAMS = {
  "a": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)},
  "b": {"kernel": jnp.ones((8, 5))},
}
RIGL = sparseopt_jax.RigL(100, 2)


def state_with(masks, **kwargs):
  tree = {
    "a": {"kernel": masks["a"], "bias": optax.MaskedNode()},
    "b": {"kernel": masks["b"]},
  }
  options = {"corrected": True} | kwargs
  tx = sparseopt_jax.sparseopt(0.5, masks=tree, **options)
  return tx, tx.init(PARAMS)


def random_masks(seed=0):
  rng = np.random.default_rng(seed)
  masks = {"a": rng.random((3, 3, 4, 8)) < 0.1, "b": rng.random((8, 5)) < 0.3}
  masks["a"][..., 2] = False
  masks["b"][:, 4] = False
  return masks


def test_agree_with_counts_in_numpy():
  masks = random_masks()
  _, state = state_with(masks)
  metrics = jax.jit(sparseopt_jax.sparsity_metrics)(state)
  active = sum(mask.sum() for mask in masks.values())
  size = sum(mask.size for mask in masks.values())
  dead = sum((oracle.fan_ins(mask) == 0).sum() for mask in masks.values())
  angles = [oracle.skew_angle(mask) for mask in masks.values()]
  np.testing.assert_allclose(metrics["sparsity"], 1 - active / size, rtol=1e-6)
  np.testing.assert_allclose(metrics["itop_rate"], active / size, rtol=1e-6)
  np.testing.assert_allclose(metrics["skew_angle"], np.mean(angles), rtol=1e-5)
  assert int(metrics["dead_neurons"]) == dead >= 2
  assert float(metrics["mask_change"]) == 0
  assert int(metrics["skipped_updates"]) == 0
  assert all(value.shape == () for value in metrics.values())


def test_skew_angle_looks_at_corrected_layers_only():
  masks = random_masks()
  only_a = lambda path, leaf: path == "a/kernel"
  _, state = state_with(masks, corrected=only_a)
  got = sparseopt_jax.sparsity_metrics(state)["skew_angle"]
  np.testing.assert_allclose(got, oracle.skew_angle(masks["a"]), rtol=1e-5)
  _, state = state_with(masks, corrected=False)
  assert float(sparseopt_jax.sparsity_metrics(state)["skew_angle"]) == 0


@pytest.mark.parametrize("topology", [sparseopt_jax.Static(), RIGL])
def test_groups_of_leaves_count_as_one_network(topology):
  """Two links under `optax.partition` against one over all leaves."""
  masks = random_masks()
  labels = {"a": {"kernel": "a", "bias": "a"}, "b": {"kernel": "b"}}
  links = {}
  for name in masks:
    nodes = jax.tree.map(lambda _: optax.MaskedNode(), PARAMS)
    nodes[name]["kernel"] = masks[name]
    links[name] = sparseopt_jax.sparseopt(
      0.5, topology, corrected=True, masks={name: nodes[name]}
    )
  groups = optax.partition(links, labels)
  whole, whole_state = state_with(masks, topology=topology)
  state = groups.init(PARAMS)
  rng = np.random.default_rng(0)
  draw = lambda p: rng.normal(size=p.shape).astype(np.float32)
  functions = (
    sparseopt_jax.sparsity_metrics,
    sparseopt_jax.sparsity_table,
    sparseopt_jax.masks_checksum,
    sparseopt_jax.get_masks,
  )
  for _ in range(3):
    for function in functions:
      got, expected = function(state), function(whole_state)
      jax.tree.map(np.testing.assert_array_equal, got, expected)
    sparseopt_jax.assert_replicas_agree(state)
    gradients = jax.tree.map(draw, PARAMS)
    _, state = groups.update(gradients, state, PARAMS)
    _, whole_state = whole.update(gradients, whole_state, PARAMS)


def test_zeros_among_the_weights_do_not_count():
  tx, state = state_with(random_masks())
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  before = sparseopt_jax.sparsity_metrics(state)
  _, state = tx.update(zeros, state, zeros)
  after = sparseopt_jax.sparsity_metrics(state)
  assert float(before["sparsity"]) == float(after["sparsity"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["kernel", "bias"])
def test_skipped_updates_are_counted(bad, leaf):
  tx, state = state_with(random_masks(), topology=RIGL)
  masks = sparseopt_jax.get_masks(state)
  gradients = jax.tree.map(jnp.ones_like, PARAMS)
  gradients["a"][leaf] = gradients["a"][leaf].at[(0,) * (1)].set(bad)
  update = jax.jit(tx.update)
  for _ in range(5):  # due on the third and on the fifth call
    _, state = update(gradients, state, PARAMS)
  metrics = sparseopt_jax.sparsity_metrics(state)
  assert int(metrics["skipped_updates"]) == 2
  for old, new in zip(
    jax.tree.leaves(masks),
    jax.tree.leaves(sparseopt_jax.get_masks(state)),
    strict=True,
  ):
    np.testing.assert_array_equal(old, new)


def test_checksum_tells_masks_apart_and_sees_masks_only():
  masks = random_masks()
  _, state = state_with(masks)
  checksum = jax.jit(sparseopt_jax.masks_checksum)
  value = int(checksum(state))
  _, again = state_with(masks, seed=7, topology=sparseopt_jax.RigL(10))
  assert int(checksum(again)) == value
  seen = {value}
  for index in range(40):
    other = {path: mask.copy() for path, mask in masks.items()}
    other["b"].reshape(-1)[index] ^= True
    seen.add(int(checksum(state_with(other)[1])))
  assert len(seen) == 41


def test_table_has_a_line_for_each_layer():
  masks = random_masks()
  _, state = state_with(masks, corrected=lambda path, leaf: path == "a/kernel")
  lines = sparseopt_jax.sparsity_table(state).splitlines()
  assert len(lines) == 4
  for line, mask, corrected in zip(
    lines[1:3], masks.values(), ("yes", "no"), strict=True
  ):
    cells = line.split()
    assert cells[1] == "x".join(map(str, mask.shape))
    assert int(cells[2]) == mask.sum()
    assert cells[3] == f"{1 - mask.mean():.4f}"
    assert int(cells[5]) == (oracle.fan_ins(mask) == 0).sum()
    assert cells[6] == corrected
  assert lines[3].split()[1] == str(sum(mask.sum() for mask in masks.values()))


def test_replicas_stacked_twice_are_compared():
  params = {"kernel": jnp.ones((8, 4))}

  def init(seed):
    tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.75, corrected=True, seed=seed)
    return tx.init(params)

  stack = jax.vmap(jax.vmap(init))
  sparseopt_jax.assert_replicas_agree(stack(jnp.zeros((2, 2), jnp.int32)))
  with pytest.raises(AssertionError, match="must hold the same masks"):
    sparseopt_jax.assert_replicas_agree(stack(jnp.arange(4).reshape(2, 2)))
