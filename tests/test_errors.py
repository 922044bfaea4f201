"""Bad input gets an error that names the argument and its value."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax
from sparseopt_jax import SET
from sparseopt_jax import Magnitude
from sparseopt_jax import RigL
from sparseopt_jax import SRigL

PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}


def link(sparsity=0.5, topology=sparseopt_jax.Static(), **options):  # noqa: B008
  return sparseopt_jax.sparseopt(
    sparsity, topology, **{"corrected": True} | options
  )


def wrapped(inner, topology=sparseopt_jax.Static()):  # noqa: B008
  return sparseopt_jax.sparsify(inner, 0.5, topology, corrected=True)


def masks_like(kernel, bias=optax.MaskedNode()):  # noqa: B008
  return {"kernel": kernel, "bias": bias}


@contextlib.contextmanager
def raises(error, match):
  """One line that names argument and value, however large the value is."""
  with pytest.raises(error, match=match) as caught:
    yield
  # Under jit, JAX adds a line on its traceback.
  message = str(caught.value).partition("\n" + 20 * "-")[0]
  assert "\n" not in message
  assert "PyTreeDef" not in message
  assert len(message) <= 400


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda: link(1.0), ValueError, r"sparsity.*1\.0"),
    (lambda: link(-0.1), ValueError, r"sparsity.*-0\.1"),
    (lambda: link(float("nan")), ValueError, "sparsity.*nan"),
    (lambda: link("0.9"), TypeError, r"sparsity.*'0\.9'"),
    (lambda: link(jnp.ones(())), TypeError, "sparsity.*1"),
    (lambda: link(0.9, "rigl"), TypeError, "topology.*'rigl'"),
    (lambda: link(0.9, RigL), TypeError, "topology.*RigL"),
    (lambda: link(0.9, distribution="er"), ValueError, "distribution.*'er'"),
    (
      lambda: link(0.9, distribution=["erk"]),
      TypeError,
      r"distribution.*\['erk'\]",
    ),
    (lambda: link(0.9, seed=2**63), ValueError, "seed.*9223372036854775808"),
    (
      lambda: link(0.9, seed=jax.random.split(jax.random.key(0), 3)),
      TypeError,
      "seed must be an int or a key",
    ),
    (lambda: RigL(2**31), ValueError, "update_until.*2147483648"),
    (lambda: SET(10, 2**31), ValueError, "update_every.*2147483648"),
    (lambda: wrapped(None), TypeError, "inner.*None"),
    (lambda: wrapped(optax.sgd), TypeError, "inner.*function sgd"),
    (
      lambda: sparseopt_jax.erk({"a": (-3, 4)}, 0.5),
      ValueError,
      r"'a'.*\(-3, 4\)",
    ),
    (
      lambda: sparseopt_jax.correct(jnp.ones(3, int), jnp.ones(3, bool)),
      TypeError,
      "gradient.*int32",
    ),
    (lambda: link(0.9, seed="a"), TypeError, "seed.*'a'"),
    (lambda: link(0.9, seed=1.5), TypeError, r"seed.*1\.5"),
    (lambda: SET(10, 0), ValueError, "update_every.*0"),
    (lambda: RigL(10, -5), ValueError, "update_every.*-5"),
    (lambda: RigL(10, 2.5), TypeError, r"update_every.*2\.5"),
    (lambda: RigL(-1), ValueError, "update_until.*-1"),
    (lambda: SET("10"), TypeError, "update_until.*'10'"),
    (lambda: RigL(10, drop_fraction=1.5), ValueError, r"drop_fraction.*1\.5"),
    (lambda: SET(10, drop_fraction=-0.1), ValueError, r"drop_fraction.*-0\.1"),
    (lambda: SET(10, drop_fraction="x"), TypeError, "drop_fraction.*'x'"),
    (lambda: RigL(10, grow_from="all"), ValueError, "grow_from.*'all'"),
    (lambda: SRigL(10, gamma_sal=1.5), ValueError, r"gamma_sal.*1\.5"),
    (lambda: SRigL(10, gamma_sal="x"), TypeError, "gamma_sal.*'x'"),
    (lambda: SRigL(10, 0), ValueError, "update_every.*0"),
    (lambda: Magnitude(-1, 9), ValueError, "begin_step.*-1"),
    (lambda: Magnitude(5, 5), ValueError, r"end_step.*\[6, 2\*\*31.*got 5"),
    (lambda: Magnitude(5, 9.0), TypeError, r"end_step.*9\.0"),
    (lambda: Magnitude(5, 9, 0), ValueError, "update_every.*0"),
    (lambda: Magnitude(5, 9, 1, 1.0), ValueError, r"initial_sparsity.*1\.0"),
    (lambda: Magnitude(5, 9, 1, "0"), TypeError, "initial_sparsity.*'0'"),
  ],
)
def test_at_construction(make, error, message):
  with raises(error, match=message):
    make()


@pytest.mark.parametrize(
  ("kwargs", "error", "message"),
  [
    ({"sparse": lambda path, leaf: False}, ValueError, "sparse.*'kernel'"),
    ({"sparse": {"kernel": True}}, ValueError, "sparse.*structure"),
    ({"sparse": masks_like(True, 0)}, TypeError, "sparse.*bool.*'bias'.*0"),
    ({"corrected": {"bias": True}}, ValueError, "corrected.*structure"),
    ({"corrected": lambda path, leaf: "no"}, TypeError, "corrected.*'no'"),
    ({"corrected": "off"}, TypeError, "corrected.*bool.*'off'"),
    (
      {"corrected": lambda path, leaf: path == "kernal"},
      ValueError,
      r"corrected.*'kernel'.*function",
    ),
    ({"corrected": masks_like(False, True)}, ValueError, "corrected.*'bias'"),
    ({"distribution": lambda shapes, s: [0.5]}, TypeError, r"\[0\.5\]"),
    (
      {"distribution": lambda shapes, s: dict.fromkeys(shapes, "0.5")},
      TypeError,
      "distribution.*'kernel'.*'0.5'",
    ),
    (
      {"distribution": lambda shapes, s: dict.fromkeys(shapes, jnp.ones(2))},
      TypeError,
      "distribution.*'kernel'",
    ),
    ({"output_axis": 2}, ValueError, "output_axis.*kernel.*2"),
    ({"output_axis": "last"}, TypeError, "output_axis.*'last'"),
    ({"output_axis": lambda path, leaf: None}, TypeError, "output_axis.*None"),
    ({"masks": {"kernal": np.ones((4, 3), bool)}}, ValueError, "'kernal'"),
    ({"masks": np.ones((4, 3), bool)}, ValueError, "masks.*''"),
    (
      {"masks": masks_like(np.ones((3, 4), bool))},
      ValueError,
      r"masks.*\(4, 3\).*'kernel'.*\(3, 4\)",
    ),
    (
      {"masks": masks_like(np.ones((4, 3)))},
      TypeError,
      "masks.*'kernel'.*float64",
    ),
    ({"masks": masks_like([True])}, (TypeError, ValueError), "masks"),
    ({"masks": "kernel"}, TypeError, "masks.*str"),
    ({"masks": masks_like(np.ones((4, 3), int))}, TypeError, "masks.*int64"),
    (
      {"masks": masks_like(optax.MaskedNode())},
      ValueError,
      "choose a leaf.*'kernel'",
    ),
    (
      {
        "masks": masks_like(np.ones((4, 3), bool)),
        "sparse": masks_like(True, True),
      },
      ValueError,
      "sparse.*'bias'.*masks.*True",
    ),
    (
      {"stacked": 2, "sparse": masks_like(True, False)},
      ValueError,
      r"stacked.*'kernel'.*\(4, 3\).*2",
    ),
    (
      {"stacked": -1, "sparse": masks_like(True, False)},
      ValueError,
      "stacked.*-1",
    ),
    ({"stacked": True}, TypeError, "stacked.*int.*True"),
    ({"stacked": lambda path, leaf: None}, TypeError, "stacked.*int.*None"),
    ({"stacked": {"kernel": 0}}, ValueError, "stacked.*structure"),
  ],
)
def test_at_init(kwargs, error, message):
  tx = link(0.5, **kwargs)
  with raises(error, match=message):
    tx.init(PARAMS)


def test_the_axis_is_refused_with_the_leaf_that_lacks_it():
  params = {"Conv_0": jnp.ones((3, 3, 2, 4)), "Dense_0": jnp.ones((8, 4))}
  tx = link(0.5, output_axis=-3)
  with raises(ValueError, match=r"output_axis.*Dense_0.*-3"):
    tx.init(params)


@pytest.mark.parametrize("given", [[0.0, 0.5], [0.1], None, "a"])
def test_a_schedule_that_gives_no_scalar(given):
  given = jnp.array(given) if isinstance(given, list) else given
  topology = RigL(10, 1, drop_fraction=lambda count: given)
  tx = link(0.5, topology)
  state = tx.init(PARAMS)
  with raises(TypeError, match="drop_fraction.*a scalar"):
    jax.jit(tx.update)(PARAMS, state, PARAMS)


def test_a_state_of_something_else():
  sgd = optax.sgd(0.1, 0.9)
  tx = link(0.5, RigL(10))
  with raises(TypeError, match=r"state must be.*tuple"):
    tx.update(PARAMS, sgd.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
  "change", [lambda state: state.link, lambda state: state._asdict()]
)
def test_a_state_that_is_not_of_sparsify(change):
  tx = wrapped(optax.sgd(0.1), RigL(10))
  state = change(tx.init(PARAMS))
  kind = type(state).__name__
  with raises(TypeError, match=f"state must be a SparsifyState.*{kind}"):
    tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("kernel", [jnp.ones((3, 4)), None])
def test_gradients_and_parameters_of_another_shape(kernel):
  tx = link(0.5, RigL(10))
  state, other = tx.init(PARAMS), PARAMS | {"kernel": kernel}
  got = r"\(3, 4\)" if kernel is not None else "None"
  message = r"params and updates.*\(4, 3\) at 'kernel'; got "
  with raises(ValueError, match=rf"{message}\[\(4, 3\), {got}\]"):
    tx.update(other, state, PARAMS)
  if kernel is not None:
    with raises(ValueError, match=rf"{message}\[{got}, \(4, 3\)\]"):
      tx.update(PARAMS, state, other)


def test_parameters_of_another_shape_than_the_masks():
  state = link(0.5).init(PARAMS)
  other = {**PARAMS, "kernel": jnp.ones((1, 3))}
  with raises(ValueError, match=r"params.*\(4, 3\) at .*kernel.*\(1, 3\)"):
    sparseopt_jax.apply_masks(other, state)


def test_a_state_of_several_networks():
  states = jax.vmap(lambda seed: link(seed=seed).init(PARAMS))(jnp.arange(3))
  with raises(ValueError, match=r"opt_state.*one network.*jax\.vmap"):
    sparseopt_jax.apply_masks(PARAMS, states)
  several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS)
  got = jax.vmap(sparseopt_jax.apply_masks)(several, states)
  expected = np.where(states.masks["kernel"], several["kernel"], 0)
  np.testing.assert_array_equal(got["kernel"], expected)


def test_integers_and_scalars_cannot_be_sparse():
  every = lambda path, leaf: True
  with raises(TypeError, match=r"sparse.*'n'.*int32"):
    link(0.5, sparse=every).init({"n": jnp.arange(3)})
  with raises(ValueError, match=r"sparse.*'x'.*\(\)"):
    link(0.5, sparse=every).init({"x": jnp.ones(())})


def test_floats_of_eight_bits_cannot_be_sparse():
  params = {"kernel": jnp.ones((4, 3), jnp.float8_e4m3fn)}
  with raises(TypeError, match=r"sparse.*'kernel'.*float8"):
    link(0.5).init(params)


def test_sparse_leaves_must_have_paths_of_their_own():
  params = {"a": {"b": jnp.ones((4, 3))}, "a/b": jnp.ones((5, 3))}
  with raises(ValueError, match=r"sparse.*paths.*'a/b'"):
    link(0.5).init(params)
  with raises(ValueError, match=r"sparse.*paths.*'a/b'"):
    sparseopt_jax.magnitude_masks(params, 0.5)


def test_layers_that_are_too_large():
  layer = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
  init = link(0.5).init
  assert jax.eval_shape(init, layer(2**16, 2**15 - 1)).count.shape == ()
  with raises(ValueError, match=r"2\*\*31 - 1 weights.*65536, 32768"):
    jax.eval_shape(init, layer(2**16, 2**15))


@pytest.mark.parametrize(
  "inner",
  [
    optax.sm3(0.1),
    optax.lbfgs(),
    optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
  ],
  ids=["sm3", "lbfgs", "line search"],
)
def test_states_whose_slots_cannot_be_found(inner):
  optax.chain(link(), inner).init(PARAMS)  # The bare link needs none.
  with raises(ValueError, match=r"inner.*map_params"):
    wrapped(inner).init(PARAMS)


MANY = {f"a_layer_with_a_long_name_{i}": jnp.ones((3, 2)) for i in range(100)}


@pytest.mark.parametrize(
  ("cause", "message"),
  [
    (lambda: sparseopt_jax.get_masks(optax.adam(0.1).init(MANY)), "opt_state"),
    (lambda: link(sparse={"a": True}).init(MANY), "sparse"),
    (lambda: link(sparse=lambda path, leaf: False).init(MANY), "sparse"),
    (lambda: link(masks={"a": jnp.ones((3, 2), bool)}).init(MANY), "masks"),
    (lambda: link(corrected={"a": True}).init(MANY), "corrected"),
    (
      lambda: link(corrected=lambda path, leaf: path == "a").init(MANY),
      "corrected",
    ),
    (lambda: link(distribution=lambda *_: {}).init(MANY), "distribution"),
    (
      lambda: sparseopt_jax.apply_masks({}, link().init(MANY)),
      "params must hold",
    ),
    (
      lambda: sparseopt_jax.apply_masks(
        MANY, jax.vmap(lambda seed: link(seed=seed).init(MANY))(jnp.arange(99))
      ),
      "jax.vmap",
    ),
    (lambda: wrapped(optax.sm3(0.1)).init(MANY), "inner"),
  ],
)
def test_the_message_is_short_for_trees_of_many_leaves(cause, message):
  with raises(ValueError, match=message):
    cause()


@pytest.mark.parametrize("topology", [sparseopt_jax.Static(), RigL(10)])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_update_without_params(topology, is_wrapped):
  tx = wrapped(optax.sgd(0.1), topology) if is_wrapped else link(0.5, topology)
  with raises(ValueError, match=r"params.*None"):
    tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
  "function",
  [
    sparseopt_jax.get_masks,
    sparseopt_jax.sparsity_metrics,
    sparseopt_jax.sparsity_table,
    sparseopt_jax.masks_checksum,
    lambda state: sparseopt_jax.apply_masks(PARAMS, state),
  ],
)
def test_no_state(function):
  with raises(ValueError, match=r"opt_state.*SparseOptState.*tuple"):
    function(optax.adam(0.1).init(PARAMS))


def test_errors_do_not_fire_on_abstract_or_leafless_trees():
  tx = wrapped(optax.sgd(0.1), RigL(10))
  state = jax.eval_shape(tx.init, PARAMS)
  assert state.link.masks["kernel"].shape == (4, 3)
  mapped = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(PARAMS))
  assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.parametrize(
  "other",
  [
    sparseopt_jax.sparseopt(
      0.5, corrected=False, sparse={"a": True, "b": False}
    ),
    sparseopt_jax.sparseopt(0.5, corrected=False, sparse=True),
    sparseopt_jax.sparseopt(
      0.5, RigL(10), corrected=False, sparse={"a": False, "b": True}
    ),
  ],
  ids=["other leaf", "more leaves", "other topology"],
)
def test_a_state_made_under_another_rule(other):
  """Else the gradient of one leaf could be taken for that of another."""
  params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3))}
  link = sparseopt_jax.sparseopt(
    0.5, corrected=False, sparse={"a": False, "b": True}
  )
  with raises(ValueError, match=r"state must be of these.*\['b'\]"):
    other.update(params, link.init(params), params)


@pytest.mark.parametrize(
  ("given", "error"), [(2.0, ValueError), ("x", TypeError)]
)
def test_a_function_that_gives_no_gamma(given, error):
  topology = SRigL(10, 1, gamma_sal=lambda path, leaf: given)
  tx = link(0.5, topology)
  state = tx.init(PARAMS)
  with raises(error, match=f"gamma_sal.*{given!r}"):
    tx.update(PARAMS, state, PARAMS, update_masks=True)
