"""The architecture: what may import what."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import sparseopt_jax

PACKAGE = pathlib.Path(sparseopt_jax.__file__).parent
# From the bottom up; a module imports only from layers below its own.
LAYERS = [
  {"_numbers", "_paths", "_lax", "_sharding"},
  {"_correction", "_distributions", "_packing"},
  {"_selection"},
  {"_topology", "_state"},
  {"_masks"},
  {"_transform", "metrics"},
  {"_sparsify"},
]
PUBLIC = {
  "Layer",
  "Magnitude",
  "RigL",
  "SET",
  "SRigL",
  "SparseOptState",
  "SparsifyState",
  "Static",
  "Topology",
  "apply_masks",
  "assert_replicas_agree",
  "correct",
  "erk",
  "get_masks",
  "magnitude_masks",
  "masks_checksum",
  "neuron_sparsity",
  "sparseopt",
  "sparsify",
  "sparsity_metrics",
  "sparsity_table",
  "uniform",
}


def layer_of(module):
  for i, layer in enumerate(LAYERS):
    if module in layer:
      return i
  return None


def imported_modules(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "sparseopt_jax":
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      package, _, module = node.module.partition(".")
      if package == "sparseopt_jax":
        yield module


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_imports_of_the_core_go_down_only(module):
  for name in imported_modules(PACKAGE / f"{module}.py"):
    assert layer_of(name) is not None, f"{module} imports {name}"
    assert layer_of(name) < layer_of(module), f"{module} imports {name}"


def test_every_module_of_the_core_has_its_layer():
  """What __init__ imports, and all that this imports."""
  todo, core = list(imported_modules(PACKAGE / "__init__.py")), set()
  while todo:
    module = todo.pop()
    if module not in core:
      core.add(module)
      todo += imported_modules(PACKAGE / f"{module}.py")
  assert core == set().union(*LAYERS)


@pytest.mark.parametrize("package", ["models", "data"])
def test_models_and_data_know_nothing_of_optimisers(package):
  for path in (PACKAGE / package).glob("*.py"):
    for name in imported_modules(path):
      assert name.split(".")[0] == package, f"{path.name} imports {name}"
    assert "optax" not in path.read_text()


def test_the_core_needs_jax_and_optax_alone():
  forbidden = "flax chex orbax tensorflow tensorflow_datasets tyro sklearn tqdm"
  code = (
    "import sys, jax, optax; before = set(sys.modules); import sparseopt_jax;"
    "new = set(sys.modules) - before;"
    f"print([m for m in '{forbidden}'.split() if m in new])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


def test_public_names_are_there_and_documented():
  names = {name for name in dir(sparseopt_jax) if name[0] != "_"}
  is_module = lambda name: inspect.ismodule(getattr(sparseopt_jax, name))
  assert {name for name in names if not is_module(name)} == PUBLIC
  reference = (PACKAGE / "docs" / "core.rst").read_text()
  for name in PUBLIC:
    assert getattr(sparseopt_jax, name).__doc__
    assert f":: {name}\n" in reference
