"""How the active weights of a network are shared out among its layers."""

from collections.abc import Callable, Mapping
import fnmatch
import math
import re
from typing import Any

from sparseopt_jax._numbers import check, check_type, is_real

Shapes = Mapping[str, tuple[int, ...]]
Distribution = Callable[[Shapes, float], Mapping[str, float]]


def check_sparsity(sparsity: Any) -> None:
  """Raises unless it is a Python number in [0, 1); it fixes counts."""
  is_number = is_real(sparsity) and not hasattr(sparsity, "devices")
  check_type(is_number, "sparsity must be a Python number", sparsity)
  check(0.0 <= sparsity < 1.0, "sparsity must lie in [0, 1)", sparsity)


def _check(shapes: Shapes, sparsity: float) -> None:
  check_sparsity(sparsity)
  for path, shape in shapes.items():
    check(
      min(shape, default=0) >= 1, f"shapes[{path!r}] must have elements", shape
    )


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
  r"""Gives every layer the same density, :math:`1 - s`.

  Args:
    shapes: The shape of each sparse layer's weights, by path.
    sparsity: Fraction :math:`s` of zeros, in [0, 1).

  Returns:
    The density (fraction of active weights) of each layer, by path.

  Raises:
    TypeError: If ``sparsity`` is not a Python number.
    ValueError: If ``sparsity`` lies outside [0, 1) or a layer is empty.

  Examples:

    >>> import sparseopt_jax
    >>> sparseopt_jax.uniform({'a/kernel': (3, 4), 'b/kernel': (4, 2)}, 0.75)
    {'a/kernel': 0.25, 'b/kernel': 0.25}

  .. seealso:: :func:`sparseopt_jax.erk`
  """
  _check(shapes, sparsity)
  return dict.fromkeys(shapes, 1.0 - float(sparsity))


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
  r"""Erdős-Rényi-Kernel: small layers are kept denser than large ones.

  The density of layer :math:`l` with weights of shape
  :math:`(d_1, \dots, d_k)` is

  .. math::

    p^l = \min\left(1, \epsilon \frac{\sum_j d_j}{\prod_j d_j}\right),

  with one :math:`\epsilon` for all layers, such that together they have as many
  active weights as under :func:`sparseopt_jax.uniform`. Axes count as they are:
  a kernel whose outputs are split into heads gets fewer weights than a matrix.

  Args:
    shapes: The shape of each sparse layer's weights, by path.
    sparsity: Fraction :math:`s` of zeros over all layers, in [0, 1).

  Returns:
    The density (fraction of active weights) of each layer, by path.

  Raises:
    TypeError: If ``sparsity`` is not a Python number.
    ValueError: If ``sparsity`` lies outside [0, 1) or a layer is empty.

  Examples:

    >>> import sparseopt_jax
    >>> sparseopt_jax.erk({'a/kernel': (4, 4), 'b/kernel': (36, 4)}, 0.75)
    {'a/kernel': 0.4166666666666667, 'b/kernel': 0.23148148148148148}

  References:
    Evci et al., `Rigging the Lottery: Making All Tickets Winners
    <https://arxiv.org/abs/1911.11134>`_, 2020

  .. seealso:: :func:`sparseopt_jax.uniform`
  """
  _check(shapes, sparsity)
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  budget = (1.0 - float(sparsity)) * sum(sizes.values())
  share = sum(sum(shape) for shape in shapes.values())
  densities = {}
  # A layer passes 1 where sum(shape) / size is largest, so in that order.
  order = sorted(shapes, key=lambda path: sum(shapes[path]) / sizes[path])
  for path in reversed(order):
    size, part = sizes[path], sum(shapes[path])
    is_dense = budget * part >= share * size
    densities[path] = 1.0 if is_dense else budget * part / (share * size)
    budget, share = budget - is_dense * size, share - is_dense * part
  return {path: densities[path] for path in shapes}


def active_counts(shapes: Shapes, sparsity: float, how: Any) -> dict[str, int]:
  """The active weights of each layer, at least one, in the order of shapes."""
  densities = resolve(how)(shapes, sparsity)
  rule = "distribution must return {path: density} for the paths it was given"
  check_type(isinstance(densities, Mapping), rule, densities)
  odd = sorted(densities.keys() ^ shapes.keys())
  check(not odd, rule, odd)
  counts = {}
  for path, shape in shapes.items():
    rule = f"distribution must return a density in [0, 1] for {path!r}"
    check_type(is_real(densities[path]), rule, densities[path])
    check(0.0 <= densities[path] <= 1.0, rule, densities[path])
    counts[path] = max(1, round(float(densities[path]) * math.prod(shape)))
  return counts


def resolve(distribution: Any) -> Distribution:
  """The function that a name or a dict stands for; functions pass through."""
  if callable(distribution):
    return distribution
  if isinstance(distribution, Mapping):
    return _by_pattern(dict(distribution))
  rule = "distribution must be 'erk', 'uniform', a dict or a function"
  check_type(isinstance(distribution, str), rule, distribution)
  check(distribution in ("erk", "uniform"), rule, distribution)
  return erk if distribution == "erk" else uniform


def _by_pattern(densities: dict[str, float]) -> Distribution:
  """The densities of some layers by the patterns of their paths; else ERK."""
  for pattern, density in densities.items():
    is_text = isinstance(pattern, str)
    check_type(is_text, "distribution must have patterns for keys", pattern)
    rule = f"distribution must give a density in (0, 1] for {pattern!r}"
    check_type(is_real(density), rule, density)
    check(0.0 < density <= 1.0, rule, density)

  def densities_of(shapes: Shapes, sparsity: float) -> dict[str, float]:
    given: dict[str, float] = {}
    for pattern, density in densities.items():
      found = [path for path in shapes if _is_match(path, pattern)]
      rule = f"distribution must match some of {', '.join(shapes)}"
      check(found, rule, pattern)
      given = dict.fromkeys(found, density) | given  # The first pattern counts.
    rest = {path: shapes[path] for path in shapes if path not in given}
    return given | erk(rest, sparsity)

  return densities_of


def _is_match(path: str, pattern: str) -> bool:
  """Whether it names a layer, or the leaf that the layer is stacked in."""
  leaf = re.sub(r"\[[\d, ]+\]$", "", path)
  return path == pattern or fnmatch.fnmatchcase(leaf, pattern)
