"""The notebooks run from the first cell to the last, and are kept so."""

import json
import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NAMES = ("gradient_skew", "quickstart", "transformer")


def read(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook):
  return [o for cell in notebook.cells for o in cell.get("outputs", [])]


def figures(notebook):
  return [o for o in outputs(notebook) if "image/png" in o.get("data", {})]


def test_there_are_no_others():
  assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_kept_with_the_outputs_of_one_whole_run(name):
  notebook = read(name)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  counts = [cell.execution_count for cell in code]
  assert counts == list(range(1, len(code) + 1))
  assert len(figures(notebook)) >= 2
  # Nothing went wrong, and nothing was said that is not for the reader.
  for output in outputs(notebook):
    assert output.output_type != "error"
    assert output.get("name") != "stderr"
  assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_outputs_name_no_place_of_one_machine(name):
  texts = [
    json.dumps({k: v for k, v in o.get("data", {}).items() if k != "image/png"})
    + o.get("text", "")
    for o in outputs(read(name))
  ]
  assert texts
  for text in texts:
    for place in (
      "/tmp",
      "/home",
      "/root",
      "/usr",
      "/content",
      "site-packages",
    ):
      assert place not in text


@pytest.mark.parametrize("name", NAMES)
def test_colab_installs_first(name):
  code = [cell for cell in read(name).cells if cell.cell_type == "code"]
  assert 'if "google.colab" in sys.modules:\n  %pip install' in code[0].source


@pytest.mark.parametrize("name", NAMES)
def test_a_badge_opens_colab(name):
  """At its upload, which needs no address of this repository."""
  (first, *_) = read(name).cells
  badge = "https://colab.research.google.com/assets/colab-badge.svg"
  link = "https://colab.research.google.com/#upload=true"
  assert f"[![Open in Colab]({badge})]({link})" in first.source


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_to_the_end(name, tmp_path):
  notebook = read(name)
  expected = len(figures(notebook))
  for cell in notebook.cells:
    cell.pop("outputs", None)
    if cell.cell_type == "code":
      cell.outputs, cell.execution_count = [], None
  nbclient.NotebookClient(
    notebook,
    timeout=900,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  ).execute()
  assert len(figures(notebook)) == expected
