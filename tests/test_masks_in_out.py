"""Masks that come from elsewhere, and masks that go elsewhere."""

import io

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax

RIGL = sparseopt_jax.RigL(100, update_every=2, drop_fraction=0.5)


def _params(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "Conv_0": {"kernel": draw(3, 3, 2, 4)},
    "Dense_0": {"kernel": draw(6, 5), "bias": draw(5)},
  }


def _train(tx, params, opt_state, steps):
  @jax.jit
  def step(gradients, opt_state, params):
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for i in range(steps):
    params, opt_state = step(_params(10 + i), opt_state, params)
  return params, opt_state


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def trained():
  """Parameters and masks after dynamic sparse training."""
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.6, RIGL)
  params = _params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  params, opt_state = _train(tx, params, opt_state, 5)
  return params, sparseopt_jax.get_masks(opt_state)


def test_masks_are_a_plain_tree_that_numpy_saves(trained):
  _, masks = trained
  assert isinstance(masks["Dense_0"]["bias"], optax.MaskedNode)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(mask)
    for path, mask in jax.tree_util.tree_leaves_with_path(masks)
  }
  assert set(named) == {"Conv_0/kernel", "Dense_0/kernel"}
  file = io.BytesIO()
  np.savez(file, **named)
  file.seek(0)
  loaded = np.load(file)
  restored = jax.tree_util.tree_map_with_path(
    lambda path, _: loaded[
      jax.tree_util.keystr(path, simple=True, separator="/")
    ],
    masks,
  )
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.6, masks=restored)
  _assert_same(sparseopt_jax.get_masks(tx.init(_params())), masks)


def test_fine_tuning_keeps_the_masks_of_an_earlier_model(trained):
  params, masks = trained
  tx = sparseopt_jax.sparseopt_sgd(
    0.1, 0.6, sparseopt_jax.Static(), masks=masks, weight_decay=1e-3
  )
  opt_state = tx.init(params)
  _assert_same(sparseopt_jax.apply_masks(params, opt_state), params)
  tuned, opt_state = _train(tx, params, opt_state, 5)
  _assert_same(sparseopt_jax.get_masks(opt_state), masks)
  for layer in ("Conv_0", "Dense_0"):
    mask = masks[layer]["kernel"]
    before, after = params[layer]["kernel"], tuned[layer]["kernel"]
    assert not np.any(after[~mask])
    assert np.all(after[mask] != before[mask])


def test_dynamic_training_goes_on_from_given_masks(trained):
  params, masks = trained
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.6, RIGL, masks=masks)
  _, opt_state = _train(tx, params, tx.init(params), 5)
  new = sparseopt_jax.get_masks(opt_state)
  for layer in ("Conv_0", "Dense_0"):
    assert new[layer]["kernel"].sum() == masks[layer]["kernel"].sum()
    assert np.any(new[layer]["kernel"] != masks[layer]["kernel"])
  rate = sparseopt_jax.sparsity_metrics(opt_state)["itop_rate"]
  active = sum(int(m.sum()) for m in jax.tree.leaves(masks))
  size = sum(m.size for m in jax.tree.leaves(masks))
  assert rate > active / size


def test_given_masks_may_be_dense_in_one_layer_and_empty_in_another():
  params = _params()
  masks = {
    "Conv_0": {"kernel": np.ones((3, 3, 2, 4), bool)},
    "Dense_0": {"kernel": np.zeros((6, 5), bool), "bias": optax.MaskedNode()},
  }
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.9, RIGL, masks=masks)
  params = sparseopt_jax.apply_masks(params, tx.init(params))
  new, opt_state = _train(tx, params, tx.init(params), 5)
  assert not np.any(new["Dense_0"]["kernel"])
  assert np.all(new["Conv_0"]["kernel"])
  assert np.isfinite(sparseopt_jax.sparsity_metrics(opt_state)["skew_angle"])


def test_masks_chosen_leaf_by_leaf_make_the_others_dense():
  masks = {
    "Conv_0": {"kernel": np.eye(72, dtype=bool)[0].reshape(3, 3, 2, 4)},
    "Dense_0": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()},
  }
  opt_state = sparseopt_jax.sparseopt_sgd(0.1, 0.9, masks=masks).init(_params())
  _assert_same(sparseopt_jax.get_masks(opt_state), masks)


def _expected_magnitude_mask(weights, n):
  order = np.argsort(np.abs(np.ravel(weights)), kind="stable")
  mask = np.ones(weights.size, bool)
  mask[order[: weights.size - n]] = False
  return mask.reshape(weights.shape)


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_magnitude_masks_keep_the_largest_weights(distribution):
  params = _params()
  masks = sparseopt_jax.magnitude_masks(params, 0.7, distribution=distribution)
  shapes = {"Conv_0": (3, 3, 2, 4), "Dense_0": (6, 5)}
  densities = getattr(sparseopt_jax, distribution)(shapes, 0.7)
  for layer, shape in shapes.items():
    weights = np.asarray(params[layer]["kernel"])
    n = round(densities[layer] * np.prod(shape))
    np.testing.assert_array_equal(
      masks[layer]["kernel"], _expected_magnitude_mask(weights, n)
    )
  assert isinstance(masks["Dense_0"]["bias"], optax.MaskedNode)


def test_magnitude_masks_prune_ties_by_index_and_ignore_signs():
  params = {"kernel": jnp.array([[0.0, -2.0, 1.0], [-1.0, 1.0, -0.0]])}
  masks = sparseopt_jax.magnitude_masks(params, 0.5, distribution="uniform")
  expected = [[False, True, False], [True, True, False]]
  np.testing.assert_array_equal(masks["kernel"], expected)


def test_magnitude_masks_choose_leaves_as_sparseopt_does():
  masks = sparseopt_jax.magnitude_masks(
    _params(), 0.5, sparse=lambda path, leaf: path == "Conv_0/kernel"
  )
  assert isinstance(masks["Dense_0"]["kernel"], optax.MaskedNode)
  assert int(masks["Conv_0"]["kernel"].sum()) == 36
  with pytest.raises(ValueError, match="sparsity must lie"):
    sparseopt_jax.magnitude_masks(_params(), 1.0)


@pytest.mark.parametrize("topology", [sparseopt_jax.Static(), RIGL])
def test_train_from_magnitude_masks(topology):
  params = _params()
  masks = sparseopt_jax.magnitude_masks(params, 0.7)
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.7, topology, masks=masks)
  opt_state = tx.init(params)
  _assert_same(sparseopt_jax.get_masks(opt_state), masks)
  uniformly_random = sparseopt_jax.sparseopt_sgd(0.1, 0.7).init(params)
  counts = lambda tree: [int(m.sum()) for m in jax.tree.leaves(tree)]
  assert counts(masks) == counts(sparseopt_jax.get_masks(uniformly_random))


def test_whole_state_goes_through_bytes():
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.6, RIGL)
  params = _params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  params, opt_state = _train(tx, params, opt_state, 3)
  data = flax.serialization.to_bytes(opt_state)
  restored = flax.serialization.from_bytes(tx.init(_params(1)), data)
  _assert_same(restored, opt_state)
  _assert_same(
    _train(tx, params, restored, 3), _train(tx, params, opt_state, 3)
  )
