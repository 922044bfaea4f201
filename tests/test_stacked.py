"""Layers stacked in a leaf are layers of their own, as if unstacked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax
from sparseopt_jax import _packing

BLOCKS = 24
RIGL = sparseopt_jax.RigL(100, update_every=1, drop_fraction=0.5)


def _stacked(tree=None):
  """Blocks as `nn.scan` makes them: a leaf holds all layers of a name."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "blocks": {
      "up": {"kernel": draw(BLOCKS, 8, 24), "bias": draw(BLOCKS, 24)},
      "down": {"kernel": draw(BLOCKS, 24, 8)},
    },
    "head": {"kernel": draw(8, 40)},
  }


def _unstacked(tree):
  blocks = {
    f"block_{i}": jax.tree.map(lambda x, i=i: x[i], tree["blocks"])
    for i in range(BLOCKS)
  }
  return {**blocks, "head": tree["head"]}


def _rule(path, leaf):
  return 1 if path.startswith("blocks/") else 0


def _density(mask):
  return int(mask.sum()) / mask.size


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize(
  "stacked", [_rule, {"blocks": 1, "head": 0}], ids=["rule", "prefix"]
)
def test_densities_are_those_of_the_unstacked_twin(stacked, distribution):
  options = {"corrected": True, "distribution": distribution}
  link = sparseopt_jax.sparseopt(0.9, stacked=stacked, **options)
  masks = sparseopt_jax.get_masks(link.init(_stacked()))
  twin = sparseopt_jax.sparseopt(0.9, **options)
  expected = sparseopt_jax.get_masks(twin.init(_unstacked(_stacked())))
  for name in ("up", "down"):
    for i in range(BLOCKS):
      got = masks["blocks"][name]["kernel"][i]
      want = expected[f"block_{i}"][name]["kernel"]
      assert got.sum() == want.sum()
  assert masks["head"]["kernel"].sum() == expected["head"]["kernel"].sum()
  # Taken for one layer, the blocks would be far sparser than the head.
  wrong = sparseopt_jax.get_masks(
    sparseopt_jax.sparseopt(0.9, **options).init(_stacked())
  )
  if distribution == "erk":
    up = [m["blocks"]["up"]["kernel"] for m in (masks, wrong)]
    assert _density(up[1]) < 0.8 * _density(up[0])


def test_a_distribution_sees_each_layer_by_name():
  seen = {}

  def by_depth(shapes, sparsity):
    seen.update(shapes)
    return {p: 0.5 if p == "blocks/up/kernel[3]" else 0.25 for p in shapes}

  link = sparseopt_jax.sparseopt(
    0.9, stacked=_rule, corrected=True, distribution=by_depth
  )
  masks = sparseopt_jax.get_masks(link.init(_stacked()))
  assert seen["blocks/up/kernel[3]"] == (8, 24)
  assert seen["head/kernel"] == (8, 40)
  assert len(seen) == 2 * BLOCKS + 1
  active = np.asarray(masks["blocks"]["up"]["kernel"].sum((1, 2)))
  expected = np.full(BLOCKS, 8 * 24 // 4)
  expected[3] = 8 * 24 // 2
  np.testing.assert_array_equal(active, expected)


def test_a_dict_of_densities_names_a_leaf_or_a_layer_in_it():
  given = {"blocks/up/kernel[3]": 0.5, "blocks/up/*": 0.25, "head/*": 1.0}
  link = sparseopt_jax.sparseopt(
    0.9, stacked=_rule, corrected=True, distribution=given
  )
  masks = sparseopt_jax.get_masks(link.init(_stacked()))
  expected = np.full(BLOCKS, 8 * 24 // 4)
  expected[3] = 8 * 24 // 2
  active = np.asarray(masks["blocks"]["up"]["kernel"].sum((1, 2)))
  np.testing.assert_array_equal(active, expected)
  assert masks["head"]["kernel"].all()
  # The rest is 24 layers alike, at the sparsity of the link.
  active = np.asarray(masks["blocks"]["down"]["kernel"].sum((1, 2)))
  np.testing.assert_array_equal(active, np.full(BLOCKS, round(0.1 * 8 * 24)))


@pytest.mark.parametrize("large", [10, 10**7])
def test_rigl_updates_each_slice_as_the_oracle_does(large, monkeypatch):
  """In blocks of small layers, and as large leaves of their own."""
  monkeypatch.setattr(_packing, "_LARGE", large)
  tx = sparseopt_jax.sparsify(
    optax.sgd(0.1, momentum=0.9), 0.8, RIGL, stacked=_rule, corrected=True
  )
  params = _stacked()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  update = jax.jit(lambda *args: tx.update(*args))
  rng = np.random.default_rng(1)
  for step in range(4):
    gradients = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), params
    )
    old, weights = sparseopt_jax.get_masks(opt_state), params
    updates, opt_state = update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    new = sparseopt_jax.get_masks(opt_state)
    for name in ("up", "down"):
      of = lambda tree, name=name: np.asarray(tree["blocks"][name]["kernel"])
      for i in range(BLOCKS):
        mask = of(old)[i]
        expected = mask
        if step > 0:
          found = oracle.rigl_update(
            of(weights)[i], mask, of(gradients)[i], 0.5
          )
          assert found.remaining == 0
          expected = found.certain
        np.testing.assert_array_equal(of(new)[i], expected)
      assert not of(params)[~of(new)].any()


@pytest.mark.parametrize("large", [10, 10**7])
def test_magnitude_prunes_each_slice_as_the_oracle_does(large, monkeypatch):
  monkeypatch.setattr(_packing, "_LARGE", large)
  topology = sparseopt_jax.Magnitude(0, 3, 1, initial_sparsity=0.3)
  link = sparseopt_jax.sparseopt(
    0.8, topology, stacked=_rule, corrected=True, distribution="uniform"
  )
  params = _stacked()
  state = link.init(params)
  update = jax.jit(link.update)
  for step in range(4):
    old = np.asarray(state.masks["blocks"]["up"]["kernel"])
    # As they are, not masked: weights outside the masks count for nothing.
    _, state = update(params, state, params)
    new = np.asarray(state.masks["blocks"]["up"]["kernel"])
    for i in range(BLOCKS):
      size = old[i].size
      first, last = round(0.7 * size), round(0.2 * size)
      n = oracle.magnitude_count(step, 0, 3, first, last)
      weights = params["blocks"]["up"]["kernel"][i]
      expected = oracle.magnitude_update(weights, old[i], n)
      np.testing.assert_array_equal(new[i], expected.certain)
      assert new[i].sum() == n


@pytest.mark.parametrize("large", [10, 10**7])
def test_srigl_updates_each_slice_as_the_oracle_does(large, monkeypatch):
  monkeypatch.setattr(_packing, "_LARGE", large)
  topology = sparseopt_jax.SRigL(100, 1, 0.5, gamma_sal=0.8)
  link = sparseopt_jax.sparseopt(
    0.8, topology, stacked=_rule, corrected=True, distribution="uniform"
  )
  params = _stacked()
  state = link.init(params)
  update = jax.jit(link.update)
  rng = np.random.default_rng(1)
  lost = 0
  for step in range(4):
    gradients = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), params
    )
    old = np.asarray(state.masks["blocks"]["up"]["kernel"])
    _, state = update(gradients, state, params)
    new = np.asarray(state.masks["blocks"]["up"]["kernel"])
    fraction = oracle.drop_fraction(0.5, step, 100)
    for i in range(BLOCKS):
      weights = params["blocks"]["up"]["kernel"][i]
      gradient = gradients["blocks"]["up"]["kernel"][i]
      n = round(0.2 * old[i].size)
      if step == 0:
        assert set(oracle.fan_ins(old[i])) == {round(n / 24)}
        continue
      for index, part in oracle.srigl_update(
        weights, old[i], gradient, fraction, 0.8, n, -1
      ):
        assert part.remaining == 0
        np.testing.assert_array_equal(new[i][index], part.certain)
      lost += (oracle.fan_ins(new[i]) == 0).sum()
  assert lost


def test_the_correction_is_that_of_each_slice():
  # Of unlike slices, or the mean over all of them would do as well.
  densities = lambda shapes, sparsity: {
    path: 0.1 + 0.8 * i / len(shapes) for i, path in enumerate(shapes)
  }
  link = sparseopt_jax.sparseopt(
    0.7, stacked=_rule, corrected=True, distribution=densities
  )
  params = _stacked()
  state = link.init(params)
  updates, _ = link.update(params, state, params)
  masks = sparseopt_jax.get_masks(state)
  for name in ("up", "down"):
    for i in range(BLOCKS):
      expected = oracle.correct(
        params["blocks"][name]["kernel"][i],
        masks["blocks"][name]["kernel"][i],
      )
      got = updates["blocks"][name]["kernel"][i]
      np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0)
  expected = oracle.correct(params["head"]["kernel"], masks["head"]["kernel"])
  np.testing.assert_allclose(updates["head"]["kernel"], expected, rtol=1e-6)


def test_axes_are_those_of_a_layer():
  """As vmapped Equinox layers have them: outputs first, behind the stack."""
  weight = np.random.default_rng(2).normal(size=(3, 5, 7)).astype(np.float32)
  params = {"weight": weight}
  options = {"corrected": True, "stacked": 1}
  link = sparseopt_jax.sparseopt(0.6, output_axis=0, **options)
  state = link.init(params)
  updates, _ = link.update(params, state, params)
  for i in range(3):
    mask = np.asarray(state.masks["weight"])[i]
    expected = oracle.correct(weight[i], mask, 0)
    np.testing.assert_allclose(updates["weight"][i], expected, rtol=1e-6)


def test_two_stacked_axes():
  params = {"kernel": np.ones((2, 3, 6, 5), np.float32)}
  link = sparseopt_jax.sparseopt(0.5, stacked=2, corrected=True)
  masks = np.asarray(link.init(params).masks["kernel"])
  np.testing.assert_array_equal(masks.sum((2, 3)), np.full((2, 3), 15))
  assert len({mask.tobytes() for mask in masks.reshape(6, 30)}) == 6


def test_magnitude_masks_prune_each_slice():
  params = _stacked()
  masks = sparseopt_jax.magnitude_masks(
    params, 0.8, distribution="uniform", stacked=_rule
  )
  for i in range(BLOCKS):
    weights = np.abs(params["blocks"]["up"]["kernel"][i])
    mask = np.asarray(masks["blocks"]["up"]["kernel"][i])
    assert mask.sum() == round(0.2 * mask.size)
    assert weights[mask].min() >= weights[~mask].max()


@pytest.mark.parametrize("stacked", [-1, 3, 7])
def test_more_stacked_axes_than_there_are(stacked):
  link = sparseopt_jax.sparseopt(
    0.5, sparse=True, stacked=stacked, corrected=True
  )
  with pytest.raises(ValueError, match=rf"stacked.*got {stacked}"):
    link.init({"kernel": jnp.ones((2, 4, 5))})


@pytest.mark.parametrize("stacked", ["1", 0.5, None, True])
def test_stacked_is_an_int(stacked):
  link = sparseopt_jax.sparseopt(0.5, stacked=stacked, corrected=True)
  with pytest.raises((TypeError, ValueError), match="stacked must"):
    link.init({"kernel": jnp.ones((2, 4, 5))})


def test_a_leaf_of_the_name_of_a_slice_is_refused():
  params = {"a": np.ones((2, 4, 6)), "a[1]": np.ones((4, 6))}
  link = sparseopt_jax.sparseopt(
    0.5, stacked={"a": 1, "a[1]": 0}, corrected=True
  )
  with pytest.raises(ValueError, match=r"different paths.*; got 'a\[1\]'"):
    link.init(params)


def test_a_leaf_of_more_weights_than_32_bits_count():
  """In layers that are small enough; nothing is computed here."""
  shape = (3, 46_000, 46_000)
  params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
  link = sparseopt_jax.sparseopt(0.5, RIGL, stacked=1, corrected=True)
  state = jax.eval_shape(link.init, params)
  updates, _ = jax.eval_shape(link.update, params, state, params)
  assert updates["kernel"].shape == shape
