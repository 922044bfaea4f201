"""The correction of one layer against the oracle, and its exact identities."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sparseopt_jax

SHAPES = [(5,), (7, 3), (3, 3, 4, 6), (2, 3, 3, 2, 5), (1, 9), (9, 1), (1, 1)]


def random_layer(shape, density, seed):
  rng = np.random.default_rng(seed)
  gradient = rng.normal(size=shape).astype(np.float32)
  return gradient, rng.random(shape) < density


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_agrees_with_oracle(shape, density):
  for axis in range(-len(shape), len(shape)):
    gradient, mask = random_layer(shape, density, seed=axis + 10)
    got = sparseopt_jax.correct(gradient, mask, axis)
    want = oracle.correct(gradient, mask, axis)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)
    assert got.dtype == jnp.float32
    got = sparseopt_jax.neuron_sparsity(mask, axis)
    np.testing.assert_allclose(
      got, oracle.neuron_sparsity(mask, axis), rtol=1e-6, atol=1e-7
    )


def test_several_neuron_axes_agree_with_oracle():
  gradient, mask = random_layer((4, 3, 2, 5), 0.3, seed=0)
  for axes in [(-2, -1), (0, 2), (1,), (0, 1, 2, 3), (2, 1), (-1, 0)]:
    np.testing.assert_allclose(
      sparseopt_jax.neuron_sparsity(mask, axes),
      oracle.neuron_sparsity(mask, axes),
      rtol=1e-6,
      atol=1e-7,
    )
    np.testing.assert_allclose(
      sparseopt_jax.correct(gradient, mask, axes),
      oracle.correct(gradient, mask, axes),
      rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dense_mask_is_the_identity_bit_for_bit(dtype):
  gradient, _ = random_layer((3, 3, 13, 37), 1.0, seed=1)
  gradient = jnp.asarray(gradient, dtype)
  got = sparseopt_jax.correct(gradient, np.ones(gradient.shape, bool))
  assert got.dtype == gradient.dtype
  np.testing.assert_array_equal(np.asarray(got), np.asarray(gradient))


def test_several_neuron_axes_come_in_ascending_order():
  mask = np.ones((2, 3, 4), bool)
  assert sparseopt_jax.neuron_sparsity(mask, (2, 1)).shape == (3, 4)
  assert sparseopt_jax.neuron_sparsity(mask, np.int64(0)).shape == (2,)


def test_denormals_may_become_zero_and_nothing_else():
  """XLA flushes them on a CPU; they are no counterexample to "bit for bit"."""
  tiny = np.finfo(np.float32).smallest_subnormal
  gradient = np.array([[tiny, 1.0], [-1e-40, 1e-37]], np.float32)
  got = np.asarray(sparseopt_jax.correct(gradient, np.ones((2, 2), bool)))
  np.testing.assert_array_equal(got[:, 1], gradient[:, 1])
  kept = got[:, 0] != 0
  np.testing.assert_array_equal(got[kept, 0], gradient[kept, 0])


@pytest.mark.parametrize("fan_in", [1, 2, 3, 7])
@pytest.mark.parametrize("neurons", [3, 11, 96])
def test_equal_fan_in_is_the_identity_bit_for_bit(fan_in, neurons):
  rng = np.random.default_rng(fan_in)
  mask = np.zeros((17, neurons), bool)
  for neuron in range(neurons):
    mask[rng.choice(17, fan_in, replace=False), neuron] = True
  gradient = rng.normal(size=mask.shape).astype(np.float32)
  got = jax.jit(sparseopt_jax.correct)(gradient, mask)
  np.testing.assert_array_equal(got, np.where(mask, gradient, 0))


def test_dead_neurons_and_dead_layers_give_zeros():
  gradient, mask = random_layer((8, 4), 0.5, seed=2)
  mask[:, 1] = False
  assert np.all(np.asarray(sparseopt_jax.correct(gradient, mask))[:, 1] == 0)
  nothing = np.zeros((8, 4), bool)
  np.testing.assert_array_equal(sparseopt_jax.correct(gradient, nothing), 0)


def test_not_a_number_outside_the_mask_does_not_get_through():
  gradient, mask = random_layer((8, 4), 0.5, seed=3)
  poisoned = np.where(mask, gradient, np.nan)
  np.testing.assert_array_equal(
    sparseopt_jax.correct(poisoned, mask), sparseopt_jax.correct(gradient, mask)
  )


def test_norm_of_an_even_gradient_is_kept():
  # If all active weights have a gradient of 1, the squares add up to
  # sum_i f_i * f_i n / nnz, which is at least nnz and equal for equal f_i.
  _, mask = random_layer((64, 32), 0.1, seed=4)
  got = np.asarray(sparseopt_jax.correct(np.ones(mask.shape), mask))
  counts = mask.sum(0)
  want = (counts**2).sum() * len(counts) / counts.sum()
  np.testing.assert_allclose((got**2).sum(), want, rtol=1e-5)


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    ((np.ones((2, 3)), np.ones((2, 3))), TypeError, "mask.*float"),
    ((np.ones((2, 3)), np.ones((3, 2), bool)), ValueError, r"mask.*\(3, 2\)"),
    ((np.ones((2, 3)), np.ones((2, 3), bool), 2), ValueError, "output_axis.*2"),
    ((np.ones((2, 3)), np.ones((2, 3), bool), "x"), TypeError, "axis.*'x'"),
    (
      (np.ones((2, 3)), np.ones((2, 3), bool), (1, -1)),
      ValueError,
      r"output_axis.*different.*\(1, -1\)",
    ),
    ((np.ones(()), np.ones((), bool)), ValueError, "mask.*scalar"),
  ],
)
def test_errors_name_the_argument(arguments, error, message):
  with pytest.raises(error, match=message):
    sparseopt_jax.correct(*arguments)
