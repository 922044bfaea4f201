"""What the masks look like, from masks and fan-ins, never from zero values."""

import math
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _blocks
from sparseopt_jax import _leaves
from sparseopt_jax import _selection
from sparseopt_jax import _state
from sparseopt_jax import _wrappers
from sparseopt_jax._state import SparseOptState


def _weights_with(state: SparseOptState, bits: int) -> jax.Array:
  """How many weights have all of ``bits`` set, layer by layer; int32."""
  return jnp.stack(
    [
      jnp.sum((status & bits) == bits, dtype=jnp.int32)
      for status in jax.tree.leaves(state.status)
    ]
  )


def _total(counts: Any) -> jax.Array:
  """A sum in float32: over all layers an int32 may overflow."""
  return jnp.sum(jnp.asarray(counts, jnp.float32))


def _skew_angle(fan_in: jax.Array) -> jax.Array:
  """The angle between g and D g, if all |g_i| of live neurons are equal.

  So they are behind batch norm: f_i squares, each amplified by N / f_i.

  cos = sum_i sqrt(f_i) / sqrt(n sum_i f_i) over the n live neurons is the same
  as tan = std / mean of sqrt(f_i), which loses no digits at small angles.
  """
  roots = jnp.sqrt(fan_in.astype(jnp.float32))
  live = jnp.maximum(jnp.sum(fan_in > 0), 1).astype(jnp.float32)
  mean = jnp.sum(roots) / live
  variance = jnp.sum(jnp.where(fan_in > 0, (roots - mean) ** 2, 0.0)) / live
  return jnp.degrees(jnp.arctan2(jnp.sqrt(variance), mean))


def sparsity_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
  r"""Summarises the masks in an optimiser state; works under ``jax.jit``.

  Args:
    opt_state: A state that holds one :class:`sparseopt_jax.SparseOptState`.

  Returns:
    Scalars:

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
    ValueError: If the state holds no SparseOptState or several.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.75)
    >>> opt_state = tx.init({'kernel': jnp.ones((8, 4))})
    >>> print(sparseopt_jax.sparsity_metrics(opt_state)['sparsity'])
    0.75
  """
  state = _wrappers.find_state(opt_state)
  size = _total([s.size for s in jax.tree.leaves(state.status)])
  active = _total(_weights_with(state, _state.ACTIVE))
  explored = _total(_weights_with(state, _state.EXPLORED))
  grown = _total(_weights_with(state, _state.ACTIVE | _state.CHANGED))
  fan_ins = jax.tree.leaves(state.fan_in)
  corrected = _state.sparse_only(state.correction, state.fan_in)
  angles = [_skew_angle(fan_in) for fan_in in corrected]
  return {
    "sparsity": (size - active) / size,
    "itop_rate": explored / size,
    "mask_change": grown / jnp.maximum(active, 1.0),
    "dead_neurons": jnp.sum(
      jnp.stack([jnp.sum(f == 0) for f in fan_ins]), dtype=jnp.int32
    ),
    "skew_angle": jnp.mean(jnp.stack(angles)) if angles else jnp.zeros([]),
    "skipped_updates": state.skipped,
  }


def sparsity_table(opt_state: optax.OptState) -> str:
  """Describes each sparse layer in a line of text.

  Args:
    opt_state: A state that holds one :class:`sparseopt_jax.SparseOptState`,
      with values that are known (not under ``jax.jit``).

  Returns:
    A table with one line a layer: path, shape, active weights, sparsity, ITOP
    rate, dead neurons, whether it is corrected; and a line of totals.

  Raises:
    ValueError: If the state holds no SparseOptState or several.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.75)
    >>> opt_state = tx.init({'kernel': jnp.ones((8, 4))})
    >>> print(sparseopt_jax.sparsity_table(opt_state))
    layer   shape  active  sparsity  itop rate  dead neurons  corrected
    kernel  8x4         8    0.7500     0.2500             0  yes
    total               8    0.7500     0.2500             0
  """
  state = _wrappers.find_state(opt_state)
  layers = jax.tree_util.tree_leaves_with_path(state.status)
  shapes = [status.shape for _, status in layers]
  size = np.array([math.prod(shape) for shape in shapes])
  # In NumPy: to compile a reduction for each layer would take seconds.
  values = [on_host(status) for _, status in layers]
  active = np.array([np.count_nonzero(x & _state.ACTIVE) for x in values])
  explored = np.array([np.count_nonzero(x & _state.EXPLORED) for x in values])
  fan_ins = map(on_host, jax.tree.leaves(state.fan_in))
  dead = np.array([np.count_nonzero(fan_in == 0) for fan_in in fan_ins])
  scales = _state.sparse_only(state.status, state.correction)

  def row(name: str, shape: str, index: Any, corrected: str) -> list[str]:
    a, e, n = active[index].sum(), explored[index].sum(), size[index].sum()
    numbers = [f"{a:,}", f"{1 - a / n:.4f}", f"{e / n:.4f}"]
    return [name, shape, *numbers, f"{dead[index].sum():,}", corrected]

  header = ["layer", "shape", "active", "sparsity", "itop rate"]
  rows = [[*header, "dead neurons", "corrected"]]
  for i, (path, _) in enumerate(layers):
    corrected = "no" if _leaves.is_masked_node(scales[i]) else "yes"
    name = _leaves.path_name(path)
    rows.append(row(name, "x".join(map(str, shapes[i])), [i], corrected))
  rows.append(row("total", "", slice(None), ""))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  left_aligned = (0, 1, 6)
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i in left_aligned else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
    for cells in rows
  )


def on_host(x: Any) -> np.ndarray:
  """The values, gathered if they are spread over processes."""
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def masks_checksum(opt_state: optax.OptState) -> jax.Array:
  """A number that tells replicas with different masks apart.

  It does not depend on how the masks are laid out over devices.

  Args:
    opt_state: A state that holds one :class:`sparseopt_jax.SparseOptState`.

  Returns:
    A uint32 scalar. Equal masks give equal numbers, different masks different
    ones but for one case in about 2**32.

  Raises:
    ValueError: If the state holds no SparseOptState or several.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> params = {'kernel': jnp.ones((8, 4))}
    >>> def checksum(seed):
    ...   tx = sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.75, seed=seed)
    ...   return sparseopt_jax.masks_checksum(tx.init(params))
    >>> print(checksum(0) == checksum(0), checksum(0) == checksum(1))
    True False
  """
  masks = jax.tree.leaves(_wrappers.get_masks(opt_state))
  total = jnp.zeros([], jnp.uint32)
  for i, mask in enumerate(masks):
    words = (jnp.uint32(i), jnp.uint32(len(masks)))
    position = _blocks.linear_index(mask.shape)
    weights = _selection.random_order(words, position)
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
    opt_state: A state that holds one :class:`sparseopt_jax.SparseOptState`.

  Raises:
    AssertionError: If masks differ.
    ValueError: If the state holds no SparseOptState or several.

  Examples:

    >>> import jax.numpy as jnp
    >>> import sparseopt_jax
    >>> tx = sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.75)
    >>> opt_state = tx.init({'kernel': jnp.ones((8, 4))})
    >>> sparseopt_jax.assert_replicas_agree(opt_state)
  """
  state = _wrappers.find_state(opt_state)
  checksum = masks_checksum
  for _ in range(jnp.ndim(state.count)):
    checksum = jax.vmap(checksum)
  # Each device computes from its own copy of what is replicated.
  copies = jax.jit(checksum)(state).addressable_shards
  seen = {int(x) for copy in copies for x in np.ravel(copy.data)}
  low, high = min(seen), max(seen)
  if jax.process_count() > 1:
    bounds = multihost_utils.process_allgather(np.array([low, high], np.uint32))
    low, high = int(np.min(bounds)), int(np.max(bounds))
  if low != high:
    raise AssertionError(
      "All replicas must hold the same masks; got checksums from "
      f"{low} to {high}. Average the gradients before update."
    )
