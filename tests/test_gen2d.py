"""GenDistiller of 2023: attention over cells (layer, time), and its implementations as one function."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_modeling import make, padded, waveforms
from train.modeling_retort import RetortGen2dStudent, RetortGenStudent, causal_over_layers

LAYERS = 4
LENGTHS = (8_000, 5_000, 6_400)


def model_and_start(**changes: object) -> tuple[RetortGen2dStudent, Tensor, Tensor]:
    """A model of four generated layers and two blocks, layer 0 of a padded batch, the mask over its keys."""
    shape = {"num_hidden_layers": LAYERS, "stack_depth": 2, "layer_embedding": True}
    model = make("gendistiller-2d", **shape | changes)
    assert isinstance(model, RetortGen2dStudent)
    batch, mask = padded(waveforms(*LENGTHS))
    start_BTD, mask_B11T = model.start(batch, mask, None, None)
    assert mask_B11T is not None
    return model, start_BTD.detach(), mask_B11T


def some_history(start_BTD: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(start_BTD.shape, generator=generator) for _ in range(LAYERS - 1)]


def dense_mask(mask_B11T: Tensor) -> Tensor:
    """Return the attention mask, written out cell by cell: bool (B, 1, N, N)."""
    size, num_frames = len(mask_B11T), mask_B11T.shape[-1]
    mask = torch.zeros(size, LAYERS * num_frames, LAYERS * num_frames, dtype=torch.bool)
    for layer in range(LAYERS):
        for earlier in range(layer + 1):
            rows = slice(layer * num_frames, (layer + 1) * num_frames)
            columns = slice(earlier * num_frames, (earlier + 1) * num_frames)
            mask[:, rows, columns] = mask_B11T[:, 0]
    return mask[:, None]


@pytest.mark.parametrize("skip", ["start", "previous", "none"])
@torch.no_grad()
def test_layer_by_layer_equals_the_dense_pass(skip: str) -> None:
    model, start, mask = model_and_start(skip=skip)
    history = some_history(start)
    dense = model.all_at_once(start, history, dense_mask(mask))
    forced = model.teacher_forced(start, history, mask)
    assert len(forced) == len(dense) == LAYERS
    for one, other in zip(forced, dense, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    # Attention over layers matters: without it this is the model of 2024, another function.
    other = RetortGenStudent.teacher_forced(model, start, history, mask)
    torch.testing.assert_close(forced[0], other[0], atol=1e-5, rtol=0)
    assert all((one - two).abs().max() > 0.01 for one, two in zip(forced[1:], other[1:], strict=True))


@torch.no_grad()
def test_cached_generation_equals_the_full_pass_with_the_same_history() -> None:
    model, start, mask = model_and_start()
    free = model.free_run(start, mask)
    again = model.all_at_once(start, free[:-1], dense_mask(mask))
    for one, other in zip(free, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    waveform_mask = torch.stack([torch.arange(max(LENGTHS)) < length for length in LENGTHS]).long()
    states = model(padded(waveforms(*LENGTHS))[0], waveform_mask, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(states, [start, *free], strict=True))


def test_gradients_of_both_ways_agree() -> None:
    model, start, mask = model_and_start()
    history = some_history(start)
    gradients = []
    for generated in (
        model.teacher_forced(start, history, mask),
        model.all_at_once(start, history, dense_mask(mask)),
    ):
        model.zero_grad()
        sum((layer * mask[:, 0, 0, :, None]).square().mean() for layer in generated).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 30
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_no_cell_attends_to_a_later_layer() -> None:
    model, start, mask = model_and_start()
    history = some_history(start)
    for changed in range(LAYERS - 1):  # history[i] is g_{i + 1}: only later layers may change
        other = [layer + 10 * (index == changed) for index, layer in enumerate(history)]
        for way, keys in ((model.teacher_forced, mask), (model.all_at_once, dense_mask(mask))):
            before, after = way(start, history, keys), way(start, other, keys)  # type: ignore[operator]
            moved = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
            assert moved == [index > changed for index in range(LAYERS)]


def test_a_cell_attends_to_all_own_frames_of_its_layer_and_those_before() -> None:
    """Gradients are exactly zero where a cell does not attend, and nowhere zero where it does."""
    model, start, mask = model_and_start()
    valid_BT = mask[:, 0, 0]
    for way, keys in ((model.teacher_forced, mask), (model.all_at_once, dense_mask(mask))):
        inputs = [layer.clone().requires_grad_() for layer in (start, *some_history(start))]
        generated = way(inputs[0], inputs[1:], keys)  # type: ignore[operator]
        frame = 3
        for index in range(LAYERS):
            seen = torch.autograd.grad(
                generated[index][:, frame].square().sum(), inputs, retain_graph=True, allow_unused=True
            )
            for row, gradient in enumerate(seen):
                reached = torch.zeros_like(valid_BT) if gradient is None else gradient.abs().sum(-1) > 0
                assert torch.equal(reached, valid_BT if row <= index else torch.zeros_like(valid_BT)), (index, row)


@torch.no_grad()
def test_padding_never_leaks_from_the_history() -> None:
    model, start, mask = model_and_start()
    history = some_history(start)
    together = model.teacher_forced(start, [layer + 1e3 * ~mask[:, 0, 0, :, None] for layer in history], mask)
    for row, num_frames in enumerate(mask[:, 0, 0].sum(-1).tolist()):
        part = [layer[row : row + 1, :num_frames] for layer in (start, *history)]
        for one, many in zip(model.teacher_forced(part[0], part[1:], None), together, strict=True):
            torch.testing.assert_close(many[row : row + 1, :num_frames], one, atol=1e-4, rtol=0)


def test_only_the_embedding_distinguishes_layers() -> None:
    # In one block and without them, exchanging two layers of the history changes nothing for the layers after both.
    for embedding in (False, True):
        model, start, mask = model_and_start(stack_depth=1, layer_embedding=embedding)
        one, two, three = some_history(start)
        with torch.no_grad():
            last = model.teacher_forced(start, [one, two, three], mask)[-1]
            exchanged = model.teacher_forced(start, [two, one, three], mask)[-1]
        assert torch.allclose(last, exchanged, atol=1e-5) != embedding


@pytest.mark.parametrize("padding", [True, False])
def test_flex_attentions_mask_is_the_dense_one(padding: bool) -> None:
    _, start, mask = model_and_start()
    size, num_frames, _ = start.shape
    if not padding:
        mask = torch.ones_like(mask)
    flex = causal_over_layers(LAYERS, size, num_frames, mask if padding else None, torch.device("cpu"))
    cells = LAYERS * num_frames
    assert torch.equal(create_mask(flex.mask_mod, size, 1, cells, cells, device="cpu"), dense_mask(mask))


@pytest.mark.parametrize(
    ("layers", "size", "num_frames"), [(3, 4, 20), (2, 3, 128), (5, 2, 333), (12, 2, 64), (3, 1, 1)]
)
@pytest.mark.parametrize("padding", [True, False])
def test_blocks_of_flex_attention_are_those_of_the_dense_mask(
    layers: int, size: int, num_frames: int, padding: bool
) -> None:
    lengths = torch.linspace(1, num_frames, size).long().flip(0)
    mask = (torch.arange(num_frames) < lengths[:, None])[:, None, None] if padding else None
    found = causal_over_layers(layers, size, num_frames, mask, torch.device("cpu"))
    cells = layers * num_frames
    expected = create_block_mask(found.mask_mod, size, None, cells, cells, device="cpu")
    assert found.shape == expected.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(expected, f"{name}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(getattr(found, f"{name}_num_blocks"), counts)
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(found, f"{name}_indices")[used], indices[used])


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [one.untyped_storage().nbytes() for one in tree_leaves(made) if isinstance(one, Tensor)]
        self.largest = max([self.largest, *sizes])
        return made


def test_the_mask_of_one_long_utterance_takes_megabytes() -> None:
    layers, num_frames = 12, 8192
    with LargestTensor() as memory:
        mask = causal_over_layers(layers, 1, num_frames, None, torch.device("cpu"))
    num_blocks = layers * num_frames // 128
    assert memory.largest <= 8 * num_blocks**2  # int64 block indices; N² bools would be 9.7 GB
    layer = torch.arange(num_blocks) // (num_frames // 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), layer <= layer[:, None])


@torch.no_grad()
def test_compiled_flex_attention_is_layer_by_layer_for_changing_shapes() -> None:
    model, start, mask = model_and_start()
    history = some_history(start)
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):  # of which a CPU has no other for this operation
        for rows, frames in ((3, 24), (2, 24), (3, 15), (2, 19), (3, 20)):
            part = [layer[:rows, :frames] for layer in (start, *history)]
            keys = mask[:rows, ..., :frames]
            flex = causal_over_layers(LAYERS, rows, frames, keys, start.device)
            found = model.all_at_once(part[0], part[1:], flex)
            for one, other in zip(found, model.layer_by_layer(part[0], part[1:], keys), strict=True):
                own = keys[:, 0, 0]
                torch.testing.assert_close(one[own], other[own], atol=1e-5, rtol=0)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # of at most 8, after which it would run dense


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_attention_equals_layer_by_layer_on_a_gpu() -> None:
    model, start, mask = model_and_start(hidden_size=64, attention_dropout=0.0, dropout=0.0, initializer_range=0.1)
    model, start, mask = model.cuda().train(), start.cuda(), mask.cuda()
    for num_rows in (3, 2):  # another batch size, compiled anew or for any size
        history = [layer.cuda()[:num_rows] for layer in some_history(start.cpu())]
        results = []
        for way in (model.teacher_forced, model.layer_by_layer):
            generated = way(start[:num_rows], history, mask[:num_rows])
            loss = sum((layer * mask[:num_rows, 0, 0, :, None]).square().mean() for layer in generated)
            model.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            gradient = model.encoder.layers[0].attention.q_proj.weight.grad
            results.append((torch.stack(generated)[:, mask[:num_rows, 0, 0]], gradient.clone()))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
