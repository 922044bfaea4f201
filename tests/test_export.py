"""The exported model: what is in the file, and what it computes."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tiny

from sparseopt_jax import export
from sparseopt_jax import models
from sparseopt_jax import train
from sparseopt_jax.training import folder
from sparseopt_jax.training.errors import UsageError

_create = models.create  # Before it is replaced.


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
  tiny.use(monkeypatch)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A finished run and its file."""
  path = tmp_path_factory.mktemp("finished")
  with pytest.MonkeyPatch.context() as patch:
    tiny.use(patch)
    assert train.main(tiny.arguments(path / "run")) == 0
    assert export.main([str(path / "run"), str(path / "model")]) == 0
  return path / "run", path / "model"


def _header(path):
  content = path.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_values_are_the_active_weights_of_the_run(exported):
  run, path = exported
  state = tiny.restored(run)
  header, data = _header(path)
  for name in ("Conv_0", "Conv_1", "Dense_0"):
    kernel = np.asarray(state.params[name]["kernel"])
    mask = np.asarray(tiny.masks(state)[name]["kernel"])
    entry = header[f"values/params/{name}/kernel"]
    start, stop = entry["data_offsets"]
    values = np.frombuffer(data[start:stop], np.float32)
    np.testing.assert_array_equal(values, kernel[mask])
    entry = header[f"mask/params/{name}/kernel"]
    start, stop = entry["data_offsets"]
    assert stop - start == -(-mask.size // 8)
    bits = "".join(f"{byte:08b}" for byte in data[start:stop])
    expected = "".join("01"[bit] for bit in mask.reshape(-1).astype(int))
    assert bits[: mask.size] == expected


def test_load_gives_every_array_of_the_run(exported):
  run, path = exported
  state = tiny.restored(run)
  model = export.load(path)
  expected = {"params": state.params, "batch_stats": state.batch_stats}
  jax.tree.map(np.testing.assert_array_equal, dict(model.variables), expected)
  assert model.info["test_accuracy"] == tiny.metrics(run)[-1]["test_accuracy"]
  assert model.info["dataset"] == "digits"
  assert model.info["num_classes"] == 10


@pytest.mark.parametrize("kind", ["dense", "bcoo", "csr"])
def test_accuracy_is_that_of_the_run(exported, kind):
  model = export.load(exported[1])
  accuracy = export.evaluate(model, tiny.digits(), kind, batch_size=16)
  assert accuracy == model.info["test_accuracy"]


@pytest.mark.parametrize("kind", ["bcoo", "csr"])
def test_sparse_matrices_compute_the_same(exported, kind):
  model = export.load(exported[1])
  images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
  matrices = model.matrices(kind)
  expected = model.module.apply(model.variables, images, train=False)
  # All but the sparse kernels: were they used, there would be zeros.
  params = jax.tree.map(
    lambda x: jnp.zeros_like(x) if x.ndim > 1 else x, model.variables["params"]
  )
  hollow = model._replace(variables={**model.variables, "params": params})
  found = hollow.apply_sparse(images, matrices)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  for path, mask in model.masks.items():
    assert matrices[path].nse == mask.sum()
    assert matrices[path].shape == (mask.shape[-1], mask[..., 0].size)


@pytest.mark.slow
def test_the_command_removes_dead_channels(monkeypatch, tmp_path, capsys):
  """Of a ResNet-8, in which SRigL has ablated some; it says how many."""
  monkeypatch.setattr(models, "create", _create)
  run, paths = tmp_path / "run", [tmp_path / "whole", tmp_path / "smaller"]
  flags = {"topology": "srigl", "gamma_sal": 1.0, "drop_fraction": 0.6}
  assert train.main(tiny.arguments(run, width=4, sparsity=0.8, **flags)) == 0
  assert export.main([str(run), str(paths[0])]) == 0
  capsys.readouterr()
  assert export.main([str(run), str(paths[1]), "--remove-dead"]) == 0
  printed = capsys.readouterr().out
  whole, smaller = map(export.load, paths)
  removed = 4 + 8 + 16 - sum(map(sum, smaller.info["hidden"]))
  assert removed
  assert f"{removed} of 28 channels inside blocks are removed" in printed
  images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
  expected = whole.module.apply(whole.variables, images, train=False)
  got = smaller.module.apply(smaller.variables, images, train=False)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  sizes = [
    sum(x.size for x in jax.tree.leaves(model.variables))
    for model in (whole, smaller)
  ]
  assert f"{sizes[1] / sizes[0]:.1%} of {sizes[0]:,} numbers" in printed
  got = smaller.apply_sparse(images, smaller.matrices())
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def condensed(tmp_path_factory):
  """A finished run of SRigL, with ablated neurons, and its file."""
  path = tmp_path_factory.mktemp("condensed")
  flags = {"topology": "srigl", "gamma_sal": 1.0, "drop_fraction": 0.6}
  with pytest.MonkeyPatch.context() as patch:
    tiny.use(patch)
    assert train.main(tiny.arguments(path / "run", **flags)) == 0
    assert export.main([str(path / "run"), str(path / "model")]) == 0
  return path / "run", path / "model"


def test_constant_fan_in_is_condensed(condensed):
  """Values and indices, a row for each live neuron."""
  run, path = condensed
  state = tiny.restored(run)
  file = safetensors.safe_open(path, framework="numpy")
  dead = 0
  for name in ("Conv_1", "Dense_0"):
    kernel = np.asarray(state.params[name]["kernel"])
    mask = np.asarray(tiny.masks(state)[name]["kernel"])
    values = file.get_tensor(f"values/params/{name}/kernel")
    indices = file.get_tensor(f"indices/params/{name}/kernel")
    assert f"mask/params/{name}/kernel" not in file.keys()  # noqa: SIM118
    live = [i for i in range(mask.shape[-1]) if mask[..., i].any()]
    dead += mask.shape[-1] - len(live)
    if len(live) < mask.shape[-1]:
      neurons = file.get_tensor(f"neurons/params/{name}/kernel")
      np.testing.assert_array_equal(neurons, live)
    assert (
      values.shape == indices.shape == (len(live), mask[..., live[0]].sum())
    )
    for row, i in enumerate(live):
      np.testing.assert_array_equal(
        indices[row], np.flatnonzero(mask[..., i].ravel())
      )
      np.testing.assert_array_equal(
        values[row], kernel[..., i].ravel()[indices[row]]
      )
  assert dead, "a neuron was to be ablated"


def test_load_of_a_condensed_model(condensed):
  run, path = condensed
  state = tiny.restored(run)
  model = export.load(path)
  expected = {"params": state.params, "batch_stats": state.batch_stats}
  jax.tree.map(np.testing.assert_array_equal, dict(model.variables), expected)
  for name, mask in model.masks.items():
    kernel = tiny.masks(state)[name.removesuffix("/kernel")]["kernel"]
    np.testing.assert_array_equal(mask, kernel)


def test_the_command_says_sizes_and_accuracy(exported, tmp_path, capsys):
  run, path = exported
  assert export.main([str(run), str(tmp_path / "out")]) == 0
  printed = capsys.readouterr().out
  accuracy = tiny.metrics(run)[-1]["test_accuracy"]
  assert f"{path.stat().st_size:,} bytes" in printed
  assert printed.count(f"{accuracy:.2%}") == 2


def test_the_file_says_how_to_normalise(exported):
  model, dataset = export.load(exported[1]), tiny.digits()
  pixels = next(iter(dataset.test_batches(4)))["image"]
  info = model.info
  np.testing.assert_allclose(
    (pixels / 255 - info["mean"]) / info["std"],
    dataset.preprocess(pixels),
    rtol=1e-5,
    atol=1e-5,
  )


def test_another_accuracy_than_the_runs_is_no_export(
  exported, tmp_path, capsys
):
  run = shutil.copytree(exported[0], tmp_path / "run")
  summary = json.loads((run / folder.SUMMARY).read_text())
  summary["test_accuracy"] += 0.1
  (run / folder.SUMMARY).write_text(json.dumps(summary))
  assert export.main([str(run), str(tmp_path / "model")]) == 1
  assert "nothing is exported" in capsys.readouterr().err
  assert not (tmp_path / "model").exists()


def test_float64_needs_jax_to_have_it(exported, tmp_path):
  model = export.load(exported[1])
  info = {**model.info, "precision": "float64"}
  export.save(tmp_path / "wide", model.variables, model.masks, info)
  with pytest.raises(UsageError, match="jax_enable_x64"):
    export.load(tmp_path / "wide")


def test_a_dense_run_can_be_exported(tmp_path):
  arguments = tiny.arguments(tmp_path / "run", topology="dense")
  assert train.main(arguments) == 0
  assert export.main([str(tmp_path / "run"), str(tmp_path / "model")]) == 0
  model = export.load(tmp_path / "model")
  assert model.masks == {}
  accuracy = export.evaluate(model, tiny.digits())
  assert accuracy == model.info["test_accuracy"]


def _flip(path):
  content = bytearray(path.read_bytes())
  content[-20] ^= 4
  path.write_bytes(content)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-20])


def _foreign(path):
  from safetensors import numpy as safetensors

  safetensors.save_file({"x": np.zeros(3)}, path)


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (_flip, "is damaged: its CRC does not match"),
    (_truncate, "cannot be read"),
    (_foreign, "is not a sparse model of this version"),
    (lambda path: path.write_text("no model"), "cannot be read"),
    (lambda path: path.unlink(), "cannot be read"),
  ],
  ids=["flipped", "truncated", "foreign", "text", "missing"],
)
def test_unknown_and_damaged_files_are_refused(
  exported, tmp_path, harm, message
):
  path = tmp_path / "model"
  path.write_bytes(exported[1].read_bytes())
  harm(path)
  with pytest.raises(UsageError, match=message):
    export.load(path)


def test_a_file_that_does_not_name_its_model_is_refused(tmp_path):
  kernel = np.ones((3, 2), np.float32)
  variables = {"params": {"kernel": kernel}}
  masks = {"kernel": kernel > 0}
  export.save(tmp_path / "model", variables, masks, {"width": 3})
  message = "does not say model, num_classes, precision, shortcut_size"
  with pytest.raises(UsageError, match=message):
    export.load(tmp_path / "model")


@pytest.mark.parametrize(
  ("run", "out", "message"),
  [
    ("{tmp}", "{tmp}/out", "is not the folder of a finished run"),
    ("{run}", "{tmp}", "is there already"),
    ("{run}", "{tmp}/no/out", "there is no folder"),
    ("{run}", "", "required: OUT"),
  ],
)
def test_bad_input(exported, tmp_path, capsys, run, out, message):
  arguments = f"{run} {out}".format(run=exported[0], tmp=tmp_path).split()
  assert export.main(arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert message in error
  assert error.count("\n") == 1


def test_a_damaged_last_checkpoint_is_refused(exported, tmp_path, capsys):
  import shutil

  run = shutil.copytree(exported[0], tmp_path / "run")
  shutil.rmtree(run / folder.CHECKPOINTS / str(tiny.STEPS) / "state")
  assert export.main([str(run), str(tmp_path / "out")]) == 2
  assert "no sound checkpoint of step 12" in capsys.readouterr().err
