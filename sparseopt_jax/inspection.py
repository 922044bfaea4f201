"""Which normalisation each kernel feeds, found from what the module computes.

SparseOpt is for layers whose output goes straight into batch normalisation. In
a pre-activation network that is not every convolution, and a name does not
tell. This module needs Flax.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparseopt_jax import _dataflow


def normalizations(
  module: _dataflow.Module, *inputs: Any, **kwargs: Any
) -> dict[str, str]:
  """Finds what the output of each kernel goes into first.

  In between, the output may be reshaped, transposed, cast, sliced or
  concatenated (in a DenseNet, batch norm still normalises each neuron by its
  own standard deviation), and anything that does not depend on the module's
  inputs may be added or multiplied: a bias, a scale. Everything else comes
  first itself, so an addition of two layers' outputs (the residual stream of a
  pre-activation network), a ReLU or a pooling before the normalisation means
  "none". So does an output that goes several ways which do not all begin with
  the same kind of normalisation, one that a `lax.scan` carries on, and any
  normalisation other than Flax's `BatchNorm`, `LayerNorm` and `GroupNorm` and
  their subclasses (in NNX, those that use the inherited `__call__`). It is not
  checked that batch norm's features are the kernel's neurons, as they are
  unless a reshape or transposition mixes them.

  Nothing is computed: `jax.ShapeDtypeStruct` will do for arrays.

  Args:
    module: A Flax module: of linen, not bound, or of NNX, which is not changed.
      `flax.nnx.bridge` may have made it or parts of it.
    *inputs: Its inputs, as for `module.apply` (linen) or `module` (NNX).
    **kwargs: Its keyword arguments. A module whose batch norm has an
      `axis_name` is best called as in evaluation (`train=False`), where there
      is no such axis.

  Returns:
    "batch_norm", "layer_norm", "group_norm" or "none" by path, for each
    parameter that is multiplied, as the kernel of a matrix product or a
    convolution, with something that depends on the inputs. Paths are those of
    the linen `params`, or of `nnx.state(module, nnx.Param)`. Kernels used only
    inside of `lax.cond` are missing; those of a `lax.while_loop` may be.

  Raises:
    TypeError: If `module` is not a Flax module.

  Examples:
    >>> import jax
    >>> from flax import linen as nn
    >>> from sparseopt_jax import inspection
    >>> module = nn.Sequential([
    ...   nn.Dense(8),
    ...   nn.BatchNorm(use_running_average=True),
    ...   nn.relu,
    ...   nn.Dense(3),
    ... ])
    >>> kinds = inspection.normalizations(module, jax.numpy.zeros((2, 4)))
    >>> kinds
    {'layers_0/kernel': 'batch_norm', 'layers_3/kernel': 'none'}

    The same in NNX:

    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> module = nnx.Sequential(
    ...   nnx.Linear(4, 8, rngs=rngs),
    ...   nnx.BatchNorm(8, rngs=rngs),
    ...   nnx.relu,
    ...   nnx.Linear(8, 3, rngs=rngs),
    ... )
    >>> inspection.normalizations(module, jax.numpy.zeros((2, 4)))
    {'layers/0/kernel': 'batch_norm', 'layers/3/kernel': 'none'}
  """
  uses: dict[str, set[str]] = {}
  for product in _dataflow.products(module, inputs, kwargs):
    if product.kernel is not None:
      uses.setdefault(product.kernel, set()).update(product.uses)
  return {
    path: next(iter(kinds)) if len(kinds) == 1 else _dataflow.NONE
    for path, kinds in uses.items()
  }


@dataclasses.dataclass(frozen=True)
class BatchNormalized:
  """Tells which leaves are kernels that feed batch normalisation.

  Attributes:
    paths: Of these kernels, such as "Conv_0/kernel".
  """

  paths: tuple[str, ...]

  def __call__(self, path: str, leaf: Any) -> bool:
    """Whether the leaf at a path is one of them."""
    del leaf
    return path in self.paths


def batch_normalized(
  module: _dataflow.Module, *inputs: Any, **kwargs: Any
) -> BatchNormalized:
  """The kernels to correct: those whose output goes into batch norm first.

  Args:
    module: As for `normalizations`.
    *inputs: As for `normalizations`.
    **kwargs: As for `normalizations`.

  Returns:
    What `sparseopt_jax.sparsify` and `sparseopt_jax.sparseopt` take as
    `corrected`, a predicate (path, leaf) -> bool, true for the kernels that
    `normalizations` calls "batch_norm". Where there are none, both raise a
    ValueError.

  Raises:
    TypeError: If `module` is not a Flax module.

  Examples:
    >>> import jax
    >>> import optax
    >>> from flax import linen as nn
    >>> import sparseopt_jax
    >>> from sparseopt_jax import inspection
    >>> module = nn.Sequential([
    ...   nn.Dense(8),
    ...   nn.BatchNorm(use_running_average=True),
    ...   nn.relu,
    ...   nn.Dense(3),
    ... ])
    >>> x = jax.numpy.zeros((2, 4))
    >>> corrected = inspection.batch_normalized(module, x)
    >>> corrected
    BatchNormalized(paths=('layers_0/kernel',))
    >>> tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, corrected=corrected)
    >>> opt_state = tx.init(module.init(jax.random.key(0), x)['params'])

    In NNX, ``nnx.Optimizer`` takes it from there; once, before training, the
    parameters get their zeros:

    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...   nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    ... )
    >>> corrected = inspection.batch_normalized(model, x)
    >>> tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, corrected=corrected)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> params = nnx.state(model, nnx.Param)
    >>> params = sparseopt_jax.apply_masks(params, optimizer.opt_state)
    >>> nnx.update(model, params)
  """
  kinds = normalizations(module, *inputs, **kwargs)
  return BatchNormalized(
    tuple(path for path, kind in kinds.items() if kind == "batch_norm")
  )
