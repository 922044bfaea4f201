"""The link of the chain: holds the masks and corrects the gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _correction
from sparseopt_jax import _distributions
from sparseopt_jax import _lax
from sparseopt_jax import _masks
from sparseopt_jax import _paths
from sparseopt_jax import _selection
from sparseopt_jax import _sharding
from sparseopt_jax import _state
from sparseopt_jax._numbers import check, check_type, is_int
from sparseopt_jax._state import SparseOptState
from sparseopt_jax._topology import Layer, Static, Topology


def _key_data(seed: Any) -> jax.Array:
  """Two uint32 from an int, or from a key of any implementation."""
  if is_int(seed):
    check(-(2**63) <= seed < 2**63, "seed must lie in [-2**63, 2**63)", seed)
    # JAX takes 32 or 64 bits of it, as jax_enable_x64 says.
    low = (1 << 32) - 1
    return jnp.array([(int(seed) >> 32) & low, int(seed) & low], jnp.uint32)
  shape, dtype = getattr(seed, "shape", None), getattr(seed, "dtype", object)
  if shape == (2,) and dtype == jnp.uint32:
    return jnp.array(seed)  # A copy: the state may be donated.
  if shape == () and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return jax.random.bits(seed, (2,), jnp.uint32)
  is_array = shape == () and jnp.issubdtype(dtype, jnp.integer)
  check_type(is_array, "seed must be an int or a key", seed)
  return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _all_finite(tree: Any) -> jax.Array:
  is_float = lambda x: jnp.issubdtype(getattr(x, "dtype", float), jnp.inexact)
  floats = [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_float(x)]
  # All small ones of a dtype at once: each reduction takes its time to compile.
  small = [x for x in floats if x.size <= 1 << 16]
  arrays = [x for x in floats if x.size > 1 << 16]
  for dtype in dict.fromkeys(x.dtype for x in small):
    alike = [x.reshape(-1) for x in small if x.dtype == dtype]
    arrays.append(jnp.concatenate(alike))
  # Bytes: XLA reduces bools slowly on a CPU, and loses NaN in a maximum there.
  bad = [(~jnp.isfinite(x)).astype(jnp.uint8) for x in arrays]
  return jnp.all(jnp.stack([jnp.max(x, initial=0) == 0 for x in bad]))


def _factor(layer: Layer, mask: jax.Array) -> jax.Array:
  axes = layer.input_axes
  return _correction.factors(mask, axes, layer.stacked, layer.corrected)


def _new_masks(topology: Any, layers: Any, state: SparseOptState) -> Any:
  """The state with the masks that the topology gives."""
  like: Any = jax.tree.structure(state.masks)
  key = _selection.call_key(state.key, optax.safe_increment(state.count))
  masks = topology.update_masks(layers, state.count, key)
  # 3 and 2 where it is active, 1 and 0 where not: see SparseOptState.
  mark = lambda before, old, mask: jnp.where(
    mask,
    old.mask.astype(jnp.uint8) + np.uint8(2),
    jnp.minimum(before, np.uint8(1)),
  )
  explored = map(mark, jax.tree.leaves(state.explored), layers, masks)
  factors = tuple(map(_factor, layers, masks))
  trees = {"masks": like.unflatten(masks), "explored": like.unflatten(explored)}
  return state._replace(updated=state.updated | True, factors=factors, **trees)


def sparseopt(
  sparsity: float,
  topology: Topology = Static(),  # noqa: B008
  *,
  corrected: Any,
  distribution: Any = "erk",
  sparse: Any = None,
  masks: Any = None,
  output_axis: Any = None,
  stacked: Any = 0,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Sparse training with the gradient skew of batch normalisation undone.

  Holds a mask for each sparse layer, updates the masks as the topology says,
  and turns the gradient :math:`g` of a layer into

  .. math::

    \tilde g = m \odot \frac{1}{\sqrt{1 - s_{avg}}} D g, \qquad
    D = \mathrm{diag}\left(\sqrt{1 - s_i}\right), \qquad
    s_i = 1 - \frac{f_i}{N},

  with mask :math:`m`, sparsity :math:`s_i`, fan-in :math:`f_i` and dense
  fan-in :math:`N` of neuron :math:`i`, and :math:`s_{avg}` the mean of
  :math:`s_i` over the layer. :func:`sparseopt_jax.correct` is that formula for
  one layer. ``init`` fixes the number of active weights of each layer. Of the
  topologies of this package, only :class:`sparseopt_jax.Magnitude` changes it,
  and :class:`sparseopt_jax.SRigL` by less than a weight a neuron.

  The link belongs first in a chain. It cannot cancel what later links add, such
  as momentum, so call :func:`sparseopt_jax.apply_masks` after each
  ``optax.apply_updates``; or give the optimiser to
  :func:`sparseopt_jax.sparsify`, which needs no such call.

  On a call that updates the masks, weights that stay make their ordinary step,
  with the factors of the masks under which the gradient was taken. Weights are
  dropped by their magnitude as passed to ``update``. A mask update is skipped
  and counted if any gradient is not finite.

  Whether a call updates the masks is decided on the device, from the number of
  calls. A loop that counts them itself can say so by the extra argument
  ``update_masks`` of ``update``, a Python bool, and the branch is left out:
  ``update_masks=topology.is_due(step)``, a static argument of a jitted step.
  That ``step`` has to be the state's own count, by which the drop fraction
  goes. Under ``jax.vmap`` over states, whose counts may differ, each step takes
  several times longer unless the loop says so; not so in a training function
  that is mapped as a whole, ``init`` included.

  Factors may exceed 1, so that large float16 gradients can overflow; bfloat16
  and float32 have the range.

  Args:
    sparsity: As for :func:`sparseopt_jax.sparsify`.
    topology: As for :func:`sparseopt_jax.sparsify`.
    corrected: As for :func:`sparseopt_jax.sparsify`.
    distribution: As for :func:`sparseopt_jax.sparsify`.
    sparse: As for :func:`sparseopt_jax.sparsify`.
    masks: As for :func:`sparseopt_jax.sparsify`.
    output_axis: As for :func:`sparseopt_jax.sparsify`.
    stacked: As for :func:`sparseopt_jax.sparsify`.
    seed: As for :func:`sparseopt_jax.sparsify`.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`sparseopt_jax.SparseOptState`. Its ``update`` needs ``params``.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range, no leaf can be sparse, or
      ``corrected`` is not ``False`` and chooses no sparse leaf.

  Examples:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> params = {'kernel': jnp.ones((8, 4)), 'bias': jnp.zeros(4)}
    >>> tx = optax.chain(
    ...   sparseopt_jax.sparseopt(0.75, corrected=True), optax.sgd(0.1)
    ... )
    >>> opt_state = tx.init(params)
    >>> params = sparseopt_jax.apply_masks(params, opt_state)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> params = sparseopt_jax.apply_masks(params, opt_state)
    >>> print(jnp.count_nonzero(params['kernel']))
    8

  References:
    Adnan et al., `SparseOpt: Addressing Normalization-induced Gradient Skew in
    Sparse Training <https://arxiv.org/abs/2605.27541>`_, 2026

  .. seealso:: :func:`sparseopt_jax.sparsify`
  """
  _distributions.check_sparsity(sparsity)
  _distributions.resolve(distribution)
  is_one = isinstance(topology, Topology) and not isinstance(topology, type)
  check_type(is_one, "topology must be a Topology, as RigL(30_000)", topology)
  _key_data(seed)
  options = _masks.Options(
    sparsity, distribution, sparse, stacked, corrected, masks, output_axis
  )
  sparse_leaves = _masks.planner(options)
  # By a traced count, since for a number False may mean that it is not due now.
  probe = lambda count: topology.is_due(count) is False or None
  is_static = jax.eval_shape(probe, jnp.int32(0)) is not None

  def init_fn(params: optax.Params) -> SparseOptState:
    # optax.tree.map_params asks with a tree that has no leaves.
    layers = sparse_leaves(params) if jax.tree.leaves(params) else []
    layers = _masks.with_masks(layers, topology, _key_data(seed))
    layers = [x._replace(factor=_factor(x, x.mask)) for x in layers]
    first = _masks.as_tree(params, layers, [x.mask for x in layers])
    factors: Any = tuple(x.factor for x in layers)
    kept: Any = tuple(map(topology.init, layers))
    if not layers:  # There, an array stands for a tuple of any length.
      factors = kept = jnp.zeros([])
    return SparseOptState(
      count=jnp.zeros([], jnp.int32),
      skipped=jnp.zeros([], jnp.int32),
      updated=jnp.zeros([], jnp.bool_),
      key=_key_data(seed),
      masks=first,
      explored=() if is_static else _state.explored_at_first(first),
      factors=factors,
      topology_state=kept,
    )

  def layers_of(params: Any, state: SparseOptState, grads: Any) -> list[Layer]:
    """The sparse leaves with all that belongs to them."""
    treedef: Any = jax.tree.structure(params)
    raw, layers = treedef.flatten_up_to(grads), sparse_leaves(params)
    names, paths = _paths.names(state.masks), [x.path for x in layers]
    is_own = names == paths and (is_static or jax.tree.leaves(state.explored))
    check(is_own, "state must be of these sparse leaves and topology", names)
    of_state = jax.tree.leaves(state.masks), state.factors, state.topology_state
    for layer, mask in zip(layers, of_state[0], strict=True):
      found = [getattr(x, "shape", x) for x in (layer.weight, raw[layer.place])]
      rule = f"params and updates must have shape {mask.shape} at"
      check(found == [mask.shape] * 2, f"{rule} {layer.path!r}", found)
    return [
      layer._replace(
        weight=jnp.asarray(layer.weight),
        gradient=jnp.asarray(raw[layer.place]),
        mask=mask,
        factor=factor,
        state=kept,
        corrected=factor.dtype != jnp.bool_,
      )
      for layer, mask, factor, kept in zip(layers, *of_state, strict=True)
    ]

  def update_fn(
    updates: optax.Updates,
    state: SparseOptState,
    params: optax.Params | None = None,
    *,
    update_masks: bool | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SparseOptState]:
    del extra_args
    is_known = isinstance(update_masks, bool | np.bool_ | None)
    check_type(is_known, "update_masks must be a bool or None", update_masks)
    check(params is not None, "params must be passed to update", params)
    is_state = isinstance(state, SparseOptState)
    check_type(is_state, "state must be a SparseOptState", type(state))
    layers = layers_of(params, state, updates)
    kept = tuple(topology.observe(layer, state.count) for layer in layers)
    # An operation on the old flag keeps its layout, and its axes under vmap.
    new = state._replace(updated=state.updated & False, topology_state=kept)
    if not is_static:
      due = topology.is_due(state.count)
      due = due if update_masks is None else bool(update_masks)
      new = _lax.once(due, change_freely, new, params, updates)
    # One after the other, as map_sparse comes to their masks.
    scaled = iter(_correction.rescale(x.gradient, x.factor) for x in layers)
    updates = _state.map_sparse(lambda *_: next(scaled), new.masks, updates)
    # A weight that is dropped or grown in this call makes no step.
    updates = _state.zero_unless(_state.settled(new), updates)
    return updates, new._replace(count=optax.safe_increment(new.count))

  def change(state: SparseOptState, params: Any, grads: Any) -> SparseOptState:
    """New masks, if all gradients are finite; else the state counts it."""
    finite = _all_finite((grads, state.topology_state))
    skipped = state.skipped + (~finite).astype(jnp.int32)
    layers = layers_of(params, state, grads)
    new_masks = functools.partial(_new_masks, topology, layers)
    return _lax.once(finite, new_masks, state._replace(skipped=skipped))

  # Made once: jax.jit knows by the function itself what it has compiled.
  change_freely = functools.partial(_sharding.lay_out_freely, change)
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
