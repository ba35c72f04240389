"""Losses of the student families, and the prediction heads that only training needs.

A `Distiller` is a student with its heads. It maps a batch to one prediction for each of the teacher's target layers,
on the utterances' own frames (never on padding), and to the loss of its family. With p the predictions and t the
targets (docs/methods.md):

    distilhubert   mean |p - t| + mean(-log sigmoid(cos(p, t)))                         arXiv 2110.01900, official code
    gendistillers  the same                                                             arXiv 2406.09444
    stacked        MSE at the last layer + w · mean MSE at the target layers below it   arXiv 2606.11766

The setting `loss` replaces the error of a layer (L1 and cosine, MSE, or the cross-entropy of train/codes.py) and keeps
the family's weights of the layers.

With several stores of targets there is one such loss for each, and the loss is their weighted mean.

Checkpoints keep the heads, the saved student does not have them.

Shapes: B batch, T frames of the padded batch, F own frames of all utterances in a row, L target layers, C channels of
the stem, d dim of the student, D dim of the teacher.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import add
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.codes import CodeHeads
from train.config import GENERATING, Loss, StudentConfig
from train.data import Batch
from train.growth import Stage, matched_position, plan_stages
from train.modeling_retort import (
    RetortGen2dStudent,
    RetortGenStudent,
    RetortStackedStudent,
    RetortStudent,
    RetortStudentConfig,
)
from train.stem import STANDARD, StemShape


def regression_loss(predicted: list[Tensor], targets_LFD: Tensor) -> Tensor:
    """Return DistilHuBERT's loss, a float32 scalar; every frame and layer has the same weight.

    Arguments:
        predicted: L predictions (F, D), float32 or bfloat16.
        targets_LFD: the teacher's layers, float32.
    """
    predicted_LFD = torch.stack(predicted).float()  # the loss is float32 under autocast too
    distance = functional.l1_loss(predicted_LFD, targets_LFD)
    cosine_LF = functional.cosine_similarity(predicted_LFD, targets_LFD, dim=-1)
    # The second term has the weight 1 of the official code (lambda in the paper).
    return distance - functional.logsigmoid(cosine_LF).mean()


def squared_error(predicted_FD: Tensor, target_FD: Tensor) -> Tensor:
    """Return the MSE of one layer, a float32 scalar."""
    return functional.mse_loss(predicted_FD.float(), target_FD)


def absolute_and_cosine_error(predicted_FD: Tensor, target_FD: Tensor) -> Tensor:
    """Return DistilHuBERT's loss of one layer, a float32 scalar."""
    return regression_loss([predicted_FD], target_FD[None])


REGRESSION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": squared_error,
    "l1-cosine": absolute_and_cosine_error,
}


def layer_to_layer_loss(losses: list[Tensor], weight: float) -> Tensor:
    """Return the loss of the last layer, the output, plus `weight` times the mean loss of the layers below."""
    if len(losses) == 1:
        return losses[0]
    return losses[-1] + weight * torch.stack(losses[:-1]).mean()


def layer_errors(predicted: list[Tensor], targets_LFD: Tensor) -> Tensor:
    """Return the errors of every target layer in the order of `LayerError`, float32 (L, 3), on the device.

    Arguments as in `regression_loss`.
    """
    errors_L3 = []
    for one_FD, target_FD in zip(predicted, targets_LFD, strict=True):
        found_FD = one_FD.float()
        cosine = functional.cosine_similarity(found_FD, target_FD, dim=-1).mean()
        l1, mse = functional.l1_loss(found_FD, target_FD), functional.mse_loss(found_FD, target_FD)
        errors_L3.append(torch.stack([l1, cosine, mse]))
    return torch.stack(errors_L3)


def weighted_sum(losses: list[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of weighted losses, a scalar."""
    return reduce(add, [weight * loss for weight, loss in zip(weights, losses, strict=True)])


@dataclass(frozen=True)
class TeacherTargets:
    """Layers to predict from one store: their numbers, ascending, their dim, and the weight of the store's loss."""

    layers: tuple[int, ...]
    dim: int
    weight: float = 1.0


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is scaled, so that the stem learns more slowly (GradMultiply of fairseq)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return value.view_as(value)  # autograd forbids returning the input itself

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None  # type: ignore[attr-defined]


class Distiller(nn.Module, ABC):
    """Student with its training-only heads: `forward` returns predictions, `loss` compares them with the targets."""

    published_loss: ClassVar[Loss] = "l1-cosine"  # of a layer, without the setting `loss`
    student: RetortStudent
    heads: nn.ModuleDict

    def __init__(self, config: StudentConfig, teachers: Sequence[TeacherTargets]) -> None:
        super().__init__()
        self.teachers = tuple(teachers)
        total = sum(teacher.weight for teacher in teachers)
        self.weights = tuple(teacher.weight / total for teacher in teachers)  # of their losses; 1 for one teacher
        self.stem_grad_scale = config.optimiser.stem_grad_scale
        self.stem_trains = True
        self.layer_loss = config.loss or self.published_loss
        self.heads = nn.ModuleDict()

    @property
    def code_heads(self) -> CodeHeads:
        """Heads of the loss `codes`."""
        heads = self.heads["codes"]
        assert isinstance(heads, CodeHeads)
        return heads

    def train_stem(self, trains: bool) -> None:
        """Train or freeze the stem. A frozen stem has no trainable parameter and builds no autograd graph."""
        self.stem_trains = trains
        self.student.feature_extractor.requires_grad_(trains)

    def stem(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the stem's output (B, T, C) and the own frames, bool (B, T), from waveforms or from the store."""
        if batch.samples_BS is None:
            return batch.stem()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stem_trains):
            stem_BTC, valid_BT = self.student.feature_extractor(batch.waveforms(), batch.num_samples_B)
        if self.stem_trains and self.stem_grad_scale != 1:
            stem_BTC = _ScaleGradient.apply(stem_BTC, self.stem_grad_scale)  # type: ignore[no-untyped-call, unused-ignore]
        return stem_BTC, valid_BT

    def states(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return all hidden states of the student, layer 0 first, each (B, T, d)."""
        stem_BTC, valid_BT = self.stem(batch)
        output = self.student(stem_features=stem_BTC, frame_mask=valid_BT, output_hidden_states=True)
        return output.hidden_states  # type: ignore[no-any-return]

    @abstractmethod
    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        """Return one prediction (F, D) for each target layer, store after store, with F and D of that store.

        Arguments:
            targets_LFD: the layers of the first teacher; only teacher forcing reads them.
            forced: use the teacher's layers as the history of a gendistiller (teacher forcing).
        """

    def by_store(self, predicted: list[Tensor]) -> list[list[Tensor]]:
        """Return the predictions of `forward`, grouped by store."""
        left = iter(predicted)
        return [list(islice(left, len(teacher.layers))) for teacher in self.teachers]

    def store_losses(self, predicted: list[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """Return the loss of each store, float32 scalars, from all predictions and the stores' targets (L, F, D)."""
        return [self.loss(*pair) for pair in zip(self.by_store(predicted), targets, strict=True)]

    def loss(self, predicted: list[Tensor], targets_LFD: Tensor) -> Tensor:
        """Return the loss of one store, a float32 scalar: the mean over its layers, or what the family has instead."""
        if self.layer_loss == "l1-cosine":
            return regression_loss(predicted, targets_LFD)
        return torch.stack(self.layer_losses(predicted, targets_LFD)).mean()

    def layer_losses(self, predicted: list[Tensor], targets_LFD: Tensor) -> list[Tensor]:
        """Return the loss of each target layer, float32 scalars."""
        if self.layer_loss == "codes":
            return self.code_heads.losses(predicted, targets_LFD)
        error = REGRESSION[self.layer_loss]
        return [error(one_FD, target_FD) for one_FD, target_FD in zip(predicted, targets_LFD, strict=True)]


class HeadDistiller(Distiller):
    """DistilHuBERT (arXiv 2110.01900): all target layers are predicted from the last block.

    p_l = W_l GELU(V h)_l, with V: d -> L d shared by all targets, then split into L parts, and W_l: d -> D. L counts
    the targets of all stores.
    """

    def __init__(self, config: StudentConfig, student: RetortStudent, teachers: Sequence[TeacherTargets]) -> None:
        super().__init__(config, teachers)
        self.student = student
        dims, dim = [teacher.dim for teacher in teachers for _ in teacher.layers], student.config.hidden_size
        self.heads["shared"] = nn.Linear(dim, dim * len(dims))
        self.heads["split"] = nn.ModuleList(nn.Linear(dim, teacher_dim) for teacher_dim in dims)

    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        inner = functional.gelu(self.heads["shared"](_own_frames(self.states(batch)[-1], batch)))  # (F, L d)
        parts = self.by_store(list(inner.chunk(len(self.heads["split"]), dim=-1)))  # type: ignore[arg-type]  # (F, d)
        # The heads are linear, so the mean over frames may come before them, where it costs less.
        matched = [batch.matched(part, store) for store, of_store in enumerate(parts) for part in of_store]
        return [head(part) for head, part in zip(self.heads["split"], matched, strict=True)]  # type: ignore[call-overload]


class LayerDistiller(Distiller):
    """Layer to layer: each target layer is predicted from one block of the student, by a linear map d -> D of its own.

    The map belongs to the target, not to the block: after growth the same map reads another block.
    """

    published_loss = "mse"

    def __init__(self, config: StudentConfig, student: RetortStudent, teachers: Sequence[TeacherTargets]) -> None:
        super().__init__(config, teachers)
        self.student = student
        self.config, self.stages = config, plan_stages(config)
        self.heads["projections"] = nn.ModuleList(
            nn.Linear(student.config.hidden_size, teacher.dim) for teacher in teachers for _ in teacher.layers
        )
        for stage in self.stages:
            self.match(stage)  # raises now for a target without a counterpart at a later stage
        self.match(self.stages[0])

    def match(self, stage: Stage) -> None:
        """Set the positions of the student's blocks that are compared at this stage of growth, by store."""
        place = self.config.growth.intermediate
        self.positions = [
            [matched_position(stage, self.stages, layer, teacher.layers[-1], place) for layer in teacher.layers]
            for teacher in self.teachers
        ]

    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        blocks = self.states(batch)[1:]  # without layer 0
        compared = [
            batch.matched(_own_frames(blocks[position], batch), store)  # before the linear map, where it costs less
            for store, positions in enumerate(self.positions)
            for position in positions
        ]
        return [head(one) for head, one in zip(self.heads["projections"], compared, strict=True)]  # type: ignore[call-overload]

    def loss(self, predicted: list[Tensor], targets_LFD: Tensor) -> Tensor:
        return layer_to_layer_loss(self.layer_losses(predicted, targets_LFD), self.config.intermediate_weight)


class GenerationDistiller(Distiller):
    """GenDistiller (arXiv 2310.13418, 2406.09444): the student generates the target layers themselves, without heads.

    With teacher forcing the history of layer i is the teacher's layer i - 1 from the store, so that one batched pass
    predicts all targets. Free running uses the student's own layer i - 1, as scoring always does.
    """

    student: RetortGenStudent

    def __init__(self, config: StudentConfig, student: RetortGenStudent, teachers: Sequence[TeacherTargets]) -> None:
        super().__init__(config, teachers)
        self.student = student

    def forward(self, batch: Batch, targets_LFD: Tensor, forced: bool = False) -> list[Tensor]:
        stem_BTC, valid_BT = self.stem(batch)
        start_BTD, mask_B11T = self.student.start(None, None, stem_BTC, valid_BT)  # d = D here
        if forced:
            history = [_grid(target_FD, start_BTD, batch) for target_FD in targets_LFD[:-1]]
            generated = self.student.teacher_forced(start_BTD, history, mask_B11T)
        else:
            generated = self.student.free_run(start_BTD, mask_B11T)
        return [_own_frames(layer_BTD, batch) for layer_BTD in generated]


def _own_frames(hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Return the utterances' own frames (F, d) of the padded grid (B, T, d)."""
    return hidden_BTD.flatten(0, 1).index_select(0, batch.rows_F)


def _grid(values_FD: Tensor, like_BTD: Tensor, batch: Batch) -> Tensor:
    """Return values (F, D) of the own frames on the padded grid (B, T, D), zero elsewhere: inverse of `_own_frames`."""
    grid_ND = torch.zeros_like(like_BTD).flatten(0, 1)
    return grid_ND.index_copy(0, batch.rows_F, values_FD.to(grid_ND.dtype)).view_as(like_BTD)


def build_distiller(
    config: StudentConfig,
    *,
    targets: tuple[int, ...],
    teacher_dim: int,
    weight: float = 1.0,
    others: Mapping[str, TeacherTargets] = MappingProxyType({}),
    normalise: bool,
    stem: StemShape = STANDARD,
    note: str | None = None,
    depth: int | None = None,
    words_LSKD: Tensor | None = None,
    light_blocks: int | None = None,
) -> Distiller:
    """Return a new distiller with random weights from torch's global generator.

    Arguments:
        targets: teacher layers to predict, ascending.
        teacher_dim: dim of the targets.
        weight: of their loss beside the losses of `others`, further stores of targets by name.
        normalise: waveforms come with zero mean and unit variance.
        stem: shape of the teacher's stem; with it the student has the teacher's frames.
        note: text of the teacher's author that is shown beside its scores; it is copied to the student's config.
        depth: number of blocks; None: the shape's.
        words_LSKD: of the codebook; needed by the loss `codes` alone.
        light_blocks: blocks of a light stem with the frames of `stem`; None: the stem is that of convolutions.
    """
    depth = config.shape.layers if depth is None else depth
    student_config = _student_config(config, targets, normalise=normalise, stem=stem, depth=depth)
    student_config.light_blocks = light_blocks
    if note is not None:
        student_config.retort_note = note
    if others:
        student_config.retort_other_targets = {name: list(other.layers) for name, other in others.items()}
    teachers = (TeacherTargets(targets, teacher_dim, weight), *others.values())
    distiller: Distiller
    if config.family == "gendistiller-2d":
        distiller = GenerationDistiller(config, RetortGen2dStudent(student_config), teachers)
    elif config.family == "gendistiller":
        distiller = GenerationDistiller(config, RetortGenStudent(student_config), teachers)
    elif config.family == "distilhubert":
        distiller = HeadDistiller(config, RetortStackedStudent(student_config), teachers)
    else:
        distiller = LayerDistiller(config, RetortStackedStudent(student_config), teachers)
    if config.loss == "codes":
        assert words_LSKD is not None
        # Drawn last, so that student and prediction heads start as with the other losses.
        distiller.heads["codes"] = CodeHeads(words_LSKD)
    distiller.train_stem(config.stem_trains_from == 0)
    return distiller


def _student_config(
    config: StudentConfig, targets: tuple[int, ...], *, normalise: bool, stem: StemShape, depth: int
) -> RetortStudentConfig:
    shape, generates = config.shape, config.family in GENERATING
    layer_embedding = config.generation.layer_embedding
    return RetortStudentConfig(
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
        layer_embedding=config.family == "gendistiller-2d" if layer_embedding is None else layer_embedding,
    )
