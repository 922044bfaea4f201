"""The link of the chain: holds the masks and corrects the gradient."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _blocks
from sparseopt_jax import _correction
from sparseopt_jax import _distributions
from sparseopt_jax import _leaves
from sparseopt_jax import _selection
from sparseopt_jax import _state
from sparseopt_jax import _topology
from sparseopt_jax._state import SettledState
from sparseopt_jax._state import SparseOptState


def _check_seed(seed: Any) -> None:
  if _correction.is_int(seed):
    if not -(2**63) <= seed < 2**63:
      raise ValueError(f"seed must lie in [-2**63, 2**63); got {seed!r}.")
  elif not (isinstance(seed, jax.Array | np.ndarray) and _is_key(seed)):
    raise TypeError(f"seed must be an int or a key; got {seed!r}.")


def _is_key(array: jax.Array | np.ndarray) -> bool:
  """Whether it is a key, the data of one, or an integer."""
  if array.shape == (2,):
    return array.dtype == jnp.uint32
  return array.shape == () and (
    jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    or jnp.issubdtype(array.dtype, jnp.integer)
  )


def _key_data(seed: Any) -> jax.Array:
  """Two uint32 from an int or a key of any implementation."""
  if _correction.is_int(seed):
    # JAX takes 32 or 64 bits of it, as jax_enable_x64 says.
    low = (1 << 32) - 1
    return jnp.array([(seed >> 32) & low, seed & low], jnp.uint32)
  if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
    return jax.random.bits(seed, (2,), jnp.uint32)
  if seed.shape == (2,):
    return jnp.array(seed)  # A copy: the state may be donated.
  return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _place(array: jax.Array, leaf: Any) -> jax.Array:
  """Lays an array out as its parameter, if that is known by now."""
  if isinstance(leaf, jax.core.Tracer):
    if _leaves.explicit_mesh(leaf) is None:
      return array
    return jax.sharding.reshard(array, jax.typeof(leaf).sharding)
  # An array put on a device is bound to it; one that is not must stay free.
  if isinstance(leaf, jax.Array) and leaf.committed:
    return jax.device_put(array, leaf.sharding)
  return array


def _all_finite(gradients: Sequence[jax.Array]) -> jax.Array:
  # All small ones of a dtype at once: each reduction takes its time to compile.
  small: dict[Any, list[jax.Array]] = {}
  arrays = []
  for gradient in gradients:
    if getattr(gradient, "dtype", None) == jax.dtypes.float0:
      continue  # Of integers.
    gradient = jnp.asarray(gradient)
    if gradient.size > 1 << 16:
      arrays.append(gradient)
    else:
      small.setdefault(gradient.dtype, []).append(gradient.reshape(-1))
  arrays += [jnp.concatenate(group) for group in small.values()]
  # A maximum passes NaN on, and is faster on a CPU than a conjunction.
  largest = [jnp.max(jnp.abs(x), initial=0) for x in arrays]
  return jnp.all(jnp.stack([jnp.isfinite(x) for x in largest]))


def _scaled(gradient: jax.Array, scale: Any) -> jax.Array:
  if _leaves.is_masked_node(scale):
    return gradient
  return _correction.rescale(jnp.asarray(gradient), scale)


def _growth_scores(
  topology: _topology.SET | _topology.RigL,
  state: SparseOptState,
  gradients: Any,
) -> list[jax.Array] | None:
  if isinstance(topology, _topology.SET):
    return None
  source = state.gradient_sum if topology.accumulate > 1 else gradients
  scores = _state.sparse_only(state.status, source)
  if topology.grow_from == "corrected":
    scales = _state.sparse_only(state.status, state.correction)
    scores = [_scaled(g, d) for g, d in zip(scores, scales, strict=True)]
  return scores


# Traced once for each shape and not for each layer.
@functools.partial(jax.jit, static_argnames="axes")
def _neurons(mask: jax.Array, axes: tuple[int, ...]) -> tuple:
  """The fan-in of each neuron and the factor of its gradient.

  Args:
    mask: Bools.
    axes: The input axes.
  """
  fan_in, rest = _blocks.counts([mask, ~mask], axes)
  nnz, all_rest = _blocks.sums([fan_in, rest], range(fan_in.ndim))
  # This adds 0. Were the active weights all that is used, counting them would
  # be slow.
  nnz += jnp.minimum(all_rest, 0)
  scale = _correction.scale_from_fan_in(fan_in, nnz)
  return jnp.expand_dims(fan_in, axes), jnp.expand_dims(scale, axes)


# Compiled as a whole: outside of jit, init would compile one operation after
# the other. Tracing init again, as a wrapper does, finds it done.
@functools.partial(jax.jit, static_argnames="shapes")
def _random_masks(
  key_data: jax.Array, counts: jax.Array, shapes: tuple[tuple[int, ...], ...]
) -> list[jax.Array]:
  """One mask for each shape, with so many active weights."""
  # Else XLA would evaluate masks that do not depend on arguments, slowly.
  key = lax.optimization_barrier(key_data)
  words = _topology.random_words(key, jnp.uint32(0), len(shapes))

  def draw(block: _blocks.Block) -> jax.Array:
    return _selection.at_random(
      block, block.is_layer(), block.take(counts), block.take(words)
    )

  return _blocks.block_by_block(shapes, draw)


@functools.partial(jax.jit, static_argnames="axes")
def _initial_state(
  mask: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Status, fan-in and scale of a layer with this mask."""
  fan_in, scale = _neurons(mask, axes)
  status = jnp.where(
    mask, np.uint8(_state.ACTIVE | _state.EXPLORED), np.uint8(0)
  )
  return status, fan_in, scale


def _new_status(status: jax.Array, new_mask: jax.Array) -> jax.Array:
  changed = new_mask != _state.has_bits(status, _state.ACTIVE)
  return (
    (status & np.uint8(_state.EXPLORED))
    | jnp.where(
      new_mask, np.uint8(_state.ACTIVE | _state.EXPLORED), np.uint8(0)
    )
    | jnp.where(changed, np.uint8(_state.CHANGED), np.uint8(0))
  )


def _update_masks(
  topology: _topology.SET | _topology.RigL,
  state: SparseOptState,
  gradients: Any,
  params: Any,
) -> SparseOptState:
  """Drops and grows in every sparse layer, if all gradients are finite."""
  finite = _all_finite(jax.tree.leaves((gradients, state.gradient_sum)))
  status = _state.sparse_only(state.status, state.status)
  weights = _state.sparse_only(state.status, params)
  scores = _growth_scores(topology, state, gradients)
  count = optax.safe_increment(state.count)
  words = _topology.random_words(state.key, count, len(status))

  def change(
    block: _blocks.Block, old: jax.Array, weights: jax.Array, *scores: jax.Array
  ) -> jax.Array:
    mask = _state.has_bits(old, _state.ACTIVE)
    active, _ = block.count([mask, ~mask])
    new_mask = _topology.update_masks(
      block,
      mask,
      weights,
      scores[0] if scores else None,
      topology.drop_counts(state.count, active - block.padding),
      block.take(words),
    )
    return jnp.where(finite, _new_status(old, new_mask), old)

  # Padding is active, so it never grows, and NaN, so it is dropped last.
  columns: list[_blocks.Column] = [(status, _state.ACTIVE), (weights, jnp.nan)]
  if scores is not None:
    columns.append((scores, 0.0))
  shapes = [s.shape for s in status]
  new_status = _blocks.block_by_block(shapes, change, *columns)
  return state._replace(
    updated_at=jnp.where(finite, count, state.updated_at),
    skipped=state.skipped + (~finite).astype(jnp.int32),
    status=_state.put_sparse(state.status, state.status, new_status),
  )


def _update_neurons(state: SparseOptState) -> SparseOptState:
  """Fan-ins and factors of new masks."""
  rows = [
    _neurons(
      _state.has_bits(status, _state.ACTIVE),
      tuple(axis for axis, size in enumerate(fan_in.shape) if size == 1),
    )
    for status, fan_in in zip(
      _state.sparse_only(state.status, state.status),
      _state.sparse_only(state.status, state.fan_in),
      strict=True,
    )
  ]
  fan_in, scale = zip(*rows, strict=True)
  return state._replace(
    fan_in=_state.put_sparse(state.fan_in, state.status, fan_in),
    correction=_state.put_sparse(state.correction, state.status, scale),
  )


def _accumulate(
  topology: _topology.RigL, state: SparseOptState, gradients: Any
) -> SparseOptState:
  """Adds the gradient to the sum that the next mask update grows from.

  The mean has the same order, but for what its rounding would add.
  """
  opens = topology.opens_window(state.count)
  old = _state.sparse_only(state.status, state.gradient_sum)
  if any(map(_leaves.is_masked_node, old)):
    raise ValueError(
      "state must have been made with accumulate > 1, as the topology has "
      f"accumulate={topology.accumulate}; got one without sums of gradients."
    )
  new = [
    jnp.where(opens, 0, total) + jnp.asarray(gradient, total.dtype)
    for total, gradient in zip(
      old, _state.sparse_only(state.status, gradients), strict=True
    )
  ]
  sums = _state.put_sparse(state.gradient_sum, state.status, new)
  return state._replace(gradient_sum=sums)


def _advance(
  topology: _topology.Topology,
  state: SparseOptState,
  gradients: Any,
  params: Any,
  update_masks: bool | None,
) -> SparseOptState:
  """The state after a call: counted, and with new masks where they are due."""
  count = state.count
  # A count that is set back must not meet that of an earlier mask update.
  state = state._replace(updated_at=jnp.full_like(state.updated_at, -1))
  if isinstance(topology, _topology.RigL) and topology.accumulate > 1:
    in_window = topology.in_window(count)
    state = _state.once(
      in_window, lambda s: _accumulate(topology, s, gradients), state
    )
  if not isinstance(topology, _topology.Static):
    due = topology.is_due(count) if update_masks is None else update_masks
    change = functools.partial(_update_masks, topology)

    def update(state: SparseOptState) -> SparseOptState:
      return _update_neurons(
        _leaves.lay_out_freely(change, state, gradients, params)
      )

    # One loop, not two: before each, an accelerator's queue runs empty.
    state = _state.once(due, update, state)
  return state._replace(count=optax.safe_increment(count))


def _correct(gradients: Any, state: SparseOptState, scale: Any) -> Any:
  """Zero outside the masks; rescaled where the layer is corrected."""
  bits = _state.settled_bits(_state.just_updated(state))

  def one(status: Any, gradient: Any, scale: Any) -> Any:
    if _leaves.is_masked_node(status):
      return gradient
    scaled = _scaled(gradient, scale)
    return jnp.where(_state.is_settled(status, bits), scaled, 0)

  return jax.tree.map(
    one, state.status, gradients, scale, is_leaf=_leaves.is_masked_node
  )


def sparseopt(
  sparsity: float,
  topology: _topology.Topology = _topology.Static(),  # noqa: B008
  *,
  distribution: str | _distributions.Distribution = "erk",
  sparse: _leaves.Rule = None,
  corrected: _leaves.Rule = None,
  masks: Any = None,
  output_axis: _leaves.AxisRule = -1,
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
  one layer. The number of active weights of a layer is fixed at ``init`` and
  never changes.

  It belongs first in a chain. A link cannot cancel what later links add, such
  as momentum, so either wrap the whole chain in
  :func:`sparseopt_jax.keep_params_sparse`, or call
  :func:`sparseopt_jax.apply_masks` after each ``optax.apply_updates``.

  On a call that updates the masks, weights that stay make their ordinary step,
  with the factors of the masks under which the gradient was taken. Weights are
  dropped by their magnitude as passed to ``update``. A mask update is skipped
  and counted if any gradient is not finite.

  Whether a call updates the masks is decided on the device, from the number of
  calls. A loop that counts them itself can say so by the extra argument
  ``update_masks`` of ``update``, a Python bool, and the branch is left out:
  ``update_masks=topology.is_due(step)``, a static argument of a jitted step.
  That ``step`` has to be the state's own count, by which the drop fraction and
  ``accumulate`` go.

  Factors may exceed 1, so that large float16 gradients can overflow; bfloat16
  and float32 have the range.

  Args:
    sparsity: Fraction of zeros over all sparse leaves, in [0, 1).
    topology: :class:`sparseopt_jax.Static`, :class:`sparseopt_jax.SET` or
      :class:`sparseopt_jax.RigL`.
    distribution: ``'erk'``, ``'uniform'``, or a function of ``{path: shape}``
      and the sparsity that returns ``{path: density}``.
    sparse: Which leaves get a mask: a pytree of bools (or a prefix of one, as
      for ``optax.masked``) or a predicate of a path such as ``'Conv_0/kernel'``
      and the leaf. By default leaves of two or more axes not named bias, scale
      or embedding.
    corrected: Which of the sparse leaves get the correction, in the same forms,
      or ``False`` for none of them: plain RigL, SET or static training. By
      default all. It is meant for layers whose output goes straight into batch
      normalisation; leave out the classifier.
    masks: Start from these instead of random ones: a bool array for each sparse
      leaf and ``optax.MaskedNode()`` for the others, as returned by
      :func:`sparseopt_jax.get_masks`. Their active weights are what is kept;
      ``sparsity`` and ``distribution`` are then not used.
    output_axis: The neuron axis of the weights, a tuple of them, or a function
      of path and leaf that returns either. -1 for Flax, 0 for Equinox. A leaf
      is one layer; layers stacked in a leaf, as by ``nn.scan``, are not told
      apart.
    seed: An int or a key, traced or not.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`sparseopt_jax.SparseOptState`. Its ``update`` needs ``params``.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range, no leaf can be sparse, or
      ``corrected`` is given, is not ``False``, and chooses no sparse leaf.

  Examples:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> params = {'kernel': jnp.ones((8, 4)), 'bias': jnp.zeros(4)}
    >>> tx = optax.chain(sparseopt_jax.sparseopt(0.75), optax.sgd(0.1))
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

  .. seealso:: :func:`sparseopt_jax.keep_params_sparse`,
    :func:`sparseopt_jax.sparseopt_sgd`
  """
  _distributions.check_sparsity(sparsity)
  _distributions.resolve(distribution)
  _topology.check(topology)
  _check_seed(seed)
  if not callable(output_axis):
    _correction.check_axes(output_axis)

  def initial_masks(params: Any, leaves: Sequence[_leaves.Leaf]) -> list:
    """A bool array for each sparse leaf, MaskedNode for the others."""
    given = None
    if masks is not None:
      given = _leaves.given_masks(masks, params, leaves)
    chosen = _leaves.choose_sparse(sparse, given, params, leaves)
    if given is not None:
      return given
    shapes = {
      leaf.path: leaf.shape
      for leaf, choice in zip(leaves, chosen, strict=True)
      if choice
    }
    counts = _distributions.active_counts(shapes, sparsity, distribution)
    layers = iter(
      _random_masks(
        _key_data(seed),
        np.array(list(counts.values()), np.int32),
        tuple(shapes.values()),
      )
    )
    return [next(layers) if choice else optax.MaskedNode() for choice in chosen]

  def init_leaf(mask: Any, is_corrected: bool, path: str, leaf: Any) -> tuple:
    """Status, fan-in, scale and sum of gradients of one leaf."""
    none = optax.MaskedNode()
    if _leaves.is_masked_node(mask):
      return none, none, none, none
    axis = output_axis(path, leaf) if callable(output_axis) else output_axis
    mask = _place(mask, leaf)
    axes = _correction.input_axes(mask.ndim, axis, path)
    status, fan_in, scale = _initial_state(mask, axes)
    scale = scale if is_corrected else none
    total = none
    if isinstance(topology, _topology.RigL) and topology.accumulate > 1:
      dtype = _correction.wide_dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))
      total = jnp.zeros_like(leaf, dtype=dtype)
    return status, fan_in, scale, total

  def init_fn(params: optax.Params) -> SparseOptState:
    treedef: Any = jax.tree.structure(params)
    values = jax.tree.leaves(params)
    leaves = _leaves.describe(params)
    columns: list = [(), (), (), ()]
    # optax.tree.map_params calls init with a tree that has no leaves.
    if leaves:
      first = initial_masks(params, leaves)
      is_sparse = [not _leaves.is_masked_node(mask) for mask in first]
      chosen = _leaves.choose_corrected(corrected, is_sparse, params, leaves)
      rows = [
        init_leaf(mask, choice, leaf.path, value)
        for mask, choice, leaf, value in zip(
          first, chosen, leaves, values, strict=True
        )
      ]
      columns = list(zip(*rows, strict=True))
    trees = [treedef.unflatten(column) for column in columns]
    return SparseOptState(
      jnp.zeros([], jnp.int32),
      jnp.full([], -1, jnp.int32),
      jnp.zeros([], jnp.int32),
      _key_data(seed),
      *trees,
    )

  def update_fn(
    updates: optax.Updates,
    state: SparseOptState,
    params: optax.Params | None = None,
    *,
    update_masks: bool | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SparseOptState]:
    del extra_args
    if update_masks is not None and not isinstance(update_masks, bool):
      raise TypeError(
        "update_masks must be a bool that is known while tracing, or None; got "
        f"{update_masks!r}."
      )
    if params is None:
      raise ValueError(
        "params must be passed to update, since masks depend on them; got None."
      )
    if not isinstance(state, SparseOptState):
      raise TypeError(
        "state must be the SparseOptState that init gave; got a "
        f"{type(state).__name__}."
      )
    new_state = state
    if not isinstance(state, SettledState):
      new_state = _advance(topology, state, updates, params, update_masks)
    return _correct(updates, new_state, state.correction), new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
