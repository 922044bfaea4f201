"""Masks from the values of dense parameters."""

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax import _blocks
from sparseopt_jax import _distributions
from sparseopt_jax import _leaves
from sparseopt_jax import _selection


def magnitude_masks(
  params: optax.Params,
  sparsity: float,
  *,
  distribution: str | _distributions.Distribution = "erk",
  sparse: _leaves.Rule = None,
) -> optax.Params:
  r"""Masks that keep the weights of largest magnitude in each layer.

  One-shot magnitude pruning of trained, dense parameters, to fine-tune on these
  masks or to start dynamic sparse training from them:
  ``sparseopt(sparsity, topology, masks=magnitude_masks(params, sparsity))``.

  Args:
    params: The dense parameters.
    sparsity: Fraction of zeros over all sparse leaves, in [0, 1).
    distribution: As for :func:`sparseopt_jax.sparseopt`; it decides how many
      weights each layer keeps.
    sparse: Which leaves get a mask, as for :func:`sparseopt_jax.sparseopt`.

  Returns:
    The parameters' structure with a bool array in the shape of each sparse
    leaf, true where a weight is kept, and ``optax.MaskedNode()`` for others. Of
    equal magnitudes those of lowest row-major index are pruned first.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range, or no leaf can be sparse.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> params = {'kernel': jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> masks = sparseopt_jax.magnitude_masks(params, 0.5)
    >>> print(masks['kernel'])
    [[False  True]
     [ True False]]

  References:
    Han et al., `Learning both Weights and Connections for Efficient Neural
    Networks <https://arxiv.org/abs/1506.02626>`_, 2015

  .. seealso:: :func:`sparseopt_jax.get_masks`
  """
  values, treedef = jax.tree.flatten(params)
  leaves = _leaves.describe(params)
  chosen = _leaves.choose_sparse(sparse, None, params, leaves)
  layers = {
    leaf.path: jnp.asarray(value)
    for leaf, value, choice in zip(leaves, values, chosen, strict=True)
    if choice
  }
  shapes = {path: layer.shape for path, layer in layers.items()}
  counts = _distributions.active_counts(shapes, sparsity, distribution)
  excess = [layers[path].size - count for path, count in counts.items()]
  n = jnp.array(excess, jnp.int32)

  def keep(block: _blocks.Block, values: jax.Array) -> jax.Array:
    is_layer = block.is_layer()
    return ~_selection.smallest(block, values, is_layer, block.take(n))

  def prune(values: list[jax.Array]) -> list[jax.Array]:
    return _blocks.block_by_block(list(shapes.values()), keep, (values, 0.0))

  masks = iter(_leaves.lay_out_freely(prune, list(layers.values())))
  return jax.tree.unflatten(
    treedef,
    [next(masks) if choice else optax.MaskedNode() for choice in chosen],
  )
