"""What the study of Adam trains: two perceptrons and a small transformer."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
import dataclasses
import functools
import importlib
import inspect
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import data as data_lib


@dataclasses.dataclass(frozen=True)
class Task:
  """A network, its data and how it is trained.

  Attributes:
    load: Reads the data, given the folder of TensorFlow Datasets or None.
    init: Parameters from a key.
    batch: A batch from a key and the data.
    loss: Of parameters and a batch.
    evaluate: Loss and accuracy on the test set, of parameters and the data.
    is_text: Whether the test loss is what counts, else the accuracy.
    is_constant: Whether the learning rate stays at its peak, else it warms up
      and falls to 0 by a cosine.
    sparsity: Of all kernels together.
    steps: Of training.
    update_every: Steps between two mask updates, at least 25.
    seeds: Networks, unless a flag says otherwise.
    rates: Peaks of the learning rate, likewise.
  """

  load: Callable[[str | None], Any]
  init: Callable[[jax.Array], Any]
  batch: Callable[[jax.Array, Any], Any]
  loss: Callable[[Any, Any], jax.Array]
  evaluate: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  is_text: bool
  sparsity: float
  steps: int
  update_every: int
  seeds: int
  rates: tuple[float, ...]
  is_constant: bool = False


# --- Images -------------------------------------------------------------------


class Examples(NamedTuple):
  """Inputs (n, ...) and labels (n, ...)."""

  inputs: jax.Array
  labels: jax.Array


class Images(NamedTuple):
  """Examples of uint8 images (n, h, w, c), and how to standardise them."""

  train: Examples
  test: Examples
  mean: jax.Array  # per channel, in [0, 1]
  std: jax.Array


class Perceptron(nn.Module):
  """Three layers, with layer normalisation after the first two."""

  width: int
  classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(2):
      x = nn.relu(nn.LayerNorm()(nn.Dense(self.width)(x)))
    return nn.Dense(self.classes)(x)


def _load_images(name: str, data_dir: str | None) -> Images:
  found = data_lib.load(name, data_dir)
  arrays = found.arrays()
  assert arrays is not None
  train, test = (Examples(*map(jnp.asarray, split)) for split in arrays)
  return Images(train, test, jnp.asarray(found.mean), jnp.asarray(found.std))


def _standardised(examples: Examples, data: Images) -> Examples:
  pixels = examples.inputs / jnp.float32(255)
  mean, std = (jnp.broadcast_to(x, pixels.shape) for x in data[2:])
  flat = ((pixels - mean) / std).reshape(len(pixels), -1)
  return examples._replace(inputs=flat)


def _batch_of_images(key: jax.Array, data: Images) -> Examples:
  rows = jax.random.randint(key, (128,), 0, len(data.train.labels))
  return _standardised(jax.tree.map(lambda x: x[rows], data.train), data)


def _losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _images(
  name: str, inputs: int, width: int, classes: int, **rest: Any
) -> Task:
  model: Any = Perceptron(width, classes)

  def loss(params: Any, batch: Examples) -> jax.Array:
    return jnp.mean(_losses(model.apply(params, batch.inputs), batch.labels))

  def evaluate(params: Any, data: Images) -> tuple[jax.Array, jax.Array]:
    test = _standardised(data.test, data)
    logits = model.apply(params, test.inputs)
    hits = jnp.argmax(logits, axis=-1) == test.labels
    return jnp.mean(_losses(logits, test.labels)), jnp.mean(hits)

  return Task(
    load=functools.partial(_load_images, name),
    init=lambda key: model.init(key, jnp.zeros((1, inputs))),
    batch=_batch_of_images,
    loss=loss,
    evaluate=evaluate,
    is_text=False,
    **rest,
  )


# --- Text ---------------------------------------------------------------------


class Text(NamedTuple):
  """Codes of the training text, and windows for validation."""

  train: jax.Array
  test: Examples


_TRAINING = """
argparse asyncio.events bdb calendar codecs collections configparser datetime
difflib doctest email.message enum fractions ftplib functools http.client
http.server imaplib inspect ipaddress logging logging.handlers mailbox optparse
os pdb pickletools platform pydoc random shutil smtplib socketserver ssl
statistics subprocess tarfile textwrap threading traceback typing unittest.case
unittest.mock urllib.parse uuid zipfile
"""
_VALIDATION = """
ast csv contextlib heapq http.cookiejar json.decoder shelve tempfile
urllib.request string xml.etree.ElementTree
"""
_LENGTH, _WIDTH, _BLOCKS, _HEADS = 32, 64, 2, 4


class Decoder(nn.Module):
  """Two blocks of attention and a feed-forward layer, normalised in front."""

  @nn.compact
  def __call__(self, text: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    positions = self.param("pos_embedding", init, (_LENGTH, _WIDTH))
    x = nn.Embed(128, _WIDTH)(text) + positions[None]
    mask = nn.make_causal_mask(text)
    for _ in range(_BLOCKS):
      attention = nn.MultiHeadDotProductAttention(_HEADS)
      x = x + attention(nn.LayerNorm()(x), mask=mask)
      y = nn.gelu(nn.Dense(4 * _WIDTH)(nn.LayerNorm()(x)))
      x = x + nn.Dense(_WIDTH)(y)
    return nn.Dense(128)(nn.LayerNorm()(x))


_DECODER: Any = Decoder()


def _docstrings(modules: str) -> list[str]:
  """Each docstring once, in the order of the sources."""
  found: dict[str, None] = {}
  for name in modules.split():
    source = inspect.getsource(importlib.import_module(name))
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        found[ast.get_docstring(node) or ""] = None
  return list(found)


def _codes(texts: Iterable[str]) -> jax.Array:
  text = "\n\n".join(texts).encode("ascii", "replace")
  return jnp.asarray(np.frombuffer(text, np.uint8).astype(np.int32))


def _load_text(data_dir: str | None) -> Text:
  """Docstrings of the standard library; validation on windows of others."""
  del data_dir
  known = _docstrings(_TRAINING)
  new = _codes(x for x in _docstrings(_VALIDATION) if x not in set(known))
  starts = np.linspace(0, new.size - _LENGTH - 1, 512).astype(int)
  return Text(_codes(known), _windows(new, starts))


def _windows(text: jax.Array, starts: Any) -> Examples:
  found = text[starts[:, None] + np.arange(_LENGTH + 1)[None]]
  return Examples(found[:, :-1], found[:, 1:])


def _batch_of_text(key: jax.Array, data: Text) -> Examples:
  starts = jax.random.randint(key, (32,), 0, data.train.size - _LENGTH)
  return _windows(data.train, starts)


def _text_loss(params: Any, batch: Examples) -> jax.Array:
  """Bits per character."""
  logits = _DECODER.apply(params, batch.inputs)
  return jnp.mean(_losses(logits, batch.labels)) / jnp.log(2.0)


def _evaluate_text(params: Any, data: Text) -> tuple[jax.Array, jax.Array]:
  logits = _DECODER.apply(params, data.test.inputs)
  hits = jnp.argmax(logits, axis=-1) == data.test.labels
  return _text_loss(params, data.test), jnp.mean(hits)


_DIGITS = _images(
  "digits",
  inputs=64,
  width=256,
  classes=10,
  sparsity=0.97,
  steps=600,
  update_every=25,
  seeds=10,
  rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
)
TASKS = {
  "digits": _DIGITS,
  "digits-constant": dataclasses.replace(
    _DIGITS, is_constant=True, rates=(0.001, 0.003, 0.01, 0.03)
  ),
  "text": Task(
    load=_load_text,
    init=lambda key: _DECODER.init(key, jnp.zeros((1, _LENGTH), jnp.int32)),
    batch=_batch_of_text,
    loss=_text_loss,
    evaluate=_evaluate_text,
    is_text=True,
    sparsity=0.9,
    steps=400,
    update_every=25,
    seeds=5,
    rates=(0.003, 0.01, 0.03, 0.1),
  ),
  # Needs data from elsewhere.
  "fashion_mnist": _images(
    "fashion_mnist",
    inputs=784,
    width=128,
    classes=10,
    sparsity=0.97,
    steps=1000,
    update_every=50,
    seeds=5,
    rates=(0.001, 0.003, 0.01, 0.03),
  ),
}
