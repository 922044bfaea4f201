"""The oracle against examples worked by hand, and published figures."""

import math

import numpy as np
import optax
import oracle
import pytest

# Four inputs, two neurons: f = (4, 1), N = 4, nnz = 5.
UNEQUAL = np.array([[1, 1], [1, 0], [1, 0], [1, 0]], bool)


def random_mask(seed, shape, density):
  return np.random.default_rng(seed).random(shape) < density


# --- The correction -----------------------------------------------------------


def test_neuron_sparsity_by_hand():
  np.testing.assert_array_equal(oracle.neuron_sparsity(UNEQUAL), [0, 0.75])
  np.testing.assert_array_equal(
    oracle.neuron_sparsity(UNEQUAL, 0), [0, 0.5, 0.5, 0.5]
  )


def test_correct_by_hand():
  # s_avg = 3/8. Neuron 0: sqrt(1) / sqrt(5/8), neuron 1: sqrt(1/4) / sqrt(5/8).
  gradient = np.full((4, 2), 10.0)
  gradient[1, 1] = np.nan
  expected = np.where(UNEQUAL, [10 * math.sqrt(1.6), 10 * math.sqrt(0.4)], 0)
  np.testing.assert_allclose(
    oracle.correct(gradient, UNEQUAL), expected, rtol=1e-15
  )


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), (2, 0)])
def test_correct_is_the_equation(axis):
  mask = random_mask(0, (3, 4, 5), 0.4)
  gradient = np.random.default_rng(1).normal(size=mask.shape)
  axes = (axis,) if isinstance(axis, int) else axis
  inputs = tuple(i for i in range(3) if i not in {a % 3 for a in axes})
  s = 1 - mask.mean(axis=inputs, keepdims=True)
  expected = np.sqrt(1 - s) / np.sqrt(1 - s.mean()) * gradient * mask
  np.testing.assert_allclose(
    oracle.correct(gradient, mask, axis), expected, rtol=1e-14
  )
  np.testing.assert_allclose(
    oracle.neuron_sparsity(mask, axis).mean(), 1 - mask.mean()
  )


def test_two_neuron_axes_equal_one_flattened_axis():
  mask = random_mask(2, (6, 3, 4), 0.3)
  gradient = np.random.default_rng(3).normal(size=mask.shape)
  flat = oracle.correct(gradient.reshape(6, 12), mask.reshape(6, 12))
  both = oracle.correct(gradient, mask, (1, 2))
  np.testing.assert_array_equal(both.reshape(6, 12), flat)


@pytest.mark.parametrize("fan_in", [1, 3, 7])
def test_equal_fan_ins_are_the_identity_bit_for_bit(fan_in):
  rng = np.random.default_rng(fan_in)
  mask = rng.permuted(np.arange(7)[:, None] < np.full((1, 9), fan_in), axis=0)
  gradient = rng.normal(size=mask.shape)
  np.testing.assert_array_equal(
    oracle.correct(gradient, mask), np.where(mask, gradient, 0)
  )
  assert oracle.skew_angle(mask) == 0


def test_dead_neurons_and_dead_layers_are_zero():
  mask = np.zeros((3, 2), bool)
  gradient = np.full((3, 2), np.inf)
  np.testing.assert_array_equal(
    oracle.correct(gradient, mask), np.zeros((3, 2))
  )
  assert oracle.skew_angle(mask) == 0
  mask[:, 0] = True  # One of two neurons lives: its factor is sqrt(2).
  np.testing.assert_allclose(oracle.factors(mask), [math.sqrt(2), 0])


def test_skew_angle_by_hand():
  # cos = (2 + 1) / sqrt(2 * 5), so tan = 1/3.
  assert oracle.skew_angle(UNEQUAL) == pytest.approx(
    math.degrees(math.atan(1 / 3))
  )


@pytest.mark.parametrize(
  ("fan_in", "sparsity", "degrees"),
  [
    (64, 0.9, 11),
    (64, 0.97, 15),
    (576, 0.9, 3.6),
    (576, 0.97, 6.9),
    (2304, 0.9, 1.8),
    (2304, 0.97, 3.4),
  ],
)
def test_skew_angle_of_random_masks(fan_in, sparsity, degrees):
  mask = random_mask(fan_in, (fan_in, 1000), 1 - sparsity)
  assert oracle.skew_angle(mask) == pytest.approx(degrees, rel=0.08)


# --- Distributions ------------------------------------------------------------


def test_erk_by_hand():
  # 100 of 1000 weights, shared out as 20 : 100.
  density = oracle.erk({"a": (10, 10), "b": (10, 90)}, 0.9)
  assert density == pytest.approx({"a": 1 / 6, "b": 250 / 2700})
  # 1001 of 10010: "a" would pass 1, so "b" gets the other 991.
  density = oracle.erk({"a": (1, 10), "b": (100, 100)}, 0.9)
  assert density == pytest.approx({"a": 1.0, "b": 0.0991})


def test_erk_without_sparsity_is_dense_everywhere():
  shapes = {"a": (3, 3, 3, 16), "b": (7, 11), "c": (1, 1)}
  assert oracle.erk(shapes, 0.0) == dict.fromkeys(shapes, 1.0)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
def test_erk_spends_what_uniform_spends(sparsity):
  shapes = {path: shape for path, shape, _ in wide_resnet_22_2()}
  densities = oracle.erk(shapes, sparsity)
  assert max(densities.values()) <= 1
  erk = oracle.active_counts(shapes, densities)
  uniform = oracle.active_counts(shapes, oracle.uniform(shapes, sparsity))
  assert abs(sum(erk.values()) - sum(uniform.values())) <= len(shapes)


def test_active_counts_are_at_least_one():
  shapes = {"a": (4, 5), "b": (2, 2)}
  counts = oracle.active_counts(shapes, {"a": 0.18, "b": 0.01})
  assert counts == {"a": 4, "b": 1}  # round(3.6), and not round(0.04).


def resnet_50():
  """(path, shape, output positions) of the convolutions and the classifier."""
  layers = [("stem", (7, 7, 3, 64), 112**2), ("head", (2048, 1000), 1)]
  width, size = 64, 56
  for stage, blocks in enumerate([3, 4, 6, 3]):
    mid = 64 * 2**stage
    for block in range(blocks):
      name, inner = f"{stage}.{block}", 56 // 2**stage
      layers.append((f"{name}.1", (1, 1, width, mid), size**2))
      layers.append((f"{name}.2", (3, 3, mid, mid), inner**2))
      layers.append((f"{name}.3", (1, 1, mid, 4 * mid), inner**2))
      if block == 0:
        layers.append((f"{name}.skip", (1, 1, width, 4 * mid), inner**2))
      width, size = 4 * mid, inner
  return layers


def wide_resnet_22_2():
  """The same for WRN-22-2 on 32 x 32 pixels and ten classes."""
  layers = [("stem", (3, 3, 3, 16), 32**2), ("head", (128, 10), 1)]
  width = 16
  for stage, mid in enumerate([32, 64, 128]):
    positions = (32 // 2**stage) ** 2
    for block in range(3):
      name = f"{stage}.{block}"
      layers.append((f"{name}.1", (3, 3, width, mid), positions))
      layers.append((f"{name}.2", (3, 3, mid, mid), positions))
      if block == 0:
        layers.append((f"{name}.skip", (1, 1, width, mid), positions))
      width = mid
  return layers


@pytest.mark.parametrize(
  ("layers", "sparsity", "published"),
  [
    (resnet_50, 0.8, 0.414),
    (resnet_50, 0.9, 0.242),
    (resnet_50, 0.95, 0.122),
    (resnet_50, 0.965, 0.085),
    (wide_resnet_22_2, 0.8, 0.352),
  ],
)
def test_erk_gives_the_published_inference_flops(layers, sparsity, published):
  flops = {
    path: 2 * math.prod(shape) * positions
    for path, shape, positions in layers()
  }
  density = oracle.erk({path: shape for path, shape, _ in layers()}, sparsity)
  sparse = sum(flops[path] * density[path] for path in flops)
  assert sparse / sum(flops.values()) == pytest.approx(published, abs=1e-3)


# --- Selection, drop and growth -----------------------------------------------


@pytest.mark.parametrize(
  ("scores", "n", "expected"),
  [
    ([3, 1, 2, 3], 2, [1, 0, 0, 1]),
    ([1, 1, 1, 1], 2, [1, 1, 0, 0]),
    ([0.0, -0.0, 0.0], 2, [1, 1, 0]),
    ([-0.0, 0.0, -0.0], 1, [1, 0, 0]),
    ([np.nan, -np.inf, np.nan], 2, [1, 1, 0]),
    ([np.inf, np.inf, 1e38], 1, [1, 0, 0]),
    ([1e-45, 0, 2e-45], 2, [1, 0, 1]),
    ([5, 6], 0, [0, 0]),
  ],
)
def test_largest_by_hand(scores, n, expected):
  scores = np.array(scores, np.float32)
  chosen = oracle.largest(scores, n, np.ones(scores.shape, bool))
  np.testing.assert_array_equal(chosen, np.array(expected, bool))


def test_largest_takes_ties_in_row_major_order():
  chosen = oracle.largest(np.ones((2, 3)), 4, [[0, 1, 1], [1, 1, 1]])
  np.testing.assert_array_equal(chosen, np.array([[0, 1, 1], [1, 1, 0]], bool))


def test_largest_never_leaves_the_eligible():
  with pytest.raises(ValueError, match="between 0 and 1, got 2"):
    oracle.largest([1.0, 2.0], 2, [True, False])


def test_drop_by_hand():
  weights = [np.nan, -1.0, 0.0, 1.0, 0.5, np.inf]
  mask = np.array([1, 1, 0, 1, 1, 1], bool)
  order = [4, 1, 3, 5, 0]  # 0.5, then |-1| before |1|, then inf, then NaN.
  for n in range(6):
    dropped = np.flatnonzero(oracle.drop(weights, mask, n))
    np.testing.assert_array_equal(dropped, sorted(order[:n]))


def test_drop_fraction_falls_from_alpha_to_zero():
  assert oracle.drop_fraction(0.3, 0, 1000) == np.float32(0.3)
  assert oracle.drop_fraction(0.3, 500, 1000) == pytest.approx(0.15, abs=1e-7)
  assert oracle.drop_fraction(0.3, 1000, 1000) == pytest.approx(0, abs=1e-7)
  # cos(pi / 3) = 1/2, so 3/4 of alpha.
  assert oracle.drop_fraction(0.4, 100, 300) == pytest.approx(0.3, rel=1e-6)
  assert oracle.drop_fraction(0.3, 7, 10).dtype == np.float32


def test_drop_count_floors_in_float32():
  assert oracle.drop_count(0.3, 9) == 2
  assert oracle.drop_count(0.29, 100) == 29  # float64: 28.999999999999996.
  assert oracle.drop_count(1.0, 2**24 + 1) == 2**24
  assert oracle.drop_count(1.0, 2**24 + 3) == 2**24 + 3  # float32: one more.
  assert oracle.drop_count(0.0, 10) == 0


def test_rigl_update_by_hand():
  # Of four active weights the two smallest go, 1 and 2. The scores outside
  # those that stay are 5, 0, 7 and 0 at 1, 4, 5 and the dropped 2 has 5: the
  # tie between 1 and 2 goes to the lower index.
  weights = [9, 1, 2, 8, 0, 0]
  mask = np.array([1, 1, 1, 1, 0, 0], bool)
  update = oracle.rigl_update(weights, mask, [99, 5, -5, 99, 0, 7], 0.5)
  np.testing.assert_array_equal(np.flatnonzero(update.dropped), [1, 2])
  np.testing.assert_array_equal(np.flatnonzero(update.certain), [0, 1, 3, 5])
  assert update.remaining == 0
  assert oracle.permits(update, update.certain)
  assert not oracle.permits(update, mask)


def test_rigl_update_leaves_the_rest_to_chance():
  # Two to grow, but only index 4 has a score: one more out of 0, 1 and 5.
  weights = [1, 2, 3, 4, 0, 0]
  mask = np.array([1, 1, 1, 1, 0, 0], bool)
  update = oracle.rigl_update(weights, mask, [0, 0, 9, 9, 1, 0], 0.5)
  np.testing.assert_array_equal(np.flatnonzero(update.certain), [2, 3, 4])
  np.testing.assert_array_equal(np.flatnonzero(update.candidates), [0, 1, 5])
  assert update.remaining == 1
  right = np.array([0, 1, 1, 1, 1, 0], bool)
  too_many = np.array([1, 1, 1, 1, 1, 0], bool)
  lost_one = np.array([1, 0, 0, 1, 1, 0], bool)
  assert oracle.permits(update, right)
  assert not oracle.permits(update, update.certain)
  assert not oracle.permits(update, too_many)
  assert not oracle.permits(update, lost_one)


def test_set_update_by_hand():
  weights = [1, 2, 3, 4, 0, 0]
  mask = np.array([1, 1, 1, 1, 0, 0], bool)
  update = oracle.set_update(weights, mask, 0.5)
  np.testing.assert_array_equal(np.flatnonzero(update.certain), [2, 3])
  np.testing.assert_array_equal(np.flatnonzero(update.candidates), [0, 1, 4, 5])
  assert update.remaining == 2
  drawn = [
    oracle.complete(update, np.random.default_rng(seed)) for seed in range(60)
  ]
  assert all(oracle.permits(update, mask) for mask in drawn)
  assert len({tuple(mask) for mask in drawn}) == 6  # Every pair out of four.


def test_magnitude_count_by_hand():
  # Three of four steps are left, then two, one and none: 27, 8 and 1 of 64.
  counts = [oracle.magnitude_count(t, 4, 12, 84, 20) for t in range(4, 13, 2)]
  assert counts == [84, 47, 28, 21, 20]
  assert oracle.magnitude_count(5, 4, 7, 10, 1) == 1 + 2  # floor(9 * 8 / 27).
  assert oracle.magnitude_count(0, 4, 12, 84, 20) == 84
  assert oracle.magnitude_count(13, 4, 12, 84, 20) == 20


def test_magnitude_update_by_hand():
  mask = np.array([1, 1, 0, 1, 1], bool)
  update = oracle.magnitude_update([-1, 3, 9, 1, 2], mask, 2)
  np.testing.assert_array_equal(np.flatnonzero(update.dropped), [0, 3])
  np.testing.assert_array_equal(np.flatnonzero(update.certain), [1, 4])
  kept = oracle.magnitude_update([-1, 3, 9, 1, 2], mask, 5)
  np.testing.assert_array_equal(kept.certain, mask)


def test_magnitude_prunes_on_its_grid_and_at_its_end():
  topology = oracle.Topology("magnitude", 17, 5, begin_step=5)
  assert [t for t in range(40) if topology.is_due(t)] == [10, 15, 17]


def srigl_by_hand(gradient, gamma):
  """Three neurons of fan-in 2 out of 4; the smallest three weights go."""
  weights = np.array([[9, 1, 2], [8, 0, 7], [0, 3, 0], [0, 0, 0]])
  parts = oracle.srigl_update(
    weights, weights != 0, np.array(gradient), 0.5, gamma, 6, -1
  )
  assert not any(update.remaining for _, update in parts)
  return np.stack([update.certain for _, update in parts], axis=-1)


def test_srigl_update_by_hand():
  # Neuron 0 keeps both weights, neuron 1 none, neuron 2 its 7. The three
  # largest gradients elsewhere are two of neuron 0 and one of neuron 1.
  gradient = [[0, 1, 2], [0, 2, 0], [8, 3, 1], [7, 0, 1]]
  expected = [[1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]]
  np.testing.assert_array_equal(srigl_by_hand(gradient, 0.5), expected)
  # Salient are 4, 1 and 1 weights. With at least 2 only neuron 0 would be left,
  # which cannot hold six weights. So nothing is ablated.
  np.testing.assert_array_equal(srigl_by_hand(gradient, 1.0), expected)


def test_srigl_ablates_by_hand():
  # Salient are 4, 0 and 2: neuron 1 goes, and the others have fan-ins of 3.
  gradient = [[0, 1, 4], [0, 2, 0], [8, 3, 1], [7, 0, 1]]
  expected = [[1, 0, 1], [1, 0, 1], [1, 0, 1], [0, 0, 0]]
  np.testing.assert_array_equal(srigl_by_hand(gradient, 0.5), expected)
  # It takes fewer than gamma * 2, so half a weight does not do it.
  assert srigl_by_hand(gradient, 0.0).sum(0).tolist() == [2, 2, 2]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_updates_conserve_the_number_of_active_weights(fraction, density):
  rng = np.random.default_rng(0)
  mask = random_mask(1, (6, 7), density)
  weights, gradient = rng.integers(-2, 3, (2, 6, 7))  # Ties and zeros.
  for update in (
    oracle.rigl_update(weights, mask, gradient, fraction),
    oracle.set_update(weights, mask, fraction),
  ):
    new_mask = oracle.complete(update, rng)
    assert oracle.permits(update, new_mask)
    assert new_mask.sum() == mask.sum()


# --- Whole runs ---------------------------------------------------------------


def rigl_run_by_hand():
  # Four inputs, five neurons, f = (4, 1, 0, 0, 0): factors (2, 1, 0, 0, 0).
  mask = np.zeros((4, 5), bool)
  mask[:, 0] = True
  mask[0, 1] = True
  kernel = np.full((4, 5), 99.0)
  kernel[:, 0] = [1, 2, 3, 4]
  kernel[0, 1] = 8
  return oracle.Run(
    {"kernel": kernel, "bias": [1.0]},
    {"kernel": mask},
    oracle.Topology("rigl", 2, update_every=1, alpha=lambda t: 0.4),
    learning_rate=0.125,
    momentum=0.5,
    weight_decay=0.5,
  )


def test_run_by_hand():
  run = rigl_run_by_hand()
  # Call 0 updates no mask. m = (2 or 1) * 1 + w / 2, w <- w - m / 8.
  first = run.step({"kernel": np.ones((4, 5)), "bias": [2.0]})
  kernel, slot = np.zeros((4, 5)), np.zeros((4, 5))
  slot[:, 0], slot[0, 1] = [2.5, 3, 3.5, 4], 5
  kernel[:, 0], kernel[0, 1] = [0.6875, 1.625, 2.5625, 3.5], 7.375
  np.testing.assert_array_equal(first.params["kernel"], kernel)
  np.testing.assert_array_equal(first.momentum["kernel"], slot)
  np.testing.assert_array_equal(first.params["bias"], [0.6875])
  assert first.itop_rate == 0.25
  assert first.mask_change == 0
  assert first.dead_neurons == 3
  # Call 1 drops two of five: rows 0 and 1 of neuron 0. The two largest
  # gradients elsewhere are -3 at (0, 0), which so comes back and keeps its
  # value and momentum, and 2 at (3, 4), which starts at 0.
  gradient = np.zeros((4, 5))
  gradient[0, 0], gradient[1, 0], gradient[3, 4] = -3, 1, 2
  second = run.step({"kernel": gradient, "bias": [0.0]})
  # m = m / 2 + factor * g + w / 2, w <- w - m / 8.
  slot[:, 0], slot[0, 1] = [-4.40625, 0, 3.03125, 3.75], 6.1875
  kernel[:, 0] = [1.23828125, 0, 2.18359375, 3.03125]
  kernel[0, 1] = 6.6015625
  np.testing.assert_array_equal(second.params["kernel"], kernel)
  np.testing.assert_array_equal(second.momentum["kernel"], slot)
  mask = kernel != 0
  mask[3, 4] = True
  np.testing.assert_array_equal(second.masks["kernel"], mask)
  assert second.sparsity == 0.75
  assert second.itop_rate == 6 / 20
  assert second.mask_change == 1 / 5
  assert second.dead_neurons == 2
  assert second.skipped_updates == 0


def test_run_skips_a_mask_update_where_any_gradient_is_not_finite():
  run = rigl_run_by_hand()
  run.step({"kernel": np.ones((4, 5)), "bias": [2.0]})
  before = run.masks["kernel"].copy()
  record = run.step({"kernel": np.ones((4, 5)), "bias": [np.inf]})
  np.testing.assert_array_equal(record.masks["kernel"], before)
  assert record.skipped_updates == 1
  assert record.mask_change == 0


def test_run_refuses_masks_that_the_method_does_not_allow():
  run = rigl_run_by_hand()
  gradients = {"kernel": np.ones((4, 5)), "bias": [2.0]}
  wrong = {"kernel": ~run.masks["kernel"]}
  with pytest.raises(AssertionError, match="kernel: wrong mask at 0"):
    run.step(gradients, wrong)


def test_updates_fall_on_positive_multiples_below_the_end():
  topology = oracle.Topology("set", update_until=30, update_every=10)
  assert [t for t in range(100) if topology.is_due(t)] == [10, 20]
  assert not any(oracle.Topology().is_due(t) for t in range(300))


@pytest.mark.parametrize("grow_from", ["raw", "corrected"])
def test_growth_from_the_corrected_gradient(grow_from):
  # One is dropped: (0, 0). Raw growth takes the 3 of the dead neuron 4, where
  # corrected growth sees 0; it sees 2 * 0.75 at (0, 0) and 1 * 1 at (1, 1).
  run = rigl_run_by_hand()
  run.topology = run.topology._replace(grow_from=grow_from, alpha=lambda t: 0.2)
  run.count = 1
  gradient = np.zeros((4, 5))
  gradient[0, 0], gradient[1, 1], gradient[3, 4] = 0.75, 1, 3
  mask = run.step({"kernel": gradient, "bias": [0.0]}).masks["kernel"]
  grown = (3, 4) if grow_from == "raw" else (0, 0)
  assert mask[grown]
  assert mask.sum() == 5


@pytest.mark.parametrize("kind", ["static", "set", "rigl"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_invariants_of_a_run(kind, dtype):
  rng = np.random.default_rng(0)
  shapes = {"a": (8, 6), "b": (3, 3, 2, 5)}
  masks = {path: random_mask(1, shapes[path], 0.3) for path in shapes}
  target = {path: rng.normal(size=shapes[path]) for path in shapes}
  run = oracle.Run(
    {path: rng.normal(size=shapes[path]) for path in shapes},
    masks,
    oracle.Topology(kind, update_until=40, update_every=5),
    learning_rate=0.1,
    momentum=0.9,
    dtype=dtype,
  )
  records = oracle.simulate(
    run, lambda params: {p: params[p] - target[p] for p in params}, 50
  )
  for record in records:
    for path, mask in record.masks.items():
      assert mask.sum() == masks[path].sum()
      assert record.params[path].dtype == dtype
      assert not record.params[path][~mask].any()
      assert not record.momentum[path][~mask].any()
  rates = [record.itop_rate for record in records]
  assert rates == sorted(rates)
  changes = [t for t in range(50) if records[t].mask_change > 0]
  if kind == "static":
    assert rates[-1] == rates[0]
    assert changes == []
  else:
    assert rates[-1] > rates[0]
    assert changes[0] == 5
    np.testing.assert_array_equal(
      records[35].masks["b"], records[-1].masks["b"]
    )


def test_a_run_with_masks_of_ones_is_plain_sgd():
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
  schedule = optax.cosine_decay_schedule(0.1, 10)
  run = oracle.Run(
    params,
    {"kernel": np.ones((4, 3), bool)},
    oracle.Topology(),
    learning_rate=schedule,
    momentum=0.9,
    weight_decay=0.01,
    dtype=np.float32,
  )
  tx = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(schedule, 0.9))
  params = {path: leaf.astype(np.float32) for path, leaf in params.items()}
  state = tx.init(params)
  for t in range(10):
    gradients = {
      path: rng.normal(size=leaf.shape).astype(np.float32)
      for path, leaf in params.items()
    }
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    record = run.step(gradients)
    for path, leaf in params.items():
      np.testing.assert_allclose(
        record.params[path], leaf, rtol=2e-6, atol=1e-7, err_msg=f"step {t}"
      )


# --- HAM ----------------------------------------------------------------------


def test_ham_by_hand():
  # After the base step: 2, -2, 2, -2, 0, and exponents -lr * alpha * sign * g
  # of -0.5, 0.5, -100 -> -5, 100 -> 5.
  before = np.array([[1.0, 1.0, 1.0, -1.0, 1.0]])
  updates = np.array([[1.0, -3.0, 1.0, -1.0, -1.0]])
  gradient = np.array([[0.5, 0.5, 100.0, 100.0, np.nan]])
  result = oracle.ham(before, updates, gradient, 0.1, alpha=10.0, beta=0.0)
  e = math.e
  expected = [[2 * e**-0.5, -2 * e**0.5, 2 * e**-5, -2 * e**5, 0]]
  np.testing.assert_allclose(result, expected, rtol=1e-14)


def test_ham_shrinks_by_beta_and_leaves_vectors_alone():
  zeros = np.zeros((1, 2))
  shrunk = oracle.ham([[1.0, -4.0]], zeros, zeros, 0.5, beta=0.02)
  np.testing.assert_allclose(shrunk, [[math.exp(-0.01), -4 * math.exp(-0.01)]])
  bias = oracle.ham([1.0, 2.0], [0.5, 0.5], [9.0, 9.0], 0.1)
  np.testing.assert_array_equal(bias, [1.5, 2.5])
