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


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("function", [sparseopt_jax.erk, sparseopt_jax.uniform])
def test_sparsity_outside_its_range(function, sparsity):
  with pytest.raises(ValueError, match=rf"sparsity.*{sparsity!r}"):
    function(SHAPES, sparsity)


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
  ],
)
def test_bad_distributions(distribution, message):
  with pytest.raises(ValueError, match=message):
    _distributions.active_counts({"a": (4, 2)}, 0.9, distribution)


def test_empty_layers_are_refused():
  with pytest.raises(ValueError, match=r"shapes\['a'\]"):
    sparseopt_jax.erk({"a": (4, 0)}, 0.9)
