"""What a student is asked to match, and the heads that only training needs.

A `Distiller` is a student with its heads. It maps a batch to one prediction for each of the teacher's target layers,
on the utterances' own frames alone, and to the loss of its family:

    distilhubert   mean |p - t| + mean(-log sigmoid(cos(p, t)))                         arXiv 2110.01900, official code
    gendistillers  the same                                                             METHODS.md, section 2
    stacked        MSE at the last layer + w · mean MSE at the target layers below it   METHODS.md, section 1

Heads are kept in checkpoints and dropped from the saved student. Shapes: B batch, T frames, F valid frames of all
utterances in a row, L target layers, D the teacher's dim.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.config import GENERATING, StudentConfig
from train.data import Batch
from train.growth import Stage, matched_position, plan_stages
from train.initial_weights import STANDARD, StemShape
from train.metrics import LayerError
from train.modeling_retort import (
    RetortGen2dStudent,
    RetortGenStudent,
    RetortStackedStudent,
    RetortStudent,
    RetortStudentConfig,
)


def regression_loss(predicted: list[Tensor], targets_LFD: Tensor) -> Tensor:
    """DistilHuBERT's loss, float32 scalar; every frame and layer weighs the same."""
    predicted_LFD = torch.stack(predicted).float()
    distance = functional.l1_loss(predicted_LFD, targets_LFD)
    cosine_LF = functional.cosine_similarity(predicted_LFD, targets_LFD, dim=-1)
    return distance - functional.logsigmoid(cosine_LF).mean()


def layer_to_layer_loss(predicted: list[Tensor], targets_LFD: Tensor, weight: float) -> Tensor:
    """Output MSE plus `weight` times the mean MSE of the layers below, float32 scalar."""
    errors_L = [
        functional.mse_loss(one_FD.float(), target_FD) for one_FD, target_FD in zip(predicted, targets_LFD, strict=True)
    ]
    if len(errors_L) == 1:
        return errors_L[0]
    return errors_L[-1] + weight * torch.stack(errors_L[:-1]).mean()


def layer_errors(predicted: list[Tensor], targets_LFD: Tensor) -> list[LayerError]:
    """The errors of every target layer."""
    return [
        LayerError(
            l1=functional.l1_loss(one_FD.float(), target_FD).item(),
            cosine=functional.cosine_similarity(one_FD.float(), target_FD, dim=-1).mean().item(),
            mse=functional.mse_loss(one_FD.float(), target_FD).item(),
        )
        for one_FD, target_FD in zip(predicted, targets_LFD, strict=True)
    ]


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled: lets the stem learn more slowly (fairseq's GradMultiply)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None  # type: ignore[attr-defined]


class Distiller(nn.Module, ABC):
    """A student with its training-only heads. `forward` predicts; `loss` judges."""

    student: RetortStudent
    heads: nn.ModuleDict

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.stem_grad_scale = config.optimiser.stem_grad_scale
        self.stem_trains = True
        self.heads = nn.ModuleDict()

    def train_stem(self, trains: bool) -> None:
        """Whether the stem learns. A frozen one has no parameter to train, and runs without a graph."""
        self.stem_trains = trains
        self.student.feature_extractor.requires_grad_(trains)

    def stem(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The stem's output (B, T, C) and its valid frames, bool (B, T): from the waveforms, or as stored."""
        if batch.waveforms_BS is None:
            return batch.stem()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stem_trains):
            stem_BTC, valid_BT = self.student.feature_extractor(batch.waveforms_BS, batch.num_samples_B)
        if self.stem_trains and self.stem_grad_scale != 1:
            stem_BTC = _ScaleGradient.apply(stem_BTC, self.stem_grad_scale)  # type: ignore[no-untyped-call, unused-ignore]
        return stem_BTC, valid_BT

    def states(self, batch: Batch) -> tuple[Tensor, ...]:
        """All hidden states of the student, each (B, T, d)."""
        stem_BTC, valid_BT = self.stem(batch)
        output = self.student(stem_features=stem_BTC, frame_mask=valid_BT, output_hidden_states=True)
        return output.hidden_states  # type: ignore[no-any-return]

    @abstractmethod
    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        """One prediction (F, D) for each target layer. `forced`: with the teacher's layers as history."""

    def loss(self, predicted: list[Tensor], targets_LFD: Tensor) -> Tensor:
        """The family's loss, float32 scalar."""
        return regression_loss(predicted, targets_LFD)


class HeadDistiller(Distiller):
    """DistilHuBERT: all target layers are predicted from the last block, by Linear, GELU and a linear map a target."""

    def __init__(self, config: StudentConfig, student: RetortStudent, *, teacher_dim: int) -> None:
        super().__init__(config)
        self.student = student
        num_targets, dim = len(student.config.target_layers), student.config.hidden_size
        self.heads["shared"] = nn.Linear(dim, dim * num_targets)
        self.heads["split"] = nn.ModuleList(nn.Linear(dim, teacher_dim) for _ in range(num_targets))

    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        inner = functional.gelu(self.heads["shared"](_valid(self.states(batch)[-1], batch)))
        parts = inner.chunk(len(self.heads["split"]), dim=-1)  # type: ignore[arg-type]
        return [head(part) for head, part in zip(self.heads["split"], parts, strict=True)]  # type: ignore[call-overload]


class LayerDistiller(Distiller):
    """Layer to layer: each target layer is predicted from one layer of the student, by a linear map of its own."""

    def __init__(self, config: StudentConfig, student: RetortStudent, *, teacher_dim: int) -> None:
        super().__init__(config)
        self.student = student
        self.config, self.stages = config, plan_stages(config)
        targets = student.config.target_layers
        self.heads["projections"] = nn.ModuleList(nn.Linear(student.config.hidden_size, teacher_dim) for _ in targets)
        for stage in self.stages:
            self.match(stage)  # a target without a counterpart at some stage is an error now, not in a week
        self.match(self.stages[0])

    def match(self, stage: Stage) -> None:
        """Set which layers of the student are compared, at this stage of growth."""
        targets, place = self.student.config.target_layers, self.config.growth.intermediate
        self.positions = [matched_position(stage, self.stages, layer, targets[-1], place) for layer in targets]

    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        blocks = self.states(batch)[1:]
        return [
            head(_valid(blocks[position], batch))
            for head, position in zip(self.heads["projections"], self.positions, strict=True)  # type: ignore[call-overload]
        ]

    def loss(self, predicted: list[Tensor], targets_LFD: Tensor) -> Tensor:
        return layer_to_layer_loss(predicted, targets_LFD, self.config.intermediate_weight)


class GenerationDistiller(Distiller):
    """GenDistiller: the student generates the target layers themselves; there is no head."""

    student: RetortGenStudent

    def __init__(self, config: StudentConfig, student: RetortGenStudent) -> None:
        super().__init__(config)
        self.student = student

    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        stem_BTC, valid_BT = self.stem(batch)
        start_BTD, mask_B11T = self.student.start(None, None, stem_BTC, valid_BT)
        if forced:
            history = [_grid(target_FD, start_BTD, batch) for target_FD in targets_LFD[:-1]]
            generated = self.student.teacher_forced(start_BTD, history, mask_B11T)
        else:
            generated = self.student.free_run(start_BTD, mask_B11T)
        return [_valid(layer_BTD, batch) for layer_BTD in generated]


def _valid(hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """The utterances' own frames, (F, D)."""
    return hidden_BTD.flatten(0, 1).index_select(0, batch.rows_F)


def _grid(values_FD: Tensor, like_BTD: Tensor, batch: Batch) -> Tensor:
    """Values of the utterances' own frames on the padded grid (B, T, D), zero elsewhere."""
    grid_ND = torch.zeros_like(like_BTD).flatten(0, 1)
    return grid_ND.index_copy(0, batch.rows_F, values_FD.to(grid_ND.dtype)).view_as(like_BTD)


def build_distiller(
    config: StudentConfig,
    *,
    targets: tuple[int, ...],
    teacher_dim: int,
    normalise: bool,
    stem: StemShape = STANDARD,
    note: str | None = None,
    depth: int | None = None,
) -> Distiller:
    """A fresh distiller of a config, `depth` blocks deep (None: the shape's). Weights from torch's global generator.

    `stem` is the shape of the teacher's: with it the student has the teacher's frames. `note` is what the teacher's
    maker wants to stand wherever scores stand; the student hands it on.
    """
    shape = config.shape
    generates, two_dimensional = config.family in GENERATING, config.family == "gendistiller-2d"
    layer_embedding = config.generation.layer_embedding
    depth = shape.layers if depth is None else depth
    student_config = RetortStudentConfig(
        family=config.family,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_hidden_layers=len(targets) if generates else depth,
        conv_dim=(shape.stem_channels,) * len(stem.kernels),
        conv_kernel=stem.kernels,
        conv_stride=stem.strides,
        conv_bias=shape.stem_bias,
        feat_extract_norm=shape.stem_norm,
        num_conv_pos_embeddings=shape.position_kernel,
        num_conv_pos_embedding_groups=shape.position_groups,
        dropout=shape.dropout,
        attention_dropout=shape.attention_dropout,
        do_normalize=normalise,
        target_layers=targets,
        stack_depth=depth if generates else 1,
        skip=config.generation.skip,
        layer_embedding=two_dimensional if layer_embedding is None else layer_embedding,
    )
    if note is not None:
        student_config.retort_note = note
    distiller: Distiller
    if generates:
        kind = RetortGen2dStudent if two_dimensional else RetortGenStudent
        distiller = GenerationDistiller(config, kind(student_config))
    elif config.family == "distilhubert":
        distiller = HeadDistiller(config, RetortStackedStudent(student_config), teacher_dim=teacher_dim)
    else:
        distiller = LayerDistiller(config, RetortStackedStudent(student_config), teacher_dim=teacher_dim)
    distiller.train_stem(config.stem_trains_from == 0)
    return distiller
