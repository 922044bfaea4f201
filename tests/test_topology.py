"""The protocol of topologies, implemented by a user's own code."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax

PARAMS = {
  "a": {"kernel": np.random.default_rng(0).normal(size=(12, 9)).astype("f4")},
  "b": {
    "kernel": np.random.default_rng(1).normal(size=(3, 3, 4, 6)).astype("f4"),
    "bias": np.zeros(6, np.float32),
  },
}
TARGETS = {"a/kernel": 0.3, "b/kernel": 0.4}


def _gradients(step):
  rng = np.random.default_rng(100 + step)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  return jax.tree.map(draw, PARAMS)


def _steps(topology, steps, **options):
  """Masks, parameters and the link's state after each step."""
  tx = sparseopt_jax.sparsify(
    optax.sgd(0.1, momentum=0.9),
    *(0.6, topology),
    **{"corrected": True, "distribution": lambda shapes, s: TARGETS} | options,
  )
  opt_state = tx.init(PARAMS)
  params = sparseopt_jax.apply_masks(PARAMS, opt_state)
  update = jax.jit(tx.update)
  yield params, opt_state.link
  for i in range(steps):
    updates, opt_state = update(_gradients(i), opt_state, params)
    params = optax.apply_updates(params, updates)
    yield params, opt_state.link


class KeepAlive(sparseopt_jax.RigL):
  """As in the docstring of Topology."""

  def drop_scores(self, layer):
    size = jnp.where(layer.mask, jnp.abs(layer.weight), -1)
    top = size.max(layer.input_axes, keepdims=True)
    return jnp.where(size == top, jnp.inf, size)


def test_rigl_that_never_takes_a_neuron_its_last_input():
  two_inputs = lambda *shape: np.arange(np.prod(shape)) < 2 * shape[-1]
  masks = {
    name: {"kernel": two_inputs(*x["kernel"].shape).reshape(x["kernel"].shape)}
    for name, x in PARAMS.items()
  }
  options = {"update_every": 1, "drop_fraction": lambda count: 0.4}
  dead = {}
  for topology in (sparseopt_jax.RigL, KeepAlive):
    runs = _steps(topology(1_000, **options), 20, masks=masks)
    dead[topology] = [
      sum(
        int((oracle.fan_ins(mask) == 0).sum())
        for mask in jax.tree.leaves(link.masks)
      )
      for _, link in runs
    ]
  assert dead[sparseopt_jax.RigL][0] == 0
  assert dead[sparseopt_jax.RigL][-1] > 0
  assert set(dead[KeepAlive]) == {0}


@dataclasses.dataclass(frozen=True)
class Prune(sparseopt_jax.Topology):
  """Prunes by magnitude to the target; from nothing, in NumPy's way."""

  at: int

  def is_due(self, count):
    return count == self.at

  def update_masks(self, layers, count, key):
    masks = []
    for layer in layers:
      size = jnp.where(layer.mask, jnp.abs(layer.weight), -1).ravel()
      rank = jnp.argsort(jnp.argsort(-size))
      masks.append((rank < layer.target).reshape(layer.mask.shape))
    return masks


def test_a_topology_may_change_the_number_of_active_weights():
  """From given, denser masks to what sparsity and distribution ask for."""
  dense = {
    "a": {"kernel": np.ones((12, 9), bool)},
    "b": {"kernel": np.ones((3, 3, 4, 6), bool)},
  }
  *_, (weights, before), (params, after) = _steps(Prune(2), 3, masks=dense)
  for name in "ab":
    old, new = (np.asarray(x.masks[name]["kernel"]) for x in (before, after))
    assert old.all()
    assert new.sum() == round(TARGETS[f"{name}/kernel"] * new.size)
    kept = np.abs(np.asarray(weights[name]["kernel"]))
    assert kept[new].min() >= kept[~new].max()
    assert not np.asarray(params[name]["kernel"])[~new].any()
  # The correction follows the masks.
  for factor, name in zip(after.factors, "ab", strict=True):
    mask = np.asarray(after.masks[name]["kernel"])
    expected = oracle.factors(mask)
    np.testing.assert_allclose(np.ravel(factor), expected, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Record(sparseopt_jax.Topology):
  """Keeps a sum of gradients and of counts, and draws masks by its key."""

  def is_due(self, count):
    return count % 2 == 1

  def init(self, layer):
    assert layer.gradient is None
    assert layer.mask.shape == layer.weight.shape
    return {"sum": jnp.zeros_like(layer.weight), "calls": jnp.int32(0)}

  def observe(self, layer, count):
    total = layer.state["sum"] + layer.gradient
    return {"sum": total, "calls": layer.state["calls"] + count}

  def update_masks(self, layers, count, key):
    keys = jax.random.split(key, len(layers))
    return [
      jax.random.permutation(k, layer.mask.ravel()).reshape(layer.mask.shape)
      for k, layer in zip(keys, layers, strict=True)
    ]


def test_state_of_its_own_and_a_key_for_each_call():
  runs = list(_steps(Record(), 6))
  _, link = runs[-1]
  total = sum(np.asarray(_gradients(i)["a"]["kernel"]) for i in range(6))
  np.testing.assert_allclose(link.topology_state[0]["sum"], total, rtol=1e-5)
  assert [int(kept["calls"]) for kept in link.topology_state] == [15, 15]
  masks = [np.asarray(link.masks["a"]["kernel"]) for _, link in runs]
  changes = [bool((a != b).any()) for a, b in itertools.pairwise(masks)]
  assert changes == [False, True] * 3
  assert len({mask.tobytes() for mask in masks}) == 4
  assert len({int(mask.sum()) for mask in masks}) == 1


def test_what_a_layer_tells():
  seen = {}

  class Look(sparseopt_jax.Topology):
    def is_due(self, count):
      return count >= 0

    def update_masks(self, layers, count, key):
      for layer in layers:
        shapes = layer.active.shape, layer.factor.shape
        static = layer.corrected, layer.input_axes, int(layer.target)
        seen[layer.path] = (*static, *shapes)
      return [layer.mask for layer in layers]

  corrected = lambda path, leaf: path == "a/kernel"
  list(_steps(Look(), 1, corrected=corrected))
  assert seen == {
    "a/kernel": (True, (0,), 32, (), (1, 9)),
    "b/kernel": (False, (0, 1, 2), 86, (), (1, 1, 1, 6)),
  }


def test_a_class_that_inherits_nothing():
  class Bare:
    def is_due(self, count):
      return count == 1

    def update_masks(self, layers, count, key):
      return [jnp.roll(layer.mask, 1) for layer in layers]

    def first_masks(self, layers, key):
      return [
        jnp.arange(x.weight.size).reshape(x.weight.shape) < 9 for x in layers
      ]

    def init(self, layer):
      return ()

    def observe(self, layer, count):
      return ()

  assert isinstance(Bare(), sparseopt_jax.Topology)
  (_, first), _, (_, last) = _steps(Bare(), 2)
  assert [int(x.sum()) for x in jax.tree.leaves(first.masks)] == [9, 9]
  expected = np.roll(np.asarray(first.masks["a"]["kernel"]), 1)
  np.testing.assert_array_equal(last.masks["a"]["kernel"], expected)


def test_gradual_pruning_starts_from_given_masks_and_never_adds():
  """Sparser than the schedule they stay, denser they come down to it."""
  few = np.arange(12 * 9).reshape(12, 9) < 20
  masks = {"a": {"kernel": few}, "b": {"kernel": np.ones((3, 3, 4, 6), bool)}}
  topology = sparseopt_jax.Magnitude(0, 4, 2, initial_sparsity=0.5)
  *_, (_, half), _, (_, link) = _steps(topology, 5, masks=masks)
  np.testing.assert_array_equal(link.masks["a"]["kernel"], few)
  counts = [int(x.masks["b"]["kernel"].sum()) for x in (half, link)]
  size = 3 * 3 * 4 * 6
  last = round(TARGETS["b/kernel"] * size)
  assert counts == [last + (size // 2 - last) // 8, last]


def test_everything_is_active_before_gradual_pruning_begins():
  *_, (_, link), (_, after) = _steps(sparseopt_jax.Magnitude(1, 5, 2), 4)
  assert all(x.all() for x in jax.tree.leaves(link.masks))
  assert not any(x.all() for x in jax.tree.leaves(after.masks))


@pytest.mark.parametrize("salient", [0, 1])
def test_a_weight_without_gradient_is_not_salient(salient):
  """Neuron 1 loses both weights and would regain some by chance alone.

  It needs one that is salient, half its fan-in.
  """
  weight = jnp.tile(jnp.array([[8.0, 1.0]]), (4, 1))
  mask = np.arange(8).reshape(4, 2) < 4
  topology = sparseopt_jax.SRigL(9, 1, lambda count: 0.5, gamma_sal=0.5)
  for seed in range(5):
    link = sparseopt_jax.sparseopt(
      0.5, topology, corrected=False, masks=mask, seed=seed
    )
    gradient = jnp.zeros_like(weight).at[3, 1].set(salient)
    _, state = link.update(
      gradient, link.init(weight), weight, update_masks=True
    )
    expected = [2, 2] if salient else [4, 0]
    np.testing.assert_array_equal(state.masks.sum(0), expected)
    assert state.masks[3, 1] == bool(salient)


def test_static_is_never_due():
  assert sparseopt_jax.Static().is_due(100) is False
  assert sparseopt_jax.Static().is_due(jnp.int32(100)) is False


@pytest.mark.parametrize("topology", [None, "rigl", sparseopt_jax.RigL, 3])
def test_something_else(topology):
  with pytest.raises(TypeError, match="topology must be a Topology"):
    sparseopt_jax.sparseopt(0.9, topology, corrected=True)


def test_random_growth_if_one_layer_has_no_scores():
  class Half(sparseopt_jax.RigL):
    def grow_scores(self, layer):
      return None if layer.path == "a/kernel" else layer.gradient

  options = {"update_every": 1, "drop_fraction": lambda count: 0.5}
  half = list(_steps(Half(100, **options), 3))[-1][1]
  random = list(_steps(sparseopt_jax.SET(100, **options), 3))[-1][1]
  jax.tree.map(np.testing.assert_array_equal, half.masks, random.masks)


def test_python_that_looks_at_the_count():
  """It would never update masks in a program; the error comes at once."""

  class Concrete(sparseopt_jax.Topology):
    def is_due(self, count):
      return count in (1, 2)

  with pytest.raises(jax.errors.TracerBoolConversionError):
    sparseopt_jax.sparseopt(0.9, Concrete(), corrected=True)


def test_an_initial_sparsity_in_half_precision():
  """In float16 the number of weights would be infinite."""
  topology = sparseopt_jax.Magnitude(0, 4, initial_sparsity=np.float16(0.25))
  link = sparseopt_jax.sparseopt(0.9, topology, corrected=False)
  masks = sparseopt_jax.get_masks(link.init(jnp.ones((400, 400))))
  assert masks.sum() == 120_000
