"""Mask updates, corrections and counts for whatever Hypothesis thinks of.

Everything is compared with the oracle. A few examples run by default, thousands
in the slow part. Shapes come from a list, since each is compiled.
"""

import functools
import math

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import sparseopt_jax

# One neuron, one input, one weight; one and several axes of neurons.
SHAPES = {
  (1, 1): -1,
  (7, 1): -1,
  (1, 7): -1,
  (5, 4): -1,
  (4, 5): 0,
  (2, 2, 3, 4): -1,
  (3, 2, 3): (1, 2),
}
KINDS = {"rigl": sparseopt_jax.RigL, "set": sparseopt_jax.SET}
SPARSITY = 0.5
GAMMA = 0.7
RATE, MOMENTUM = 0.5, 0.9
# Ties, zeros of both signs, denormals and the ends of the range.
_TINY = np.finfo(np.float32).smallest_subnormal
_SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, _TINY, -_TINY, 3 * _TINY, 1e38, -1e38]


def _settings(max_examples):
  return hypothesis.settings(
    max_examples=max_examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


def _floats(shape, *, finite=True):
  special = _SPECIAL if finite else [*_SPECIAL, np.inf, -np.inf, np.nan]
  elements = st.one_of(
    st.sampled_from([np.float32(x) for x in special]),
    st.floats(-10, 10, width=32),
  )
  return hnp.arrays(np.float32, shape, elements=elements, fill=st.just(1.0))


def _masks(shape):
  """From all active to all dead."""
  return st.one_of(
    hnp.arrays(bool, shape),
    st.just(np.ones(shape, bool)),
    st.just(np.zeros(shape, bool)),
  )


_FRACTIONS = st.one_of(
  st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1, width=32)
)


@st.composite
def _problems(draw, kind, *, finite=True):
  shape = draw(st.sampled_from(sorted(SHAPES, key=str)))
  return kind, {
    "mask": draw(_masks(shape)),
    "weights": draw(_floats(shape)),
    "gradient": draw(_floats(shape, finite=finite)),
    "fraction": np.float32(draw(_FRACTIONS)),
    "seed": np.int32(draw(st.integers(0, 2**31 - 1))),
  }


@functools.cache
def _two_steps(shape, kind):
  """A first call, which never updates masks, and the one that does."""

  @jax.jit
  def run(mask, weights, gradient, fraction, seed):
    if kind == "magnitude":
      topology = sparseopt_jax.Magnitude(0, 2, 1)
    elif kind == "srigl":
      drop = lambda _: fraction
      topology = sparseopt_jax.SRigL(10, 1, drop, gamma_sal=GAMMA)
    else:
      topology = KINDS[kind](10, 1, drop_fraction=lambda _: fraction)
    tx = sparseopt_jax.sparsify(
      optax.sgd(RATE, momentum=MOMENTUM),
      SPARSITY,
      topology,
      corrected=True,
      masks=mask,
      seed=seed,
      output_axis=SHAPES[shape],
    )
    opt_state = tx.init(weights)
    params = sparseopt_jax.apply_masks(weights, opt_state)
    _, opt_state = tx.update(jnp.zeros_like(params), opt_state, params)
    updates, opt_state = tx.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    (factors,) = opt_state.link.factors
    trace, _ = opt_state.inner
    return {
      "params": params,
      "mask": sparseopt_jax.get_masks(opt_state),
      "momentum": trace.trace,
      "factors": factors,
      "metrics": sparseopt_jax.sparsity_metrics(opt_state),
    }

  return run


def _oracle_topology(kind, problem):
  size = problem["mask"].size
  counts = {"w": (size, max(1, round((1 - SPARSITY) * size)))}
  until = 2 if kind == "magnitude" else 10
  fraction = lambda t: problem["fraction"]
  return oracle.Topology(
    kind, until, 1, alpha=fraction, counts=counts, gamma=GAMMA
  )


def _check_mask_update(example):
  kind, problem = example
  shape = problem["mask"].shape
  axis = SHAPES[shape]
  seed = jnp.asarray(problem["seed"])
  got = jax.device_get(_two_steps(shape, kind)(**{**problem, "seed": seed}))
  run = oracle.Run(
    {"w": problem["weights"]},
    {"w": problem["mask"]},
    _oracle_topology(kind, problem),
    learning_rate=RATE,
    momentum=MOMENTUM,
    axis=axis,
    dtype=np.float32,
  )
  run.count = 1
  record = run.step({"w": problem["gradient"]}, {"w": got["mask"]})
  metrics = got["metrics"]
  np.testing.assert_array_equal(got["mask"], record.masks["w"])
  if kind in KINDS:
    assert got["mask"].sum() == problem["mask"].sum()
  fan_ins = oracle.fan_ins(got["mask"], axis)
  factors = got["factors"].reshape(fan_ins.shape)
  np.testing.assert_allclose(
    factors, oracle.factors(got["mask"], axis), rtol=1e-6
  )
  # Their squares are in proportion to the fan-ins, which are integers.
  share = fan_ins.sum() / fan_ins.size
  np.testing.assert_array_equal(np.rint(factors**2 * share), fan_ins)
  if fan_ins.any() and len(np.unique(fan_ins)) == 1:
    np.testing.assert_array_equal(factors, 1)
  assert metrics["skipped_updates"] == record.skipped_updates
  assert metrics["dead_neurons"] == record.dead_neurons
  for name in ("itop_rate", "mask_change", "sparsity"):
    assert metrics[name] == pytest.approx(getattr(record, name), abs=1e-6)
  assert not got["params"][~got["mask"]].any()
  if np.isfinite(problem["gradient"]).all():
    # Arithmetic of XLA on a CPU, unlike the selection, takes denormals for 0.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(got["params"], record.params["w"])
    close(got["momentum"], record.momentum["w"])


def _check_correction(example):
  gradient, mask, axis = example
  got = np.asarray(_correct(gradient, mask, axis))
  np.testing.assert_allclose(
    got, oracle.correct(gradient, mask, axis), rtol=1e-6, atol=1e-37
  )
  assert not got[~mask].any()
  if len(np.unique(oracle.fan_ins(mask, axis))) == 1:
    expected = np.where(mask, gradient, np.float32(0))
    normal = np.abs(expected) >= np.finfo(np.float32).tiny
    np.testing.assert_array_equal(got[normal], expected[normal])
  sparsity = sparseopt_jax.neuron_sparsity(mask, axis)
  np.testing.assert_allclose(
    sparsity, oracle.neuron_sparsity(mask, axis), atol=1e-6
  )


_correct = jax.jit(sparseopt_jax.correct, static_argnums=2)


def _check_densities(example):
  shapes, sparsity = example
  shapes = {f"layer_{i}/kernel": shape for i, shape in enumerate(shapes)}
  size = sum(map(math.prod, shapes.values()))
  for name in ("uniform", "erk"):
    got = getattr(sparseopt_jax, name)(shapes, sparsity)
    expected = getattr(oracle, name)(shapes, sparsity)
    assert got.keys() == expected.keys()
    for path in shapes:
      assert got[path] == pytest.approx(expected[path], rel=1e-9, abs=1e-12)
      assert 0 < got[path] <= 1
    active = sum(got[path] * math.prod(shapes[path]) for path in shapes)
    assert active == pytest.approx((1 - sparsity) * size, rel=1e-9)


_CORRECTIONS = st.sampled_from(sorted(SHAPES, key=str)).flatmap(
  lambda shape: st.tuples(
    hnp.arrays(np.float32, shape, elements=st.floats(-10, 10, width=32)),
    _masks(shape),
    st.just(SHAPES[shape]),
  )
)
_LAYERS = st.lists(
  st.lists(st.integers(1, 600), min_size=2, max_size=4).map(tuple),
  min_size=1,
  max_size=8,
)
_SPARSITIES = st.floats(0, 0.999)


def _search(check, examples, n):
  """Runs ``check`` on n examples."""
  _settings(n)(hypothesis.given(examples)(check))()


CHECKS = {
  "RigL": (_check_mask_update, _problems("rigl")),
  "SET": (_check_mask_update, _problems("set")),
  "Magnitude": (_check_mask_update, _problems("magnitude")),
  "SRigL": (_check_mask_update, _problems("srigl")),
  "not finite": (_check_mask_update, _problems("rigl", finite=False)),
  "correction": (_check_correction, _CORRECTIONS),
  "densities": (_check_densities, st.tuples(_LAYERS, _SPARSITIES)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_some_examples(name):
  _search(*CHECKS[name], n=25)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_many_examples(name):
  _search(*CHECKS[name], n=1500)
