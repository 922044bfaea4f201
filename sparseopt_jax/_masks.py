"""Which leaves of the parameters are sparse, and their first masks."""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _correction
from sparseopt_jax import _distributions
from sparseopt_jax import _paths
from sparseopt_jax import _selection
from sparseopt_jax import _sharding
from sparseopt_jax._numbers import check, check_type, is_bool, is_int
from sparseopt_jax._topology import Layer, Topology, flat

# Words of a name that say: a table, of which each entry is looked up or added,
# and not multiplied; or a shift or a scale.
_TABLE = {"embed", "embedding", "embeddings", "emb", "wte", "wpe"}
_TOKENS = {"cls", "token", "tokens", "probe", "pos", "position", "posemb"}
_SHIFTS = {"bias", "biases", "scale", "scales", "offset", "offsets"}
_NOT_A_KERNEL = _TABLE | _TOKENS | _SHIFTS
# Flax's attention: of three axes, the last two are heads and their features.
_HEADS = re.compile("(^|/)(query|key|value)/kernel$")


class Options(NamedTuple):
  """What decides about sparse leaves, as for `sparseopt`.

  A rule is a pytree of bools (or ints), in the structure of the parameters or a
  prefix of it, or a function of a leaf's path and the leaf.
  """

  sparsity: float
  distribution: Any
  sparse: Any
  stacked: Any
  corrected: Any = False
  masks: Any = None
  output_axis: Any = None


def planner(options: Options) -> Callable[[optax.Params], list[Layer]]:
  """A function that finds the sparse leaves of parameters.

  It plans once for parameters of one structure, and not in each trace. What it
  remembers of them, the last ones, holds none of their arrays.

  Errors are those of :func:`sparseopt_jax.sparseopt`.
  """
  last: tuple[Any, list[Layer]] = (None, [])

  def sparse_leaves(params: optax.Params) -> list[Layer]:
    nonlocal last
    found = last  # Another thread may trace as well.
    kind = jax.tree.flatten(jax.eval_shape(lambda tree: tree, params))
    if found[0] != kind:
      last = found = kind, _plan(params, kind[0], options)
    leaves = jax.tree.leaves(params)
    return [x._replace(weight=leaves[x.place]) for x in found[1]]

  return sparse_leaves


def _plan(params: optax.Params, shapes: list, options: Options) -> list[Layer]:
  """The sparse leaves, with shapes for weights and the masks that are given."""
  names, values = _paths.names(params), jax.tree.leaves(params)
  stacks = _resolve("stacked", options.stacked, params)
  check(min(stacks, default=0) >= 0, "stacked must be >= 0", options.stacked)
  corrected = _resolve("corrected", options.corrected, params)
  given = _given(options.masks, dict(zip(names, shapes, strict=True)))
  layers = []
  for i in _choose(options.sparse, given, params, shapes, stacks):
    name, stack = names[i], stacks[i]
    axes = _input_axes(options.output_axis, name, values[i], stack)
    target = np.zeros(shapes[i].shape[:stack], np.int32)  # Filled in below.
    static = (name, i, stack, axes, target, bool(corrected[i]))
    layers.append(Layer(*static, weight=shapes[i], mask=given.get(name)))
  is_off = is_bool(options.corrected) and not options.corrected
  rule = f"corrected must be False or choose some of {[x.path for x in layers]}"
  check(is_off or any(x.corrected for x in layers), rule, options.corrected)
  _set_targets(layers, options)
  return layers


def _resolve(argument: str, rule: Any, params: Any) -> list:
  """One value for each leaf, from a function or a pytree or a prefix of one."""
  names, values = _paths.names(params), []
  if callable(rule) and jax.tree_util.all_leaves([rule]):
    values = list(map(rule, names, jax.tree.leaves(params)))
  else:
    with contextlib.suppress(ValueError, TypeError):
      values = jax.tree.leaves(jax.tree.broadcast(rule, params))
  text = "must be a function of path and leaf, or of the parameters' structure"
  check(len(values) == len(names), f"{argument} {text} or a prefix", rule)
  is_value = is_int if argument == "stacked" else is_bool
  for name, value in zip(names, values, strict=True):
    text = f"{argument} must give {is_value.__name__[3:]}s, at {name!r} too"
    check_type(is_value(value), text, value)
  return values


def _given(masks: Any, leaves: dict[str, Any]) -> dict[str, Any]:
  """The argument ``masks`` by path: arrays, and MaskedNodes."""
  found: dict[str, Any] = {}
  for name, mask in _paths.by_name(masks, _paths.is_masked_node).items():
    if _paths.is_masked_node(mask):  # It may stand for a subtree.
      inside = [x for x in leaves if not name or x.startswith(f"{name}/")]
      found |= dict.fromkeys([name] if name in leaves else inside, mask)
      continue
    dtype = getattr(mask, "dtype", type(mask))
    is_mask = dtype in (jnp.bool_, jnp.uint8)
    check_type(is_mask, f"masks must hold bools at {name!r}", dtype)
    shape = leaves[name].shape if name in leaves else None
    rule = f"masks must be as the parameters, of shape {shape} at {name!r}"
    check(mask.shape == shape, rule, mask.shape)
    found[name] = mask
  return found


def _choose(
  rule: Any, given: dict, params: Any, shapes: list, stacks: list
) -> list[int]:
  """The places of sparse leaves: as given masks say, and else as rules say."""
  names = _paths.names(params)
  if rule is None:
    # A module whose class says so is a table, whatever its name.
    is_table = lambda node: type(node).__name__ in ("Embed", "Embedding")
    drop = lambda node: None if is_table(node) else node
    others = set(_paths.names(jax.tree.map(drop, params, is_leaf=is_table)))
    kernels = map(_is_kernel, names, shapes, stacks)
    chosen = [k and n in others for k, n in zip(kernels, names, strict=True)]
  else:
    chosen = _resolve("sparse", rule, params)
  for i, name in enumerate(names):
    if name in given:
      has_mask = not _paths.is_masked_node(given[name])
      text = f"sparse must be {has_mask} for {name!r}, as masks say"
      check(rule is None or has_mask == chosen[i], text, chosen[i])
      chosen[i] = has_mask
    if chosen[i]:
      check(names.count(name) == 1, "sparse must choose different paths", name)
      _check_leaf(name, shapes[i], stacks[i])
  text = "sparse must choose a leaf, by default kernels: two axes longer than 1"
  check(any(chosen), f"{text}, no name of a bias, scale or embedding", names)
  return [i for i, is_sparse in enumerate(chosen) if is_sparse]


def _input_axes(rule: Any, name: str, leaf: Any, stack: int) -> tuple:
  """The axes of a leaf along which a neuron's inputs lie."""
  ndim = jnp.ndim(leaf) - stack
  named = rule(name, leaf) if callable(rule) else rule
  if rule is None:
    named = (-2, -1) if ndim == 3 and _HEADS.search(name) else -1
  axes = _correction.input_axes(ndim, named, name)
  return tuple(stack + axis for axis in axes)


def _is_kernel(name: str, leaf: Any, stack: int) -> bool:
  """Two axes longer than 1, and not named as a shift, a scale or a table."""
  words = [set(re.split("[^a-z]+", x)) for x in name.lower().split("/")]
  # As in Equinox's embedding.weight, but not a patch embedding's.
  module = words[-2] if words[-1] == {"weight"} and words[1:] else set()
  is_table = module & _TABLE and "patch" not in module
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating) and 0 not in leaf.shape
  is_matrix = sum(size > 1 for size in leaf.shape[stack:]) >= 2
  return is_float and is_matrix and not (words[-1] & _NOT_A_KERNEL or is_table)


def _check_leaf(name: str, leaf: Any, stack: int) -> None:
  """Raises unless a leaf can be sparse."""
  rule = f"sparse must choose floats of 16 bits or more, not {name!r}"
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
  check_type(is_float and leaf.dtype.itemsize > 1, rule, leaf.dtype)
  rule = f"sparse must choose layers of 1 to 2**31 - 1 weights, not {name!r}"
  size = np.prod(leaf.shape[stack:]) if 0 not in leaf.shape else 0
  check(leaf.shape and 0 < size < 2**31, rule, leaf.shape)
  rule = f"stacked must leave an axis of {name!r} of shape {leaf.shape}"
  check(stack < len(leaf.shape), rule, stack)


def _set_targets(layers: Sequence[Layer], options: Options) -> None:
  """Fills in the number of active weights of each layer.

  A layer of a stack is named as in 'blocks/kernel[2]'.
  """
  shapes = {}
  for leaf in layers:
    for index in np.ndindex(leaf.target.shape):
      name = leaf.path + (str([*index]) if index else "")
      rule = "sparse must choose different paths, of slices of a stack too"
      check(name not in shapes, rule, name)
      shapes[name] = leaf.weight.shape[leaf.stacked :]
  how = options.sparsity, options.distribution
  # In the order of the shapes.
  counts = iter(_distributions.active_counts(shapes, *how).values())
  for leaf in layers:
    leaf.target.flat[:] = [next(counts) for _ in range(leaf.target.size)]
    leaf.target.flags.writeable = False  # A plan is used more than once.


def with_masks(
  layers: Sequence[Layer], topology: Topology, key: jax.Array
) -> list[Layer]:
  """The layers with their first masks: given, or as the topology says."""
  masks = {layer.path: layer.mask for layer in layers}
  left = [layer for layer in layers if layer.mask is None]
  if left:
    first = topology.first_masks(left, key)
    masks |= dict(zip([layer.path for layer in left], first, strict=True))
  # Copied, since the state may be donated and given masks are the user's own.
  copy = lambda x: _sharding.place(jnp.array(masks[x.path], bool), x.weight)
  return [layer._replace(mask=copy(layer)) for layer in layers]


def as_tree(params: Any, layers: Sequence[Layer], values: Iterable[Any]) -> Any:
  """The parameters' structure with values, MaskedNode where it is dense."""
  every: list[Any] = [optax.MaskedNode() for _ in jax.tree.leaves(params)]
  for layer, value in zip(layers, values, strict=True):
    every[layer.place] = value
  return jax.tree.unflatten(jax.tree.structure(params), every)


def magnitude_masks(
  params: optax.Params,
  sparsity: float,
  *,
  distribution: Any = "erk",
  sparse: Any = None,
  stacked: Any = 0,
) -> optax.Params:
  r"""Masks that keep the weights of largest magnitude in each layer.

  One-shot magnitude pruning of trained, dense parameters, to fine-tune on these
  masks or to start dynamic sparse training from them:
  ``sparsify(..., masks=magnitude_masks(params, sparsity))``.

  Args:
    params: The dense parameters.
    sparsity: As for :func:`sparseopt_jax.sparsify`.
    distribution: As for :func:`sparseopt_jax.sparsify`; it decides how many
      weights each layer keeps.
    sparse: Which leaves get a mask, as for :func:`sparseopt_jax.sparseopt`.
    stacked: As for :func:`sparseopt_jax.sparsify`.

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
  layers = planner(Options(sparsity, distribution, sparse, stacked))(params)
  stacks = [layer.stacked for layer in layers]

  def keep(weights: Any) -> Any:
    every = [jnp.ones_like(x, bool) for x in weights]
    counts = flat(layer.target for layer in layers)
    return _selection.keep_largest(weights, every, counts, stacks)

  weights = [jnp.asarray(layer.weight) for layer in layers]
  return as_tree(params, layers, _sharding.lay_out_freely(keep, weights))
