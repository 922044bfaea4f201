"""Masks that come from elsewhere, and masks that go elsewhere.

Which leaves have one by default is tested in `test_trees`.
"""

import dataclasses
import functools
import gc
import io
import weakref

from flax import linen as nn
from flax import nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import sparseopt_jax

RIGL = sparseopt_jax.RigL(100, update_every=2, drop_fraction=0.5)


def _sgd(sparsity, topology=sparseopt_jax.Static(), **options):  # noqa: B008
  inner = optax.chain(
    optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9)
  )
  return sparseopt_jax.sparsify(
    inner, sparsity, topology, corrected=True, **options
  )


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
  tx = _sgd(0.6, RIGL)
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
  tx = _sgd(0.6, masks=restored)
  _assert_same(sparseopt_jax.get_masks(tx.init(_params())), masks)


def test_fine_tuning_keeps_the_masks_of_an_earlier_model(trained):
  params, masks = trained
  tx = _sgd(0.6, masks=masks)
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
  tx = _sgd(0.6, RIGL, masks=masks)
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
  tx = _sgd(0.9, RIGL, masks=masks)
  params = sparseopt_jax.apply_masks(params, tx.init(params))
  new, opt_state = _train(tx, params, tx.init(params), 5)
  assert not np.any(new["Dense_0"]["kernel"])
  assert np.all(new["Conv_0"]["kernel"])
  assert np.isfinite(sparseopt_jax.sparsity_metrics(opt_state)["skew_angle"])


def test_masks_may_be_bytes(trained):
  params, masks = trained
  as_bytes = jax.tree.map(lambda mask: np.asarray(mask, np.uint8), masks)
  got = sparseopt_jax.get_masks(_sgd(0.6, masks=as_bytes).init(params))
  _assert_same(got, masks)
  # Whatever their value: it is a mask if it is not 0.
  as_bytes = jax.tree.map(lambda mask: 255 * mask, as_bytes)
  got = sparseopt_jax.get_masks(_sgd(0.6, masks=as_bytes).init(params))
  _assert_same(got, masks)


def test_leaves_left_out_of_the_masks_are_drawn():
  """As many active weights as without masks, at other places by the seed."""
  kernel = np.eye(6, 5, dtype=bool)
  draw = lambda **options: sparseopt_jax.get_masks(
    _sgd(0.6, **options).init(_params())
  )
  plain = draw()
  for masks in ({"Dense_0": {"kernel": kernel}}, {"Dense_0/kernel": kernel}):
    drawn = [draw(masks=masks, seed=seed) for seed in (0, 1)]
    for tree in drawn:
      assert jax.tree.structure(tree) == jax.tree.structure(plain)
      np.testing.assert_array_equal(tree["Dense_0"]["kernel"], kernel)
      got = tree["Conv_0"]["kernel"].sum()
      assert got == plain["Conv_0"]["kernel"].sum()
    one, other = (tree["Conv_0"]["kernel"] for tree in drawn)
    assert np.any(one != other)


def test_a_masked_node_makes_all_below_it_dense():
  kernel = np.ones((6, 5), bool)
  masks = {"Conv_0": optax.MaskedNode(), "Dense_0": {"kernel": kernel}}
  got = sparseopt_jax.get_masks(_sgd(0.6, masks=masks).init(_params()))
  _assert_same(
    got,
    jax.tree.map(lambda _: optax.MaskedNode(), _params())
    | {"Dense_0": {"kernel": jnp.asarray(kernel), "bias": optax.MaskedNode()}},
  )


class _Net(nnx.Module):
  """With leaves of the names and shapes of `_params`."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.Conv_0 = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
    self.Dense_0 = nnx.Linear(6, 5, rngs=rngs)


def test_masks_are_matched_by_path(trained):
  """Masks of a linen model for an NNX model, and back."""
  params, masks = trained
  state = nnx.state(_Net(), nnx.Param)
  of_nnx = _sgd(0.6, masks=masks).init(state)
  nnx_masks = sparseopt_jax.get_masks(of_nnx)
  assert jax.tree.structure(nnx_masks) != jax.tree.structure(masks)
  for layer in ("Conv_0", "Dense_0"):
    got = nnx_masks[layer]["kernel"][...]
    np.testing.assert_array_equal(got, masks[layer]["kernel"])
  of_linen = _sgd(0.6, masks=nnx_masks).init(params)
  _assert_same(sparseopt_jax.get_masks(of_linen), masks)
  # Likewise where they are applied.
  dense = _params(1)
  expected = sparseopt_jax.apply_masks(dense, of_linen)
  _assert_same(sparseopt_jax.apply_masks(dense, of_nnx), expected)
  frozen = nn.FrozenDict(dense)
  got = sparseopt_jax.apply_masks(frozen, of_linen)
  _assert_same(got, nn.FrozenDict(expected))
  got = sparseopt_jax.apply_masks(state, of_linen)
  assert jax.tree.structure(got) == jax.tree.structure(state)
  for layer in ("Conv_0", "Dense_0"):
    kernel, mask = state[layer]["kernel"][...], masks[layer]["kernel"]
    zeroed = got[layer]["kernel"][...]
    np.testing.assert_array_equal(zeroed, np.where(mask, kernel, 0))


def test_masks_of_nnx_stay_what_they_were():
  """`nnx.Optimizer` writes each step into the variables of its state."""
  net = _Net()
  optimizer = nnx.Optimizer(net, _sgd(0.6, RIGL), wrt=nnx.Param)
  params = nnx.state(net, nnx.Param)
  before = sparseopt_jax.get_masks(optimizer.opt_state)
  kernel = np.array(before["Dense_0"]["kernel"][...])
  for i in range(3):
    noise = lambda x, i=i: jnp.cos(jnp.arange(x.size) + i).reshape(x.shape)
    optimizer.update(net, jax.tree.map(noise, params))
  np.testing.assert_array_equal(before["Dense_0"]["kernel"][...], kernel)
  after = sparseopt_jax.get_masks(optimizer.opt_state)
  assert np.any(after["Dense_0"]["kernel"][...] != kernel)
  # Another optimiser goes on from them.
  other = nnx.Optimizer(net, _sgd(0.6, RIGL, masks=after), wrt=nnx.Param)
  _assert_same(sparseopt_jax.get_masks(other.opt_state), after)


def _groups():
  """Two links over different leaves, and a plain optimiser for the bias."""
  labels = {
    "Conv_0": {"kernel": "conv"},
    "Dense_0": {"kernel": "dense", "bias": "bias"},
  }
  return optax.partition(
    {"conv": _sgd(0.9, RIGL), "dense": _sgd(0.5), "bias": optax.sgd(0.1)},
    labels,
  )


def test_states_of_several_groups_are_read_as_one():
  tx, params = _groups(), _params()
  params, opt_state = _train(tx, params, tx.init(params), 4)
  masks = sparseopt_jax.get_masks(opt_state)
  assert jax.tree.structure(masks) == jax.tree.structure(
    sparseopt_jax.get_masks(_sgd(0.5).init(params))
  )
  assert masks["Conv_0"]["kernel"].sum() == 7
  assert masks["Dense_0"]["kernel"].sum() == 15
  got = sparseopt_jax.apply_masks(_params(1), opt_state)
  expected = jax.tree.map(
    lambda mask, x: x if isinstance(mask, optax.MaskedNode) else mask * x,
    masks,
    _params(1),
    is_leaf=lambda node: isinstance(node, optax.MaskedNode),
  )
  _assert_same(got, expected)
  _assert_same(sparseopt_jax.apply_masks(params, opt_state), params)
  # One optimiser goes on from the masks of both.
  tx = _sgd(0.5, masks=masks)
  _assert_same(sparseopt_jax.get_masks(tx.init(params)), masks)


def test_masks_chosen_leaf_by_leaf_make_the_others_dense():
  masks = {
    "Conv_0": {"kernel": np.eye(72, dtype=bool)[0].reshape(3, 3, 2, 4)},
    "Dense_0": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()},
  }
  opt_state = _sgd(0.9, masks=masks).init(_params())
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
  tx = _sgd(0.7, topology, masks=masks)
  opt_state = tx.init(params)
  _assert_same(sparseopt_jax.get_masks(opt_state), masks)
  uniformly_random = _sgd(0.7).init(params)
  counts = lambda tree: [int(m.sum()) for m in jax.tree.leaves(tree)]
  assert counts(masks) == counts(sparseopt_jax.get_masks(uniformly_random))


@pytest.mark.parametrize("several", [False, True])
def test_a_state_that_orbax_restores_without_a_target(tmp_path, several):
  """It has dicts and lists in the place of tuples, and None for MaskedNode."""
  tx = _groups() if several else _sgd(0.6, RIGL)
  params, opt_state = _train(tx, _params(), tx.init(_params()), 3)
  with orbax.checkpoint.StandardCheckpointer() as saved:
    saved.save(tmp_path / "state", opt_state)
    saved.wait_until_finished()
    restored = saved.restore(tmp_path / "state")
  is_tuple = lambda node: type(node) is sparseopt_jax.SparseOptState
  nodes = jax.tree.leaves(restored, is_leaf=is_tuple)
  assert not any(map(is_tuple, nodes))
  masks = sparseopt_jax.get_masks(opt_state)
  got = sparseopt_jax.get_masks(restored)
  for layer in ("Conv_0", "Dense_0"):
    mask = got[layer]["kernel"]
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, masks[layer]["kernel"])
  dense = _params(1)
  expected = sparseopt_jax.apply_masks(dense, opt_state)
  _assert_same(sparseopt_jax.apply_masks(dense, restored), expected)
  # And what it holds can start another run.
  again = _sgd(0.6, masks=got).init(params)
  _assert_same(sparseopt_jax.get_masks(again), masks)


def test_whole_state_goes_through_bytes():
  tx = _sgd(0.6, RIGL)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Attention:
  query: jax.Array
  key: jax.Array
  value: jax.Array


def test_a_field_that_is_named_as_the_attribute_of_a_box():
  """`value` is dense; that says nothing of its neighbours."""
  params = {"att": _Attention(*(jnp.ones((8, 8)) for _ in range(3)))}
  link = sparseopt_jax.sparseopt(
    0.5, corrected=True, sparse=lambda path, leaf: path != "att"
  )
  masks = sparseopt_jax.get_masks(link.init(params))
  assert masks["att"].value == optax.MaskedNode()
  again = sparseopt_jax.sparseopt(0.5, corrected=True, masks=masks)
  _assert_same(sparseopt_jax.get_masks(again.init(params)), masks)


def test_given_masks_are_not_needed_after_init():
  """They may lie in a state that was donated since."""
  params = _params()
  masks = {"Dense_0": {"kernel": jnp.ones((6, 5), bool)}}
  tx = sparseopt_jax.sparsify(
    optax.sgd(0.1), 0.6, RIGL, masks=masks, corrected=True
  )
  opt_state = tx.init(params)
  masks["Dense_0"]["kernel"].delete()
  _train(tx, params, opt_state, 3)


def _counting(seen):
  """A rule that chooses matrices and keeps what it was asked."""

  def rule(path, leaf):
    assert isinstance(leaf, jax.Array)  # A tracer is one too.
    seen.append(path)
    return leaf.ndim > 1

  return rule


def test_the_leaves_are_planned_once():
  """In init; later traces, and calls outside of jit, ask no rule again."""
  params, seen = _params(), []
  tx = _sgd(0.6, RIGL, sparse=_counting(seen))
  opt_state = tx.init(params)
  paths = ["Conv_0/kernel", "Dense_0/bias", "Dense_0/kernel"]
  assert seen == paths
  for known in (True, False, None):
    update = functools.partial(tx.update, update_masks=known)
    jax.jit(update)(params, opt_state, params)
    update(params, opt_state, params)
  assert seen == paths


@pytest.mark.parametrize(
  "jit", [pytest.param(lambda f: f, marks=pytest.mark.slow), jax.jit]
)
def test_one_transformation_for_several_trees(jit):
  """In turn: of other shapes, dtypes, names and containers."""
  base = _params()
  trees = [
    base,
    jax.tree.map(lambda x: jnp.concatenate([x, x]), base),
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), base),
    {"Dense_1": base["Dense_0"], "Embed": base["Conv_0"]},
    [base["Dense_0"]["kernel"], base["Dense_0"]["bias"]],
  ]
  shared = _sgd(0.6, RIGL)
  states = [jit(shared.init)(tree) for tree in trees]
  for _ in range(3):
    for i, tree in enumerate(trees):
      _, states[i] = jit(shared.update)(tree, states[i], tree)
  for tree, state in zip(trees, states, strict=True):
    own = _sgd(0.6, RIGL)
    expected = jit(own.init)(tree)
    for _ in range(3):
      _, expected = jit(own.update)(tree, expected, tree)
    _assert_same(state, expected)


def test_nothing_of_a_call_is_kept():
  """Neither tracers nor arrays, be they parameters, masks or a state."""
  params = _params()
  masks = {"Dense_0": {"kernel": jnp.ones((6, 5), bool)}}
  tx = _sgd(0.6, RIGL, masks=masks)
  with jax.checking_leaks():
    opt_state = jax.jit(tx.init)(params)
    jax.jit(tx.update)(params, opt_state, params)
  updates, opt_state = tx.update(params, tx.init(params), params)
  arrays = jax.tree.leaves((params, updates, opt_state))
  alive = [weakref.ref(array) for array in arrays]
  del arrays, params, updates, opt_state
  gc.collect()
  assert not any(ref() is not None for ref in alive)


def test_the_numbers_of_active_weights_cannot_be_changed():
  """A topology gets those of the plan, which later calls use."""

  class Careless(sparseopt_jax.RigL):
    def update_masks(self, layers, count, key):
      for layer in layers:
        layer.target[...] = 1
      return super().update_masks(layers, count, key)

  params = _params()
  link = sparseopt_jax.sparseopt(0.5, Careless(9, 1), corrected=True)
  opt_state = link.init(params)
  with pytest.raises(ValueError, match="read-only"):
    link.update(params, opt_state, params, update_masks=True)
