"""What a student is made of: one section of params.yaml, parsed into frozen values.

    train:
      distilhubert:            # the name that `python -m train run --student` takes
        family: distilhubert
        steps: 200
        shape: {layers: 2, dim: 160, ffn: 640, heads: 4, stem_channels: 64}

Everything has a default but the family, the number of steps and the shape's layers, dim, ffn and heads. An unknown key
or value is an error that lists the valid ones.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from extract.base.errors import RetortError, unknown
from extract.base.params import merge, read_section
from extract.base.validate import parse

Family = Literal[
    "distilhubert",
    "layerwise",
    "interleaved",
    "gradual",
    "midas",
    "progressive",
    "one-shot",
    "gendistiller",
    "gendistiller-2d",
]
GROWN: tuple[Family, ...] = ("interleaved", "gradual", "midas", "progressive", "one-shot")
GENERATING: tuple[Family, ...] = ("gendistiller", "gendistiller-2d")


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """The student's shape. Defaults are wav2vec 2.0's stem and positional convolution."""

    layers: int  # Transformer blocks; a gendistiller's are shared by all generated layers
    dim: int
    ffn: int
    heads: int
    stem_channels: int = 512
    stem_norm: Literal["group", "layer"] = "group"
    stem_bias: bool = False
    position_kernel: int = 128
    position_groups: int = 16
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "ffn", "heads", "stem_channels", "position_kernel", "position_groups"):
            _check_range(self, name, low=1)
        for name in ("dropout", "attention_dropout"):
            _check_range(self, name, low=0, below=1)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW, warm-up and linear decay to zero. Defaults are DistilHuBERT's."""

    lr: float = 2e-4
    warmup: float = 0.07  # share of the steps
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 1e-6
    clip: float = 5.0  # largest gradient norm
    accumulate: int = 1  # packs a step of each process
    ema: float = 0.0  # decay of a moving average of the weights, which is scored and saved in their place; 0: none
    stem_grad_scale: float = 0.1  # gradients of the convolution stem; 0 freezes it
    stem_frozen: float = 0.0  # share of the steps, from the first on, in which it is frozen all the same

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            if getattr(self, name) <= 0:
                raise RetortError(f"{name}: got {getattr(self, name):g}, expected more than 0")
        for name in ("weight_decay", "stem_grad_scale"):
            _check_range(self, name, low=0)
        if not 0 <= self.warmup <= 1:
            raise RetortError(f"warmup: got {self.warmup:g}, expected a share of the steps, 0 to 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RetortError(f"betas: got {list(self.betas)}, expected two numbers from 0 to below 1")
        _check_range(self, "accumulate", low=1)


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How a grown family gets from `first` layers to the shape's depth (METHODS.md, section 1)."""

    first: int = 3
    schedule: Literal["equal", "proportional", "late"] = "equal"
    exponent: float = 1.0  # of `proportional`: stage i takes i^exponent parts
    late_share: float = 0.8  # of `late`: what the first stage takes
    optimiser: Literal["copy", "copy-reset-step", "fresh"] = "copy"
    fresh_warmup_steps: int = 20
    learning_rate: Literal["continue", "restart"] = "restart"  # at every stage; lower losses in all seeds (RESULTS.md)
    intermediate: Literal["block-end", "original"] = "block-end"

    def __post_init__(self) -> None:
        _check_range(self, "first", low=1)
        _check_range(self, "exponent", low=0, below=100)
        _check_range(self, "late_share", low=0, below=1)
        _check_range(self, "fresh_warmup_steps", low=0)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What only a gendistiller has (METHODS.md, section 2)."""

    skip: Literal["start", "previous", "none"] = "start"
    layer_embedding: bool | None = None  # None: on where a layer attends to others, as in gendistiller-2d
    forcing_first: float = 0.0  # share of steps with the teacher's layers as history, at the first step
    forcing_last: float = 0.0  # and at the last

    def __post_init__(self) -> None:
        for name, share in (("forcing_first", self.forcing_first), ("forcing_last", self.forcing_last)):
            if not 0 <= share <= 1:
                raise RetortError(f"{name}: got {share:g}, expected a share of the steps, 0 to 1")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """One student: a section of `train` in params.yaml."""

    family: Family
    steps: int
    shape: ShapeConfig
    targets: tuple[int, ...] | None = None  # teacher layers to predict; None: all in the store but layer 0
    init: Literal["teacher", "random"] = "teacher"
    # What steps with a frozen stem start from: `stored` reads what `extract run --keep frames,pooled,stem` left, and no
    # waveform. Steps that train the stem, dev scores and the saved student start from waveforms in any case.
    stem: Literal["waveforms", "stored"] = "waveforms"
    intermediate_weight: float = 0.5  # of the layer-to-layer loss beside the output loss
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    train_splits: tuple[str, ...] = ("train",)
    dev_split: str | None = "dev"
    log_every: int = 10
    dev_every: int = 1000
    checkpoint_every_steps: int = 1000
    checkpoint_every_s: float = 600.0

    def __post_init__(self) -> None:
        shape = self.shape
        for name in ("steps", "log_every", "dev_every", "checkpoint_every_steps"):
            _check_range(self, name, low=1)
        for name in ("seed", "checkpoint_every_s", "intermediate_weight"):
            _check_range(self, name, low=0)
        for name, divisor in (("heads", shape.heads), ("position_groups", shape.position_groups)):
            if shape.dim % divisor:
                raise RetortError(f"shape.dim: got {shape.dim}, expected a multiple of shape.{name} ({divisor})")
        if self.targets is not None and (
            not self.targets or list(self.targets) != sorted(set(self.targets)) or self.targets[0] < 1
        ):
            raise RetortError(f"targets: got {list(self.targets)}, expected ascending layers from 1 up")
        self._check_stem()
        if not 0 <= self.optimiser.ema < 1:
            raise RetortError(f"optimiser.ema: got {self.optimiser.ema:g}, expected 0 (none) or a decay below 1")
        if self.dev_split in self.train_splits:
            raise RetortError(f"dev_split: {self.dev_split!r} is among train_splits; dev utterances never train")

    def _check_stem(self) -> None:
        settings = self.optimiser
        if self.init == "random" and settings.stem_grad_scale == 0:
            raise RetortError(
                "optimiser.stem_grad_scale: 0 freezes a stem that `init: random` leaves untrained; raise it"
            )
        if not 0 <= settings.stem_frozen < 1 or (settings.stem_frozen and settings.stem_grad_scale == 0):
            raise RetortError(
                f"optimiser.stem_frozen: got {settings.stem_frozen:g} (stem_grad_scale {settings.stem_grad_scale:g}), "
                "expected a share of the steps from 0 to below 1, and a gradient scale above 0 for those after it"
            )
        if self.init == "random" and (settings.stem_frozen or self.stem == "stored"):
            raise RetortError("init: `random` has no teacher's stem to freeze or to read from the store; set `teacher`")
        if self.stem == "stored" and self.stem_trains_from == 0:
            raise RetortError(
                "stem: `stored` is the teacher's and stays as it is, but this stem trains from the first step on; set "
                "optimiser.stem_grad_scale to 0, or optimiser.stem_frozen to the share of steps that read the store"
            )

    @property
    def stem_trains_from(self) -> float:
        """The step from which on the stem is trained; infinity for never."""
        settings = self.optimiser
        return math.inf if settings.stem_grad_scale == 0 else round(settings.stem_frozen * self.steps)

    @property
    def seed_layers(self) -> int:
        """How many Transformer blocks may start as the teacher's first ones."""
        return self.shape.layers if self.family in ("distilhubert", *GENERATING) else 0


def _check_range(section: object, name: str, *, low: float, below: float = math.inf) -> None:
    value = getattr(section, name)
    if not low <= value < below:
        end = "" if math.isinf(below) else f" and below {below:g}"
        raise RetortError(f"{name}: got {value:g}, expected at least {low:g}{end}")


def read_student(params: Path, name: str) -> StudentConfig:
    """Return the student `train.NAME` of a params file, merged over `train.defaults`.

    Raises RetortError for unknown names, keys and values.
    """
    sections = read_section(params, "train")
    defaults = sections.pop("defaults", {})
    if name not in sections:
        raise unknown(f"student (section `train` of {params})", name, sections)
    for key, section in (("defaults", defaults), (name, sections[name])):
        if not isinstance(section, dict):
            raise RetortError(f"{params}: train.{key}: got {section!r}, expected a section with keys")
    return parse(StudentConfig, merge(defaults, sections[name]), where=f"{params}: train.{name}")
