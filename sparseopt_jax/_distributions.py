"""How the active weights of a network are shared out among its layers."""

from collections.abc import Callable, Mapping
import math
import numbers

Shapes = Mapping[str, tuple[int, ...]]
Distribution = Callable[[Shapes, float], Mapping[str, float]]


def check_sparsity(sparsity: float) -> None:
  """Raises unless ``sparsity`` is a Python number in [0, 1)."""
  if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
    raise TypeError(
      "sparsity must be a Python number, since it fixes the number of active "
      f"weights; got {sparsity!r}. Under optax.inject_hyperparams list it in "
      "static_args."
    )
  if not 0.0 <= sparsity < 1.0:
    raise ValueError(f"sparsity must lie in [0, 1); got {sparsity!r}.")


def _check(shapes: Shapes, sparsity: float) -> None:
  check_sparsity(sparsity)
  for path, shape in shapes.items():
    if not all(size >= 1 for size in shape):
      raise ValueError(f"shapes[{path!r}] has no elements; got {shape!r}.")


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
  return dict.fromkeys(shapes, 1.0 - sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
  r"""Erdős-Rényi-Kernel: small layers are kept denser than large ones.

  The density of layer :math:`l` with weights of shape
  :math:`(d_1, \dots, d_k)` is

  .. math::

    p^l = \min\left(1, \epsilon \frac{\sum_j d_j}{\prod_j d_j}\right),

  with one :math:`\epsilon` for all layers, such that together they have as many
  active weights as under :func:`sparseopt_jax.uniform`.

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
  # A layer passes 1 where sum(shape) / size is largest, so in that order.
  order = sorted(shapes, key=lambda path: sum(shapes[path]) / sizes[path])
  budget = (1.0 - sparsity) * sum(sizes.values())
  share = sum(sum(shape) for shape in shapes.values())
  densities = {}
  while order:
    path = order[-1]
    if budget * sum(shapes[path]) < share * sizes[path]:
      break
    densities[order.pop()] = 1.0
    budget -= sizes[path]
    share -= sum(shapes[path])
  for path in order:
    densities[path] = budget * sum(shapes[path]) / (share * sizes[path])
  return {path: densities[path] for path in shapes}


def active_counts(
  shapes: Shapes, sparsity: float, distribution: str | Distribution
) -> dict[str, int]:
  """The number of active weights of each layer, at least one."""
  densities = resolve(distribution)(shapes, sparsity)
  if not isinstance(densities, Mapping):
    raise TypeError(
      f"distribution must return {{path: density}}; got {densities!r}."
    )
  if set(densities) != set(shapes):
    odd = sorted(set(densities) ^ set(shapes))
    raise ValueError(
      "distribution must return one density for each sparse leaf; missing or "
      f"unknown: {odd}."
    )
  for path, density in densities.items():
    is_array = getattr(density, "shape", None) == ()
    if not (is_array or isinstance(density, numbers.Real)):
      raise TypeError(
        f"distribution must return numbers; got {density!r} for {path!r}."
      )
    if not 0.0 <= density <= 1.0:
      raise ValueError(
        f"distribution must return densities in [0, 1]; got {density!r} for "
        f"{path!r}."
      )
  return {
    path: max(1, round(densities[path] * math.prod(shape)))
    for path, shape in shapes.items()
  }


def resolve(distribution: str | Distribution) -> Distribution:
  """The function that a name stands for; functions pass through."""
  named = {"erk": erk, "uniform": uniform}
  if callable(distribution):
    return distribution
  message = (
    "distribution must be 'erk', 'uniform' or a function; got "
    f"{distribution!r}."
  )
  if not isinstance(distribution, str):
    raise TypeError(message)
  if distribution not in named:
    raise ValueError(message)
  return named[distribution]
