"""Dynamic sparse training for JAX, as Optax gradient transformations."""

from sparseopt_jax._alias import sparseopt_sgd
from sparseopt_jax._correction import correct
from sparseopt_jax._correction import neuron_sparsity
from sparseopt_jax._distributions import erk
from sparseopt_jax._distributions import uniform
from sparseopt_jax._ham import HamState
from sparseopt_jax._ham import ham
from sparseopt_jax._pruning import magnitude_masks
from sparseopt_jax._state import SparseOptState
from sparseopt_jax._topology import SET
from sparseopt_jax._topology import RigL
from sparseopt_jax._topology import Static
from sparseopt_jax._transform import sparseopt
from sparseopt_jax._wrappers import apply_masks
from sparseopt_jax._wrappers import get_masks
from sparseopt_jax._wrappers import keep_params_sparse
from sparseopt_jax.metrics import assert_replicas_agree
from sparseopt_jax.metrics import masks_checksum
from sparseopt_jax.metrics import sparsity_metrics
from sparseopt_jax.metrics import sparsity_table

__all__ = (
  "SET",
  "HamState",
  "RigL",
  "SparseOptState",
  "Static",
  "apply_masks",
  "assert_replicas_agree",
  "correct",
  "erk",
  "get_masks",
  "ham",
  "keep_params_sparse",
  "magnitude_masks",
  "masks_checksum",
  "neuron_sparsity",
  "sparseopt",
  "sparseopt_sgd",
  "sparsity_metrics",
  "sparsity_table",
  "uniform",
)
