"""What all clients are asked: a real data set, and is the training sparse?"""

import functools
from typing import Any

import jax
import numpy as np
from sklearn import datasets


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
  """1,797 images of 8 x 8 pixels, standardised, and their labels."""
  data = datasets.load_digits()
  images = data.images[..., None].astype(np.float32)
  return (images - images.mean()) / images.std(), data.target


def batches(epochs: int, size: int = 128) -> Any:
  """Shuffled batches of the digits."""
  images, labels = digits()
  for epoch in range(epochs):
    order = np.random.default_rng(epoch).permutation(len(labels))
    for start in range(0, len(labels) - size + 1, size):
      places = order[start : start + size]
      yield images[places], labels[places]


def by_path(tree: Any) -> dict[str, np.ndarray]:
  """The leaves by path; the attribute of a variable or box is left out."""
  pairs = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {
    name(path).removesuffix("/value"): np.asarray(leaf) for path, leaf in pairs
  }


def assert_sparse(params: Any, first: Any, last: Any, sparsity: float) -> None:
  """Exact zeros outside the last masks, which moved but kept their counts."""
  params, first, last = map(by_path, (params, first, last))
  assert first.keys() == last.keys()
  for path, mask in last.items():
    assert mask.shape == params[path].shape
    assert not params[path][~mask].any(), path
    # All but a few that lie at 0 by chance, as fresh ones do.
    assert np.count_nonzero(params[path]) > 0.9 * mask.sum(), path
    assert mask.sum() == first[path].sum(), path
  assert any((first[path] != mask).any() for path, mask in last.items())
  active = sum(mask.sum() for mask in last.values())
  size = sum(mask.size for mask in last.values())
  # Each layer has a whole number of active weights.
  assert abs(active - (1 - sparsity) * size) <= len(last) / 2
