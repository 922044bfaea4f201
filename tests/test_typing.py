"""The package's types, as a type checker of a user sees them."""

import os
import pathlib
import subprocess
import sys

import pytest

import sparseopt_jax

PACKAGE = pathlib.Path(sparseopt_jax.__file__).parent
CLIENT = pathlib.Path(__file__).parent / "typed_client.py"


@pytest.mark.slow
def test_a_client_is_clean_under_mypy_strict(tmp_path):
  pytest.importorskip("mypy")
  assert (PACKAGE / "py.typed").exists()
  done = subprocess.run(
    [
      *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
      *("--config-file", os.devnull, str(CLIENT)),
    ],
    cwd=tmp_path,
    env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
