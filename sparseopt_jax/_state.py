"""The state of the link, and the masks in it."""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _paths
from sparseopt_jax._numbers import check


class SparseOptState(NamedTuple):
  """State of :func:`sparseopt_jax.sparseopt`.

  Trees have the structure of the parameters, with ``optax.MaskedNode()`` in the
  place of dense leaves. Tuples have an entry for each sparse leaf. They stand
  outside that structure, so that a layout of the parameters never falls on
  arrays of another shape.

  ``optax.tree.map_params`` takes ``masks`` and ``explored`` for parameters, so
  that layouts reach them. A function that resets slots, such as
  ``jnp.zeros_like``, would empty the masks: see
  :class:`sparseopt_jax.SparsifyState`.
  """

  # shape=(), dtype=jnp.int32; calls of update so far
  count: jax.Array  # type: ignore[assignment]
  skipped: jax.Array  # shape=(), dtype=jnp.int32; mask updates given up
  updated: jax.Array  # shape=(), dtype=jnp.bool_; the last call updated masks
  key: jax.Array  # shape=(2,), dtype=jnp.uint32; from the seed
  masks: optax.Params  # leaf shape, dtype=jnp.bool_; true where active
  # leaf shape, dtype=jnp.uint8; 0 never active, 1 active once, but not now, 2
  # grown by the last mask update, 3 active since before it; () for a topology
  # that never changes masks
  explored: optax.Params
  # per neuron, with length 1 on input axes: dtype=jnp.float32, what its
  # gradient is multiplied by; in a leaf that is not corrected dtype=jnp.bool_,
  # whether it has an active weight
  factors: tuple[jax.Array, ...]
  topology_state: tuple[Any, ...]  # what the topology keeps, likewise


def explored_at_first(masks: optax.Params) -> optax.Params:
  """What was explored by the first masks: the active weights."""
  return jax.tree.map(lambda x: jnp.where(x, np.uint8(3), np.uint8(0)), masks)


def settled(state: SparseOptState) -> optax.Params:
  """The masks, without the weights that the last call has grown.

  Read from one array of bytes: XLA would store the conjunction of two, and
  reads bools slowly on a CPU.
  """
  if not jax.tree.leaves(state.explored):
    return jax.tree.map(lambda mask: mask.astype(jnp.uint8) > 0, state.masks)
  bits = jnp.where(state.updated, np.uint8(3), np.uint8(2))
  return jax.tree.map(lambda x: (x & bits) == bits, state.explored)


def zero_unless(masks: optax.Params, tree: Any) -> Any:
  """The values under the masks, exactly 0 elsewhere; abstract ones stay."""
  is_abstract = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  one = lambda mask, x: x if is_abstract(x) else jnp.where(mask, x, 0)
  return map_sparse(one, masks, tree)


def map_sparse(function: Any, masks: Any, tree: Any, *rest: Any) -> Any:
  """Applies a function of mask and values; where there is none, ``tree``."""
  is_none = _paths.is_masked_node
  one = lambda mask, x, *ys: x if is_none(mask) else function(mask, x, *ys)
  return jax.tree.map(one, masks, tree, *rest, is_leaf=is_none)


def find_states(opt_state: optax.OptState, stacks: bool = False) -> list[Any]:
  """All SparseOptStates in an optimiser state; at least one.

  Orbax restores a NamedTuple as a dict where it is given no target.

  Args:
    opt_state: The state.
    stacks: Whether it may be a stack of the states of several networks.
  """
  names = set(SparseOptState._fields)
  is_dict = lambda x: isinstance(x, Mapping) and set(x) == names
  is_state = lambda x: isinstance(x, SparseOptState) or is_dict(x)
  nodes = filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state))
  found = [SparseOptState(**x) if is_dict(x) else x for x in nodes]
  rule = "opt_state must hold a SparseOptState, as sparsify and sparseopt have"
  check(found, rule, type(opt_state))
  paths = [path for state in found for path in _paths.names(state.masks)]
  check(len(paths) == len({*paths}), "opt_state must mask a leaf once", paths)
  rule = "opt_state must be of one network: use jax.vmap, or x[0] of each leaf"
  check(stacks or not any(map(num_stacked, found)), rule, found[0].count)
  return found


def num_stacked(state: SparseOptState) -> int:
  """Over how many axes ``jax.vmap`` or ``jax.pmap`` stacked the state."""
  return jnp.ndim(jax.tree.leaves(state.count)[0])


def get_masks(opt_state: optax.OptState) -> optax.Params:
  """Returns the masks in an optimiser state.

  Args:
    opt_state: A state that holds a :class:`sparseopt_jax.SparseOptState` at any
      depth, or several over different leaves; or that state itself.

  Returns:
    The parameters' structure with a bool array in the shape of each sparse
    leaf, true where a weight is active, and ``optax.MaskedNode()`` for the
    others. ``sparsify(..., masks=...)`` starts from it. In NNX a state of
    variables, which later training does not change.

  Raises:
    ValueError: If the state holds no SparseOptState.

  Examples:

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.75, corrected=True)
    >>> opt_state = tx.init({'kernel': jnp.ones((2, 4)), 'bias': jnp.zeros(4)})
    >>> masks = sparseopt_jax.get_masks(opt_state)
    >>> print(masks['kernel'].sum(), masks['bias'])
    2 MaskedNode()
  """
  states = find_states(opt_state, stacks=True)
  masks = functools.reduce(_merge, [state.masks for state in states])
  # New containers: NNX would write the masks of the next step into the old.
  return jax.tree.map(lambda mask: mask, masks)


def _merge(one: Any, other: Any) -> Any:
  """Two trees of masks as one; a MaskedNode may stand for a whole subtree."""
  is_none = lambda x: x is None or _paths.is_masked_node(x)  # None by Orbax.
  if is_none(one) or is_none(other):
    return other if is_none(one) else one
  treedef: Any
  nodes, treedef = jax.tree.flatten(one, is_leaf=lambda x: x is not one)
  return treedef.unflatten(map(_merge, nodes, treedef.flatten_up_to(other)))


def apply_masks(params: optax.Params, opt_state: optax.OptState) -> Any:
  """Returns the parameters with zeros outside the masks.

  Call it once after ``init``, so that the first forward pass is sparse. With
  the bare link, without :func:`sparseopt_jax.sparsify` around the optimiser,
  call it after each ``optax.apply_updates`` as well; right after a mask update
  it also puts the grown weights to 0, which leftover momentum may have moved.

  In NNX, ``nnx.update(model, apply_masks(nnx.state(model, nnx.Param),
  optimizer.opt_state))``. In Equinox, ``model = apply_masks(model,
  opt_state)``: what has no mask is left alone.

  Args:
    params: Parameters. Masks are matched by path, so a container of another
      type than the one that the state was made for will do.
    opt_state: A state that holds a :class:`sparseopt_jax.SparseOptState`, or
      several over different leaves.

  Returns:
    The parameters, exactly 0 where a mask is false. What stood there before,
    NaN included, does not matter.

  Raises:
    ValueError: If the state holds no SparseOptState, or its masks do not fit
      the parameters; for a state of several devices or instances, use
      ``jax.vmap``.

  Examples:

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> params = {'kernel': jnp.ones((2, 4)), 'bias': jnp.ones(4)}
    >>> tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.75, corrected=True)
    >>> params = sparseopt_jax.apply_masks(params, tx.init(params))
    >>> print(params['kernel'].sum(), params['bias'].sum())
    2.0 4.0
  """
  masks: dict[str, jax.Array] = {}
  for state in find_states(opt_state):
    masks |= _paths.by_name(settled(state))
  unknown = masks.keys() - set(_paths.names(params))
  check(not unknown, "params must hold a leaf for each mask", sorted(unknown))

  def one(path: tuple, leaf: Any) -> Any:
    mask = masks.get(_paths.name(path))
    if mask is None:
      return leaf
    rule = f"params must have shape {mask.shape} at {_paths.name(path)!r}"
    check(jnp.shape(leaf) == mask.shape, rule, jnp.shape(leaf))
    return jnp.where(mask, leaf, 0)

  return jax.tree_util.tree_map_with_path(one, params)
