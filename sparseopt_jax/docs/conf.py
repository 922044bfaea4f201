"""The API reference: `sphinx-build sparseopt_jax/docs build/docs`."""

from typing import Any

project = "sparseopt-jax"
html_title = project
html_theme_options = {"page_width": "70em"}
extensions = [
  "sphinx.ext.autodoc",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
]
# `name` is a link where it is a name of ours, and code elsewhere.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
# The docstrings say in words what unions of ten types do not.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True


def setup(app: Any) -> None:
  """Fields of named tuples are described once, in the class's docstring."""
  is_field = lambda obj: type(obj).__name__ == "_tuplegetter"
  app.connect(
    "autodoc-skip-member",
    lambda app, what, name, obj, skip, options: skip or is_field(obj),
  )
