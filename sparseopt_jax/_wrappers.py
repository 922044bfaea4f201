"""Masks out of an optimiser state, and parameters kept on them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax import _leaves
from sparseopt_jax import _state
from sparseopt_jax._state import SettledState
from sparseopt_jax._state import SparseOptState


def _is_state(node: Any) -> bool:
  return isinstance(node, SparseOptState)


def check_transformation(name: str, value: Any) -> None:
  """Raises TypeError unless ``value`` is a transformation."""
  if not (hasattr(value, "init") and hasattr(value, "update")):
    raise TypeError(f"{name} must be a GradientTransformation; got {value!r}.")


def find_state(
  opt_state: optax.OptState, holder: str = "opt_state"
) -> SparseOptState:
  """The one SparseOptState anywhere in an optimiser state.

  Args:
    opt_state: The state.
    holder: The argument to name if there is not one.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=_is_state)
  found = [node for node in nodes if _is_state(node)]
  if len(found) != 1:
    raise ValueError(
      f"{holder} must hold exactly one SparseOptState; got "
      f"{len(found)} in a {type(opt_state).__name__}."
    )
  return found[0]


def _replace_state(
  opt_state: optax.OptState, state: SparseOptState
) -> optax.OptState:
  return jax.tree.map(
    lambda node: state if _is_state(node) else node,
    opt_state,
    is_leaf=_is_state,
  )


def get_masks(opt_state: optax.OptState) -> optax.Params:
  """Returns the masks in an optimiser state.

  Args:
    opt_state: A state that holds one :class:`sparseopt_jax.SparseOptState`, at
      any depth; or that state itself.

  Returns:
    The parameters' structure with a bool array in the shape of each sparse
    leaf, true where a weight is active, and ``optax.MaskedNode()`` for the
    others. ``sparseopt(..., masks=...)`` starts from it.

  Raises:
    ValueError: If the state holds no SparseOptState or several.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.75)
    >>> opt_state = tx.init({'kernel': jnp.ones((2, 4)), 'bias': jnp.zeros(4)})
    >>> masks = sparseopt_jax.get_masks(opt_state)
    >>> print(masks['kernel'].sum(), masks['bias'])
    2 MaskedNode()
  """
  return jax.tree.map(
    lambda status: _state.has_bits(status, _state.ACTIVE),
    find_state(opt_state).status,
  )


def apply_masks(
  params: optax.Params, opt_state: optax.OptState
) -> optax.Params:
  """Returns the parameters with zeros outside the masks.

  Call it once after ``init``, so that the first forward pass is sparse. Without
  :func:`sparseopt_jax.keep_params_sparse` call it after each
  ``optax.apply_updates`` as well; right after a mask update it also puts the
  grown weights to 0, which leftover momentum may have moved.

  Args:
    params: Parameters in the structure of those that the state was made for.
    opt_state: A state that holds one :class:`sparseopt_jax.SparseOptState`.

  Returns:
    The parameters, exactly 0 where a mask is false, by selection: what stood
    there before, NaN included, does not matter.

  Raises:
    ValueError: If the state holds no SparseOptState or several, or one of other
      shapes; for a state of several devices or instances, use ``jax.vmap``.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> params = {'kernel': jnp.ones((2, 4)), 'bias': jnp.ones(4)}
    >>> opt_state = sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.75).init(params)
    >>> params = sparseopt_jax.apply_masks(params, opt_state)
    >>> print(params['kernel'].sum(), params['bias'].sum())
    2.0 4.0
  """
  state = find_state(opt_state)
  _check_shapes(state.status, params)
  return _select_settled(state.status, _state.just_updated(state), params)


def _check_shapes(status: Any, params: Any) -> None:
  def check(path: tuple, status: Any, param: Any) -> None:
    masked = _leaves.is_masked_node(status)
    if not masked and jnp.shape(param) != status.shape:
      raise ValueError(
        "params must have the shapes of the masks; got "
        f"{jnp.shape(param)} at {_leaves.path_name(path)!r} where the mask has "
        f"{status.shape}."
      )

  jax.tree_util.tree_map_with_path(
    check, status, params, is_leaf=_leaves.is_masked_node
  )


def _select_settled(status: Any, fresh: jax.Array, params: Any) -> Any:
  """Zero outside the masks, and where the mask changed if ``fresh``."""
  bits = _state.settled_bits(fresh)

  def one(status: Any, param: Any) -> Any:
    if _leaves.is_masked_node(status):
      return param
    return jnp.where(_state.is_settled(status, bits), param, 0)

  return jax.tree.map(one, status, params, is_leaf=_leaves.is_masked_node)


def _cancel_outside(
  status: Any, fresh: jax.Array, updates: Any, params: Any
) -> Any:
  """Updates that put every weight outside the masks at exactly 0."""
  bits = _state.settled_bits(fresh)

  def one(status: Any, update: Any, param: Any) -> Any:
    if _leaves.is_masked_node(status):
      return update
    # Promotes: a bfloat16 update could not cancel a float32 parameter.
    return jnp.where(_state.is_settled(status, bits), update, -param)

  return jax.tree.map(
    one, status, updates, params, is_leaf=_leaves.is_masked_node
  )


def _zero_where(changed: Any, tree: Any) -> Any:
  def one(changed: Any, leaf: Any) -> Any:
    if _leaves.is_masked_node(changed):
      return leaf
    return jnp.where(changed, 0, leaf)

  return jax.tree.map(one, changed, tree, is_leaf=_leaves.is_masked_node)


def _changed(status: Any, fresh: jax.Array, params: Any) -> Any:
  """Where the masks changed, all false unless ``fresh``.

  In the structure of the parameters; in the status, a MaskedNode may stand for
  a whole subtree that ``optax.masked`` or ``optax.partition`` left out.
  """

  def one(status: Any, param: Any) -> Any:
    if _leaves.is_masked_node(status):
      return jax.tree.map(lambda _: status, param)
    return _state.has_bits(status, _state.CHANGED) & fresh

  return jax.tree.map(one, status, params, is_leaf=_leaves.is_masked_node)


def _mark_slots(
  inner: optax.GradientTransformation, state: optax.OptState, changed: Any
) -> Any:
  """The state with ``changed`` in its slots of one entry a weight, else False.

  The slots are found by ``optax.tree.map_params``, which knows the copies of
  the parameters in nearly any state.
  """

  def mark(slot: Any, changed: Any) -> Any:
    if _leaves.is_masked_node(slot):
      return slot
    is_weight = not _leaves.is_masked_node(changed)
    return changed if is_weight and slot.shape == changed.shape else False

  return optax.tree.map_params(
    inner,
    mark,
    state,
    changed,
    transform_non_params=lambda _: False,
    is_leaf=_leaves.is_masked_node,
  )


def _check_slots(
  inner: optax.GradientTransformation,
  state: optax.OptState,
  params: optax.Params,
) -> None:
  """Raises unless the slots of the state can be found."""
  try:
    nothing = jax.tree.map(lambda _: optax.MaskedNode(), params)
    _mark_slots(inner, state, nothing)
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise ValueError(
      "inner must have a state that optax.tree.map_params can map, to start "
      "slots of weights anew (use the bare chain and apply_masks instead); got "
      f"{inner!r}, for which it raises: {error}"
    ) from error


def _restart_slots(
  inner: optax.GradientTransformation,
  state: optax.OptState,
  changed: Any,
  params: optax.Params,
) -> optax.OptState:
  """Starts the per-weight state anew where a mask changed.

  The weights in question are 0, and so is what ``inner.init`` sees here.
  """
  marks = _mark_slots(inner, state, changed)
  fresh = inner.init(jax.tree.map(jnp.zeros_like, params))

  def restart(mark: Any, slot: Any, fresh: Any) -> Any:
    if mark is False:
      return slot
    return jnp.where(mark, fresh, slot)

  return jax.tree.map(restart, marks, state, fresh)


def keep_params_sparse(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the parameters exactly zero outside the masks, at every step.

  A link in front of a chain can mask gradients, but it cannot cancel the
  momentum or the decay that later links add, nor start their state anew. The
  owner of the whole chain can: outside the masks it emits :math:`-w`, and
  :math:`w + (-w)` is exactly 0 in floating point.

  On a call that updates the masks, a weight that was dropped or grown is at 0
  afterwards. Its per-weight state in ``inner`` (momentum, second moment, ...)
  starts that call as ``inner.init`` makes it for a weight at 0 and sees a zero
  gradient, so that with SGD, Adam and all others whose fresh state stays put
  under a zero gradient, it is fresh on return. A weight that was dropped and
  grown again in the same update has not changed.

  The wrapper has no state of its own: its state is that of ``inner``. In a call
  it asks ``inner`` twice, first for the masks, then for the step under them; of
  the first all but the masks is dead code, which ``jax.jit`` removes. Outside
  of ``jax.jit`` a call is slow, and effects in ``inner``, such as those of
  ``jax.debug.print``, happen twice in any case. ``optax.MultiSteps`` within
  ``inner`` passes no extra arguments on, so ``update_masks`` has to be told to
  one outside.

  Args:
    inner: Any transformation with one :func:`sparseopt_jax.sparseopt` in it
      and a state that ``optax.tree.map_params`` can map, in each step anew. Of
      Optax's own, ``sm3``, ``monitor``, ``flatten``, ``lookahead`` and the line
      searches (``lbfgs`` has one by default) have not; most work in the bare
      chain. Slots in the shape of a leaf are taken for per-weight state, so a
      state of square matrices, as in Shampoo, needs the bare chain too.

  Returns:
    A ``GradientTransformationExtraArgs``. Its ``init`` calls ``inner.init`` on
    the masked parameters. Its ``update`` needs ``params`` and passes extra
    arguments on.

  Raises:
    TypeError: If ``inner`` is not a transformation.
    ValueError: If ``inner`` holds no sparseopt or several, or its slots cannot
      be found; in ``update``, if ``params`` are missing.

  Examples:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.keep_params_sparse(
    ...   optax.chain(
    ...     sparseopt_jax.sparseopt(0.75),
    ...     optax.add_decayed_weights(5e-4),
    ...     optax.sgd(0.1, momentum=0.9),
    ...   )
    ... )
    >>> params = {'kernel': jnp.ones((8, 4)), 'bias': jnp.zeros(4)}
    >>> opt_state = tx.init(params)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(jnp.count_nonzero(params['kernel']))
    8

  .. seealso:: :func:`sparseopt_jax.sparseopt_sgd`
  """
  check_transformation("inner", inner)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> optax.OptState:
    state = find_state(inner.init(params), "inner")
    # The masks do not depend on values; the first are kept, the second unused.
    opt_state = inner.init(apply_masks(params, state))
    _check_slots(inner, opt_state, params)
    return _replace_state(opt_state, state)

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    if params is None:
      raise ValueError(
        "params must be passed to update, since zeros depend on them; got None."
      )
    old = find_state(state)
    if isinstance(old, SettledState):
      # A wrapper around this one is at work.
      return inner.update(updates, state, params, **extra_args)
    new = find_state(inner.update(updates, state, params, **extra_args)[1])
    # Not so where the call did not get as far as the link, as in MultiSteps.
    fresh = _state.just_updated(new) & (new.count != old.count)
    changed = _changed(new.status, fresh, params)
    # The gradient was taken under the old masks, so it gets their factors.
    settled = SettledState(*new._replace(correction=old.correction))
    state = _restart_slots(inner, state, changed, params)
    updates, state = inner.update(
      _zero_where(changed, updates),
      _replace_state(state, settled),
      _select_settled(new.status, fresh, params),
      **extra_args,
    )
    updates = _cancel_outside(new.status, fresh, updates, params)
    return updates, _replace_state(state, new)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
