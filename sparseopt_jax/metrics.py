"""What the masks look like; from masks and factors, never from zero values."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _lax
from sparseopt_jax import _numbers
from sparseopt_jax import _paths
from sparseopt_jax import _selection
from sparseopt_jax import _state


def _with_explored(opt_state: optax.OptState) -> list[_state.SparseOptState]:
  """The states; where masks are static, they are all that was explored."""
  fill = lambda s: s._replace(explored=_state.explored_at_first(s.masks))
  states = _state.find_states(opt_state)
  return [s if jax.tree.leaves(s.explored) else fill(s) for s in states]


def _total(masks: Any) -> jax.Array:
  """How many are true; a float32, since over all layers an int32 may overflow.

  Leaf by leaf it is exact.
  """
  per_layer = [jnp.sum(x, dtype=jnp.int32) for x in jax.tree.leaves(masks)]
  return jnp.sum(jnp.stack(per_layer).astype(jnp.float32))


def _skew_angle(factor: jax.Array) -> jax.Array:
  """The angle between g and D g, if all |g_i| of live neurons are equal.

  So they are behind batch norm: f_i squares, each amplified by N / f_i. The
  factors d_i are in proportion to sqrt(f_i), and over the n live neurons
  cos = sum_i d_i / sqrt(n sum_i d_i^2) is the same as tan = std / mean of d_i,
  which loses no digits at small angles.
  """
  live = jnp.maximum(jnp.sum(factor > 0), 1).astype(jnp.float32)
  mean = jnp.sum(factor) / live
  variance = jnp.sum(jnp.where(factor > 0, (factor - mean) ** 2, 0.0)) / live
  return jnp.degrees(jnp.arctan2(jnp.sqrt(variance), mean))


def sparsity_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
  r"""Summarises the masks in an optimiser state; works under ``jax.jit``.

  Args:
    opt_state: A state that holds a :class:`sparseopt_jax.SparseOptState`, or
      several over different leaves.

  Returns:
    Scalars by name.

    - ``sparsity``: fraction of zeros over all sparse leaves, from the masks.
    - ``itop_rate``: fraction of the sparse leaves' weights that have been
      active at any time.
    - ``mask_change``: fraction of the active weights that the last mask update
      grew.
    - ``dead_neurons``: number of neurons without an active weight.
    - ``skew_angle``: mean over the corrected leaves, in degrees, of the angle
      whose cosine is :math:`\sum_i \sqrt{f_i} / \sqrt{n \sum_i f_i}` over the
      :math:`n` live neurons; 0 for equal fan-ins.
    - ``skipped_updates``: mask updates given up because a gradient was not
      finite.

  Raises:
    ValueError: If the state holds no SparseOptState.

  Examples:

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.75, corrected=True)
    >>> opt_state = tx.init({'kernel': jnp.ones((8, 4))})
    >>> print(sparseopt_jax.sparsity_metrics(opt_state)['sparsity'])
    0.75
  """
  states = _with_explored(opt_state)
  masks, explored = [x.masks for x in states], [x.explored for x in states]
  size = float(sum(mask.size for mask in jax.tree.leaves(masks)))
  active = _total(masks)
  grown = _total(jax.tree.map(lambda x: x == 2, explored))
  factors = jax.tree.leaves([x.factors for x in states])
  dead = [jnp.sum(f == 0) for f in factors]
  angles = [_skew_angle(f) for f in factors if f.dtype != jnp.bool_]
  skipped = jax.tree.leaves([x.skipped for x in states])
  return {
    "sparsity": (size - active) / size,
    "itop_rate": _total(jax.tree.map(lambda x: x > 0, explored)) / size,
    "mask_change": grown / jnp.maximum(active, 1.0),
    "dead_neurons": jnp.sum(jnp.stack(dead), dtype=jnp.int32),
    "skew_angle": jnp.mean(jnp.stack(angles)) if angles else jnp.zeros([]),
    "skipped_updates": jnp.max(jnp.stack(skipped)),
  }


def sparsity_table(opt_state: optax.OptState) -> str:
  """Describes each sparse layer in a line of text.

  Args:
    opt_state: A state that holds a :class:`sparseopt_jax.SparseOptState`, or
      several over different leaves, with values that are known (not under
      ``jax.jit``).

  Returns:
    A table. A layer's line has its path, shape, active weights, sparsity, ITOP
    rate, dead neurons and whether it is corrected; the last line has totals.

  Raises:
    ValueError: If the state holds no SparseOptState.

  Examples:

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.75, corrected=True)
    >>> opt_state = tx.init({'kernel': jnp.ones((8, 4))})
    >>> print(sparseopt_jax.sparsity_table(opt_state))
    layer   shape  active  sparsity  itop rate  dead neurons  corrected
    kernel  8x4         8    0.7500     0.2500             0  yes
    total               8    0.7500     0.2500             0
  """
  header = "layer,shape,active,sparsity,itop rate,dead neurons,corrected"
  rows, totals = [header.split(",")], np.zeros(4, int)
  for state in _with_explored(opt_state):
    masks, explored = map(jax.tree.leaves, (state.masks, state.explored))
    columns = (_paths.names(state.masks), masks, explored, state.factors)
    for path, mask, ever, factor in zip(*columns, strict=True):
      # In NumPy: to compile a reduction for each layer would take seconds.
      arrays = on_host(mask), on_host(ever), on_host(factor) == 0
      counts = [mask.size, *map(np.count_nonzero, arrays)]
      totals += counts
      corrected = "no" if factor.dtype == jnp.bool_ else "yes"
      shape = "x".join(map(str, mask.shape))
      rows.append([path, shape, *_cells(*counts), corrected])
  rows.append(["total", "", *_cells(*totals), ""])
  return aligned(rows, left=(0, 1, 6))


def _cells(size: int, active: int, explored: int, dead: int) -> list[str]:
  rates = [f"{1 - active / size:.4f}", f"{explored / size:.4f}"]
  return [f"{active:,}", *rates, f"{dead:,}"]


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
  """Rows of cells as lines of columns.

  Args:
    rows: All of the same length.
    left: The columns that are aligned to the left.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  cells = [f"{{:{'<' if i in left else '>'}{w}}}" for i, w in enumerate(widths)]
  return "\n".join("  ".join(cells).format(*row).rstrip() for row in rows)


def on_host(x: Any) -> np.ndarray:
  """The values, gathered if they are spread over processes."""
  is_spread = isinstance(x, jax.Array) and not x.is_fully_addressable
  if is_spread and not x.is_fully_replicated:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def masks_checksum(opt_state: optax.OptState) -> jax.Array:
  """A number that tells replicas with different masks apart.

  It does not depend on how the masks are laid out over devices.

  Args:
    opt_state: A state that holds a :class:`sparseopt_jax.SparseOptState`, or
      several over different leaves.

  Returns:
    A uint32 scalar. Equal masks give equal numbers, different masks different
    ones but for one case in about 2**32.

  Raises:
    ValueError: If the state holds no SparseOptState.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> params = {'kernel': jnp.ones((8, 4))}
    >>> def checksum(seed):
    ...   tx = sparseopt_jax.sparseopt(0.75, corrected=True, seed=seed)
    ...   return sparseopt_jax.masks_checksum(tx.init(params))
    >>> print(checksum(0) == checksum(0), checksum(0) == checksum(1))
    True False
  """
  masks = jax.tree.leaves(_state.get_masks(opt_state))
  total = jnp.zeros([], jnp.uint32)
  for i, mask in enumerate(masks):
    words = (jnp.uint32(i), jnp.uint32(len(masks)))
    weights = _selection.random_order(words, _lax.linear_index(mask.shape))
    total += jnp.sum(jnp.where(mask, weights, jnp.uint32(0)), dtype=jnp.uint32)
  return total


def assert_replicas_agree(opt_state: optax.OptState) -> None:
  """Raises unless all replicas of a state hold the same masks.

  Masks drift apart if the replicas' gradients are not averaged before
  ``update``. For the user's own loop, now and then and outside of
  ``jax.jit``: it compares :func:`sparseopt_jax.masks_checksum` over the entries
  of a state that ``jax.pmap`` or ``jax.vmap`` stacks on leading axes, over the
  devices that hold copies of an array, and over processes.

  Args:
    opt_state: A state that holds a :class:`sparseopt_jax.SparseOptState`, or
      several over different leaves.

  Raises:
    AssertionError: If masks differ.
    ValueError: If the state holds no SparseOptState.

  Examples:

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.75, corrected=True)
    >>> opt_state = tx.init({'kernel': jnp.ones((8, 4))})
    >>> sparseopt_jax.assert_replicas_agree(opt_state)
  """
  states = _state.find_states(opt_state, stacks=True)
  checksum = masks_checksum
  for _ in range(_state.num_stacked(states[0])):
    checksum = jax.vmap(checksum)
  # Each device computes from its own copy of what is replicated.
  copies = jax.jit(checksum)(states).addressable_shards
  seen = {int(x) for copy in copies for x in np.ravel(copy.data)}
  if jax.process_count() > 1:
    bounds = np.array([min(seen), max(seen)], np.uint32)
    seen = set(np.ravel(multihost_utils.process_allgather(bounds)).tolist())
  text = (
    "Replicas must hold the same masks. Average the gradients before update"
  )
  _numbers.check(len(seen) == 1, text, seen, AssertionError)
