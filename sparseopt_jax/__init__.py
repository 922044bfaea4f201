"""Dynamic sparse training for JAX, as Optax gradient transformations."""

from sparseopt_jax._correction import correct as correct
from sparseopt_jax._correction import neuron_sparsity as neuron_sparsity
from sparseopt_jax._distributions import erk as erk
from sparseopt_jax._distributions import uniform as uniform
from sparseopt_jax._masks import magnitude_masks as magnitude_masks
from sparseopt_jax._sparsify import SparsifyState as SparsifyState
from sparseopt_jax._sparsify import sparsify as sparsify
from sparseopt_jax._state import SparseOptState as SparseOptState
from sparseopt_jax._state import apply_masks as apply_masks
from sparseopt_jax._state import get_masks as get_masks
from sparseopt_jax._topology import SET as SET
from sparseopt_jax._topology import Layer as Layer
from sparseopt_jax._topology import Magnitude as Magnitude
from sparseopt_jax._topology import RigL as RigL
from sparseopt_jax._topology import SRigL as SRigL
from sparseopt_jax._topology import Static as Static
from sparseopt_jax._topology import Topology as Topology
from sparseopt_jax._transform import sparseopt as sparseopt
from sparseopt_jax.metrics import assert_replicas_agree as assert_replicas_agree
from sparseopt_jax.metrics import masks_checksum as masks_checksum
from sparseopt_jax.metrics import sparsity_metrics as sparsity_metrics
from sparseopt_jax.metrics import sparsity_table as sparsity_table
