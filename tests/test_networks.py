"""Several networks in one program: each is the one that is trained alone."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparseopt_jax import compare
from sparseopt_jax import export
from sparseopt_jax import train
from sparseopt_jax.data import order
from sparseopt_jax.training import feed
from sparseopt_jax.training import folder
from sparseopt_jax.training import parallel
from sparseopt_jax.training import records
from sparseopt_jax.training import state as state_lib
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError

SEEDS = (5, 6, 7, 8)
FOUR = {"networks": 4, "seed": SEEDS[0]}
# One network a device; two devices; all on each device by vmap.
LAYOUTS = {"1 device": (1, False), "2 devices": (2, False), "vmap": (2, True)}


@pytest.fixture
def x64():
  """Double precision, and single precision again afterwards."""
  yield
  jax.config.update("jax_enable_x64", False)


def _as_on_accelerators(monkeypatch):
  """All networks of a device in one step, by vmap."""
  begin = parallel.Networks.__init__

  def of_accelerator(self, devices, networks):
    begin(self, devices, networks)
    self._size, self.mapped = networks, True

  monkeypatch.setattr(parallel.Networks, "__init__", of_accelerator)


def _of_network(path, index):
  """A network's arrays in a checkpoint of several."""
  return [leaf[index] for leaf in tiny.final_state(path)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Each seed trained alone, in float64."""
  path = tmp_path_factory.mktemp("alone")
  with pytest.MonkeyPatch.context() as patch:
    tiny.use(patch)
    for seed in SEEDS:
      flags = {"seed": seed, "precision": "float64"}
      assert train.main(tiny.arguments(path / str(seed), **flags)) == 0
    states = {seed: tiny.final_state(path / str(seed)) for seed in SEEDS}
  jax.config.update("jax_enable_x64", False)
  return path, states


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_ends_as_alone(monkeypatch, tmp_path, x64, alone, layout):
  devices, mapped = LAYOUTS[layout]
  path, states = alone
  tiny.use(monkeypatch)
  if mapped:
    _as_on_accelerators(monkeypatch)
  together = tmp_path / "together"
  flags = {**FOUR, "devices": devices, "precision": "float64"}
  assert train.main(tiny.arguments(together, **flags)) == 0
  for index, seed in enumerate(SEEDS):
    own, folder_of_own = states[seed], together / f"seed-{seed}"
    for a, b in zip(_of_network(together, index), own, strict=True):
      assert a.dtype == b.dtype
      if not mapped or not np.issubdtype(a.dtype, np.floating):
        np.testing.assert_array_equal(a, b)
      elif a.dtype == np.float64:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
      else:  # The sum of the losses.
        np.testing.assert_allclose(a, b, rtol=1e-6)
    lines, expected = (
      tiny.metrics(folder_of_own),
      tiny.metrics(path / str(seed)),
    )
    assert [line["step"] for line in lines] == [6, 12]
    for line, other in zip(lines, expected, strict=True):
      assert line["mask_change"] == other["mask_change"] > 0
      assert line["test_accuracy"] == other["test_accuracy"]
      np.testing.assert_allclose(line["train_loss"], other["train_loss"])
    configs = [
      json.loads((each / folder.CONFIG).read_text())
      for each in (folder_of_own, path / str(seed))
    ]
    assert configs[0] == configs[1]
  summaries = [
    json.loads((together / f"seed-{seed}" / folder.SUMMARY).read_text())
    for seed in SEEDS
  ]
  # Time is of the program; each network has its own share of the speed.
  assert len({summary["seconds"] for summary in summaries}) == 1
  assert {summary["networks"] for summary in summaries} == {4}
  losses = {
    tiny.metrics(together / f"seed-{s}")[-1]["test_loss"] for s in SEEDS
  }
  assert len(losses) == 4, "each network was to be another one"


def _signal_at(monkeypatch, step):
  """Sends SIGTERM once, as the batches of a later step are asked for."""
  sent = []
  plain = feed.Resident.train

  def asking(self, now):
    if now >= step and not sent:
      sent.append(now)
      signal.raise_signal(signal.SIGTERM)
    return plain(self, now)

  monkeypatch.setattr(feed.Resident, "train", asking)


@pytest.mark.parametrize(
  "flags",
  [
    {},
    pytest.param(FOUR, marks=pytest.mark.slow),
    pytest.param({**FOUR, "devices": 2}, marks=pytest.mark.slow),
  ],
)
def test_stopped_and_resumed_bit_for_bit(monkeypatch, tmp_path, flags):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(whole, **flags)) == 0
  with monkeypatch.context() as patch:
    _signal_at(patch, 7)
    assert train.main(tiny.arguments(parts, **flags)) == 143
  steps = [int(p.name) for p in (parts / folder.CHECKPOINTS).iterdir()]
  assert 6 < max(steps) < tiny.STEPS
  assert train.main(tiny.arguments(parts, **flags, resume=True)) == 0
  for a, b in zip(
    tiny.final_state(whole), tiny.final_state(parts), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  names = [f"seed-{seed}" for seed in SEEDS] if flags else ["."]
  for name in names:
    assert tiny.metrics(whole / name) == tiny.metrics(parts / name)


@pytest.mark.slow
def test_resumed_between_the_lines_of_two_networks(monkeypatch, tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(whole, **FOUR)) == 0
  assert train.main(tiny.arguments(parts, **FOUR)) == 0
  for seed in SEEDS[2:]:
    file = parts / f"seed-{seed}" / folder.METRICS
    records.write_bytes(file, file.read_bytes().splitlines(True)[0])
  assert train.main(tiny.arguments(parts, **FOUR, resume=True)) == 0
  for seed in SEEDS:
    name = f"seed-{seed}"
    assert tiny.metrics(whole / name) == tiny.metrics(parts / name)


def test_device_and_host_draw_the_same_batches(monkeypatch, tmp_path):
  """Hooks have the batches drawn on the host, one by one."""
  device, host = tmp_path / "device", tmp_path / "host"
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(device)) == 0
  monkeypatch.undo()
  tiny.use(monkeypatch, lambda step, batch: batch)
  assert train.main(tiny.arguments(host)) == 0
  for a, b in zip(
    tiny.final_state(device), tiny.final_state(host), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert tiny.metrics(device) == tiny.metrics(host)


def _spoil(monkeypatch):
  """The network of seed 7 begins with NaN."""
  create = state_lib.create

  def spoiled(seed, variables, tx):
    state = create(seed, variables, tx)
    factor = jnp.where(seed == 7, jnp.nan, 1.0)
    return state._replace(
      params=jax.tree.map(lambda p: p * factor, state.params)
    )

  monkeypatch.setattr(state_lib, "create", spoiled)


@pytest.mark.parametrize(
  "mapped", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_network_that_is_not_finite_leaves_the_others(
  monkeypatch, tmp_path, capsys, mapped
):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  tiny.use(monkeypatch)
  if mapped:
    _as_on_accelerators(monkeypatch)
  assert train.main(tiny.arguments(whole, **FOUR)) == 0
  with monkeypatch.context() as patch:
    _spoil(patch)
    capsys.readouterr()
    assert train.main(tiny.arguments(parts, **FOUR)) == 1
    told = capsys.readouterr()
    assert told.out.count("network of seed 7 by step 1; the others go on") == 1
    assert "network(s) of seed 7; the others are finished" in told.err
    # The finished run tells it again.
    assert train.main(tiny.arguments(parts, **FOUR, resume=True)) == 1
  for seed in SEEDS:
    is_spoiled = seed == 7
    name = f"seed-{seed}"
    assert (parts / name / folder.SUMMARY).exists() != is_spoiled
    same = tiny.metrics(parts / name) == tiny.metrics(whole / name)
    assert same != is_spoiled


def test_steps_left_out_are_counted_for_each(monkeypatch, tmp_path):
  parts = tmp_path / "parts"
  tiny.use(monkeypatch)
  _spoil(monkeypatch)
  # A network that begins with NaN never makes a step; the run ends in error.
  assert train.main(tiny.arguments(parts, **FOUR, skip_nonfinite=True)) == 1
  counts = [
    tiny.metrics(parts / f"seed-{seed}")[-1]["nonfinite_steps"]
    for seed in SEEDS
  ]
  assert counts == [0, 0, tiny.STEPS, 0]


def test_one_network_is_exported_as_alone(monkeypatch, tmp_path):
  tiny.use(monkeypatch)
  together, one = tmp_path / "together", tmp_path / "one"
  assert train.main(tiny.arguments(together, **FOUR)) == 0
  assert train.main(tiny.arguments(one, seed=7)) == 0
  found = []
  for run in (together / "seed-7", one):
    out = tmp_path / f"{run.name}.safetensors"
    assert export.main([str(run), str(out)]) == 0
    found.append(export.load(out))
  assert found[0].info == found[1].info
  for a, b in zip(
    jax.tree.leaves(found[0].variables),
    jax.tree.leaves(found[1].variables),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  link = tmp_path / "link"
  link.symlink_to(together / "seed-7")
  assert export.main([str(link), str(tmp_path / "linked")]) == 0
  groups = compare.group(
    [compare.read(together / f"seed-{seed}") for seed in SEEDS]
  )
  assert [len(group.runs) for group in groups] == [4]


def test_another_number_of_networks_is_refused(monkeypatch, tmp_path, capsys):
  tiny.use(monkeypatch)
  run = tmp_path / "run"
  assert train.main(tiny.arguments(run, **FOUR)) == 0
  fewer = {**FOUR, "networks": 2, "resume": True}
  assert train.main(tiny.arguments(run, **fewer)) == 2
  assert "--networks 4 became 2" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [False, True])
def test_a_networks_folder_is_not_trained_in(
  monkeypatch, tmp_path, capsys, resume
):
  tiny.use(monkeypatch)
  run = tmp_path / "run"
  assert train.main(tiny.arguments(run, **FOUR)) == 0
  before = tiny.metrics(run / "seed-6")
  own = {"seed": 6, "resume": True} if resume else {"seed": 6}
  assert train.main(tiny.arguments(run / "seed-6", **own)) == 2
  assert "is that of one network of the run" in capsys.readouterr().err
  assert tiny.metrics(run / "seed-6") == before


def test_commands_name_the_folder_that_they_want(monkeypatch, tmp_path, capsys):
  tiny.use(monkeypatch)
  run = tmp_path / "run"
  assert train.main(tiny.arguments(run, **FOUR)) == 0
  assert export.main([str(run), str(tmp_path / "x")]) == 2
  assert f"give one of its networks, {run}/seed-K" in capsys.readouterr().err
  assert compare.main([str(run)]) == 2
  error = capsys.readouterr().err
  assert f"is a run of 4 networks; give their folders, such as {run}" in error
  # A folder that is not one of the run's networks.
  foreign = run / "seed-77"
  shutil.copytree(run / "seed-6", foreign)
  for seed in (77, 6):
    config = json.loads((run / "seed-6" / folder.CONFIG).read_text())
    config |= {"seed": seed, "topology": "set"}
    (foreign / folder.CONFIG).write_text(json.dumps(config))
    assert export.main([str(foreign), str(tmp_path / "x")]) == 2
    assert "is not a network of the run" in capsys.readouterr().err


def test_a_file_in_a_networks_place_is_one_line(monkeypatch, tmp_path, capsys):
  tiny.use(monkeypatch)
  run = tmp_path / "run"
  run.mkdir()
  (run / "seed-6").touch()
  assert train.main(tiny.arguments(run, **FOUR)) == 2
  assert "seed-6 cannot be made: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"networks": 0}, r"--networks must be in \[1, 2\^31\), got 0"),
    (
      {"networks": 3, "devices": 2},
      "--networks must be 1 or a multiple of --devices 2, got 3",
    ),
    (
      {"networks": 2, "seed": 2**32 - 1},
      r"--networks 2: seeds must be below 2\^32, got 4294967296",
    ),
    (
      {"networks": 2, "devices": 2, "shard_params": True},
      "--shard-params goes with one network, got --networks 2",
    ),
  ],
)
def test_bad_numbers_of_networks(flags, message):
  with pytest.raises(UsageError, match=message):
    Config(**flags)


def test_images_that_are_read_as_needed_are_refused(
  monkeypatch, tmp_path, capsys
):
  tiny.use(monkeypatch, lambda step, batch: batch)
  assert train.main(tiny.arguments(tmp_path / "run", **FOUR)) == 2
  assert "--networks 4 needs images in memory" in capsys.readouterr().err


def test_rows_of_an_epoch_are_those_of_its_steps():
  rows = order.epoch_rows(50, 3, 2, 16)
  assert rows.shape == (3, 16)
  assert len(set(rows.ravel())) == 48
  for step in range(3):
    one = order.train_indices(50, 3, 2 * 3 + step, 16)
    np.testing.assert_array_equal(rows[step], one)
  indices, valid = order.test_rows(40, 16)
  np.testing.assert_array_equal(indices[valid], np.arange(40))
