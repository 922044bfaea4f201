"""Uniform and ERK densities against the oracle and against each other."""

import math

import numpy as np
import oracle
import pytest

import sparseopt_jax
from sparseopt_jax import _distributions

SHAPES = {
  "stem": (3, 3, 3, 16),
  "a": (3, 3, 16, 16),
  "b": (3, 3, 16, 64),
  "c": (1, 1, 64, 256),
  "d": (3, 3, 256, 256),
  "head": (256, 10),
}
SPARSITIES = [0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.999]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_agree_with_oracle(sparsity):
  for name in ("erk", "uniform"):
    got = getattr(sparseopt_jax, name)(SHAPES, sparsity)
    want = getattr(oracle, name)(SHAPES, sparsity)
    assert list(got) == list(SHAPES)
    np.testing.assert_allclose(
      list(got.values()), [float(want[path]) for path in got], rtol=1e-12
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_total_is_that_of_uniform_up_to_rounding(sparsity):
  counts = _distributions.active_counts(SHAPES, sparsity, "erk")
  size = sum(math.prod(shape) for shape in SHAPES.values())
  assert abs(sum(counts.values()) - (1 - sparsity) * size) <= len(SHAPES)
  assert all(1 <= counts[p] <= math.prod(SHAPES[p]) for p in SHAPES)


def test_every_layer_keeps_a_weight():
  counts = _distributions.active_counts({"a": (2, 2)}, 0.99, "uniform")
  assert counts == {"a": 1}


def test_a_function_may_be_given():
  def halves(shapes, sparsity):
    assert sparsity == 0.9
    return dict.fromkeys(shapes, 0.5)

  counts = _distributions.active_counts({"a": (4, 2)}, 0.9, halves)
  assert counts == {"a": 4}


def test_densities_by_pattern_and_erk_for_the_rest():
  given = {"stem": 1.0, "[ab]": 0.5, "*a*": 0.25}  # The first that matches.
  counts = _distributions.active_counts(SHAPES, 0.9, given)
  densities = {"stem": 1.0, "a": 0.5, "b": 0.5, "head": 0.25}
  rest = {path: SHAPES[path] for path in ("c", "d")}
  densities |= oracle.erk(rest, 0.9)
  assert counts == oracle.active_counts(SHAPES, densities)
  # The rest has the sparsity that was asked for, whatever the others have.
  spent = counts["c"] + counts["d"]
  size = math.prod(rest["c"]) + math.prod(rest["d"])
  assert spent == pytest.approx(0.1 * size, abs=1)


def test_densities_of_all_layers_by_pattern():
  counts = _distributions.active_counts(SHAPES, 0.9, {"*": 0.5})
  assert counts == {path: math.prod(SHAPES[path]) // 2 for path in SHAPES}


def test_patterns_of_layers_that_are_stacked():
  """A pattern means the leaf, a whole name also one layer in it."""
  shapes = {f"blocks/kernel[{i}]": (10, 10) for i in range(3)}
  shapes["head/kernel"] = (10, 10)
  given = {"blocks/kernel[1]": 1.0, "*s/kernel": 0.5}
  counts = _distributions.active_counts(shapes, 0.9, given)
  assert list(counts.values()) == [50, 100, 50, 10]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("function", [sparseopt_jax.erk, sparseopt_jax.uniform])
def test_sparsity_outside_its_range(function, sparsity):
  with pytest.raises(ValueError, match=rf"sparsity.*{sparsity!r}"):
    function(SHAPES, sparsity)


@pytest.mark.parametrize("how", ["erk", "uniform"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_the_kind_of_the_number_does_not_matter(how, kind):
  """In float16, sums of weights overflow."""
  shapes = {"a": (4096, 4096), "b": (64, 32), "c": (32, 16)}
  sparsity = kind(0.9)
  got = _distributions.active_counts(shapes, sparsity, how)
  assert got == _distributions.active_counts(shapes, float(sparsity), how)
  given = lambda kind: lambda shapes, _: dict.fromkeys(shapes, kind(sparsity))
  got, expected = (
    _distributions.active_counts(shapes, 0.5, given(each))
    for each in (kind, float)
  )
  assert got == expected


@pytest.mark.parametrize("sparsity", ["0.9", None, True, [0.9]])
def test_sparsity_of_another_type(sparsity):
  with pytest.raises(TypeError, match="sparsity must be a Python number"):
    sparseopt_jax.erk(SHAPES, sparsity)


@pytest.mark.parametrize(
  ("distribution", "message"),
  [
    ("er", "distribution.*'er'"),
    (lambda shapes, _: {}, r"distribution.*\['a'\]"),
    (lambda shapes, _: {"a": 1.5}, r"distribution.*'a'.*1\.5"),
    (lambda shapes, _: {"a": 0.5, "b": 0.5}, r"distribution.*\['b'\]"),
    ({"a": 0.5, "b/*": 0.5}, r"distribution must match some of a; got 'b/\*'"),
    ({"a": 0.0}, r"distribution.*\(0, 1\] for 'a'; got 0\.0"),
    ({"a": 1.5}, r"distribution.*'a'.*1\.5"),
    ({"A": 0.5}, "distribution.*'A'"),
  ],
)
def test_bad_distributions(distribution, message):
  with pytest.raises(ValueError, match=message):
    _distributions.active_counts({"a": (4, 2)}, 0.9, distribution)


@pytest.mark.parametrize("distribution", [{"a": "0.5"}, {"a": True}, {1: 0.5}])
def test_dicts_of_other_types(distribution):
  with pytest.raises(TypeError, match="distribution must"):
    sparseopt_jax.sparseopt(0.9, corrected=True, distribution=distribution)


@pytest.mark.parametrize("shape", [(4, 0), ()])
def test_empty_layers_are_refused(shape):
  with pytest.raises(ValueError, match=r"shapes\['a'\]"):
    sparseopt_jax.erk({"a": shape}, 0.9)
