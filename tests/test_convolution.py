"""The convolution of the models, against XLA's own and its gradient."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt_jax.models import convolution

# (kernel, stride, padding, height, width): what ResNets have, and unlike axes.
SHAPES = {
  "3x3": ((3, 3), (1, 1), ((1, 1), (1, 1)), 8, 8),
  "3x3, stride 2, even": ((3, 3), (2, 2), ((1, 1), (1, 1)), 8, 8),
  "3x3, stride 2, odd": ((3, 3), (2, 2), ((1, 1), (1, 1)), 7, 9),
  "1x1, stride 2, even": ((1, 1), (2, 2), ((0, 0), (0, 0)), 8, 8),
  "1x1, stride 2, odd": ((1, 1), (2, 2), ((0, 0), (0, 0)), 7, 7),
  "7x7, stride 2": ((7, 7), (2, 2), ((3, 3), (3, 3)), 16, 14),
  "unlike axes": ((3, 5), (3, 2), ((0, 2), (2, 1)), 11, 10),
}


def _arrays(shape, dtype=np.float32):
  (kh, kw), strides, padding, height, width = shape
  rng = np.random.default_rng(0)
  images = rng.normal(size=(4, height, width, 3)).astype(dtype)
  kernel = rng.normal(size=(kh, kw, 3, 5)).astype(dtype)
  return jnp.asarray(images), jnp.asarray(kernel), strides, padding


def _gradients(function, images, kernel):
  """Of a sum in which each output counts differently."""

  def loss(images, kernel):
    y = function(images, kernel)
    return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape))

  return jax.grad(loss, argnums=(0, 1))(images, kernel)


def _plain(images, kernel, strides, padding):
  return lax.conv_general_dilated(
    images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_lax_with_its_gradient(shape):
  images, kernel, strides, padding = _arrays(shape)
  fast = lambda x, w: convolution.convolve(x, w, strides, padding)
  plain = lambda x, w: _plain(x, w, strides, padding)
  np.testing.assert_array_equal(fast(images, kernel), plain(images, kernel))
  for one, other in zip(
    _gradients(fast, images, kernel),
    _gradients(plain, images, kernel),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_form_of_accelerators_is_lax_gradient(shape):
  images, kernel, strides, padding = _arrays(shape)
  y = _plain(images, kernel, strides, padding)
  gradient = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
  found = convolution._backward_of_plain(
    strides, padding, images, kernel, gradient
  )
  on_cpu = convolution._backward_as_forward(
    strides, padding, images, kernel, gradient
  )
  plain = lambda x, w: jnp.sum(_plain(x, w, strides, padding) * gradient)
  expected = jax.grad(plain, argnums=(0, 1))(images, kernel)
  for one, other, third in zip(found, on_cpu, expected, strict=True):
    np.testing.assert_array_equal(one, third)
    np.testing.assert_allclose(other, third, rtol=1e-4, atol=1e-4)


def test_many_networks_by_vmap():
  images, kernel, strides, padding = _arrays(SHAPES["3x3, stride 2, even"])
  kernels = jnp.stack([kernel, 2 * kernel, -kernel])
  convolve = lambda x, w: convolution.convolve(x, w, strides, padding)
  gradients = functools.partial(_gradients, convolve, images)
  found = jax.vmap(gradients)(kernels)
  for number, each in enumerate(kernels):
    for one, other in zip(found, gradients(each), strict=True):
      np.testing.assert_allclose(one[number], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_images", [False, True])
def test_many_networks_in_the_form_of_accelerators(own_images):
  """One convolution for all image gradients, one each for the kernels'."""
  one, kernel, strides, padding = _arrays(SHAPES["3x3, stride 2, even"])
  rng = np.random.default_rng(1)
  images = rng.normal(size=(3, *one.shape)).astype(np.float32)
  kernels = rng.normal(size=(3, *kernel.shape)).astype(np.float32)
  gradients = rng.normal(size=(3, 4, 4, 4, 5)).astype(np.float32)
  if not own_images:
    images[:] = images[0]
  backward = jax.vmap(
    functools.partial(convolution._backward_of_plain, strides, padding),
    in_axes=(0 if own_images else None, 0, 0),
  )
  given = images if own_images else images[0], kernels, gradients
  program = jax.jit(backward).lower(*given).compile()
  found = program(*given)
  plain = lambda x, w: _plain(x, w, strides, padding)
  for index in range(3):
    _, pull = jax.vjp(plain, images[index], kernels[index])
    for each, other in zip(found, pull(gradients[index]), strict=True):
      np.testing.assert_allclose(each[index], other, rtol=1e-4, atol=1e-4)
  assert program.as_text().count(" convolution(") == 1 + 3


def test_gradients_of_single_examples_in_the_form_of_accelerators():
  """As many convolutions as for one."""
  images, kernel, strides, padding = _arrays(SHAPES["3x3"])
  gradients = jnp.cos(jnp.arange(4.0 * 8 * 8 * 5)).reshape(4, 1, 8, 8, 5)
  backward = functools.partial(convolution._backward_of_plain, strides, padding)
  each = jax.vmap(backward, in_axes=(0, None, 0))
  given = images[:, None], kernel, gradients
  program = jax.jit(each).lower(*given).compile()
  assert program.as_text().count(" convolution(") == 2
  for found, image, gradient in zip(
    program(*given)[1], images, gradients, strict=True
  ):
    other = backward(image[None], kernel, gradient)[1]
    np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-4)


def test_forward_over_reverse():
  """As `jax.jvp` of the gradient of XLA's own convolution."""
  images, kernel, strides, padding = _arrays(SHAPES["3x3"])
  found, expected = (
    jax.jvp(
      lambda w, function=function: _gradients(function, images, w)[1],
      (kernel,),
      (jnp.cos(kernel),),
    )[1]
    for function in (
      lambda x, w: convolution.convolve(x, w, strides, padding),
      lambda x, w: _plain(x, w, strides, padding),
    )
  )
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)


def test_no_tracer_leaks():
  images, kernel, strides, padding = _arrays(SHAPES["3x3"])
  convolve = lambda x, w: convolution.convolve(x, w, strides, padding)
  with jax.checking_leaks():
    gradients = functools.partial(_gradients, convolve)
    jax.eval_shape(jax.jit(gradients), images, kernel)


def test_a_loop_has_no_convolution_that_is_not_a_forward_one():
  """In a loop, XLA's CPU backend has a library for these alone."""
  images, kernel, strides, padding = _arrays(SHAPES["3x3, stride 2, even"])
  convolve = lambda x, w: convolution.convolve(x, w, strides, padding)

  def descend(images, kernel):
    def step(_, kernel):
      return kernel - 0.1 * _gradients(convolve, images, kernel)[1]

    return lax.fori_loop(0, 3, step, kernel)

  program = jax.jit(descend).lower(images, kernel).compile().as_text()
  forms = {
    line.partition("dim_labels=")[2].partition(",")[0].split()[0]
    for line in program.splitlines()
    if " convolution(" in line
  }
  assert forms == {"b01f_01io->b01f"}


def test_barriers_stay_where_the_options_are_given():
  """XLA ignores the name of a pass that it does not know."""
  images, kernel, strides, padding = _arrays(SHAPES["3x3"])
  convolve = lambda x, w: convolution.convolve(nn.relu(x), w, strides, padding)
  gradients = functools.partial(_gradients, convolve)
  kept = jax.jit(gradients, compiler_options=convolution.BARRIER_OPTIONS)
  texts = [
    each.lower(images, kernel).compile().as_text()
    for each in (jax.jit(gradients), kept)
  ]
  assert ["opt-barrier(" in text for text in texts] == [False, True]


def test_other_options_are_refused():
  images = jnp.zeros((1, 8, 8, 4))
  for options, message in (
    ({"kernel_dilation": 2}, r"rhs_dilation must be 1, got \(2, 2\)"),
    ({"input_dilation": 2}, r"lhs_dilation must be 1, got \(2, 2\)"),
    ({"feature_group_count": 2}, "feature_group_count must be 1, got 2"),
    ({"precision": "highest"}, "precision must be None, got highest"),
    ({"padding": "SAME"}, "padding must be pairs of numbers, got 'SAME'"),
  ):
    layer = nn.Conv(
      4,
      (3, 3),
      **{"padding": ((1, 1), (1, 1)), **options},
      conv_general_dilated=convolution.convolve,
    )
    with pytest.raises(ValueError, match=message):
      layer.init(jax.random.key(0), images)
