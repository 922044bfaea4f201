"""Topologies of one's own, for the tests."""

import dataclasses

import jax.numpy as jnp

import sparseopt_jax


@dataclasses.dataclass(frozen=True)
class GrowBySum(sparseopt_jax.RigL):
  """RigL that grows by the sum of the gradients since the last mask update.

  It keeps the sum as its state, in float32.
  """

  def init(self, layer):
    return jnp.zeros(layer.weight.shape, jnp.float32)

  def observe(self, layer, count):
    begins = count % self.update_every == 1 % self.update_every
    kept = jnp.where(begins, 0, layer.state)
    return kept + layer.gradient.astype(jnp.float32)

  def grow_scores(self, layer):
    return super().grow_scores(layer._replace(gradient=layer.state))
