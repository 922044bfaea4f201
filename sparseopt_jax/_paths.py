"""Names of leaves, by which trees of different structure are matched."""

from typing import Any

import jax
import optax


def is_masked_node(node: Any) -> bool:
  """Whether it stands for a leaf that has no such entry."""
  return isinstance(node, optax.MaskedNode)


def name(path: tuple) -> str:
  """A path such as 'Conv_0/kernel'; the attribute of a box is left out."""
  if path and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Any) -> list[str]:
  """The names of the leaves of a tree."""
  return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def by_name(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
  """The leaves of a tree by their names."""
  pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {name(path): leaf for path, leaf in pairs}
