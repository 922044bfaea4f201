"""Bad input gets an error that names the argument and its value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax
from sparseopt_jax import SET
from sparseopt_jax import RigL

PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}


def masks_like(kernel, bias=optax.MaskedNode()):  # noqa: B008
  return {"kernel": kernel, "bias": bias}


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda: sparseopt_jax.sparseopt(1.0), ValueError, r"sparsity.*1\.0"),
    (lambda: sparseopt_jax.sparseopt(-0.1), ValueError, r"sparsity.*-0\.1"),
    (
      lambda: sparseopt_jax.sparseopt(float("nan")),
      ValueError,
      "sparsity.*nan",
    ),
    (lambda: sparseopt_jax.sparseopt("0.9"), TypeError, r"sparsity.*'0\.9'"),
    (lambda: sparseopt_jax.sparseopt(jnp.ones(())), TypeError, "sparsity.*1"),
    (
      lambda: sparseopt_jax.sparseopt(0.9, "rigl"),
      TypeError,
      "topology.*'rigl'",
    ),
    (lambda: sparseopt_jax.sparseopt(0.9, RigL), TypeError, "topology.*RigL"),
    (
      lambda: sparseopt_jax.sparseopt(0.9, distribution="er"),
      ValueError,
      "distribution.*'er'",
    ),
    (
      lambda: sparseopt_jax.sparseopt(0.9, output_axis="last"),
      TypeError,
      "output_axis.*'last'",
    ),
    (
      lambda: sparseopt_jax.sparseopt(0.9, distribution=["erk"]),
      TypeError,
      r"distribution.*\['erk'\]",
    ),
    (
      lambda: sparseopt_jax.sparseopt(0.9, seed=2**63),
      ValueError,
      "seed.*9223372036854775808",
    ),
    (
      lambda: sparseopt_jax.sparseopt(
        0.9, seed=jax.random.split(jax.random.key(0), 3)
      ),
      TypeError,
      "seed must be an int or a key",
    ),
    (lambda: RigL(2**31), ValueError, "update_until.*2147483648"),
    (lambda: SET(10, 2**31), ValueError, "update_every.*2147483648"),
    (lambda: sparseopt_jax.keep_params_sparse(None), TypeError, "inner.*None"),
    (
      lambda: sparseopt_jax.keep_params_sparse(optax.sgd),
      TypeError,
      "inner.*function sgd",
    ),
    (lambda: sparseopt_jax.ham(None, 0.1), TypeError, "inner.*None"),
    (
      lambda: sparseopt_jax.ham(optax.sgd(0.1), "a"),
      TypeError,
      "learning_rate.*'a'",
    ),
    (
      lambda: sparseopt_jax.ham(optax.sgd(0.1), 0.1, alpha=None),
      TypeError,
      "alpha.*None",
    ),
    (
      lambda: sparseopt_jax.ham(optax.sgd(0.1), 0.1, beta=jnp.ones(2)),
      TypeError,
      "beta.*Array",
    ),
    (
      lambda: sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.9, weight_decay=None),
      TypeError,
      "weight_decay.*None",
    ),
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
    (lambda: sparseopt_jax.sparseopt(0.9, seed="a"), TypeError, "seed.*'a'"),
    (lambda: sparseopt_jax.sparseopt(0.9, seed=1.5), TypeError, r"seed.*1\.5"),
    (lambda: SET(10, 0), ValueError, "update_every.*0"),
    (lambda: RigL(10, -5), ValueError, "update_every.*-5"),
    (lambda: RigL(10, 2.5), TypeError, r"update_every.*2\.5"),
    (lambda: RigL(-1), ValueError, "update_until.*-1"),
    (lambda: SET("10"), TypeError, "update_until.*'10'"),
    (lambda: RigL(10, drop_fraction=1.5), ValueError, r"drop_fraction.*1\.5"),
    (lambda: SET(10, drop_fraction=-0.1), ValueError, r"drop_fraction.*-0\.1"),
    (lambda: SET(10, drop_fraction="x"), TypeError, "drop_fraction.*'x'"),
    (lambda: RigL(10, grow_from="all"), ValueError, "grow_from.*'all'"),
    (lambda: RigL(10, accumulate=0), ValueError, "accumulate.*0"),
    (lambda: RigL(10, 5, accumulate=6), ValueError, "accumulate.*6"),
  ],
)
def test_at_construction(make, error, message):
  with pytest.raises(error, match=message):
    make()


@pytest.mark.parametrize(
  ("kwargs", "error", "message"),
  [
    ({"sparse": lambda path, leaf: False}, ValueError, "sparse.*'kernel'"),
    ({"sparse": {"kernel": True}}, ValueError, "sparse.*structure"),
    ({"sparse": masks_like(True, 0)}, TypeError, "sparse.*bool.*0.*'bias'"),
    ({"corrected": {"bias": True}}, ValueError, "corrected.*structure"),
    ({"corrected": lambda path, leaf: "no"}, TypeError, "corrected.*'no'"),
    ({"corrected": "off"}, TypeError, "corrected.*bool.*'off'"),
    (
      {"corrected": lambda path, leaf: path == "kernal"},
      ValueError,
      r"corrected.*function.*\['kernel'\]",
    ),
    ({"corrected": masks_like(False, True)}, ValueError, "corrected.*'bias'"),
    ({"distribution": lambda shapes, s: [0.5]}, TypeError, r"\[0\.5\]"),
    (
      {"distribution": lambda shapes, s: dict.fromkeys(shapes, "0.5")},
      TypeError,
      "distribution.*'0.5' for 'kernel'",
    ),
    (
      {"distribution": lambda shapes, s: dict.fromkeys(shapes, jnp.ones(2))},
      TypeError,
      "distribution.*'kernel'",
    ),
    ({"output_axis": 2}, ValueError, "output_axis.*2"),
    ({"output_axis": lambda path, leaf: None}, TypeError, "output_axis.*None"),
    (
      {"masks": {"kernel": np.ones((4, 3), bool)}},
      ValueError,
      "masks.*structure",
    ),
    (
      {"masks": masks_like(np.ones((3, 4), bool))},
      ValueError,
      r"masks.*\(3, 4\).*'kernel'",
    ),
    (
      {"masks": masks_like(np.ones((4, 3)))},
      TypeError,
      "masks.*float64.*'kernel'",
    ),
    ({"masks": masks_like(None)}, (TypeError, ValueError), "masks"),
    (
      {"masks": masks_like(optax.MaskedNode())},
      ValueError,
      "at least one leaf.*'kernel'",
    ),
    (
      {
        "masks": masks_like(np.ones((4, 3), bool)),
        "sparse": masks_like(True, True),
      },
      ValueError,
      "sparse.*masks.*'kernel'",
    ),
  ],
)
def test_at_init(kwargs, error, message):
  tx = sparseopt_jax.sparseopt(0.5, **kwargs)
  with pytest.raises(error, match=message):
    tx.init(PARAMS)


def test_the_axis_is_refused_with_the_leaf_that_lacks_it():
  params = {"Conv_0": jnp.ones((3, 3, 2, 4)), "Dense_0": jnp.ones((8, 4))}
  tx = sparseopt_jax.sparseopt(0.5, output_axis=-3)
  with pytest.raises(ValueError, match=r"output_axis.*-3 for 'Dense_0'"):
    tx.init(params)


@pytest.mark.parametrize("given", [[0.0, 0.5], [0.1], None, "a"])
def test_a_schedule_that_gives_no_scalar(given):
  given = jnp.array(given) if isinstance(given, list) else given
  topology = RigL(10, 1, drop_fraction=lambda count: given)
  tx = sparseopt_jax.sparseopt(0.5, topology)
  state = tx.init(PARAMS)
  with pytest.raises(TypeError, match="drop_fraction must be a schedule of a"):
    jax.jit(tx.update)(PARAMS, state, PARAMS)


def test_a_state_of_something_else():
  sgd = optax.sgd(0.1, 0.9)
  tx = sparseopt_jax.sparseopt(0.5, RigL(10))
  with pytest.raises(TypeError, match=r"state must be.*got a tuple"):
    tx.update(PARAMS, sgd.init(PARAMS), PARAMS)


def test_a_state_without_the_sums_that_accumulation_needs():
  state = sparseopt_jax.sparseopt(0.5, RigL(10, 4)).init(PARAMS)
  tx = sparseopt_jax.sparseopt(0.5, RigL(10, 4, accumulate=2))
  with pytest.raises(ValueError, match=r"state.*accumulate=2"):
    tx.update(PARAMS, state, PARAMS)


def test_parameters_of_another_shape_than_the_masks():
  state = sparseopt_jax.sparseopt(0.5).init(PARAMS)
  other = {**PARAMS, "kernel": jnp.ones((1, 3))}
  with pytest.raises(ValueError, match=r"\(1, 3\) at 'kernel'.*\(4, 3\)"):
    sparseopt_jax.apply_masks(other, state)


def test_integers_and_scalars_cannot_be_sparse():
  every = lambda path, leaf: True
  with pytest.raises(TypeError, match=r"sparse.*'n'.*int32"):
    sparseopt_jax.sparseopt(0.5, sparse=every).init({"n": jnp.arange(3)})
  with pytest.raises(ValueError, match=r"sparse.*'x'.*\(\)"):
    sparseopt_jax.sparseopt(0.5, sparse=every).init({"x": jnp.ones(())})


def test_floats_of_eight_bits_cannot_be_sparse():
  params = {"kernel": jnp.ones((4, 3), jnp.float8_e4m3fn)}
  with pytest.raises(TypeError, match=r"sparse.*'kernel'.*float8"):
    sparseopt_jax.sparseopt(0.5).init(params)


def test_sparse_leaves_must_have_paths_of_their_own():
  params = {"a": {"b": jnp.ones((4, 3))}, "a/b": jnp.ones((5, 3))}
  with pytest.raises(ValueError, match=r"sparse.*two at 'a/b'"):
    sparseopt_jax.sparseopt(0.5).init(params)
  with pytest.raises(ValueError, match=r"sparse.*two at 'a/b'"):
    sparseopt_jax.magnitude_masks(params, 0.5)


def test_layers_that_are_too_large():
  layer = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
  init = sparseopt_jax.sparseopt(0.5).init
  assert jax.eval_shape(init, layer(2**16, 2**15 - 1)).count.shape == ()
  with pytest.raises(ValueError, match=r"2\*\*31 - 1 weights.*65536, 32768"):
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
  chain = optax.chain(sparseopt_jax.sparseopt(0.5), inner)
  chain.init(PARAMS)  # The bare chain has no need of them.
  with pytest.raises(ValueError, match=r"inner.*map_params"):
    sparseopt_jax.keep_params_sparse(chain).init(PARAMS)


def test_the_message_is_short_for_a_state_of_many_leaves():
  params = {str(i): jnp.ones(2) for i in range(100)}
  with pytest.raises(ValueError, match="got 0 in a tuple") as error:
    sparseopt_jax.get_masks(optax.adam(0.1).init(params))
  assert len(str(error.value)) < 100


@pytest.mark.parametrize("topology", [sparseopt_jax.Static(), RigL(10)])
@pytest.mark.parametrize(
  "wrap", [lambda tx: tx, sparseopt_jax.keep_params_sparse]
)
def test_update_without_params(topology, wrap):
  tx = wrap(sparseopt_jax.sparseopt(0.5, topology))
  with pytest.raises(ValueError, match=r"params.*None"):
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
def test_no_state_or_two(function):
  with pytest.raises(ValueError, match=r"opt_state.*exactly one.*got 0"):
    function(optax.adam(0.1).init(PARAMS))
  link = sparseopt_jax.sparseopt(0.5)
  with pytest.raises(ValueError, match=r"opt_state.*exactly one.*got 2"):
    function(optax.chain(link, link).init(PARAMS))


def test_the_wrapper_needs_a_link():
  with pytest.raises(ValueError, match=r"exactly one SparseOptState; got 0"):
    sparseopt_jax.keep_params_sparse(optax.sgd(0.1)).init(PARAMS)


def test_errors_do_not_fire_on_abstract_or_leafless_trees():
  tx = sparseopt_jax.sparseopt_sgd(0.1, 0.5, RigL(10))
  state = jax.eval_shape(tx.init, PARAMS)
  assert state[0].status["kernel"].shape == (4, 3)
  mapped = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(PARAMS))
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
