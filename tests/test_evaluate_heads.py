"""Heads against independent references: torch's modules, packed sequences, and all frames of a time mean."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from evaluate.heads import LinearHead, RecurrentHead
from evaluate.pooled import summed_cross_entropy
from evaluate.ragged import Ragged

F64 = torch.float64
F64_KEEP = torch.tensor(0.8, dtype=torch.float64)


class ReferencePooledHead(nn.Module):
    """Head of KS, IC, SID and ER as in the reference: weighted sum of a padded batch, Linear, masked mean, Linear."""

    def __init__(self, head: LinearHead) -> None:
        super().__init__()
        self.layer_logits = nn.Parameter(head.layer_logits.detach().clone())
        self.projection, self.output = nn.Linear(1, 1), nn.Linear(1, 1)
        for mine, other in ((self.projection, head.projection), (self.output, head.output)):
            mine.weight, mine.bias = (nn.Parameter(p.detach().clone()) for p in (other.weight, other.bias))

    def forward(self, hidden_LBTD: Tensor, num_frames_B: Tensor) -> Tensor:
        mixed_BTD = sum(w * layer_BTD for w, layer_BTD in zip(self.layer_logits.softmax(0), hidden_LBTD, strict=True))
        projected_BTH = self.projection(mixed_BTD)
        mask_BT = torch.arange(projected_BTH.shape[1]) < num_frames_B[:, None]
        mean_BH = (projected_BTH * mask_BT[..., None]).sum(1) / num_frames_B[:, None]
        logits: Tensor = self.output(mean_BH)
        return logits


def reference_loss(logits_BC: Tensor, classes_BG: Tensor, num_classes_G: list[int]) -> Tensor:
    """Sum of the cross-entropies of each label's slice of the output, as in the reference's IC."""
    loss, start = torch.zeros((), dtype=logits_BC.dtype), 0
    for group, num_classes in enumerate(num_classes_G):
        loss = loss + F.cross_entropy(logits_BC[:, start : start + num_classes], classes_BG[:, group])
        start += num_classes
    return loss


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 13),
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.sampled_from([2, 40]),
    st.sampled_from([[5], [12], [6, 14, 4], [2, 3]]),  # SID, KS and ER have one label, IC has three
)
def test_time_means_give_the_logits_loss_and_gradients_of_all_frames(
    seed: int, num_layers: int, lengths: list[int], projection: int, num_classes_G: list[int]
) -> None:
    torch.manual_seed(seed)
    head = LinearHead(num_layers=num_layers, dim=7, projection=projection, classes=sum(num_classes_G)).to(F64)
    nn.init.normal_(head.layer_logits)
    reference = ReferencePooledHead(head)
    hidden = [torch.randn(num_layers, length, 7, dtype=F64) for length in lengths]
    classes_BG = torch.stack([torch.randint(0, num, (len(lengths),)) for num in num_classes_G], 1)

    pooled_LBD = torch.stack([states.mean(1) for states in hidden], 1)
    logits = head(head.sum_layers(pooled_LBD))
    padded_BTLD = pad_sequence([states.transpose(0, 1) for states in hidden], batch_first=True, padding_value=1e3)
    expected = reference(padded_BTLD.permute(2, 0, 1, 3), torch.tensor(lengths))
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)

    loss = summed_cross_entropy(logits, classes_BG, num_classes_G)
    expected_loss = reference_loss(expected, classes_BG, num_classes_G)
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)
    loss.backward()
    expected_loss.backward()
    expected_grads = dict(reference.named_parameters())
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[name].grad, atol=1e-6, rtol=0)
    assert head.projection.weight.grad is not None
    assert head.projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("projection", "classes"), [(4, 50), (256, 3)])
def test_linear_head_is_two_linear_layers_in_either_order_of_products(projection: int, classes: int) -> None:
    torch.manual_seed(0)
    head = LinearHead(num_layers=1, dim=10, projection=projection, classes=classes).to(F64)
    x = torch.randn(6, 3, 10, dtype=F64)
    torch.testing.assert_close(head(x), head.output(head.projection(x)))


def test_layer_weights_start_equal_and_sum_to_one() -> None:
    head = LinearHead(num_layers=4, dim=2, projection=2, classes=2)
    assert head.layer_weights == [0.25] * 4


def test_the_layer_sum_is_weighted_by_a_softmax_of_the_logits() -> None:
    torch.manual_seed(0)
    head = LinearHead(num_layers=3, dim=2, projection=2, classes=2)
    nn.init.normal_(head.layer_logits)
    hidden_LFD = torch.randn(3, 5, 2)
    expected = torch.einsum("l,lfd->fd", head.layer_logits.exp() / head.layer_logits.exp().sum(), hidden_LFD)
    torch.testing.assert_close(head.sum_layers(hidden_LFD), expected)
    assert head.layer_weights == pytest.approx((head.layer_logits.exp() / head.layer_logits.exp().sum()).tolist())


def reference_recurrent(head: RecurrentHead, utterances: list[Tensor], depth: int) -> list[Tensor]:
    """Run the head with torch's packed bidirectional LSTMs on the frames (T, D) of each utterance."""
    x = [head.projection(frames_TD) for frames_TD in utterances]
    s = head.stack
    x = [y[: len(y) // s * s].reshape(len(y) // s, -1) for y in x]
    lengths = torch.tensor([len(y) for y in x])
    padded = pad_sequence(x, batch_first=True)
    for layer in range(depth):
        onward, backward = head.onwards[layer], head.backwards[layer]
        both = nn.LSTM(onward.input_size, onward.hidden_size, batch_first=True, bidirectional=True).to(padded.dtype)
        state = dict(onward.state_dict()) | {f"{k}_reverse": v for k, v in backward.state_dict().items()}
        both.load_state_dict(state)
        packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        padded, _ = pad_packed_sequence(both(packed)[0], batch_first=True)
    out = head.output(padded)
    return [out[b, :n] for b, n in enumerate(lengths.tolist())]


@pytest.mark.parametrize("stack", [1, 2, 3])
def test_recurrent_head_equals_packed_bidirectional_lstms(stack: int) -> None:
    torch.manual_seed(stack)
    head = RecurrentHead(num_layers=1, dim=5, projection=6, hidden=4, depth=2, classes=3, stack=stack).to(F64)
    utterances = [torch.randn(n, 5, dtype=F64) for n in (11, 7, 12, 3)]
    counts_B = np.array([len(u) for u in utterances])
    logits_BTC = head(torch.cat(utterances), Ragged(counts_B, stack=stack))
    assert logits_BTC.shape[1] == 12 // stack
    for logits_TC, expected in zip(logits_BTC, reference_recurrent(head, utterances, 2), strict=True):
        torch.testing.assert_close(logits_TC[: len(expected)], expected, atol=1e-10, rtol=0)


def test_an_utterances_logits_do_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    head = RecurrentHead(num_layers=1, dim=5, projection=6, hidden=4, depth=2, classes=3, stack=2)
    long, short = torch.randn(20, 5), torch.randn(9, 5)
    alone = head(short, Ragged(np.array([9]), stack=2))[0]
    together = head(torch.cat([long, short]), Ragged(np.array([20, 9]), stack=2))[1, : 9 // 2]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stack", [1, 2, 3])
def test_packed_utterances_give_the_logits_and_gradients_of_padded_ones(stack: int) -> None:
    torch.manual_seed(stack)
    head = RecurrentHead(num_layers=1, dim=5, projection=6, hidden=4, depth=2, classes=3, stack=stack).to(F64)
    frames = Ragged(np.array([7, 11, 2, 12]), stack=stack)  # with a stack of 3 the third has no head frame
    mixed_FD = torch.randn(32, 5, dtype=F64)
    own_BN = torch.from_numpy(np.arange(12 // stack) < frames.stacked_B[:, None])
    kept_BNH = [(torch.rand(4, 12 // stack, 8) < 0.8) / F64_KEEP for _ in range(2)]
    time_P, rank_P = np.nonzero(np.arange(12 // stack)[:, None] < np.sort(frames.stacked_B)[::-1])
    order_B = np.argsort(-frames.stacked_B, kind="stable")
    kept_PH = [kept[order_B[rank_P], time_P] for kept in kept_BNH]  # the same masks, in the packed layout
    found = []
    for run, kept in ((head.padded, kept_BNH), (head.packed, kept_PH), (head.padded, ()), (head.packed, ())):
        head.zero_grad()
        logits_BNC = run(mixed_FD, frames, kept)[own_BN]
        logits_BNC.square().sum().backward()
        found.append([logits_BNC.detach(), *(weight.grad for weight in list(head.parameters())[1:])])
    for one, other in (found[:2], found[2:]):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert not torch.equal(found[0][0], found[2][0])


def test_ragged_rows() -> None:
    ragged = Ragged(np.array([3, 1]))
    assert ragged.rows_BT.tolist() == [[0, 1, 2], [3, 3, 3]]
    assert ragged.reversed_BN.tolist() == [[2, 1, 0], [0, 0, 0]]
    assert ragged.grid_F.tolist() == [0, 1, 2, 3]


def test_packed_rows_are_those_of_torch() -> None:
    frames = [torch.arange(3), torch.arange(10, 16), torch.arange(20, 24)]
    expected = pack_padded_sequence(pad_sequence(frames), torch.tensor([3, 6, 4]), enforce_sorted=False)
    packed = Ragged(np.array([3, 6, 4])).packed
    assert torch.cat(frames)[packed.rows_PS[:, 0]].tolist() == expected.data.tolist()
    assert packed.batch_sizes_N.tolist() == expected.batch_sizes.tolist()
    rows_BN = packed.rows_PS[:, 0][packed.padded_BN]
    assert rows_BN.tolist() == [[0, 1, 2, 2, 2, 2], [3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 12, 12]]
