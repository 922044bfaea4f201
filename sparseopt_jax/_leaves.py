"""Which leaves of the parameters are sparse, and their masks if given."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import _correction

# A pytree of bools in the structure of the parameters or a prefix of it, or a
# predicate of a leaf's path and the leaf.
Rule = Any
_T = TypeVar("_T")
AxisRule = _correction.Axes | Callable[[str, Any], _correction.Axes]


class Leaf(NamedTuple):
  """A leaf of the parameters without its values."""

  path: str
  shape: tuple[int, ...]
  dtype: jnp.dtype


def is_masked_node(leaf: Any) -> bool:
  return isinstance(leaf, optax.MaskedNode)


def path_name(path: tuple) -> str:
  """A path such as 'Conv_0/kernel'; the trailing 'value' of nnx is left out."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return name.removesuffix("/value")


def describe(params: Any) -> list[Leaf]:
  """Path, shape and dtype of each leaf; abstract leaves will do."""
  abstract = jax.eval_shape(lambda tree: tree, params)
  return [
    Leaf(path_name(path), leaf.shape, leaf.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
  ]


def sparse_by_default(path: str, leaf: Any) -> bool:
  """Kernels: two or more axes and not named bias, scale or embedding."""
  return (
    jnp.ndim(leaf) >= 2
    and math.prod(leaf.shape) > 0
    and jnp.issubdtype(leaf.dtype, jnp.floating)
    and path.rpartition("/")[2] not in ("bias", "scale", "embedding")
  )


def choose(
  name: str, rule: Rule, params: Any, leaves: Sequence[Leaf]
) -> list[bool]:
  """One bool a leaf, from a predicate or a pytree, which may be a prefix."""
  if callable(rule):
    values = jax.tree.leaves(params)
    chosen = [
      rule(leaf.path, v) for leaf, v in zip(leaves, values, strict=True)
    ]
  else:
    with _structure_error(name, rule, "a bool for each leaf"):
      chosen = jax.tree.leaves(jax.tree.broadcast(rule, params))
  for leaf, choice in zip(leaves, chosen, strict=True):
    if not isinstance(choice, bool | np.bool_):
      raise TypeError(
        f"{name} must give a bool for each leaf; got {choice!r} for "
        f"{leaf.path!r}."
      )
  return chosen


@contextlib.contextmanager
def _structure_error(name: str, tree: Any, content: str) -> Iterator[None]:
  """Says which argument does not have the structure of the parameters."""
  try:
    yield
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{name} must have the structure of the parameters, with {content}; got "
      f"{jax.tree.structure(tree)}."
    ) from error


def given_masks(masks: Any, params: Any, leaves: Sequence[Leaf]) -> list:
  """The masks of the argument: a bool array, or MaskedNode, for each leaf."""
  content = "a bool array or optax.MaskedNode() for each leaf"
  treedef: Any = jax.tree.structure(params)
  with _structure_error("masks", masks, content):
    given = treedef.flatten_up_to(masks)
  for leaf, mask in zip(leaves, given, strict=True):
    if is_masked_node(mask):
      continue
    dtype = getattr(mask, "dtype", type(mask).__name__)
    if dtype != jnp.bool_:
      raise TypeError(
        f"masks must hold {content}; got {dtype} at {leaf.path!r}."
      )
    if mask.shape != leaf.shape:
      raise ValueError(
        f"masks must have the shapes of the parameters; got {mask.shape} at "
        f"{leaf.path!r} of shape {leaf.shape}."
      )
  return [m if is_masked_node(m) else jnp.asarray(m) for m in given]


def choose_sparse(
  rule: Rule, given: list | None, params: Any, leaves: Sequence[Leaf]
) -> list[bool]:
  """Which leaves are sparse: those of ``given``, else those of the rule."""
  if given is None:
    default = sparse_by_default if rule is None else rule
    chosen = choose("sparse", default, params, leaves)
  else:
    chosen = [not is_masked_node(mask) for mask in given]
    if rule is not None and chosen != choose("sparse", rule, params, leaves):
      paths = [leaf.path for leaf, c in zip(leaves, chosen, strict=True) if c]
      raise ValueError(
        "sparse must choose the leaves that masks has arrays for, which are "
        f"{paths}; got {rule!r}."
      )
  _check_sparse(leaves, chosen)
  return chosen


def choose_corrected(
  rule: Rule, sparse: Sequence[bool], params: Any, leaves: Sequence[Leaf]
) -> list[bool]:
  """Which of the sparse leaves are corrected."""
  if rule is None:
    return list(sparse)
  chosen = choose("corrected", rule, params, leaves)
  both = [a and b for a, b in zip(chosen, sparse, strict=True)]
  is_off = isinstance(rule, bool | np.bool_) and not rule
  if not is_off and not any(both):
    paths = [leaf.path for leaf, s in zip(leaves, sparse, strict=True) if s]
    raise ValueError(
      "corrected must choose at least one of the sparse leaves, or be False; "
      f"got {rule!r} for {paths}."
    )
  return both


def _check_sparse(leaves: Sequence[Leaf], chosen: Sequence[bool]) -> None:
  """Raises unless some leaf is sparse and all that are can be."""
  if not any(chosen):
    paths = [leaf.path for leaf in leaves]
    raise ValueError(
      "sparse must choose at least one leaf, by default those with two or more "
      f"axes not named bias, scale or embedding; got none of {paths}."
    )
  paths = [leaf.path for leaf, c in zip(leaves, chosen, strict=True) if c]
  if len(set(paths)) < len(paths):
    raise ValueError(
      "sparse must choose leaves of different paths; got two at "
      f"{max(paths, key=paths.count)!r}."
    )
  for leaf, choice in zip(leaves, chosen, strict=True):
    if not choice:
      continue
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize < 2:
      raise TypeError(
        "sparse must choose leaves of floats of 16 bits or more; got "
        f"{leaf.path!r} of dtype {leaf.dtype}."
      )
    if not leaf.shape or not 0 < math.prod(leaf.shape) < 2**31:
      raise ValueError(
        "sparse must choose leaves that have an axis and 1 to 2**31 - 1 "
        f"weights; got {leaf.path!r} of shape {leaf.shape}."
      )


def explicit_mesh(array: jax.Array) -> jax.sharding.AbstractMesh | None:
  """The mesh in the type of an array, if it has axes of explicit type."""
  mesh = jax.typeof(array).sharding.mesh
  return mesh if mesh.explicit_axes else None


def lay_out_freely(function: Callable[..., _T], tree: _T, *args: Any) -> _T:
  """Leaves the layouts inside to the compiler, also where axes are explicit.

  Args:
    function: Takes the tree and ``args``, and returns a tree of its structure.
    tree: Arrays; what the function returns is laid out as they are.
    *args: Anything else.
  """
  meshes = [explicit_mesh(array) for array in jax.tree.leaves(tree)]
  mesh = next((mesh for mesh in meshes if mesh is not None), None)
  if mesh is None:
    return function(tree, *args)
  layouts = jax.tree.map(
    lambda x: jax.NamedSharding(mesh, jax.typeof(x).sharding.spec), tree
  )
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.sharding.auto_axes(function, out_sharding=layouts)(tree, *args)
