"""Where arrays lie: beside their parameters, also on explicit mesh axes."""

from collections.abc import Callable
from typing import Any

import jax


def place(array: jax.Array, leaf: Any) -> jax.Array:
  """Lays an array out as a leaf of its shape, if that is known by now."""
  if isinstance(leaf, jax.core.Tracer):
    layout = jax.typeof(leaf).sharding
    is_explicit = layout.mesh.explicit_axes
    return jax.sharding.reshard(array, layout) if is_explicit else array
  # An array put on a device is bound to it; one that is not must stay free.
  is_bound = getattr(leaf, "committed", hasattr(leaf, "sharding"))
  layout = leaf.sharding if is_bound else None
  return array if layout is None else jax.device_put(array, layout)


def lay_out_freely(function: Callable[..., Any], tree: Any, *args: Any) -> Any:
  """Leaves the layouts inside to the compiler, also where axes are explicit.

  Args:
    function: Takes the tree and ``args``, and returns a tree of its structure.
    tree: Arrays; what the function returns is laid out as they are.
    *args: Anything else.
  """
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
  mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
  if mesh is None:
    return function(tree, *args)
  layout = lambda x: jax.NamedSharding(mesh, jax.typeof(x).sharding.spec)
  layouts = jax.tree.map(layout, tree)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.sharding.auto_axes(function, out_sharding=layouts)(tree, *args)
