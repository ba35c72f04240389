"""Settings of a student: one section of params.yaml, parsed into frozen dataclasses.

    train:
      defaults:                # merged under the section of every student; mappings merge key by key
        steps: 200
      distilhubert:            # the name that `python -m train run --student` takes
        family: distilhubert
        shape: {layers: 2, dim: 160, ffn: 640, heads: 4, stem_channels: 64}
    stems:
      light: {steps: 1000}     # the name that `python -m train stem --name` and a student's `light_stem` take

The family, the number of steps and the shape's layers, dim, ffn and heads have no default. An unknown key or value is
an error that lists the valid ones. docs/methods.md explains the families and their settings.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from extract.base.errors import RetortError, unknown
from extract.base.params import merge, read_section
from extract.base.validate import check_name, parse

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
Loss = Literal["l1-cosine", "mse", "codes"]


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """Shape of the student. The defaults are wav2vec 2.0's stem and positional convolution."""

    layers: int  # Transformer blocks; in a gendistiller all generated layers share them
    dim: int  # of the hidden states
    ffn: int  # inner dim of the feed-forward networks
    heads: int  # of attention; `dim` is a multiple of it
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
    """AdamW with warm-up and linear decay to zero. The defaults are DistilHuBERT's (arXiv 2110.01900)."""

    lr: float = 2e-4  # peak learning rate
    warmup: float = 0.07  # share of the steps
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 1e-6
    clip: float = 5.0  # largest L2 norm of all gradients together
    accumulate: int = 1  # packs per step and process
    micro_frames: int = 0  # most frames, padding included, that run at once; packs of more run in parts. 0: whole packs
    ema: float = 0.0  # decay of the moving average of the weights that is scored and saved; 0: no average
    stem_grad_scale: float = 0.1  # factor of the gradients that reach the convolution stem; 0 freezes the stem
    stem_frozen: float = 0.0  # share of the steps, from the first one on, in which the stem is frozen

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
        _check_range(self, "micro_frames", low=0)


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """Growth of a stacked family, or of a gendistiller's blocks, to the shape's depth (docs/methods.md, Growth)."""

    first: int = 3  # layers of the first stage; of a gendistiller generation.grow_from
    schedule: Literal["equal", "proportional", "late"] = "equal"  # steps of the stages
    exponent: float = 1.0  # of `proportional`: stage i takes i^exponent parts
    late_share: float = 0.8  # of `late`: share of the steps in the first stage
    optimiser: Literal["copy", "copy-reset-step", "fresh"] = "copy"  # moments and step count of AdamW at growth
    fresh_warmup_steps: int = 20  # of `fresh`: extra warm-up at the start of each later stage
    # Over all stages, the same with a warm-up after each growth, or anew at every stage: lower losses in all seeds
    # (RESULTS.md).
    learning_rate: Literal["continue", "rewarm", "restart"] = "restart"
    clones: Literal["copy", "identity"] = "copy"  # weights of new layers; identity: growth keeps the student's function
    intermediate: Literal["block-end", "original"] = "block-end"  # layers that the intermediate loss compares

    def __post_init__(self) -> None:
        _check_range(self, "first", low=1)
        _check_range(self, "exponent", low=0, below=100)
        _check_range(self, "late_share", low=0, below=1)
        _check_range(self, "fresh_warmup_steps", low=0)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of the gendistiller families alone (docs/methods.md, GenDistiller)."""

    skip: Literal["start", "previous", "none"] = "start"  # source of the skip connection
    grow_from: int | None = None  # blocks of the first stage of interleaved growth to shape.layers; None: no growth
    layer_embedding: bool | None = None  # None: on in gendistiller-2d, where attention spans several layers
    forcing_first: float = 0.0  # probability of teacher forcing at the first step
    forcing_last: float = 0.0  # and at the last step; linear in between

    def __post_init__(self) -> None:
        if self.grow_from is not None:
            _check_range(self, "grow_from", low=1)
        for name, share in (("forcing_first", self.forcing_first), ("forcing_last", self.forcing_last)):
            if not 0 <= share <= 1:
                raise RetortError(f"{name}: got {share:g}, expected a share of the steps, 0 to 1")


@dataclass(frozen=True, kw_only=True)
class StoreTargets:
    """Targets in one of several stores (docs/methods.md, Several teachers)."""

    layers: tuple[int, ...] | None = None  # None: all in the store except layer 0
    weight: float = 1.0  # of the store's loss in the weighted mean

    def __post_init__(self) -> None:
        _check_layers(self.layers, "layers")
        if self.weight <= 0:
            raise RetortError(f"weight: got {self.weight:g}, expected more than 0; leave the store out for none")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Settings of one student: a section of `train` in params.yaml. Times are in seconds, intervals in steps."""

    family: Family
    steps: int
    shape: ShapeConfig
    # Teacher layers to predict; None: all in the store except layer 0. With several stores: targets by the name of the
    # upstream, as its manifest has it.
    targets: dict[str, StoreTargets] | tuple[int, ...] | None = None
    init: Literal["teacher", "stem", "random"] = "teacher"  # the teacher's parts that fit, its stem alone, or none
    # Input of the steps with a frozen stem. `stored` reads the stem's output, which `extract run --keep
    # frames,pooled,stem` wrote, and no waveform. Steps that train the stem read waveforms, and so do all dev scores of
    # a student whose stem trains at some step. One whose stem never trains scores dev from what it trains from.
    stem: Literal["waveforms", "stored"] = "waveforms"
    light_stem: str | None = None  # name of `train stem`: its weights start a light stem; None: a convolution stem
    loss: Loss | None = None  # of a layer; None: that of the family's paper. `codes`: cross-entropy
    codebook: str | None = None  # name of `extract codebook`: targets of `codes`, and measured with the other losses
    intermediate_weight: float = 0.5  # of the layer-to-layer loss beside the output loss
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    # Of convolutions and matrix products; weights, losses and sums stay float32. fp32 is IEEE on every device. tf32
    # needs a GPU of compute capability 8.0 or more, and so does bf16 on GPUs; fp16 scales the loss.
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    train_splits: tuple[str, ...] = ("train",)
    dev_split: str | None = "dev"  # None: nothing is held out
    log_every: int = 10
    dev_every: int = 1000
    checkpoint_every_steps: int = 1000
    checkpoint_every_s: float = 600.0  # seen after steps that log, score or save

    def __post_init__(self) -> None:
        shape = self.shape
        for name in ("steps", "log_every", "dev_every", "checkpoint_every_steps"):
            _check_range(self, name, low=1)
        for name in ("seed", "checkpoint_every_s", "intermediate_weight"):
            _check_range(self, name, low=0)
        for name, divisor in (("heads", shape.heads), ("position_groups", shape.position_groups)):
            if shape.dim % divisor:
                raise RetortError(f"shape.dim: got {shape.dim}, expected a multiple of shape.{name} ({divisor})")
        self._check_targets()
        self._check_stem()
        self._check_codes()
        self._check_growth()
        if not 0 <= self.optimiser.ema < 1:
            raise RetortError(f"optimiser.ema: got {self.optimiser.ema:g}, expected 0 (none) or a decay below 1")
        _check_held_out(self)

    def _check_targets(self) -> None:
        if not isinstance(self.targets, dict):
            _check_layers(self.targets, "targets")
            return
        if not self.targets:
            raise RetortError("targets: got no store, expected the layers of one, or a mapping with a key for each")
        for name in self.targets:
            check_name(name, where="targets")
        if len(self.targets) == 1:
            return
        if self.family in GENERATING:
            raise RetortError(
                f"targets: got {len(self.targets)} stores, but a {self.family} generates the layers of one teacher one "
                "after another; give one store, or set family to distilhubert or to one that is layer to layer"
            )
        if self.codebook is not None:
            raise RetortError(
                f"codebook: got {self.codebook!r}, whose words are those of one store, and `targets` has "
                f"{len(self.targets)}; leave the codebook out, or give one store"
            )

    def _check_stem(self) -> None:
        settings = self.optimiser
        if self.light_stem is not None:
            check_name(self.light_stem, where="light_stem")
            if self.stem == "stored":
                raise RetortError(
                    "stem: got `stored`, the output of the teacher's convolutions, beside light_stem, which replaces "
                    "them; set stem to `waveforms`, or leave light_stem out"
                )
            if self.init == "stem":
                raise RetortError(
                    "init: got `stem`, the teacher's convolutions, beside light_stem, which replaces them; set init to "
                    "`random`"
                )
        elif self.init == "random" and settings.stem_grad_scale == 0:
            raise RetortError(
                "optimiser.stem_grad_scale: got 0, which freezes the random stem of `init: random`; set it above 0"
            )
        if not 0 <= settings.stem_frozen < 1 or (settings.stem_frozen and settings.stem_grad_scale == 0):
            raise RetortError(
                f"optimiser.stem_frozen: got {settings.stem_frozen:g} (stem_grad_scale {settings.stem_grad_scale:g}), "
                "expected a share of the steps from 0 to below 1, and a gradient scale above 0 for those after it"
            )
        if self.init == "random" and self.light_stem is None and (settings.stem_frozen or self.stem == "stored"):
            raise RetortError("init: got `random`, but a frozen or stored stem is the teacher's; set init to `teacher`")
        if self.stem == "stored" and self.stem_trains_from == 0:
            raise RetortError(
                "stem: `stored` needs a frozen stem, and this one trains from the first step on; set "
                "optimiser.stem_grad_scale to 0, or optimiser.stem_frozen to the share of steps that read the store"
            )

    def _check_codes(self) -> None:
        if self.loss == "codes" and self.codebook is None:
            raise RetortError(
                "loss: `codes` needs a codebook; set codebook to the name of `python -m extract codebook`"
            )
        if self.loss == "codes" and self.family in GENERATING:
            raise RetortError(
                f"loss: got `codes`, which gives a {self.family} no layer of the teacher to generate from; set loss to "
                "mse or l1-cosine, or choose another family"
            )
        if self.codebook is not None:
            check_name(self.codebook, where="codebook")
            if self.dev_split is None:
                raise RetortError("codebook: codes are measured on the dev split; set dev_split, or leave codebook out")

    def _check_growth(self) -> None:
        if self.generation.grow_from is not None and self.family not in GENERATING:
            raise RetortError(
                f"generation.grow_from: got {self.generation.grow_from} for a {self.family}, which generates no "
                "layers; set growth.first, or leave it out"
            )
        if self.growth.clones == "identity" and not self.grows:
            raise RetortError(
                f"growth.clones: got `identity`, but a {self.family} of this section does not grow; set family to one "
                f"of {', '.join(GROWN)}, or generation.grow_from, or leave it out"
            )

    def targets_in(self, store: str) -> StoreTargets:
        """Return the targets in a store, by the name of its upstream."""
        return self.targets[store] if isinstance(self.targets, dict) else StoreTargets(layers=self.targets)

    @property
    def stem_trains_from(self) -> float:
        """First step that trains the stem; infinity if none does."""
        settings = self.optimiser
        return math.inf if settings.stem_grad_scale == 0 else round(settings.stem_frozen * self.steps)

    @property
    def needs_audio(self) -> bool:
        """True if a step or a dev score reads waveforms."""
        return self.stem == "waveforms" or self.stem_trains_from < self.steps

    @property
    def grows(self) -> bool:
        """True if the student grows during training."""
        return self.family in GROWN or self.generation.grow_from is not None

    @property
    def initial_blocks(self) -> int:
        """Number of Transformer blocks that may start as the teacher's first ones.

        A stacked student's blocks stand at other depths than the teacher's first ones, so none is copied there.
        """
        if self.family not in ("distilhubert", *GENERATING):
            return 0
        return self.generation.grow_from or self.shape.layers


def _check_layers(layers: tuple[int, ...] | None, name: str) -> None:
    if layers is not None and (not layers or list(layers) != sorted(set(layers)) or layers[0] < 1):
        raise RetortError(f"{name}: got {list(layers)}, expected ascending layers from 1 up")


@dataclass(frozen=True, kw_only=True)
class LightStemConfig:
    """Settings of one light stem: a section of `stems` in params.yaml."""

    steps: int  # of one pack each
    blocks: int = 3  # 3 are a twentieth of the operations of wav2vec 2.0's convolutions
    lr: float = 2e-3  # peak learning rate of AdamW, after 7% of the steps; it ends at zero
    seed: int = 0
    train_splits: tuple[str, ...] = ("train",)
    dev_split: str | None = "dev"  # None: nothing is held out

    def __post_init__(self) -> None:
        _check_range(self, "steps", low=1)
        for name in ("blocks", "seed"):
            _check_range(self, name, low=0)
        if self.lr <= 0:
            raise RetortError(f"lr: got {self.lr:g}, expected more than 0")
        _check_held_out(self)


def _check_held_out(section: StudentConfig | LightStemConfig) -> None:
    if section.dev_split in section.train_splits:
        raise RetortError(
            f"dev_split: {section.dev_split!r} is one of train_splits; give a split that does not train, or null"
        )


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


def read_light_stem(params: Path, name: str) -> LightStemConfig:
    """Return the light stem `stems.NAME` of a params file. Raises RetortError for unknown names, keys and values."""
    sections = read_section(params, "stems")
    if name not in sections:
        raise unknown(f"light stem (section `stems` of {params})", name, sections)
    return parse(LightStemConfig, sections[name], where=f"{params}: stems.{name}")
