"""Arguments as users pass them, checked."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_bool(value: Any) -> bool:
  """Whether it is a bool of Python or NumPy."""
  return isinstance(value, bool | np.bool_)


def is_int(value: Any) -> bool:
  """Whether it is an integer of Python or NumPy, and not a bool."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
  """Whether it is a real number, in an array or not, and not a bool."""
  if isinstance(value, jax.Array | np.ndarray):
    is_number = jnp.issubdtype(value.dtype, jnp.number)
    return value.shape == () and is_number and not jnp.iscomplexobj(value)
  return isinstance(value, numbers.Real) and not is_bool(value)


def check(holds: Any, rule: str, value: Any, error: Any = ValueError) -> None:
  """Raises in one line, with the value, unless the rule holds."""
  if not holds:
    raise error(f"{rule:.250}; got {' '.join(repr(value).split()):.100}.")


def check_type(holds: Any, rule: str, value: Any) -> None:
  """Raises TypeError in one line, unless the rule holds."""
  check(holds, rule, value, TypeError)
