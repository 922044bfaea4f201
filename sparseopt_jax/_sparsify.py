"""The wrapper: one link and one optimiser, and exact zeros at every step."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax import _paths
from sparseopt_jax import _state
from sparseopt_jax import _transform
from sparseopt_jax._numbers import check, check_type
from sparseopt_jax._state import SparseOptState
from sparseopt_jax._topology import Static, Topology


class SparsifyState(NamedTuple):
  """State of :func:`sparseopt_jax.sparsify`.

  Examples:

    A restart of the optimiser that keeps the masks.
    ``optax.tree.map_params(tx, jnp.zeros_like, opt_state)`` would empty them.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> inner = optax.adam(1e-3)
    >>> tx = sparseopt_jax.sparsify(inner, 0.75, corrected=False)
    >>> params = {'kernel': jnp.ones((8, 4))}
    >>> opt_state = tx.init(params)
    >>> params = sparseopt_jax.apply_masks(params, opt_state)
    >>> opt_state = opt_state._replace(inner=inner.init(params))
  """

  link: SparseOptState  # masks and factors
  inner: optax.OptState  # of the optimiser


def _mark_slots(inner: Any, state: Any, masks: Any) -> Any:
  """The state with a leaf's mask in each of its slots, and False elsewhere.

  A slot holds one entry for each weight. ``optax.tree.map_params`` finds what
  is laid out as the parameters are in nearly any state.
  """
  # A MaskedNode has no shape.
  is_alike = lambda x, mask: getattr(x, "shape", 0) == getattr(mask, "shape", 1)
  mark = lambda slot, mask: mask if is_alike(slot, mask) else False
  options = {"transform_non_params": lambda _: False}
  options["is_leaf"] = _paths.is_masked_node
  return optax.tree.map_params(inner, mark, state, masks, **options)


def _restart_slots(inner: Any, state: Any, stays: Any, params: Any) -> Any:
  """The state with slots as at first wherever a weight does not stay.

  Such weights are 0, and so is what ``inner.init`` sees here.
  """
  marks = _mark_slots(inner, state, stays)
  fresh = inner.init(jax.tree.map(jnp.zeros_like, params))
  restart = lambda mark, slot, fresh: (
    slot if mark is False else jnp.where(mark, slot, fresh)
  )
  return jax.tree.map(restart, marks, state, fresh)


def sparsify(
  inner: optax.GradientTransformation,
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
  r"""Sparse training with any optimiser: exact zeros, fresh slots.

  In each call, :func:`sparseopt_jax.sparseopt` makes the masked, corrected
  gradient :math:`\tilde g` and, where due, new masks :math:`m`; ``inner`` makes
  its update from it; and outside the masks the update is :math:`-w`:

  .. math::

    u = \mathrm{inner}(\tilde g, m \odot w), \qquad
    w \leftarrow w + \begin{cases} u & \text{where } m \\
      -w & \text{elsewhere} \end{cases}

  A link in front of a chain can mask gradients, but it cannot cancel the
  momentum or the decay that later links add, nor start their state fresh. The
  owner of the whole chain can: :math:`w + (-w)` is exactly 0 in floating point.

  On a call that updates the masks, weights that stay make their ordinary step.
  A weight that was dropped or grown is at 0 afterwards. Its per-weight state in
  ``inner`` (momentum, second moment, ...) starts that call as ``inner.init``
  makes it for a weight at 0 and sees a zero gradient, so that with SGD, Adam
  and all others whose fresh state stays put under a zero gradient, it is fresh
  on return. So does the state of all other weights outside the masks, which no
  step depends on. A weight that was dropped and grown again in the same update
  has not changed.

  Adam corrects for a second moment of 0 only at the beginning of training, so
  the first step of a grown weight is large: with noise gradients 11 times the
  mean step of old weights after 500 steps, in the end 17 times. In small
  networks that helped at learning rates below the best one. Under RigL it cost
  up to half a point at the best one and more above it. A loss that jumps after
  each mask update says that the rate is too large.

  What should see the dense gradient stands in a chain in front:
  ``optax.chain(optax.clip(1.0), sparsify(...))``. What scales updates or mixes
  parameters, such as ``reduce_on_plateau`` or ``schedule_free``, belongs into
  ``inner``.

  Args:
    inner: Any transformation with a state that ``optax.tree.map_params`` can
      map. Of Optax's own, ``sm3``, ``monitor``, ``flatten``, ``lookahead`` and
      the line searches (``lbfgs`` has one by default) have not; most of them
      work behind the bare link. Slots in the shape of a leaf are taken for
      per-weight state, so a state of square matrices, as in Shampoo, needs the
      bare link too.
    sparsity: Fraction of zeros over all sparse leaves, in [0, 1); with a dict
      for ``distribution``, over those that it does not name.
    topology: How masks change: :class:`sparseopt_jax.Static`,
      :class:`sparseopt_jax.SET`, :class:`sparseopt_jax.RigL`,
      :class:`sparseopt_jax.SRigL`, :class:`sparseopt_jax.Magnitude`, or a
      :class:`sparseopt_jax.Topology` of one's own.
    corrected: Which of the sparse leaves get the correction: ``True`` for all,
      ``False`` for none (plain RigL, SET or static training), a pytree of bools
      or a prefix of one, or a function ``(path, leaf) -> bool`` of paths such
      as ``'Conv_0/kernel'`` (linen), ``'layers/0/conv/kernel'`` (NNX) or
      ``'linear/w'`` (Haiku). It is meant for layers whose output goes straight
      into batch normalisation, which
      :func:`sparseopt_jax.inspection.batch_normalized` finds for linen and NNX.
    distribution: ``'erk'``, ``'uniform'``, or a function of ``{path: shape}``
      and the sparsity that returns ``{path: density}``. Or a dict of densities
      in (0, 1] by shell pattern, such as ``{'Conv_0/*': 1.0}``, of which the
      first that matches a path counts. The other layers get ERK at ``sparsity``
      among themselves: neither layers named here nor leaves that ``sparse``
      leaves dense count.
    sparse: Which leaves get a mask, in the forms of ``corrected``. By default
      kernels: leaves of floats with two axes longer than 1, and no name of a
      bias, a scale, an offset, an embedding, or a table of positions or tokens.
    masks: Start from these instead of random ones: arrays of bools, or of 0 and
      1 in uint8, matched by path, such as :func:`sparseopt_jax.get_masks`
      returns. Static masks, SET and RigL keep as many active weights as these
      have, whatever ``sparsity`` says; mask updates of SRigL and Magnitude go
      by ``sparsity``. A leaf with ``optax.MaskedNode()`` stays dense; for
      leaves left out, ``sparse`` decides, and masks are drawn.
    output_axis: The neuron axis of a layer's weights, a tuple of them, or a
      function of path and leaf that returns either. By default that of Flax and
      Haiku: the last, but (-2, -1) of a leaf of three axes, beside stacked
      ones, whose path ends as in Flax's attention, 'query/kernel', 'key/kernel'
      or 'value/kernel'. 0 for Equinox.
    stacked: How many leading axes of a leaf enumerate layers, as ``nn.scan``
      makes them: a function of path and leaf, such as ``lambda path, leaf:
      int(path.startswith('ScanBlock_0'))``, a pytree or prefix of ints, or an
      int for all leaves; at 1, a matrix that is not stacked is no kernel and
      stays dense. Each slice is a layer of its own: its own share of the active
      weights, its own neurons, its own selection.
    seed: An int or a key, traced or not: under ``jax.vmap`` one for each
      network. ``init`` alone reads it.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`sparseopt_jax.SparsifyState`. Its ``init`` calls ``inner.init`` on
    the masked parameters. Its ``update`` needs ``params``, takes
    ``update_masks`` as the link does, and passes other arguments to ``inner``.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range, or the slots of ``inner``
      cannot be found; in ``update``, if ``params`` are missing.

  Examples:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparsify(
    ...   optax.chain(
    ...     optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)
    ...   ),
    ...   0.75,
    ...   sparseopt_jax.RigL(update_until=30_000),
    ...   corrected=True,
    ... )
    >>> params = {'kernel': jnp.ones((8, 4)), 'bias': jnp.zeros(4)}
    >>> opt_state = tx.init(params)
    >>> params = sparseopt_jax.apply_masks(params, opt_state)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(jnp.count_nonzero(params['kernel']))
    8

    Networks of several seeds in one program, as in reinforcement learning, each
    with its own masks:

    >>> def init(key):
    ...   tx = sparseopt_jax.sparsify(
    ...     optax.adam(1e-3), 0.75, corrected=False, seed=key
    ...   )
    ...   return tx.init(params)
    >>> opt_states = jax.vmap(init)(jax.random.split(jax.random.key(0), 5))
    >>> print(sparseopt_jax.get_masks(opt_states)['kernel'].shape)
    (5, 8, 4)

    ``update`` of any of these transformations will do, also mapped: the seed is
    read by ``init`` alone.

  References:
    Adnan et al., `SparseOpt: Addressing Normalization-induced Gradient Skew in
    Sparse Training <https://arxiv.org/abs/2605.27541>`_, 2026

  .. seealso:: :func:`sparseopt_jax.sparseopt`
  """
  is_one = hasattr(inner, "init") and hasattr(inner, "update")
  check_type(is_one, "inner must be a GradientTransformation", inner)
  inner = optax.with_extra_args_support(inner)
  options = {"corrected": corrected, "distribution": distribution, "seed": seed}
  options |= {"sparse": sparse, "masks": masks, "output_axis": output_axis}
  link = _transform.sparseopt(sparsity, topology, stacked=stacked, **options)

  def init_fn(params: optax.Params) -> SparsifyState:
    link_state = link.init(params)
    inner_state = inner.init(_state.zero_unless(link_state.masks, params))
    is_mappable = False
    with contextlib.suppress(
      AttributeError, LookupError, TypeError, ValueError
    ):
      mark = functools.partial(_mark_slots, inner)
      jax.eval_shape(mark, inner_state, link_state.masks)
      is_mappable = True
    rule = "inner must have a state that optax.tree.map_params can map"
    check(is_mappable, rule, type(inner_state))
    return SparsifyState(link_state, inner_state)

  def update_fn(
    updates: optax.Updates,
    state: SparsifyState,
    params: optax.Params | None = None,
    *,
    update_masks: bool | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SparsifyState]:
    is_state = isinstance(state, SparsifyState)
    check_type(is_state, "state must be a SparsifyState", type(state))
    updates, link_state = link.update(
      updates, state.link, params, update_masks=update_masks
    )
    # Where a weight makes a step: not where it was dropped or grown just now.
    steps, inner_state = _state.settled(link_state), state.inner
    # The same object where this call cannot update masks; then all slots stay.
    if link_state.masks is not state.link.masks:
      stays = jax.tree.map(lambda mask: mask | ~link_state.updated, steps)
      inner_state = _restart_slots(inner, inner_state, stays, params)
    updates, inner_state = inner.update(
      updates, inner_state, _state.zero_unless(steps, params), **extra_args
    )
    # Promotes: a bfloat16 update could not cancel a float32 parameter.
    cancel = lambda mask, update, param: jnp.where(mask, update, -param)
    updates = _state.map_sparse(cancel, steps, updates, params)
    return updates, SparsifyState(link_state, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
