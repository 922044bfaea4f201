"""Dynamic sparse training for JAX, as Optax gradient transformations."""

from sparseopt_jax._alias import sparseopt_sgd
from sparseopt_jax._correction import correct, neuron_sparsity
from sparseopt_jax._distributions import erk, uniform
from sparseopt_jax._topology import SET, RigL, Static
from sparseopt_jax._transform import SparseOptState, sparseopt
from sparseopt_jax._wrappers import apply_masks, get_masks, keep_params_sparse
from sparseopt_jax.metrics import (
  masks_checksum,
  sparsity_metrics,
  sparsity_table,
)

__all__ = (
  "SET",
  "RigL",
  "SparseOptState",
  "Static",
  "apply_masks",
  "correct",
  "erk",
  "get_masks",
  "keep_params_sparse",
  "masks_checksum",
  "neuron_sparsity",
  "sparseopt",
  "sparseopt_sgd",
  "sparsity_metrics",
  "sparsity_table",
  "uniform",
)
