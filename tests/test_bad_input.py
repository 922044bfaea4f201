"""Bad input to the commands: one line on stderr, exit code 2, no traceback."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

import sparseopt_jax
from sparseopt_jax import compare
from sparseopt_jax import export
from sparseopt_jax import train
from sparseopt_jax.benchmarks import __main__ as benchmarks
from sparseopt_jax.data import prepare
from sparseopt_jax.studies import __main__ as studies
from sparseopt_jax.training import folder

MAINS = {
  "benchmarks": benchmarks.main,
  "train": train.main,
  "compare": compare.main,
  "export": export.main,
  "data.prepare": prepare.main,
  "studies": studies.main,
}
# On an idle machine each takes less than 5 seconds; a busy one proves nothing.
LIMIT = 30

# The command line, and what the one line has to say. The folders are made by
# `places` below.
CASES = [
  ("train --dataset mnist2", "--dataset must be one of digits,.*got mnist2"),
  ("train --model resnet21", "--model must be one of resnet8,.*got resnet21"),
  ("train --width 0", r"--width must be in \[1, 1024\], got 0"),
  ("train --width 9999999", r"--width must be in \[1, 1024\], got 9999999"),
  ("train --width wide", "--width.*wide"),
  ("train --sparsity 1.0", r"--sparsity must be in \[0, 1\), got 1.0"),
  ("train --sparsity -0.1", r"--sparsity must be in \[0, 1\), got -0.1"),
  ("train --sparsity nan", r"--sparsity must be in \[0, 1\), got nan"),
  ("train --sparsity most", "--sparsity.*most"),
  ("train --topology random", "random.*--topology"),
  ("train --correction maybe", "maybe.*--correction"),
  ("train --grow-from noise", "noise.*--grow-from"),
  ("train --distribution erdos", "erdos.*--distribution"),
  ("train --update-every 0", r"--update-every must be in \[1, 2\^31\), got 0"),
  (
    "train --update-every 9999999999",
    r"--update-every must be in \[1, 2\^31\), got 9999999999",
  ),
  ("train --update-until 1.5", r"--update-until must be in \[0, 1\], got 1.5"),
  ("train --drop-fraction 2", r"--drop-fraction must be in \[0, 1\], got 2"),
  (
    "train --topology static --drop-fraction 0.7",
    "--drop-fraction 0.7 has no effect with --topology static",
  ),
  (
    "train --topology magnitude --drop-fraction 0.7",
    "--drop-fraction 0.7 has no effect with --topology magnitude",
  ),
  (
    "train --topology srigl --grow-from corrected",
    "--grow-from corrected has no effect with --topology srigl --correction on",
  ),
  (
    "train --initial-sparsity 0.5",
    "--initial-sparsity 0.5 has no effect with --topology rigl",
  ),
  (
    "train --topology set --update-from 0.1",
    "--update-from 0.1 has no effect with --topology set",
  ),
  (
    "train --topology magnitude --gamma-sal 0.5",
    "--gamma-sal 0.5 has no effect with --topology magnitude",
  ),
  (
    "train --topology magnitude --update-from 0.8",
    r"--update-from must be below --update-until 0\.75, got 0\.8",
  ),
  (
    "train --topology magnitude --initial-sparsity 0.95",
    r"--initial-sparsity must be at most --sparsity 0\.9, got 0\.95",
  ),
  (
    "train --topology srigl --gamma-sal 1.5",
    r"--gamma-sal must be in \[0, 1\], got 1\.5",
  ),
  (
    "train --topology dense --dense-layers nonsense",
    r"--dense-layers \('nonsense',\) has no effect with --topology dense",
  ),
  (
    "train --topology set --grow-from corrected",
    "--grow-from corrected has no effect with --topology set --correction on",
  ),
  ("train --shard-params", "--shard-params True has no effect with one device"),
  (
    "train --recipe cifar100-resnet20 --topology dense --sparsity 0.5",
    "--sparsity 0.5 has no effect with --topology dense",
  ),
  ("train --epochs -1", r"--epochs must be in \[1, 2\^31\), got -1"),
  ("train --epochs 1.5", "--epochs.*1.5"),
  ("train --epochs", "missing value.*--epochs"),
  (
    "train --epochs 2000000000 --workdir new",
    r"--epochs of 22 steps must be below 2\^31 steps, got 2000000000",
  ),
  ("train --batch-size 0", r"--batch-size must be in \[1, 2\^31\), got 0"),
  (
    "train --batch-size 65 --devices 2",
    "--batch-size must be a multiple of --devices 2 .* got 65",
  ),
  (
    "train --batch-size 2000 --workdir new",
    "--batch-size must be at most 1437",
  ),
  ("train --accumulate 3", "--batch-size must be a multiple .*--accumulate 3,"),
  ("train --learning-rate 0", "--learning-rate must be finite and above 0"),
  ("train --learning-rate inf", "--learning-rate must be finite.*got inf"),
  ("train --momentum 1", r"--momentum must be in \[0, 1\), got 1"),
  ("train --weight-decay -1", "--weight-decay must be finite and at least 0"),
  (
    "train --warmup-epochs 30",
    "--warmup-epochs must be below --epochs 30, got 30",
  ),
  ("train --label-smoothing 1", r"--label-smoothing must be in \[0, 1\), got"),
  ("train --seed -1", r"--seed must be in \[0, 2\^32\), got -1"),
  ("train --precision float8", "float8.*--precision"),
  (
    "train --keep-checkpoints 0",
    r"--keep-checkpoints must be in \[1, 2\^31\), got 0",
  ),
  (
    "train --image-size 64",
    "--image-size is for imagenet2012, got 64 for digits",
  ),
  ("train --recipe fast", "--recipe must be one of .*got 'fast'"),
  ("train --fast", "unrecognized options: --fast"),
  ("train more", "unrecognized options: more"),
  ("train --devices 64 --workdir new", "--devices 64 cannot be had: JAX sees"),
  (
    "train --process-id 0",
    "--coordinator, --process-id and --process-count go together",
  ),
  (
    "train --coordinator here --process-id 0 --process-count 2 --workdir new",
    "--coordinator must be host:port, got here",
  ),
  (
    "train --coordinator a:1 --process-id 2 --process-count 2 --workdir new",
    r"--process-id must be in \[0, 2\), got 2",
  ),
  (
    "train --coordinator a:1 --process-id 0 --process-count 2 --workdir new",
    "--devices must be a multiple of --process-count 2, got 1",
  ),
  ("train --dense-layers Conv_9 --workdir new", "'Conv_9' matches none of"),
  ("train --dense-layers * --workdir new", "leaves no layer to be sparse"),
  (
    "train --dataset cifar100 --data-dir . --workdir new",
    "cifar100 is not prepared in .*run: python -m sparseopt_jax.data.prepare",
  ),
  (
    "train --dataset cifar10 --data-dir . --workdir new",
    "cifar10.npz does not hold cifar10",
  ),
  (
    "train --dataset imagenet2012 --data-dir nowhere --workdir new",
    "imagenet2012 is not prepared in nowhere",
  ),
  ("train --workdir file", "--workdir file cannot be written"),
  ("train --workdir file/run", "--workdir file/run cannot be written"),
  ("train --workdir run", "--workdir run holds a run already"),
  ("train --workdir named", "named holds files of the same names.*metrics.j"),
  ("train --workdir named --resume", "named has metrics.jsonl but no config"),
  ("train --resume", "--resume needs the --workdir"),
  ("train --workdir broken --resume", "config.json cannot be read"),
  ("train --workdir list --resume", "config.json does not hold a run's flags"),
  ("train --workdir lost --resume", "has checkpoints but no config.json"),
  (
    "train --workdir run --resume --seed 1 --width 8",
    "run of other flags: --epochs 1 became 30; --seed 0 became 1; --width 4 ",
  ),
  (
    "train --workdir a_file --resume --epochs 1 --width 4",
    "a_file/checkpoints is not a folder",
  ),
  (
    "train --workdir cut --resume --epochs 1 --width 4",
    "--resume: no checkpoint in cut/checkpoints can be used",
  ),
  (
    "train --workdir wider --resume --epochs 1 --width 6",
    r"can be used; step 22: params/.* is float32 \(4,\), not float32 \(6,\)",
  ),
  ("compare", "arguments are required: RUN"),
  ("compare nowhere", "nowhere/config.json cannot be read"),
  ("compare run broken", "broken/config.json cannot be read"),
  ("compare list", "does not hold a run's flags"),
  ("compare unmeasured", "unmeasured holds no evaluation yet"),
  ("compare odd", "odd/metrics.jsonl: step 3 has no epoch and no test_accurac"),
  ("compare run --accuracy 0", r"--accuracy must be in \(0, 1\], got 0.0"),
  ("compare run --accuracy high", "--accuracy: invalid float value: 'high'"),
  ("compare run --out nowhere/a.png", "there is no folder nowhere"),
  ("compare run --out lost", "--out lost is there already"),
  ("export run", "arguments are required: OUT"),
  ("export nowhere new", "nowhere is not the folder of a finished run"),
  ("export broken new", "broken is not the folder of a finished run"),
  ("export odd new", "odd is not the folder of a finished run"),
  ("export future new", "flags of another version: .*'flying'"),
  ("export cut new", "cut: no sound checkpoint of step 22"),
  ("export wider new", "wider: no sound checkpoint of step 22"),
  ("export bare new", "bare has no checkpoints"),
  ("export run file", "OUT file is there already"),
  ("export run nowhere/a", "OUT nowhere/a: there is no folder nowhere"),
  ("benchmarks", "arguments are required: command"),
  ("benchmarks speed", "invalid choice: 'speed'"),
  ("benchmarks input --sparsity 1", r"--sparsity must be in \[0, 1\), got 1"),
  ("benchmarks input --batch-size 0", "--batch-size must be at least 1, got 0"),
  ("benchmarks memory --output no/a", "--output no/a: there is no such folder"),
  ("data.prepare", "arguments are required: name"),
  ("data.prepare digits", "invalid choice: 'digits'"),
  ("data.prepare cifar10 --data-dir file", "--data-dir file cannot be written"),
  ("data.prepare cifar10 --manual-dir no", "--manual-dir no is not a folder"),
  ("data.prepare imagenet2012", "--manual-dir must name a folder with ILSVRC2"),
  (
    "data.prepare imagenet2012 --manual-dir .",
    "--manual-dir . lacks ILSVRC2012_img_train.tar",
  ),
  ("studies", "NAME must be one of gradient-skew, .*got ''"),
  ("studies skew", "NAME must be one of gradient-skew, .*got 'skew'"),
  ("studies gradient-skew --seeds 0", "--seeds must be at least 1, got 0"),
  ("studies gradient-skew --dataset cats", "invalid choice: 'cats'"),
  ("studies gradient-skew --out file", "--out file: File exists"),
  ("studies convergence --seeds 0", "--seeds must be at least 1, got 0"),
  ("studies convergence --conditions rigl", "got 'rigl'"),
  ("studies early-skew --steps 0", "--steps must be at least 1, got 0"),
]


def _change(path: pathlib.Path, **flags) -> None:
  config = json.loads((path / folder.CONFIG).read_text())
  (path / folder.CONFIG).write_text(json.dumps(config | flags))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """A folder with a finished run, and runs in all states of disrepair."""
  root = tmp_path_factory.mktemp("places")
  run = root / "run"
  assert train.main(f"--workdir {run} --epochs 1 --width 4".split()) == 0
  copies = ("a_file", "bare", "cut", "future", "odd", "unmeasured", "wider")
  for name in copies:
    shutil.copytree(run, root / name)
  for file in (root / "cut" / folder.CHECKPOINTS).rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  _change(root / "future", flying=True)
  _change(root / "wider", width=6)
  (root / "odd" / folder.METRICS).write_text('{"step": 3}\n')
  (root / "odd" / folder.SUMMARY).write_text("[]")
  (root / "unmeasured" / folder.METRICS).unlink()
  shutil.rmtree(root / "bare" / folder.CHECKPOINTS)
  shutil.rmtree(root / "a_file" / folder.CHECKPOINTS)
  (root / "a_file" / folder.CHECKPOINTS).touch()
  for name, content in {"broken": "{", "list": "[]"}.items():
    (root / name).mkdir()
    (root / name / folder.CONFIG).write_text(content)
  (root / "broken" / folder.SUMMARY).write_text("{")
  (root / "lost" / folder.CHECKPOINTS).mkdir(parents=True)
  (root / "named").mkdir()
  (root / "named" / folder.METRICS).write_text("Mine.")
  (root / "file").touch()
  (root / "cifar10.npz").write_text("no arrays")
  return root


@pytest.mark.parametrize(("line", "message"), CASES, ids=[c[0] for c in CASES])
def test_one_line_and_exit_code_2(places, monkeypatch, capsys, line, message):
  monkeypatch.chdir(places)
  before = sorted(places.rglob("*"))
  command, *arguments = line.split()
  try:
    code = MAINS[command](arguments)
  except SystemExit as end:
    code = end.code
  assert code == 2
  assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
  assert sorted(places.rglob("*")) == before, "something was left behind"


def _assert_ends_soon(places, line, message):
  package = pathlib.Path(sparseopt_jax.__file__).parent.parent
  command, *arguments = line.split()
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", f"sparseopt_jax.{command}", *arguments],
    env={**os.environ, "PYTHONPATH": str(package)},
    cwd=places,
    capture_output=True,
    text=True,
  )
  seconds = time.monotonic() - start
  assert done.returncode == 2
  assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)
  assert seconds < LIMIT
  print(f"{seconds:.1f} s: {line}")


# One of each command; the others are in the slow part.
@pytest.mark.parametrize("command", MAINS)
def test_a_process_ends_soon(places, command):
  case = next(case for case in CASES if case[0].split()[0] == command)
  _assert_ends_soon(places, *case)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "message"), CASES, ids=[c[0] for c in CASES])
def test_every_process_ends_soon(places, line, message):
  _assert_ends_soon(places, line, message)


def test_flags_are_checked_before_heavy_imports():
  code = (
    "import sys; from sparseopt_jax import train;"
    "assert train.main(['--sparsity', '1']) == 2;"
    "heavy = {'flax', 'orbax', 'matplotlib', 'sklearn', 'tensorflow'};"
    "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
  )
  package = pathlib.Path(sparseopt_jax.__file__).parent.parent
  environment = {**os.environ, "PYTHONPATH": str(package)}
  subprocess.run([sys.executable, "-c", code], env=environment, check=True)


_WITHOUT = """
import runpy, sys

class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == {package!r}:
      raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = {words!r}
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
  ("line", "package", "extra"),
  [
    ("train", "tyro", "train"),
    ("train", "flax", "train"),
    ("studies convergence", "matplotlib", "train"),
    ("benchmarks memory --model resnet8", "flax", "train"),
    ("benchmarks input --model resnet8", "array_record", "tfds"),
  ],
)
def test_a_missing_package_is_named(tmp_path, line, package, extra):
  command, *flags = line.split()
  package_root = pathlib.Path(sparseopt_jax.__file__).parent.parent
  words = [f"sparseopt_jax.{command}", *flags]
  done = subprocess.run(
    [sys.executable, "-c", _WITHOUT.format(package=package, words=words)],
    env={**os.environ, "PYTHONPATH": str(package_root)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    f"error: {package} is missing: pip install 'sparseopt-jax[{extra}]'"
  )
