"""The Python of README.md and of the guide runs, block after block."""

import pathlib
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparseopt_jax

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ROOT / "README.md", ROOT / "sparseopt_jax" / "README.md"


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(8, use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(3)(x)


def _names_of_the_reader():
  """What the text takes for granted."""
  model, images = _Net(), jnp.ones((2, 6))
  params = model.init(jax.random.key(0), images, train=False)["params"]
  return {
    "model": model,
    "images": images,
    "params": params,
    "grads": jax.tree.map(jnp.ones_like, params),
    "schedule": optax.cosine_decay_schedule(0.1, 100),
    "topology": sparseopt_jax.SET(100),
  }


def test_python_blocks_run():
  names = _names_of_the_reader()
  blocks = [
    block
    for page in PAGES
    for block in re.findall(
      r"^```python\n(.*?)^```", page.read_text(), re.M | re.S
    )
  ]
  assert len(blocks) == 5
  for block in blocks:
    exec(compile(block, "a page", "exec"), names)
  masks = sparseopt_jax.get_masks(names["opt_state"])
  for layer in ("Dense_0", "Dense_1"):
    kernel = np.asarray(names["params"][layer]["kernel"])
    assert not kernel[~np.asarray(masks[layer]["kernel"])].any()
  assert names["corrected"].paths == ("Dense_0/kernel",)
  table = sparseopt_jax.sparsity_table(names["opt_state"]).splitlines()
  assert [line.split()[-1] for line in table[1:3]] == ["yes", "no"]
