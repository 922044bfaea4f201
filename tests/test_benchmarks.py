"""The benchmarks run, and their arithmetic is right."""

import json

import numpy as np
import pytest

from sparseopt_jax.benchmarks import __main__ as command
from sparseopt_jax.benchmarks import timing


@pytest.mark.parametrize(
  "arguments",
  [
    ["optimizer", "--model", "resnet8"],
    ["mask-update", "--model", "resnet8"],
    ["training-step", "--model", "resnet8", "--batch-size", "4"],
  ],
)
def test_commands_print_a_table_and_write_json(arguments, tmp_path, capsys):
  output = tmp_path / "figures.json"
  command.main([*arguments, "--repeats", "2", "--output", str(output)])
  printed = capsys.readouterr().out
  figures = json.loads(output.read_text())
  assert list(figures["rows"]) == ["plain", "static", "SET", "RigL"]
  assert figures["rows"]["plain"]["ratio"] == 1.0
  assert figures["jax"] in printed
  assert all(name in printed for name in figures["rows"])


def test_ratios_are_taken_round_by_round():
  # The machine is twice as slow in the second round; the ratio stays.
  plain = timing.Times(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
  other = timing.Times(np.array([3.0, 6.0]), np.array([2.0, 4.0]))
  times = {"plain": plain, "other": other}
  wall = timing.ratios(times, "plain", "wall")["other"]
  assert (wall["ratio"], wall["ratio_quartiles"]) == (3.0, [3.0, 3.0])
  assert wall["milliseconds"] == 4500.0
  assert timing.ratios(times, "plain", "cpu")["other"]["ratio"] == 3.0
