"""Follows data through a Flax module: which products, and what comes after.

`jax.make_jaxpr` shows what a module computes without computing it. In that
program a weight is known by the parameter that it comes from, and each call of
a normalisation module is marked by a `checkpoint_name`, which changes nothing.
A walk over the equations then finds every matrix product and convolution, the
kernel in it, and what its output goes into first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import math
import threading
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
import jax.numpy as jnp

from sparseopt_jax import _paths
from sparseopt_jax._numbers import check_type

NONE = "none"
_LINEN_KINDS = {
  nn.BatchNorm: "batch_norm",
  nn.LayerNorm: "layer_norm",
  nn.GroupNorm: "group_norm",
}
_NNX_KINDS: dict[Any, str] = {
  nnx.BatchNorm: "batch_norm",
  nnx.LayerNorm: "layer_norm",
  nnx.GroupNorm: "group_norm",
}
_MARK = "sparseopt_jax/"
_is_marking = jax.make_user_context(default_value=False)
_lock = threading.RLock()

Module = nn.Module | nnx.Module

# Operations that only move, repeat or cast numbers.
_MOVES = {
  "broadcast_in_dim",
  "concatenate",
  "convert_element_type",
  "copy",
  "expand_dims",
  "name",
  "optimization_barrier",
  "reduce_precision",
  "reshape",
  "rev",
  "sharding_constraint",
  "slice",
  "split",
  "squeeze",
  "transpose",
}
# Operations that leave the data to be normalised what it is, up to a shift and
# a scale for each neuron, if only one operand depends on the input.
_AFFINE = {"add", "sub", "mul", "div"}


@dataclasses.dataclass(eq=False)
class Product:
  """A matrix product or a convolution in a module.

  Attributes:
    kernel: Path of the parameter that is its weights, such as "Conv_0/kernel";
      None where there is none, or where several are multiplied together first.
    macs: Multiplications (each with an addition), as if the kernel were dense.
    uses: What the output goes into first, on all its ways.
  """

  kernel: str | None
  macs: int
  uses: set[str] = dataclasses.field(default_factory=set)


class _Value(NamedTuple):
  """What is known of a variable of the program."""

  is_data: bool  # Whether it depends on the module's inputs.
  kernels: frozenset[str] = frozenset()  # If not: the kernels it comes from.
  outputs: frozenset[Product] = frozenset()  # If so: the outputs it still is.


def products(
  module: Module, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> list[Product]:
  """Finds the products in a call of a module.

  Args:
    module: A Flax module: of linen, not bound, or of NNX.
    inputs: Its inputs; `jax.ShapeDtypeStruct` will do for arrays.
    kwargs: Its keyword arguments.

  Returns:
    The products in the order in which they are computed. Those inside of
    `lax.cond` are not found, and of a `lax.while_loop` at most one round is.

  Raises:
    TypeError: If `module` is not a Flax module.
  """
  is_module = isinstance(module, nn.Module | nnx.Module)
  check_type(is_module, "module must be a Flax module, linen or NNX", module)
  leaves, structure = jax.tree.flatten((tuple(inputs), kwargs))
  arrays = [leaf for leaf in leaves if hasattr(leaf, "shape")]

  def fill(arrays: Sequence[jax.Array]) -> tuple[tuple[Any], dict[str, Any]]:
    values = iter(arrays)
    return jax.tree.unflatten(
      structure, [next(values) if hasattr(x, "shape") else x for x in leaves]
    )

  if isinstance(module, nnx.Module):
    call, params, others = _nnx_function(module, fill)
  else:
    call, params, others = _linen_function(module, fill, arrays)
  with _marked_normalizations():
    program = jax.make_jaxpr(call)(params, others, arrays)
  walk = _Walk()
  known = [*_kernels(params), *([_Value(False)] * len(jax.tree.leaves(others)))]
  known += [_Value(True)] * len(arrays)
  walk.use(walk.run(program.jaxpr, known, 1), NONE)
  return walk.products


def _linen_function(
  module: nn.Module, fill: Any, arrays: Sequence[Any]
) -> tuple[Any, Any, Any]:
  """A function of parameters, other variables and inputs, and the former."""
  rngs = {name: jax.random.key(0) for name in ("params", "dropout")}

  def init(arrays: Sequence[jax.Array]) -> Any:
    args, kwargs = fill(arrays)
    return nn.meta.unbox(module.init(rngs, *args, **kwargs))

  def call(params: Any, others: Any, arrays: Sequence[jax.Array]) -> Any:
    args, kwargs = fill(arrays)
    variables = {"params": params, **others}
    return module.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)[0]

  others = dict(jax.eval_shape(init, arrays))
  return call, others.pop("params", {}), others


def _nnx_function(module: nnx.Module, fill: Any) -> tuple[Any, Any, Any]:
  """The same for a module that holds its variables; they are not changed."""
  graph, *states = nnx.split(module, nnx.Param, ...)
  params, others = states

  def call(params: Any, others: Any, arrays: Sequence[jax.Array]) -> Any:
    args, kwargs = fill(arrays)
    return nnx.merge(graph, params, others)(*args, **kwargs)

  return call, params, others


@contextlib.contextmanager
def _marked_normalizations() -> Iterator[None]:
  """Marks the inputs of all normalisation modules that are called.

  Linen has interceptors for that; of NNX, the methods are replaced meanwhile.
  Nothing that was traced outside of this context, without marks, is used in it.
  """

  def marked(kind: str, method: Any) -> Any:
    return lambda self, *args, **kwargs: method(
      self, *_mark(kind, args), **_mark(kind, kwargs)
    )

  with _lock, _is_marking(True), nn.intercept_methods(_intercept):
    methods = {module: module.__call__ for module in _NNX_KINDS}
    try:
      for module, kind in _NNX_KINDS.items():
        module.__call__ = marked(kind, methods[module])
      yield
    finally:
      for module, method in methods.items():
        module.__call__ = method


def _intercept(
  call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
  if context.method_name == "__call__":
    for module, kind in _LINEN_KINDS.items():
      if isinstance(context.module, module):
        return call(*_mark(kind, args), **_mark(kind, kwargs))
  return call(*args, **kwargs)


def _mark(kind: str, tree: Any) -> Any:
  one = lambda x: checkpoint_name(x, _MARK + kind)
  return jax.tree.map(lambda x: one(x) if isinstance(x, jax.Array) else x, tree)


def _kernels(params: Any) -> Iterable[_Value]:
  """What is known of a module's parameters, in the order of the leaves."""
  pairs = zip(_paths.names(params), jax.tree.leaves(params), strict=True)
  for path, leaf in pairs:
    yield _Value(False, frozenset({path} if jnp.ndim(leaf) > 1 else ()))


class _Walk:
  """Interprets a program on what is known of its values.

  Attributes:
    products: Those that were met.
  """

  def __init__(self) -> None:
    self.products: list[Product] = []

  def run(
    self, jaxpr: core.Jaxpr, values: Sequence[_Value], repeats: int
  ) -> list[_Value]:
    """Returns what is known of the results; `repeats` is for loops."""
    known = dict(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> _Value:
      if isinstance(atom, core.Literal):
        return _Value(False)
      return known.get(atom, _Value(False))

    for equation in jaxpr.eqns:
      operands = [read(atom) for atom in equation.invars]
      results = self._equation(equation, operands, repeats)
      known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def use(self, values: Iterable[_Value], kind: str) -> None:
    """Notes that values go into something."""
    for value in values:
      for product in value.outputs:
        product.uses.add(kind)

  def _equation(
    self, equation: core.JaxprEqn, operands: list[_Value], repeats: int
  ) -> list[_Value]:
    name, number = equation.primitive.name, len(equation.outvars)
    inner = _inner(equation)
    if inner is not None:
      return self._call(equation, inner, operands, repeats)
    data = [operand for operand in operands if operand.is_data]
    kernels = frozenset().union(*(operand.kernels for operand in operands))
    if not data:
      return [_Value(False, kernels=kernels)] * number
    if name in ("dot_general", "conv_general_dilated"):
      self.use(data, NONE)
      kernel = next(iter(kernels)) if len(kernels) == 1 else None
      product = Product(kernel, repeats * _macs(equation))
      self.products.append(product)
      return [_Value(True, outputs=frozenset({product}))]
    if name == "name" and equation.params["name"].startswith(_MARK):
      self.use(data, equation.params["name"].removeprefix(_MARK))
      return [_Value(True)]
    affine = name in _AFFINE and len(data) == 1
    if name == "div" and not operands[0].is_data:
      affine = False  # The reciprocal of the data.
    if name in _MOVES or affine:
      outputs = frozenset().union(*(operand.outputs for operand in data))
      return [_Value(True, outputs=outputs)] * number
    self.use(data, NONE)
    return [_Value(True)] * number

  def _call(
    self,
    equation: core.JaxprEqn,
    inner: core.Jaxpr,
    operands: list[_Value],
    repeats: int,
  ) -> list[_Value]:
    if equation.primitive.name != "scan":
      return self.run(inner, operands, repeats)
    operands = _with_carried_data(equation, inner, operands)
    results = self.run(inner, operands, repeats * equation.params["length"])
    # What is carried goes into the next round as well; it counts as used.
    _, number = _carry(equation, inner)
    self.use(results[:number], NONE)
    return results


def _with_carried_data(
  equation: core.JaxprEqn, inner: core.Jaxpr, operands: Sequence[_Value]
) -> list[_Value]:
  """The operands of a scan; what starts as a constant may carry data later."""
  first, number = _carry(equation, inner)
  found = [_Value(v.is_data, kernels=v.kernels) for v in operands]
  is_more = True
  while is_more:
    results = _Walk().run(inner, found, 1)
    is_more = False
    for place, result in enumerate(results[:number], first):
      if result.is_data and not found[place].is_data:
        found[place], is_more = _Value(True), True
  return [
    old if old.is_data == new.is_data else new
    for old, new in zip(operands, found, strict=True)
  ]


def _carry(equation: core.JaxprEqn, inner: core.Jaxpr) -> tuple[int, int]:
  """Where a scan's carry begins among its operands, and how long it is.

  By shapes, since the parameters that tell it differ between versions of JAX:
  what is not carried on has one axis more outside of the loop.
  """
  carried = _num_alike(equation.outvars, inner.outvars)
  return _num_alike(equation.invars, inner.invars) - carried, carried


def _num_alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  pairs = zip(outside, inside, strict=True)
  return sum(_shape(a) == _shape(b) for a, b in pairs)


def _inner(equation: core.JaxprEqn) -> core.Jaxpr | None:
  """The program that an equation calls with its own operands, if any."""
  for parameter in equation.params.values():
    jaxpr = getattr(parameter, "jaxpr", parameter)
    if (
      isinstance(jaxpr, core.Jaxpr)
      and len(jaxpr.invars) == len(equation.invars)
      and len(jaxpr.outvars) == len(equation.outvars)
    ):
      return jaxpr
  return None


def _macs(equation: core.JaxprEqn) -> int:
  left, right, outputs = (
    _shape(atom) for atom in (*equation.invars, *equation.outvars)
  )
  numbers = equation.params["dimension_numbers"]
  if equation.primitive.name == "dot_general":
    (_, contracted), (_, batch) = numbers
    free = set(range(len(right))) - {*contracted, *batch}
    return math.prod(left) * math.prod(right[axis] for axis in free)
  per_output = math.prod(right) // right[numbers.rhs_spec[0]]
  # The zeros that a transposed convolution puts between its inputs are free.
  zeros = math.prod(equation.params["lhs_dilation"])
  return math.prod(outputs) * per_output // zeros


def _shape(atom: Any) -> tuple[int, ...]:
  return atom.aval.shape
