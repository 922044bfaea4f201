"""What a run is: a frozen dataclass whose fields are the command's flags.

Needs nothing but the standard library, so that bad input is refused before
anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
import os
import typing
from typing import Any, Literal

from sparseopt_jax import data
from sparseopt_jax import models
from sparseopt_jax.training.errors import UsageError

Precision = Literal["float32", "bfloat16", "float64"]
PRECISIONS = typing.get_args(Precision)
Topology = Literal["rigl", "set", "srigl", "magnitude", "static", "dense"]
TOPOLOGIES = typing.get_args(Topology)
# Fields that say where a run lives or what it shows, not what it computes: they
# may differ when a run is resumed.
_FREE = (
  "data_dir",
  "workdir",
  "resume",
  "keep_checkpoints",
  "tensorboard",
  "coordinator",
  "process_id",
  "process_count",
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains a sparse network; by default on scikit-learn's digits.

  Raises:
    UsageError: A value that cannot be used; the message names the flag.
  """

  dataset: str = "digits"
  """digits, fashion_mnist, cifar10, cifar100 or imagenet2012."""
  data_dir: str | None = None
  """Folder of TensorFlow Datasets [$TFDS_DATA_DIR or ~/tensorflow_datasets]."""
  image_size: int | None = None
  """Height and width of the images, for imagenet2012 only [224]."""
  model: str = "resnet8"
  """resnet8, 14, 20, 32, 44, 56 or 110, resnet50, perceptron."""
  width: int | None = None
  """Channels of the first stage, or hidden neurons [the model's own]."""
  shortcut: Literal["1x1", "3x3"] = "1x1"
  """Kernels of the shortcuts where a residual network's shape changes."""
  sparsity: float = 0.9
  """Fraction of zeros over the sparse layers, in [0, 1)."""
  topology: Topology = "rigl"
  """How the masks change; magnitude: gradual pruning; dense: no masks."""
  correction: Literal["on", "off"] = "on"
  """SparseOpt's correction of the gradient skew; off: the plain baseline."""
  grow_from: Literal["raw", "corrected"] = "raw"
  """The gradient by which RigL grows weights."""
  distribution: Literal["erk", "uniform"] = "erk"
  """How the sparsity is spread over the layers."""
  update_every: int = 20
  """Steps between two mask updates."""
  update_from: float = 0.0
  """Fraction of all steps after which magnitude pruning begins."""
  update_until: float = 0.75
  """Fraction of all steps after which the masks stand still."""
  drop_fraction: float = 0.3
  """Fraction of the active weights that the first mask update replaces."""
  initial_sparsity: float = 0.0
  """Sparsity that magnitude pruning begins with."""
  gamma_sal: float = 0.3
  """Fraction of its inputs below which SRigL ablates a neuron; 0: never."""
  measure_skew: bool = False
  """Record the slope of the gradient skew, over all steps of an epoch."""
  dense_layers: tuple[str, ...] = ()
  """Patterns of kernels to keep dense, such as 'Dense_0/*' or '*'."""
  epochs: int = 30
  """Passes through the training set."""
  batch_size: int = 64
  """Images in one update, over all devices."""
  accumulate: int = 1
  """Parts that each batch is worked through in, to save memory."""
  learning_rate: float = 0.1
  """Peak of the warm-up and cosine schedule."""
  momentum: float = 0.9
  """Momentum of SGD."""
  weight_decay: float = 5e-4
  """Decay of the kernels, added to the gradient after the correction."""
  warmup_epochs: float = 0.5
  """Epochs of linear warm-up, before the cosine."""
  label_smoothing: float = 0.0
  """Probability mass that is spread evenly over the classes, in [0, 1)."""
  seed: int = 0
  """Seed of initialisation, masks, shuffling and augmentation."""
  networks: int = 1
  """Networks to train side by side, of seeds --seed, --seed + 1, ..."""
  precision: Precision = "float32"
  """Dtype of the computation; with bfloat16, parameters stay float32."""
  devices: int = 1
  """Devices over all processes: they share each batch out, or the networks."""
  shard_params: bool = False
  """Split parameters and optimiser state over the devices, by jit."""
  skip_nonfinite: bool = False
  """Leave out steps with NaN or infinity, and count them, instead of ending."""
  workdir: str | None = None
  """Folder of the run's files [runs/<what is trained>-<time>-<id>]."""
  resume: bool = False
  """Go on from the newest intact checkpoint in --workdir, if there is one."""
  keep_checkpoints: int = 3
  """How many of the newest checkpoints to keep, beside the best."""
  tensorboard: bool = False
  """Write TensorBoard event files too (needs tensorboardX)."""
  coordinator: str | None = None
  """host:port of process 0, for several processes."""
  process_id: int | None = None
  """Number of this process, from 0."""
  process_count: int | None = None
  """Number of processes."""

  def __post_init__(self) -> None:
    _check_choices(self)
    _check_numbers(self)
    _check_together(self)

  def identity(self) -> dict[str, Any]:
    """The fields that decide what the run computes, as JSON would give them."""
    fields = dataclasses.asdict(self)
    fields["dense_layers"] = list(self.dense_layers)
    return {k: v for k, v in fields.items() if k not in _FREE}

  def of_network(self, index: int) -> Config:
    """The run that trains one of the networks alone."""
    if self.networks == 1:
      return self
    seed = self.seed + index
    return dataclasses.replace(self, seed=seed, networks=1, devices=1)

  @classmethod
  def from_identity(cls, fields: dict[str, Any]) -> Config:
    """The inverse of `identity`, on one device; an optimiser is left out.

    Raises:
      UsageError: Fields or values of another version.
    """
    layers = tuple(fields.get("dense_layers", ()))
    alone = {"devices": 1, "shard_params": False, "dense_layers": layers}
    fields = {k: v for k, v in fields.items() if k != "optimizer"}
    try:
      return cls(**{**fields, **alone})
    except TypeError as error:
      raise UsageError(f"flags of another version: {error}") from None


def _check_choices(config: Config) -> None:
  choices = {
    name: typing.get_args(kind)
    for name, kind in typing.get_type_hints(Config).items()
    if typing.get_origin(kind) is Literal
  }
  choices |= {"dataset": data.NAMES, "model": models.NAMES}
  for name, allowed in choices.items():
    _require(config, name, f"one of {', '.join(allowed)}", allowed.__contains__)


def _check_numbers(config: Config) -> None:
  positive = ("epochs", "batch_size", "accumulate", "devices", "update_every")
  for name in (*positive, "keep_checkpoints", "networks"):
    _require(config, name, "in [1, 2^31)", lambda n: 1 <= n < 2**31)
  for name in ("image_size", "process_count"):
    _require(config, name, "at least 1", lambda n: n is None or n >= 1)
  # Above, the largest kernels have 2^31 weights.
  _require(
    config, "width", "in [1, 1024]", lambda n: n is None or 1 <= n <= 1024
  )
  for name in ("sparsity", "initial_sparsity", "momentum", "label_smoothing"):
    _require(config, name, "in [0, 1)", lambda x: 0 <= x < 1)
  for name in ("update_from", "update_until", "drop_fraction", "gamma_sal"):
    _require(config, name, "in [0, 1]", lambda x: 0 <= x <= 1)
  for name in ("weight_decay", "warmup_epochs"):
    _require(config, name, "finite and at least 0", lambda x: 0 <= x < math.inf)
  _require(
    config, "learning_rate", "finite and above 0", lambda x: 0 < x < math.inf
  )
  _require(config, "seed", "in [0, 2^32)", lambda n: 0 <= n < 2**32)


def _check_together(config: Config) -> None:
  _require(
    config,
    "warmup_epochs",
    f"below --epochs {config.epochs}",
    lambda x: x < config.epochs,
  )
  if config.topology == "magnitude":
    _require(
      config,
      "update_from",
      f"below --update-until {config.update_until}",
      lambda x: x < config.update_until,
    )
    _require(
      config,
      "initial_sparsity",
      f"at most --sparsity {config.sparsity}",
      lambda x: x <= config.sparsity,
    )
  _check_networks(config)
  sharing = config.devices if config.networks == 1 else 1
  parts = sharing * config.accumulate
  _require(
    config,
    "batch_size",
    f"a multiple of --devices {sharing} times --accumulate {config.accumulate}",
    lambda n: n % parts == 0,
  )
  if config.image_size is not None and config.dataset != "imagenet2012":
    raise UsageError(
      f"--image-size is for imagenet2012, got {config.image_size} for "
      f"{config.dataset}"
    )
  if config.resume and config.workdir is None:
    raise UsageError("--resume needs the --workdir of the run to go on with")
  _check_processes(config)


def _check_networks(config: Config) -> None:
  if config.networks == 1:
    return
  _require(
    config,
    "networks",
    f"1 or a multiple of --devices {config.devices}",
    lambda n: n % config.devices == 0,
  )
  last = config.seed + config.networks - 1
  if last >= 2**32:
    raise UsageError(
      f"--networks {config.networks}: seeds must be below 2^32, got {last}"
    )
  for name, given in (
    ("shard_params", config.shard_params),
    ("coordinator", config.coordinator is not None),
  ):
    if given:
      raise UsageError(
        f"{flag(name)} goes with one network, got --networks {config.networks}"
      )


def check_effects(config: Config, default: Config) -> None:
  """Raises UsageError for a flag that changes nothing with the others.

  Args:
    config: What was asked for.
    default: The same without any flag given by hand.
  """
  if config.shortcut != default.shortcut and config.model == "perceptron":
    raise UsageError(
      f"--shortcut {config.shortcut} has no effect with --model perceptron"
    )
  sparse = config.topology != "dense"
  pruning = config.topology == "magnitude"
  growing = config.topology in ("rigl", "set", "srigl")
  salient = config.topology == "srigl"
  corrected_rigl = config.topology == "rigl" and config.correction == "on"
  topology = f"--topology {config.topology}"
  both = f"{topology} --correction {config.correction}"
  for names, holds, why in (
    (
      "sparsity correction distribution dense_layers measure_skew",
      sparse,
      topology,
    ),
    ("update_every update_until", growing or pruning, topology),
    ("drop_fraction", growing, topology),
    ("update_from initial_sparsity", pruning, topology),
    ("gamma_sal", salient, topology),
    ("grow_from", corrected_rigl, both),
    ("shard_params", config.devices > 1, "one device"),
  ):
    for name in names.split():
      value = getattr(config, name)
      if value != getattr(default, name) and not holds:
        raise UsageError(f"{flag(name)} {value} has no effect with {why}")


def _check_processes(config: Config) -> None:
  coordinator, number, count = (
    config.coordinator,
    config.process_id,
    config.process_count,
  )
  if coordinator is None and number is None and count is None:
    return
  if coordinator is None or number is None or count is None:
    raise UsageError(
      "--coordinator, --process-id and --process-count go together, got "
      f"{coordinator}, {number} and {count}"
    )
  if config.workdir is None:
    raise UsageError("several processes need one --workdir, got none")
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise UsageError(f"--coordinator must be host:port, got {coordinator}")
  _require(config, "process_id", f"in [0, {count})", lambda n: 0 <= n < count)
  _require(
    config,
    "devices",
    f"a multiple of --process-count {count}",
    lambda n: n % count == 0,
  )


def _require(
  config: Config, name: str, what: str, holds: Callable[[Any], bool]
) -> None:
  value = getattr(config, name)
  if not holds(value):
    raise UsageError(f"{flag(name)} must be {what}, got {value}")


def flag(name: str) -> str:
  """The command line's spelling of a field."""
  return "--" + name.replace("_", "-")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What differs between two `folder.identity`, one flag an entry."""
  # The optimiser is no flag.
  shown = lambda name: name if name == "optimizer" else flag(name)
  return [
    f"{shown(name)} {old.get(name)} became {new.get(name)}"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]


def from_environment(config: Config) -> Config:
  """Fills in the processes from JAX's environment variables, if set."""
  coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if config.coordinator is not None or coordinator is None:
    return config
  number = os.environ.get("JAX_PROCESS_ID", "")
  count = os.environ.get("JAX_NUM_PROCESSES", "")
  if not number.isdecimal() or not count.isdecimal():
    raise UsageError(
      "JAX_COORDINATOR_ADDRESS is set, so JAX_PROCESS_ID and "
      f"JAX_NUM_PROCESSES must be numbers, got {number!r} and {count!r}"
    )
  return dataclasses.replace(
    config,
    coordinator=coordinator,
    process_id=int(number),
    process_count=int(count),
  )
