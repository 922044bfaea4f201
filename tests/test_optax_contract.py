"""What optimisers and wrappers of Optax may rely on, each crossed with each.

A cell of the table trains through two mask updates and asserts the whole
contract. By default one row and one column run, in the slow part all cells.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax
from sparseopt_jax import SparseOptState

STEPS = 8
SPARSE = ("conv/kernel", "dense/kernel")


def _params() -> dict:
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "conv": {"kernel": draw(3, 3, 2, 4)},
    "dense": {"kernel": draw(6, 5), "bias": draw(5)},
  }


def _gradients(step: int) -> dict:
  rng = np.random.default_rng(1 + step)
  return jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), _params()
  )


OPTIONS = {
  "sparsity": 0.5,
  "topology": sparseopt_jax.RigL(STEPS, update_every=3, drop_fraction=0.6),
  "corrected": True,
  "seed": 3,
}


def _link() -> optax.GradientTransformationExtraArgs:
  return sparseopt_jax.sparseopt(**OPTIONS)


def _sparsify(inner: Any) -> optax.GradientTransformationExtraArgs:
  return sparseopt_jax.sparsify(inner, **OPTIONS)


def _bare_chain(inner: Any) -> optax.GradientTransformationExtraArgs:
  return optax.chain(_link(), inner)


# --- Optimisers ---------------------------------------------------------------


class Optimizer(NamedTuple):
  make: Callable[[], Any]
  per_coordinate: bool = True
  # Whether a fresh state stays put under a zero gradient and a zero weight.
  rests: bool = True


_RATE = 0.05
OPTIMIZERS = {
  "sgd": Optimizer(lambda: optax.sgd(_RATE)),
  "momentum": Optimizer(lambda: optax.sgd(_RATE, momentum=0.9)),
  "nesterov": Optimizer(lambda: optax.sgd(_RATE, 0.9, nesterov=True)),
  "decay and schedule": Optimizer(
    lambda: optax.chain(
      optax.add_decayed_weights(1e-2),
      optax.sgd(optax.linear_schedule(0.1, 0.0, STEPS), momentum=0.9),
    )
  ),
  "clipped": Optimizer(
    lambda: optax.chain(
      optax.clip_by_global_norm(1.0), optax.sgd(_RATE, momentum=0.9)
    ),
    per_coordinate=False,
  ),
  "adam": Optimizer(lambda: optax.adam(_RATE)),
  "adamw": Optimizer(lambda: optax.adamw(_RATE, weight_decay=1e-2)),
  "nadam": Optimizer(lambda: optax.nadam(_RATE)),
  "lion": Optimizer(lambda: optax.lion(_RATE)),
  "rmsprop": Optimizer(lambda: optax.rmsprop(_RATE, momentum=0.9)),
  "adagrad": Optimizer(lambda: optax.adagrad(_RATE)),
  "adabelief": Optimizer(lambda: optax.adabelief(_RATE), rests=False),
  "adafactor": Optimizer(
    lambda: optax.adafactor(_RATE, min_dim_size_to_factor=4),
    per_coordinate=False,
    rests=False,
  ),
  "lamb": Optimizer(lambda: optax.lamb(_RATE), per_coordinate=False),
  "schedule_free": Optimizer(
    lambda: optax.contrib.schedule_free(optax.sgd(_RATE), _RATE, b1=0.9)
  ),
  "muon": Optimizer(lambda: optax.contrib.muon(_RATE), per_coordinate=False),
}

# These make the table with every layout; the others run in its first row only.
CROSSED = [
  name
  for name in OPTIMIZERS
  if name not in ("decay and schedule", "clipped", "nadam", "muon")
]


# --- Wrappers -----------------------------------------------------------------

Wrap = Callable[[Any], Any]


def _inject(tx: Any) -> Any:
  factory = lambda factor: optax.chain(optax.scale(factor), tx)
  return optax.inject_hyperparams(factory)(factor=1.0)


def _multi_steps(tx: Any) -> Any:
  return optax.MultiSteps(tx, 2).gradient_transformation()


def _extra_args(transform: Any) -> Any:
  return optax.with_extra_args_support(transform)


def _masked(tx: Any) -> Any:
  everything_but_bias = {
    "conv": {"kernel": True},
    "dense": {"kernel": True, "bias": False},
  }
  return optax.masked(tx, everything_but_bias)


def _partition(tx: Any) -> Any:
  labels = {
    "conv": {"kernel": "sparse"},
    "dense": {"kernel": "sparse", "bias": "dense"},
  }
  return optax.partition({"sparse": tx, "dense": optax.adam(0.1)}, labels)


def _named_chain(tx: Any) -> Any:
  return optax.named_chain(("first", optax.identity()), ("second", tx))


def _nested_chain(tx: Any) -> Any:
  return optax.chain(optax.chain(optax.identity(), optax.chain(tx)))


WRAPPERS: dict[str, Wrap] = {
  "inject_hyperparams": _inject,
  "MultiSteps": _multi_steps,
  "masked": _masked,
  "partition": _partition,
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
  "named_chain": _named_chain,
  "nested chain": _nested_chain,
}
# Links that follow the optimiser, so inside `sparsify` only.
LINKS: dict[str, Wrap] = {
  "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
  "reduce_on_plateau": lambda tx: optax.chain(
    tx, optax.contrib.reduce_on_plateau(patience=1, cooldown=0)
  ),
}


class Layout(NamedTuple):
  """What stands around `sparsify`, and what stands in it."""

  outside: Wrap = lambda tx: tx
  inside: Wrap = lambda tx: tx


LAYOUTS = {
  "sparsify": Layout(),
  "clip in front": Layout(lambda tx: optax.chain(optax.clip(1.0), tx)),
  **{f"{name} outside": Layout(wrap) for name, wrap in WRAPPERS.items()},
  **{
    f"{name} inside": Layout(inside=wrap)
    for name, wrap in (WRAPPERS | LINKS).items()
  },
}


# --- The contract -------------------------------------------------------------


def _find_state(opt_state: Any) -> SparseOptState:
  is_state = lambda node: isinstance(node, SparseOptState)
  nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
  (state,) = [node for node in nodes if is_state(node)]
  return state


def _by_path(tree: Any) -> dict[str, np.ndarray]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _masks(opt_state: Any) -> dict[str, np.ndarray]:
  return _by_path(sparseopt_jax.get_masks(opt_state))


def _without_masks(opt_state: Any) -> Any:
  is_state = lambda node: isinstance(node, SparseOptState)
  return jax.tree.map(
    lambda node: () if is_state(node) else node, opt_state, is_leaf=is_state
  )


def _of_bare_chain(opt_state: Any) -> Any:
  """The same state as the bare chain holds it."""
  is_pair = lambda node: isinstance(node, sparseopt_jax.SparsifyState)
  return jax.tree.map(
    lambda node: (node.link, node.inner) if is_pair(node) else node,
    opt_state,
    is_leaf=is_pair,
  )


def _slots(opt_state: Any, params: Any) -> list[tuple[str, str, np.ndarray]]:
  """(path of the parameter, path in the state, slot) of per-weight state.

  Found by name and shape, which is not how the package finds it.
  """
  leaves = _by_path(_without_masks(opt_state))
  return [
    (path, where, slot)
    for path, param in _by_path(params).items()
    for where, slot in leaves.items()
    if where.endswith("/" + path) and slot.shape == param.shape
  ]


def _types(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree
  )


def _at(masks: dict, path: str, shape: tuple) -> np.ndarray:
  return masks.get(path, np.zeros(shape, bool))


def _assert_slots(
  got: Any, expected: Any, params: Any, where: dict, **tolerance: float
) -> None:
  """Slots of two states agree where ``where`` is true."""
  pairs = zip(_slots(got, params), _slots(expected, params), strict=True)
  for (path, name, slot), (_, _, other) in pairs:
    at = _at(where, path, slot.shape)
    np.testing.assert_allclose(
      slot[at], other[at], err_msg=name, **{"rtol": 0, "atol": 0} | tolerance
    )


def _assert_zero_outside(params: Any, masks: dict) -> None:
  for path, param in _by_path(params).items():
    if path in masks:
      assert not param[~masks[path]].any(), path


def _assert_equal_elsewhere(
  params: Any, elsewhere: dict, masks: dict, new: tuple, bare: tuple
) -> None:
  """Updates of active weights, and slots, are those of the bare chain."""
  # Two programs may contract a * b + c differently: an ulp of values around 1.
  tolerance = {"rtol": 2e-6, "atol": 5e-7}
  expected = _by_path(bare[0])
  for path, update in _by_path(new[0]).items():
    on = elsewhere[path] & masks.get(path, True)
    np.testing.assert_allclose(
      update[on], expected[path][on], err_msg=path, **tolerance
    )
  _assert_slots(new[1], bare[1], params, elsewhere, **tolerance)
  jax.tree.map(
    np.testing.assert_array_equal, _find_state(new[1]), _find_state(bare[1])
  )


def _assert_one_step_from_fresh(
  optimizer: Any, old: Any, new: Any, restarted: dict, params: Any
) -> None:
  """The state of restarted weights made one step with nothing to see."""
  zeros = jax.tree.map(jnp.zeros_like, params)
  fresh = _by_path(optimizer.init(zeros))

  def restart(path: Any, slot: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return jnp.asarray(fresh[name]) if slot.ndim > 0 else slot

  state = jax.tree_util.tree_map_with_path(restart, old)
  _, expected = optimizer.update(zeros, state, zeros)
  _assert_slots(new, expected, params, restarted)


def _assert_contract(name: str, optimizer_name: str) -> None:
  layout, optimizer = LAYOUTS[name], OPTIMIZERS[optimizer_name]
  opt = optimizer.make()
  tx = layout.outside(_sparsify(layout.inside(opt)))
  bare = layout.outside(_bare_chain(layout.inside(opt)))
  update, bare_update = (
    optax.with_extra_args_support(t).update for t in (tx, bare)
  )

  @jax.jit
  def step(gradients: Any, opt_state: Any, params: Any) -> tuple:
    extra = {"value": jnp.float32(1.0), "unheard_of": jnp.zeros(3)}
    new = update(gradients, opt_state, params, **extra)
    same = _of_bare_chain(opt_state)
    bare_new = bare_update(gradients, same, params, **extra)
    return new, bare_new, optax.apply_updates(params, new[0])

  params = _params()
  opt_state = tx.init(params)
  types = _types(opt_state)
  assert _types(jax.eval_shape(tx.init, params)) == types
  mapped = optax.tree.map_params(tx, lambda leaf: leaf, opt_state)
  jax.tree.map(np.testing.assert_array_equal, mapped, opt_state)
  fresh = tx.init(jax.tree.map(jnp.zeros_like, params))

  params = sparseopt_jax.apply_masks(params, opt_state)
  masks = _masks(opt_state)
  assert set(masks) == set(SPARSE)
  active = {path: mask.sum() for path, mask in masks.items()}
  mask_updates = 0
  micro_steps = 2 if name == "MultiSteps outside" else 1
  for i in range(STEPS * micro_steps):
    old = opt_state
    new, bare_new, params = step(_gradients(i), opt_state, params)
    opt_state = new[1]
    new_masks = _masks(opt_state)
    changed = {path: masks[path] != new_masks[path] for path in masks}
    is_update = any(at.any() for at in changed.values())
    masks = new_masks
    _assert_zero_outside(params, masks)
    assert {path: mask.sum() for path, mask in masks.items()} == active
    # Slots outside the masks start afresh too; at rest this is no change.
    restarted = {
      path: is_update & (changed[path] | ~masks[path]) for path in masks
    }
    if optimizer.per_coordinate:
      differs = changed if optimizer.rests else restarted
      elsewhere = {
        path: ~_at(differs, path, param.shape)
        for path, param in _by_path(params).items()
      }
      _assert_equal_elsewhere(params, elsewhere, masks, new, bare_new)
    if is_update:
      mask_updates += 1
      if optimizer.rests:
        _assert_slots(opt_state, fresh, params, restarted)
      if name == "sparsify":
        _assert_one_step_from_fresh(
          opt, old.inner, opt_state.inner, restarted, params
        )
  assert mask_updates == 2
  assert _types(opt_state) == types
  assert step._cache_size() == 1
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer):
  _assert_contract("sparsify", optimizer)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout(layout):
  _assert_contract(layout, "decay and schedule")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", CROSSED)
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_pair(layout, optimizer):
  _assert_contract(layout, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bare_chain_with_masks_applied_after_each_step(optimizer):
  tx = _bare_chain(OPTIMIZERS[optimizer].make())

  @jax.jit
  def step(gradients: Any, opt_state: Any, params: Any) -> tuple:
    updates, opt_state = tx.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    return sparseopt_jax.apply_masks(params, opt_state), opt_state

  params = _params()
  opt_state = tx.init(params)
  types = _types(opt_state)
  params = sparseopt_jax.apply_masks(params, opt_state)
  masks = _masks(opt_state)
  active = {path: mask.sum() for path, mask in masks.items()}
  mask_updates = 0
  for i in range(STEPS):
    params, opt_state = step(_gradients(i), opt_state, params)
    new_masks = _masks(opt_state)
    grown = {path: new_masks[path] & ~masks[path] for path in masks}
    masks = new_masks
    _assert_zero_outside(params, masks)
    assert {path: mask.sum() for path, mask in masks.items()} == active
    if any(at.any() for at in grown.values()):
      mask_updates += 1
      _assert_zero_outside(params, {path: ~at for path, at in grown.items()})
  assert mask_updates == 2
  assert _types(opt_state) == types
  assert step._cache_size() == 1


def _trained(tx: Any, *, between: Callable[[Any], Any] = lambda x: x) -> tuple:
  update = jax.jit(tx.update)
  params = _params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(STEPS):
    updates, opt_state = update(_gradients(i), between(opt_state), params)
    params = optax.apply_updates(params, updates)
  return params, opt_state


def _decayed_sgd(learning_rate: Any, weight_decay: Any = 1e-2) -> Any:
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(learning_rate, momentum=0.9),
  )


def _inject_inside() -> Any:
  injected = optax.inject_hyperparams(_decayed_sgd)
  return _sparsify(injected(learning_rate=0.05, weight_decay=1e-2))


def _inject_outside() -> Any:
  """A factory of what is sparse already; the sparsity itself stays a number."""
  factory = lambda learning_rate, weight_decay: _sparsify(
    _decayed_sgd(learning_rate, weight_decay)
  )
  injected = optax.inject_hyperparams(factory)
  return injected(learning_rate=0.05, weight_decay=1e-2)


@pytest.mark.parametrize("make", [_inject_inside, _inject_outside])
def test_a_learning_rate_that_is_set_between_steps(make):
  def halve(opt_state: Any) -> Any:
    rate = optax.tree.get(opt_state, "learning_rate")
    return optax.tree.set(opt_state, learning_rate=rate / 2)

  got = _trained(make(), between=halve)
  schedule = lambda count: 0.05 / 2 ** (count + 1)
  expected = _trained(_sparsify(_decayed_sgd(schedule)))
  assert optax.tree.get(got[1], "learning_rate") == np.float32(0.05 / 2**STEPS)
  masks = [_masks(opt_state) for _, opt_state in (got, expected)]
  jax.tree.map(np.testing.assert_array_equal, *masks)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, got[0], expected[0])


def test_an_injected_sparsity_is_refused():
  injected = optax.inject_hyperparams(sparseopt_jax.sparseopt)
  tx = injected(0.5, corrected=True)
  with pytest.raises(TypeError, match="sparsity must be a Python number"):
    tx.init(_params())


def test_map_params_with_other_trees():
  """As Optax's own masked states: MaskedNode has to be named as a leaf."""
  params = _params()
  tx = _sparsify(optax.sgd(0.1, momentum=0.9))
  names = jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"),
    params,
  )
  named = optax.tree.map_params(
    tx,
    lambda slot, name: name,
    tx.init(params),
    names,
    transform_non_params=lambda _: None,
    is_leaf=lambda node: isinstance(node, optax.MaskedNode),
  )
  assert named.link.masks == names
  assert named.link.explored == names
  assert named.inner[0].trace == names
  # What has another shape than the parameters is none of them.
  assert not jax.tree.leaves(named.link.factors)


def test_slots_can_be_reset_without_the_masks():
  inner = optax.sgd(0.1, momentum=0.9)
  tx, params = _sparsify(inner), _params()
  opt_state = tx.init(params)
  params = sparseopt_jax.apply_masks(params, opt_state)
  for i in range(4):
    updates, opt_state = tx.update(_gradients(i), opt_state, params)
    params = optax.apply_updates(params, updates)
  before = _masks(opt_state)
  opt_state = opt_state._replace(inner=inner.init(params))
  _, reset = tx.update(_gradients(4), opt_state, params)
  for path, mask in _masks(reset).items():
    np.testing.assert_array_equal(mask, before[path])
  # The first step of momentum is the gradient: that of the masked weights.
  trace = reset.inner[0].trace
  np.testing.assert_array_equal(
    trace["dense"]["bias"], _gradients(4)["dense"]["bias"]
  )
  assert not trace["dense"]["kernel"][~before["dense/kernel"]].any()


def test_state_is_found_by_name():
  opt_state = _sparsify(optax.sgd(0.1)).init(_params())
  conv, dense = optax.tree.get(opt_state, "factors")
  assert conv.shape == (1, 1, 1, 4)
  assert dense.shape == (1, 5)
  masks = optax.tree.get(opt_state, "masks")
  assert masks["dense"]["kernel"].shape == (6, 5)
