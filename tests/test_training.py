"""The step, the layouts over devices, and the parts of the loop."""

import dataclasses
import functools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import sparseopt_jax
from sparseopt_jax import inspection
from sparseopt_jax import train
from sparseopt_jax.training import build
from sparseopt_jax.training import feed
from sparseopt_jax.training import optimizer
from sparseopt_jax.training import parallel
from sparseopt_jax.training import runtime
from sparseopt_jax.training import state as state_lib
from sparseopt_jax.training import step as step_lib
from sparseopt_jax.training.config import Config
from sparseopt_jax.training.errors import UsageError


@pytest.fixture
def x64():
  """Double precision, and single precision again afterwards."""
  yield
  jax.config.update("jax_enable_x64", False)


def _built(monkeypatch, **flags):
  """A tiny task, its first state and its first batch, on one device."""
  tiny.use(monkeypatch)
  config = Config(**{**tiny.FLAGS, **flags})
  task, create = build.task(config, build.devices(config))
  state = runtime.quick_jit(create)(np.uint32(config.seed))
  batch = next(task.dataset.train_batches(0, 0, config.batch_size))
  return task, state, jax.tree.map(jnp.asarray, batch)


def _step(task):
  return jax.jit(functools.partial(step_lib.train_step, task))


def _gradient(task):
  return jax.jit(functools.partial(step_lib._gradient, task))


def _close(one, other, tolerance):
  for a, b in zip(one, other, strict=True):
    assert a.dtype == b.dtype
    if np.issubdtype(a.dtype, np.floating):
      # The sum of the losses is float32 in any case.
      own = max(tolerance, 4 * np.finfo(a.dtype).eps)
      np.testing.assert_allclose(a, b, rtol=own, atol=own)
    else:
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "flags",
  [
    {"devices": 8},
    {"devices": 8, "shard_params": True},
    pytest.param({"devices": 2, "accumulate": 2}, marks=pytest.mark.slow),
  ],
  ids=["pmap", "sharded", "accumulate"],
)
def test_many_devices_equal_one(monkeypatch, tmp_path, x64, flags):
  tiny.use(monkeypatch)
  one, many = tmp_path / "one", tmp_path / "many"
  same = {"precision": "float64", "accumulate": flags.get("accumulate", 1)}
  assert train.main(tiny.arguments(one, **same)) == 0
  assert train.main(tiny.arguments(many, **{**same, **flags})) == 0
  _close(tiny.final_state(one), tiny.final_state(many), 1e-9)
  changes = [line["mask_change"] for line in tiny.metrics(many)]
  assert min(changes) > 0, "the masks were to change"


def test_dense_step_is_plain_optax(monkeypatch):
  task, state, batch = _built(
    monkeypatch, topology="dense", label_smoothing=0.1, momentum=0.8
  )
  task = task._replace(dataset=_NotAugmented(task.dataset))

  def loss(params):
    logits, _ = task.model.apply(
      {"params": params, "batch_stats": state.batch_stats},
      task.dataset.preprocess(batch["image"]),
      train=True,
      mutable=["batch_stats"],
    )
    log_probs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probs, batch["label"][:, None], axis=1)
    return -jnp.mean(0.9 * own[:, 0] + 0.1 * log_probs.mean(axis=1))

  grads = jax.grad(loss)(state.params)
  decayed = jax.tree.map(
    lambda g, p: g + 5e-4 * p if p.ndim > 1 else g, grads, state.params
  )
  # The warm-up is half an epoch of six steps: 0, 1/3, 2/3 of the peak.
  after, metrics = step_lib.train_step(task, state, batch)
  after, _ = step_lib.train_step(
    task, after._replace(params=state.params), batch
  )
  momentum = jax.tree.map(lambda d: 0.8 * d + d, decayed)
  expected = jax.tree.map(lambda p, m: p - 0.05 / 3 * m, state.params, momentum)
  _close(jax.tree.leaves(after.params), jax.tree.leaves(expected), 1e-5)
  np.testing.assert_allclose(metrics.loss, loss(state.params), rtol=1e-5)


class _NotAugmented:
  """A data set without its augmentation."""

  def __init__(self, dataset):
    self.preprocess = dataset.preprocess

  def augment(self, key, images, offset):
    del key, offset
    return images


def test_bfloat16_keeps_parameters_and_statistics_in_float32(monkeypatch):
  task, state, batch = _built(monkeypatch, precision="bfloat16")
  assert task.dataset.preprocess(batch["image"], task.dtype).dtype == "bfloat16"
  after, metrics = _step(task)(state, batch)
  for before, leaf in zip(
    jax.tree.leaves(state), jax.tree.leaves(after), strict=True
  ):
    assert leaf.dtype == before.dtype != jnp.bfloat16
  whole = _built(monkeypatch)[0]
  _, expected = _step(whole)(state, batch)
  assert 0 < abs(metrics.loss - expected.loss) < 0.05


def test_accumulation_averages_the_parts(monkeypatch):
  task, state, batch = _built(monkeypatch, topology="dense", accumulate=2)
  grads, batch_stats, sums = _gradient(task)(state, batch)
  gradient = _gradient(task._replace(accumulate=1))
  halves = [{k: v[start::2] for k, v in batch.items()} for start in (0, 1)]
  first, stats, _ = gradient(state, halves[0])
  second, stats, _ = gradient(state._replace(batch_stats=stats), halves[1])
  mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
  _close(jax.tree.leaves(grads), jax.tree.leaves(mean), 1e-6)
  _close(jax.tree.leaves(batch_stats), jax.tree.leaves(stats), 1e-6)
  assert sums.examples == 16


@pytest.mark.parametrize("batch_size", [8, 16, 40, 64])
def test_evaluation_counts_each_example_once(monkeypatch, batch_size):
  task, state, _ = _built(monkeypatch)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  sums = state_lib.Sums.zero()
  for batch in task.dataset.test_batches(batch_size):
    sums = step_lib.eval_step(task, variables, sums, batch)
  images, labels = task.dataset.test
  logits = task.model.apply(
    variables, task.dataset.preprocess(images), train=False
  )
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  assert sums.examples == len(labels)
  assert sums.correct == np.sum(np.argmax(logits, axis=1) == labels)
  expected = -log_probs[np.arange(len(labels)), labels].mean()
  np.testing.assert_allclose(sums.means()[0], expected, rtol=1e-5)


def test_batch_of_another_order_gives_the_same_step(monkeypatch):
  """Randomness goes with the place in the batch, so this needs no crop."""
  task, state, batch = _built(monkeypatch)
  task = task._replace(dataset=_NotAugmented(task.dataset))
  turned = {k: v[::-1] for k, v in batch.items()}
  one, _ = _step(task)(state, batch)
  other, _ = _step(task)(state, turned)
  _close(jax.tree.leaves(one.params), jax.tree.leaves(other.params), 1e-5)


def test_parameters_start_masked_and_stay_so(monkeypatch):
  task, state, batch = _built(monkeypatch, learning_rate=1.0)
  train_step = _step(task)
  for _ in range(5):
    masks = sparseopt_jax.get_masks(state.opt_state)
    for path in ("Conv_0", "Conv_1", "Dense_0"):
      kernel = np.asarray(state.params[path]["kernel"])
      mask = np.asarray(masks[path]["kernel"])
      assert not np.any(kernel[~mask])
      assert np.any(kernel[mask])
    state, _ = train_step(state, batch)


def test_correction_is_for_kernels_before_batch_norm(monkeypatch):
  params = _built(monkeypatch)[1].params
  model = tiny.Net("float32", None)
  before = inspection.batch_normalized(
    model, jnp.zeros((1, 8, 8, 1)), train=False
  )
  assert sorted(before.paths) == ["Conv_0/kernel", "Conv_1/kernel"]
  gradient = jax.tree.map(jnp.ones_like, params)
  updates = {}
  for correction in ("on", "off"):
    config = Config(**tiny.FLAGS, correction=correction, weight_decay=0.0)
    tx = optimizer.create(config, params, 6, before, 0)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for _ in range(2):  # The first has learning rate 0.
      updates[correction], state = update(gradient, state, params)
  same = {
    path: np.allclose(
      updates["on"][path]["kernel"], updates["off"][path]["kernel"]
    )
    for path in ("Conv_0", "Conv_1", "Dense_0")
  }
  assert same == {"Conv_0": False, "Conv_1": False, "Dense_0": True}


def test_schedule_warms_up_and_ends_at_zero():
  config = Config(learning_rate=0.4, epochs=10, warmup_epochs=2)
  schedule = optimizer.schedule(config, steps_per_epoch=5)
  assert schedule(0) == 0
  np.testing.assert_allclose(schedule(5), 0.2, rtol=1e-6)
  np.testing.assert_allclose(schedule(10), 0.4, rtol=1e-6)
  np.testing.assert_allclose(schedule(30), 0.2, rtol=1e-6)
  np.testing.assert_allclose(schedule(50), 0, atol=1e-8)


def test_warm_up_leaves_a_step_for_the_cosine():
  schedule = optimizer.schedule(Config(epochs=1, warmup_epochs=0.99), 22)
  np.testing.assert_allclose(schedule(21), 0.1, rtol=1e-6)
  np.testing.assert_allclose(schedule(22), 0, atol=1e-8)


def test_without_warm_up_the_first_step_has_the_peak():
  schedule = optimizer.schedule(Config(warmup_epochs=0.0), 5)
  np.testing.assert_allclose(schedule(0), 0.1, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("static", sparseopt_jax.Static),
    ("set", sparseopt_jax.SET),
    ("rigl", sparseopt_jax.RigL),
    ("srigl", sparseopt_jax.SRigL),
  ],
)
def test_topology_has_the_flags(name, kind):
  config = Config(topology=name, update_every=7, drop_fraction=0.2)
  found = optimizer.topology(config, 1000)
  assert type(found) is kind
  if name != "static":
    assert found.update_until == 750
    assert found.update_every == 7
    assert found.drop_fraction == 0.2


def test_magnitude_has_the_flags():
  config = Config(
    topology="magnitude", update_every=7, update_from=0.25, initial_sparsity=0.2
  )
  expected = sparseopt_jax.Magnitude(250, 749, 7, 0.2)
  assert optimizer.topology(config, 1000) == expected
  # It ends within the run, however late and short that is.
  late = dataclasses.replace(config, update_until=1.0)
  assert optimizer.topology(late, 1000).end_step == 999
  assert optimizer.topology(config, 3).end_step == 2


def test_srigl_ablates_where_batch_norm_follows():
  config = Config(topology="srigl", gamma_sal=0.4)
  gamma = optimizer.topology(config, 1000, ("Conv_0/kernel",)).gamma_sal
  assert gamma("Conv_0/kernel", None) == 0.4
  assert gamma("Dense_0/kernel", None) == 0.0


@pytest.mark.parametrize("name", ["srigl", "magnitude"])
@pytest.mark.slow
def test_trains_with_each_topology(name, monkeypatch, tmp_path):
  """A run stopped in between ends as the undisturbed one, bit for bit."""
  tiny.use(monkeypatch)
  flags = {"topology": name}
  if name == "srigl":
    flags |= {"gamma_sal": 0.9, "drop_fraction": 0.5}
  assert train.main(tiny.arguments(tmp_path / "whole", **flags)) == 0
  masks = jax.tree.leaves(tiny.masks(tiny.restored(tmp_path / "whole")))
  size = sum(mask.size for mask in masks)
  assert sum(mask.sum() for mask in masks) == pytest.approx(0.4 * size, rel=0.1)
  counts = [np.sum(mask, axis=tuple(range(mask.ndim - 1))) for mask in masks]
  is_equal = [len({*count.tolist()} - {0}) == 1 for count in counts]
  assert all(is_equal) == (name == "srigl")
  assert counts[-1].all()  # All classes, whatever was ablated before.

  def stop(now, batch):
    if now == 6:
      signal.raise_signal(signal.SIGTERM)
    return batch

  tiny.use(monkeypatch, stop)
  parts = tmp_path / "parts"
  assert train.main(tiny.arguments(parts, **flags)) == 143
  tiny.use(monkeypatch)
  assert train.main(tiny.arguments(parts, **flags, resume=True)) == 0
  tiny.assert_same_run(tmp_path / "whole", parts)


def test_dense_layers_are_patterns(monkeypatch):
  params = _built(monkeypatch)[1].params
  every = {"Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"}
  assert optimizer.sparse_paths(params, ()) == every
  sparse = optimizer.sparse_paths(params, ("Conv_0/*", "Dense*"))
  assert sparse == {"Conv_1/kernel"}
  with pytest.raises(UsageError, match="'Conv_9' matches none"):
    optimizer.sparse_paths(params, ("Conv_9",))
  with pytest.raises(UsageError, match="leaves no layer to be sparse"):
    optimizer.sparse_paths(params, ("*",))


def test_replicas_that_differ_are_found(monkeypatch):
  tiny.use(monkeypatch)
  config = Config(**tiny.FLAGS, devices=2)
  layout = build.devices(config)
  _, create = build.task(config, layout)
  state = layout.put(create(np.uint32(0)))
  layout.check_replicas(state)
  link = state.opt_state.link
  leaves, treedef = jax.tree.flatten(link.masks)
  mask = np.asarray(leaves[0])
  turned = [
    jax.device_put(values, device)
    for values, device in zip((mask, ~mask), jax.devices()[:2], strict=True)
  ]
  sharding = jax.tree.leaves(state.params)[0].sharding
  apart = jax.make_array_from_single_device_arrays(mask.shape, sharding, turned)
  broken = link._replace(masks=treedef.unflatten([apart, *leaves[1:]]))
  with pytest.raises(RuntimeError, match="the replicas' masks differ"):
    layout.check_replicas(
      state._replace(opt_state=state.opt_state._replace(link=broken))
    )


def test_sharded_layout_splits_masks_as_parameters():
  layout = parallel.Sharded(jax.devices()[:4])
  for shape, axis in [
    ((3, 3, 8, 16), 3),
    ((3, 3, 16, 10), 2),
    ((3, 5), None),
    ((16,), None),
    ((), None),
  ]:
    spec = layout.sharding(shape).spec
    assert [a == "batch" for a in spec] == [
      i == axis for i in range(len(shape))
    ]


def test_streamed_batches_are_those_of_the_data_set():
  def slow_then_gone(step, batch):
    if step == 5:
      raise OSError("gone")
    time.sleep(0.05)
    return batch

  layout = parallel.Single(jax.devices()[0])
  dataset = tiny.digits(train_hook=slow_then_gone)
  stream = feed.Streamed(dataset, layout, seed=7, batch_size=16, step=3)
  expected = tiny.digits().train_batches(7, 3, 16)
  for step in (3, 4):
    examples, first, count = stream.train(step)
    assert (first, count) == (0, 1)
    batch = next(expected)
    np.testing.assert_array_equal(examples.image, batch["image"])
    np.testing.assert_array_equal(examples.label, batch["label"])
  assert 0.1 <= stream.waited < 10
  with pytest.raises(OSError, match="gone"):
    stream.train(5)
  stream.close()


def test_the_cache_loses_what_was_read_longest_ago(tmp_path):
  runtime.trim(tmp_path / "none", 0)
  for name, read in (("b", 200), ("a", 300), ("c", 100)):
    (tmp_path / name).write_bytes(bytes(40))
    os.utime(tmp_path / name, (read, 400 - read))
  left = lambda: sorted(path.name for path in tmp_path.iterdir())
  runtime.trim(tmp_path, 120)
  assert left() == ["a", "b", "c"]
  runtime.trim(tmp_path, 119)
  assert left() == ["a", "b"]
  runtime.trim(tmp_path, 40)
  assert left() == ["a"]


def test_the_cache_is_trimmed_where_the_user_names_none(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  trimmed = []
  monkeypatch.setattr(runtime, "trim", lambda *args: trimmed.append(args))
  before = jax.config.jax_compilation_cache_dir
  runtime.prepare()  # The tests have a folder of their own.
  assert (trimmed, jax.config.jax_compilation_cache_dir) == ([], before)
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    runtime.prepare()
    own = tmp_path / "sparseopt-jax" / "compiled"
    assert trimmed == [(own, 2**30)]
    assert jax.config.jax_compilation_cache_dir == str(own)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_training_never_compiles_again(monkeypatch, tmp_path):
  compiled = []
  jit = jax.jit

  def counting(function, **options):
    compiled.append(jit(function, **options))
    return compiled[-1]

  with monkeypatch.context() as patch:
    patch.setattr(jax, "jit", counting)
    tiny.use(patch)
    assert train.main(tiny.arguments(tmp_path / "run")) == 0
  sizes = [function._cache_size() for function in compiled]
  # The step has a program with and one without a mask update.
  assert sorted(sizes)[-2:] == [1, 2], sizes


def test_state_without_masks_is_known():
  state = optax.sgd(0.1).init({"w": jnp.ones(3)})
  assert not state_lib.has_masks(state)
  tx = sparseopt_jax.sparsify(optax.sgd(0.1), 0.5, corrected=True)
  assert state_lib.has_masks(tx.init({"kernel": jnp.ones((4, 4))}))
