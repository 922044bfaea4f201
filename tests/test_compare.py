"""Comparing runs: groups, table, plot, bad input."""

import json
import shutil
import statistics

import pytest

from sparseopt_jax import compare
from sparseopt_jax.training import folder
from sparseopt_jax.training.config import Config


def _write(path, accuracies, **flags):
  """A run's folder with these test accuracies."""
  path.mkdir()
  identity = Config(**flags).identity()
  (path / folder.CONFIG).write_text(json.dumps(identity))
  lines = [
    {
      "step": 10 * epoch,
      "epoch": epoch,
      "test_accuracy": accuracy,
      "itop_rate": 0.25,
      "seconds": 10.0 * epoch,
    }
    for epoch, accuracy in enumerate(accuracies, 1)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (path / folder.METRICS).write_text(text)
  return path


@pytest.fixture
def runs(tmp_path):
  """Two seeds with the correction, two without, one of which is shorter."""
  return [
    _write(tmp_path / "a", [0.5, 0.8, 0.9], seed=0, epochs=3),
    _write(tmp_path / "b", [0.6, 0.7, 0.8], seed=1, epochs=3),
    _write(tmp_path / "c", [0.4, 0.5, 0.7], seed=0, epochs=3, correction="off"),
    _write(tmp_path / "d", [0.3, 0.65], seed=1, epochs=3, correction="off"),
  ]


def test_groups_differ_in_more_than_the_seed(runs):
  groups = compare.group([compare.read(path) for path in runs])
  assert [g.label for g in groups] == ["correction on", "correction off"]
  assert groups[0].final() == [0.9, 0.8]
  assert groups[0].epochs() == [1, 2, 3]
  assert groups[1].accuracies() == [[0.4, 0.5], [0.3, 0.65]]


def test_one_group_is_named_after_what_it_trains(runs):
  (group,) = compare.group([compare.read(path) for path in runs[:2]])
  assert group.label == "digits resnet8"


def test_runs_of_another_optimiser_make_another_group(runs, tmp_path):
  def ham():
    raise NotImplementedError

  path = _write(tmp_path / "ham", [0.9, 0.9, 0.9], seed=0, epochs=3)
  fields = folder.identity(Config(seed=0, epochs=3), ham)
  (path / folder.CONFIG).write_text(json.dumps(fields))
  groups = compare.group([compare.read(each) for each in (*runs[:2], path)])
  assert [len(each.runs) for each in groups] == [2, 1]
  assert groups[1].label.startswith(f"optimizer {__name__}.test_runs_of")


def test_a_flag_that_older_runs_do_not_know(runs):
  config = runs[1] / folder.CONFIG
  flags = json.loads(config.read_text())
  del flags["width"], flags["gamma_sal"]
  config.write_text(json.dumps(flags))
  groups = compare.group([compare.read(path) for path in runs])
  assert [len(g.runs) for g in groups] == [2, 2]


def test_table(runs):
  groups = compare.group([compare.read(path) for path in runs])
  header, on, off = compare.table(groups, 0.6).splitlines()
  assert "epochs to 60.00%" in header
  spread = statistics.stdev([0.9, 0.8])
  assert f"85.00% ± {spread:.2%}" in on
  assert "  1.5  " in on
  assert "2.0 (1 of 2)" in off
  assert "25.0%" in off
  assert compare.table(groups, 0.99).count("never") == 2
  # The longer run counts as far as the other one has got.
  assert off.startswith("correction off, epoch 2 of 3 ")
  assert on.startswith("correction on  ")
  assert f"{(0.5 + 0.65) / 2:.2%} ± " in off
  assert off.endswith(" 20")
  end = header.index("ITOP rate") + len("ITOP rate")
  assert on[:end].endswith("25.0%")
  assert off[:end].endswith("25.0%")


def test_command(runs, tmp_path, capsys):
  out = tmp_path / "figure.png"
  arguments = [*map(str, runs), "--out", str(out)]
  assert compare.main(arguments) == 0
  # The final accuracy of the weaker group, which has two common epochs.
  assert "epochs to 57.50%" in capsys.readouterr().out
  image = out.read_bytes()
  assert image.startswith(b"\x89PNG")
  assert len(image) > 10_000


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("", "required: RUN"),
    ("{tmp}/none", "config.json cannot be read"),
    ("{tmp}/empty", "holds no evaluation yet"),
    ("{tmp}/a --accuracy 95", r"--accuracy must be in \(0, 1\], got 95"),
    ("{tmp}/a --accuracy x", "--accuracy"),
    ("{tmp}/a --out {tmp}/no/x.png", "there is no folder"),
    ("{tmp}/a --seeds 3", "--seeds"),
    ("{tmp}/a {tmp}/b {tmp}/../{name}/a", "/a is given twice"),
    ("{tmp}/a {tmp}/c {tmp}/again", "again has the flags and the seed of"),
    ("{tmp}/a --out x.pdf", "--out must end in .png, got x.pdf"),
    ("{tmp}/a --out {tmp}/old.png", "/old.png is there already"),
  ],
)
def test_bad_input(runs, tmp_path, capsys, arguments, message):
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty" / folder.CONFIG).write_text("{}")
  shutil.copytree(tmp_path / "a", tmp_path / "again")
  (tmp_path / "old.png").write_text("a figure")
  assert (
    compare.main(arguments.format(tmp=tmp_path, name=tmp_path.name).split())
    == 2
  )
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert error.startswith("error: ")
  assert message.replace("\\", "") in error
  assert (tmp_path / "old.png").read_text() == "a figure"
