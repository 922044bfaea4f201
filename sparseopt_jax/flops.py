"""Floating-point operations of a module whose kernels are sparse.

Only matrix products and convolutions count, two operations for each
multiplication with its addition, as is usual in the field. This module needs
Flax.

References:
  Evci et al., `Rigging the Lottery: Making All Tickets Winners
  <https://arxiv.org/abs/1911.11134>`_, 2020, appendix H.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseopt_jax import _dataflow
from sparseopt_jax._numbers import check_type
from sparseopt_jax._topology import RigL, SRigL, Topology


def forward_flops(
  module: _dataflow.Module,
  *inputs: Any,
  densities: Mapping[str, float] | None = None,
  **kwargs: Any,
) -> float:
  r"""Operations of one forward pass.

  .. math::

    f = \sum_l 2 \, \mathrm{MACs}_l \, d_l

  over the matrix products and convolutions :math:`l`, with :math:`d_l` the
  density of the kernel. A product without a kernel, as in attention, is dense;
  what is inside of `lax.cond` does not count, and of a `lax.while_loop` at most
  one round does.
  Nothing is computed: `jax.ShapeDtypeStruct` will do for arrays.

  Args:
    module: A Flax module, as for `sparseopt_jax.inspection.normalizations`.
    *inputs: Its inputs. The result is for all of them: take a batch of one for
      the operations of one example.
    densities: {path: density} of the kernels that are sparse, such as the
      result of `sparseopt_jax.erk`; the others, and all if None, are dense.
    **kwargs: The module's keyword arguments.

  Returns:
    The number of floating-point operations.

  Raises:
    TypeError: If `module` is not a Flax module.
    ValueError: If `densities` has a path that is not a kernel of `module`, or a
      density outside [0, 1].

  Examples:
    >>> import jax
    >>> from flax import linen as nn
    >>> from sparseopt_jax import flops
    >>> flops.forward_flops(nn.Dense(10), jax.numpy.zeros((1, 50)))
    1000.0
    >>> flops.forward_flops(
    ...   nn.Dense(10), jax.numpy.zeros((1, 50)), densities={"kernel": 0.25}
    ... )
    250.0
    >>> from flax import nnx
    >>> module = nnx.Linear(50, 10, rngs=nnx.Rngs(0))
    >>> flops.forward_flops(module, jax.numpy.zeros((1, 50)))
    1000.0
  """
  densities = densities or {}
  products = _dataflow.products(module, inputs, kwargs)
  unknown = densities.keys() - {product.kernel for product in products}
  if unknown:
    raise ValueError(
      f"densities has paths that are no kernels: {sorted(unknown)}"
    )
  for path, density in densities.items():
    if not 0 <= density <= 1:
      raise ValueError(
        f"densities must be in [0, 1], got {density} for {path!r}"
      )
  return float(
    sum(
      2 * product.macs * densities.get(product.kernel or "", 1.0)
      for product in products
    )
  )


def training_flops(
  sparse_flops: float, dense_flops: float, topology: Topology
) -> float:
  r"""Operations of one training step, on average over the steps.

  The backward pass costs twice the forward pass, so with :math:`f_S` sparse
  and :math:`f_D` dense operations forward, a topology that looks at active
  weights alone, such as static masks and SET, needs :math:`3 f_S`. The mask
  updates of RigL and SRigL, one after each :math:`\Delta T` other steps, need
  the dense gradient:

  .. math::

    \frac{3 f_S \Delta T + 2 f_S + f_D}{\Delta T + 1}

  That is how RigL counts it. Masks and optimiser are left out, and hardware
  that computes the dense gradient in every step only to mask it does more.

  Args:
    sparse_flops: :math:`f_S`, from `forward_flops` with the densities. Of
      `Magnitude`, which changes them, the mean over the steps.
    dense_flops: :math:`f_D`, from `forward_flops` without.
    topology: The topology. One that is a `RigL` or an `SRigL` uses the dense
      gradient, with its `update_every` for :math:`\Delta T`; any other is taken
      not to. Dense training: `Static()`, `sparse_flops=dense_flops`.

  Returns:
    The number of floating-point operations.

  Raises:
    TypeError: If `topology` is no `sparseopt_jax.Topology`.

  Examples:
    >>> import sparseopt_jax
    >>> from sparseopt_jax import flops
    >>> flops.training_flops(1.0, 10.0, sparseopt_jax.SET(update_until=1000))
    3.0
    >>> topology = sparseopt_jax.RigL(update_until=1000, update_every=3)
    >>> flops.training_flops(1.0, 10.0, topology)
    5.25
  """
  is_one = isinstance(topology, Topology) and not isinstance(topology, type)
  check_type(is_one, "topology must be a Topology, as RigL(30_000)", topology)
  if not isinstance(topology, RigL | SRigL):
    return 3 * sparse_flops
  steps = topology.update_every + 1
  return (3 * sparse_flops * steps + dense_flops - sparse_flops) / steps
