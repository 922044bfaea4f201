"""The final sparse model in one file: `python -m sparseopt_jax.export RUN OUT`.

A safetensors file holds, for each sparse kernel, the values of the active
weights in row-major order (`values/PATH`) and the mask, eight weights a byte
(`mask/PATH`); all other arrays as they are (`dense/PATH`); and as metadata the
architecture, the accuracy and a CRC. `load` gives the model back in one call.

A kernel of constant fan-in k, as SRigL makes them, is condensed: the values of
each live neuron are a row of `values/PATH`, of shape (live neurons, k), and
`indices/PATH` says which of the neuron's inputs they belong to, by row-major
index; `neurons/PATH` says which neurons live, if not all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any, Literal, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax
from sparseopt_jax import _paths
from sparseopt_jax import models
from sparseopt_jax import shrink
from sparseopt_jax.training import cli
from sparseopt_jax.training import folder
from sparseopt_jax.training import records
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import RunError
from sparseopt_jax.training.errors import UsageError

_FORMAT = "sparseopt-jax 2"
_FIGURES = ("step", "test_accuracy", "sparsity")
# Without these in its `info`, a model cannot be made.
_MODEL = {"model", "num_classes", "width", "shortcut_size", "precision"}
# Another device, or bfloat16, may take a few images for another class.
_TOLERANCE = 0.01
Kind = Literal["bcoo", "csr"]


class SparseModel(NamedTuple):
  """A trained sparse network.

  Attributes:
    module: The Flax module; `module.apply(variables, images, train=False)`.
    variables: `params`, with exact zeros outside the masks, and `batch_stats`.
    masks: {path: bool array} of the sparse kernels, "Conv_0/kernel".
    info: `model`, `width`, `shortcut_size`, `precision`, `num_classes`,
      `image_shape`, `mean` and `std` (by channel, of pixels in [0, 1], for
      normalising), `dataset`,
      `test_accuracy`, `sparsity` (of the run); `hidden` (the channels inside
      each block) if dead ones were removed.
  """

  module: Any
  variables: dict[str, Any]
  masks: dict[str, np.ndarray]
  info: dict[str, Any]

  def matrices(self, kind: Kind = "bcoo") -> dict[str, Any]:
    """The sparse kernels as sparse matrices of (n_out, fan-in).

    The columns of a convolution are in the order (channel, row, column), that
    of `jax.lax.conv_general_dilated_patches`.

    Args:
      kind: "bcoo" or "csr", of `jax.experimental.sparse`.

    Returns:
      A matrix for each path, with as many stored values as the mask has ones.
    """
    flat = _flatten(self.variables["params"])
    make = _MAKERS[kind]
    return {
      path: make(_as_matrix(flat[path]), _as_matrix(mask))
      for path, mask in self.masks.items()
    }

  def apply_sparse(
    self, images: jax.Array, matrices: dict[str, Any]
  ) -> jax.Array:
    """Logits, computed with sparse matrices in place of the sparse kernels.

    Args:
      images: (b, h, w, c), normalised.
      matrices: From `matrices`.

    Returns:
      (b, num_classes).
    """
    from flax import linen as nn

    def intercept(layer: Any, args: Any, kwargs: Any, context: Any) -> Any:
      path = "/".join((*context.module.path, "kernel"))
      if context.method_name != "__call__" or path not in matrices:
        return layer(*args, **kwargs)
      return _multiply(context.module, args[0], matrices[path])

    with nn.intercept_methods(intercept):
      return self.module.apply(self.variables, images, train=False)


def _multiply(layer: Any, x: jax.Array, matrix: Any) -> jax.Array:
  """What a Dense or Conv layer does, by a sparse matrix."""
  from flax import linen as nn

  if isinstance(layer, nn.Conv):
    convolution: Any = layer
    x = jax.lax.conv_general_dilated_patches(
      x,
      convolution.kernel_size,
      convolution.strides,
      convolution.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
  rows = x.reshape(-1, x.shape[-1]).astype(matrix.dtype)
  y = (matrix @ rows.T).T
  if layer.use_bias:
    y += layer.get_variable("params", "bias")[None]
  return y.reshape(*x.shape[:-1], -1).astype(layer.dtype or y.dtype)


def _as_matrix(kernel: Any) -> np.ndarray:
  """(kh, kw, in, out) to (out, in * kh * kw); (in, out) to (out, in)."""
  kernel = np.asarray(kernel)
  return np.moveaxis(kernel, -2, 0).reshape(-1, kernel.shape[-1]).T


def _bcoo(matrix: np.ndarray, mask: np.ndarray) -> Any:
  from jax.experimental import sparse

  indices = np.argwhere(mask)
  return sparse.BCOO(
    (jnp.asarray(matrix[mask]), jnp.asarray(indices, jnp.int32)),
    shape=matrix.shape,
    indices_sorted=True,
    unique_indices=True,
  )


def _csr(matrix: np.ndarray, mask: np.ndarray) -> Any:
  from jax.experimental import sparse

  starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
  return sparse.CSR(
    (
      jnp.asarray(matrix[mask]),
      jnp.asarray(np.nonzero(mask)[1], jnp.int32),
      jnp.asarray(starts, jnp.int32),
    ),
    shape=matrix.shape,
  )


_MAKERS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
  "bcoo": _bcoo,
  "csr": _csr,
}


def _flatten(tree: Any) -> dict[str, np.ndarray]:
  leaves = _paths.by_name(tree)
  return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def _nest(flat: dict[str, np.ndarray]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.asarray(leaf)
  return tree


def save(
  path: pathlib.Path,
  variables: dict[str, Any],
  masks: dict[str, np.ndarray],
  info: dict[str, Any],
) -> None:
  """Writes a model's file; what `load` reads.

  Args:
    path: The file.
    variables: `params` and `batch_stats`.
    masks: {path in `params`: bool array} of the sparse kernels.
    info: As `SparseModel.info`.

  Raises:
    RunError: If it cannot be written.
  """
  from safetensors import numpy as safetensors

  tensors: dict[str, np.ndarray] = {}
  shapes = {}
  for name, leaf in _flatten(variables).items():
    mask = masks.get(name.removeprefix("params/"))
    if mask is None:
      tensors[f"dense/{name}"] = np.ascontiguousarray(leaf)
    else:
      tensors |= {f"{kind}/{name}": x for kind, x in _pack(leaf, mask).items()}
      shapes[name] = list(mask.shape)
  metadata = {
    "format": _FORMAT,
    "info": json.dumps(info),
    "shapes": json.dumps(shapes),
    "crc": str(_crc(tensors)),
  }
  records.write_bytes(path, safetensors.save(tensors, metadata))


def _pack(kernel: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
  """The tensors of a sparse kernel, by their kind."""
  # A row for each neuron, the last axis of a kernel.
  rows = mask.reshape(-1, mask.shape[-1]).T
  fan_ins = rows.sum(axis=1)
  neurons = np.flatnonzero(fan_ins)
  sizes = set(fan_ins[neurons].tolist())
  if len(sizes) != 1 or sizes == {rows.shape[1]}:
    return {"values": kernel[mask], "mask": np.packbits(mask)}
  shape = len(neurons), *sizes
  small = np.min_scalar_type(rows.shape[1] - 1)
  columns = np.nonzero(rows)[1].reshape(shape).astype(small)
  values = kernel.reshape(-1, kernel.shape[-1]).T[rows].reshape(shape)
  found = {"values": values, "indices": columns}
  if len(neurons) < len(rows):
    found["neurons"] = neurons.astype(np.uint32)
  return found


def _unpack_one(
  tensors: dict[str, np.ndarray], path: str, shape: list[int]
) -> tuple[np.ndarray, np.ndarray]:
  """A kernel and its mask, as `_pack` was given them."""
  values = tensors[f"values/{path}"]
  if f"mask/{path}" in tensors:
    bits = np.unpackbits(tensors[f"mask/{path}"], count=math.prod(shape))
    mask = bits.astype(bool).reshape(shape)
    kernel = np.zeros(shape, values.dtype)
    kernel[mask] = values
    return kernel, mask
  neurons = tensors.get(f"neurons/{path}", np.arange(shape[-1]))
  active = neurons[:, None], tensors[f"indices/{path}"]
  rows = np.zeros((shape[-1], math.prod(shape[:-1])), values.dtype)
  mask = np.zeros(rows.shape, bool)
  rows[active], mask[active] = values, True
  return rows.T.reshape(shape), mask.T.reshape(shape)


def _crc(tensors: dict[str, np.ndarray]) -> int:
  crc = 0
  for name in sorted(tensors):
    crc = zlib.crc32(name.encode(), crc)
    crc = zlib.crc32(
      np.ascontiguousarray(tensors[name]).view(np.uint8).data, crc
    )
  return crc


def load(path: str | pathlib.Path) -> SparseModel:
  """Reads a model's file.

  Args:
    path: What `python -m sparseopt_jax.export` wrote.

  Returns:
    The model, ready to be applied.

  Raises:
    UsageError: If the file is not one of these, is damaged, or does not say
      which model it holds; or it is of float64 and JAX is not set to have that.
  """
  tensors, metadata = _read(pathlib.Path(path))
  if metadata.get("format") != _FORMAT:
    raise UsageError(
      f"{path} is not a sparse model of this version: its format is "
      f"{metadata.get('format')!r}, not {_FORMAT!r}"
    )
  if metadata.get("crc") != str(_crc(tensors)):
    raise UsageError(f"{path} is damaged: its CRC does not match its content")
  info = json.loads(metadata["info"])
  missing = _MODEL - info.keys()
  if missing:
    raise UsageError(f"{path} does not say {', '.join(sorted(missing))}")
  if info["precision"] == "float64" and not jax.config.read("jax_enable_x64"):
    raise UsageError(
      f"{path} holds float64: set jax.config.update('jax_enable_x64', True)"
    )
  flat, masks = _unpack(tensors, json.loads(metadata["shapes"]))
  module = models.create(
    info["model"],
    info["num_classes"],
    width=info["width"],
    shortcut_size=info["shortcut_size"],
    dtype=info["precision"],
  )
  if "hidden" in info:
    module = module.clone(hidden=info["hidden"])
  return SparseModel(module, _nest(flat), masks, info)


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  import safetensors

  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = file.keys()
      tensors = {name: file.get_tensor(name) for name in names}
      return tensors, file.metadata() or {}
  except (OSError, safetensors.SafetensorError) as error:
    raise UsageError(f"{path} cannot be read: {error}") from None


def _unpack(
  tensors: dict[str, np.ndarray], shapes: dict[str, list[int]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  flat = {}
  masks = {}
  for name, tensor in tensors.items():
    kind, _, path = name.partition("/")
    if kind == "dense":
      flat[path] = tensor
    elif kind == "values":
      flat[path], mask = _unpack_one(tensors, path, shapes[path])
      masks[path.removeprefix("params/")] = mask
  return flat, masks


def evaluate(
  model: SparseModel,
  dataset: Any,
  kind: Kind | Literal["dense"] = "dense",
  batch_size: int = 128,
) -> float:
  """Test accuracy.

  Args:
    model: From `load`.
    dataset: From `sparseopt_jax.data.load`.
    kind: How the sparse kernels are multiplied: as dense ones, or as sparse
      matrices.
    batch_size: Images at a time.

  Returns:
    Fraction of the test set, in [0, 1].
  """
  if kind == "dense":
    apply = functools.partial(model.module.apply, train=False)
    logits = jax.jit(lambda x: apply(model.variables, x))
  else:
    matrices = model.matrices(kind)
    logits = jax.jit(lambda x: model.apply_sparse(x, matrices))
  hits = 0
  for batch in dataset.test_batches(batch_size):
    images = dataset.preprocess(batch["image"], model.info["precision"])
    found = np.asarray(logits(images)).argmax(axis=-1)
    hits += int(np.sum((found == batch["label"]) & batch["valid"]))
  return hits / dataset.num_test


def _export(
  run: pathlib.Path, out: pathlib.Path, data_dir: str | None, remove_dead: bool
) -> str:
  """Exports a finished run and returns what to say about it.

  Raises:
    RunError: If the file does not have the accuracy of the run. It is removed.
  """
  summary = _finished(run)
  from sparseopt_jax.training import build

  config = Config.from_identity(folder.read_network(run))
  config = dataclasses.replace(config, data_dir=data_dir)
  dataset = build.dataset(config)
  variables, masks = _final(config, run, summary["step"])
  info = {
    "model": config.model,
    "width": config.width,
    "shortcut_size": int(config.shortcut[0]),
    "precision": config.precision,
    "num_classes": dataset.num_classes,
    "image_shape": list(dataset.image_shape),
    "mean": list(dataset.mean),
    "std": list(dataset.std),
    "dataset": config.dataset,
    "test_accuracy": summary["test_accuracy"],
    "sparsity": summary["sparsity"],
  }
  dense = sum(x.nbytes for x in jax.tree.leaves(variables))
  said = ""
  if remove_dead:
    variables, masks, said = _without_dead(variables, masks, info)
  save(out, variables, masks, info)
  loaded = load(out)
  accuracy = evaluate(loaded, dataset)
  if abs(accuracy - summary["test_accuracy"]) > _TOLERANCE:
    out.unlink()
    raise RunError(
      f"{run}: the checkpoint of step {summary['step']} has a test accuracy of "
      f"{accuracy:.2%}, not {summary['test_accuracy']:.2%} as {folder.SUMMARY} "
      "says; nothing is exported"
    )
  size = out.stat().st_size
  return (
    f"{out}: {size:,} bytes, {size / dense:.1%} of {dense:,} dense; test "
    f"accuracy {accuracy:.2%} ({summary['test_accuracy']:.2%} in the run){said}"
  )


def _without_dead(
  variables: dict[str, Any], masks: dict[str, np.ndarray], info: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
  """The model without dead channels, and what to say; notes them in `info`."""
  flat = _flatten(variables)
  smaller, masks = shrink.shrink(flat, masks)
  before, after = map(shrink.hidden, (flat, smaller))
  if after != before:
    info["hidden"] = after
  all_channels, left = (sum(map(sum, x)) for x in (before, after))
  size, smaller_size = (
    sum(x.size for x in tree.values()) for tree in (flat, smaller)
  )
  said = (
    f"; {all_channels - left} of {all_channels} channels inside blocks are "
    f"removed, {smaller_size / size:.1%} of {size:,} numbers are left, zeros "
    "counted"
  )
  return _nest(smaller), masks, said


def _final(
  config: Config, run: pathlib.Path, step: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The run's variables and masks after its last step."""
  from sparseopt_jax.training import build
  from sparseopt_jax.training import checkpoints
  from sparseopt_jax.training.state import has_masks

  run, config, index = _checkpointed(run, config)
  layout = build.devices(config)
  _, create = build.task(config, layout)
  path = run / folder.CHECKPOINTS
  if not path.is_dir():
    raise UsageError(f"{run} has no checkpoints")
  target = layout.target(jax.eval_shape(create, np.uint32(config.seed)))
  saved = checkpoints.Checkpoints(path, keep=None, read_only=True)
  with contextlib.closing(saved):
    try:
      state = saved.read(step, target)
    except Exception as error:  # Orbax has no one type for a bad file.
      raise UsageError(
        f"{run}: no sound checkpoint of step {step}: "
        f"{checkpoints.first_line(error)}"
      ) from error
  if config.networks > 1:
    state = jax.tree.map(lambda x: x[index], state)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  if not has_masks(state.opt_state):
    return variables, {}
  return variables, _flatten(sparseopt_jax.get_masks(state.opt_state))


def _checkpointed(
  run: pathlib.Path, config: Config
) -> tuple[pathlib.Path, Config, int]:
  """The run that has the checkpoints of a network, and its place there."""
  whole_run = folder.joint_run(run)
  if whole_run is None:
    return run, config, 0
  whole = Config.from_identity(folder.read_config(whole_run))
  index = config.seed - whole.seed
  is_there = 0 <= index < whole.networks
  if not is_there or whole.of_network(index).identity() != config.identity():
    raise UsageError(f"{run} is not a network of the run {whole_run}")
  whole = dataclasses.replace(whole, data_dir=config.data_dir)
  return whole_run, whole, index


def _finished(run: pathlib.Path) -> dict[str, Any]:
  path = run / folder.SUMMARY
  try:
    summary = json.loads(path.read_text())
    return {name: summary[name] for name in _FIGURES}
  except (OSError, ValueError, KeyError, TypeError) as error:
    several = any(run.glob("seed-*"))
    advice = f"; give one of its networks, {run / 'seed-K'}" if several else ""
    raise UsageError(
      f"{run} is not the folder of a finished run: {path.name}: {error}{advice}"
    ) from None


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = cli.Parser(
    prog="python -m sparseopt_jax.export",
    description="Writes a run's final sparse model as safetensors.",
  )
  parser.add_argument("run", type=pathlib.Path, metavar="RUN")
  parser.add_argument("out", type=pathlib.Path, metavar="OUT")
  parser.add_argument(
    "--remove-dead",
    action="store_true",
    help="leave out the channels inside blocks that are dead for good: a "
    "smaller network, with the same outputs up to rounding",
  )
  parser.add_argument(
    "--data-dir",
    help="folder of the run's data set, to check the accuracy of the file "
    "(default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
  )

  def command() -> None:
    args = parser.parse_args(arguments)
    if args.out.exists():
      raise UsageError(f"OUT {args.out} is there already")
    if not args.out.parent.is_dir():
      raise UsageError(f"OUT {args.out}: there is no folder {args.out.parent}")
    print(_export(args.run, args.out, args.data_dir, args.remove_dead))

  return cli.run(command)


if __name__ == "__main__":
  sys.exit(main())
