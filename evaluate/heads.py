"""The reference's heads, each after a softmax-weighted sum of layers.

Shapes: L layers, B utterances, T frames of the longest, F frames of all utterances concatenated, N and P the same in
head frames (evaluate/ragged.py), D features, H units, C classes, X any dimensions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluate.ragged import Ragged


class Head(nn.Module):
    """Base of all heads: the weighted sum of layers, sum_l softmax(w)_l h_l with w = 0 at first (equal weights)."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layer_logits = nn.Parameter(torch.zeros(num_layers))

    @property
    def layer_weights(self) -> list[float]:
        """Return the weight of each layer; they sum to one."""
        weights: list[float] = self.layer_logits.detach().softmax(0).tolist()
        return weights

    def sum_layers(self, hidden_LX: Tensor) -> Tensor:
        """Return the weighted sum over layers: (L, ...) -> (...)."""
        # One matrix-vector product over all other dimensions: (L,) @ (L, X).
        return (self.layer_logits.softmax(0) @ hidden_LX.flatten(1)).view(hidden_LX.shape[1:])


class LinearHead(Head):
    """Two linear layers without a nonlinearity: PR on frames; KS, SID, IC and ER on time means.

    The mean over time commutes with it, so on time means it equals the reference on frames.
    """

    def __init__(self, *, num_layers: int, dim: int, projection: int, classes: int) -> None:
        super().__init__(num_layers)
        self.projection = nn.Linear(dim, projection)
        self.output = nn.Linear(projection, classes)

    def forward(self, mixed_XD: Tensor) -> Tensor:
        """Map weighted sums (..., D) to logits (..., C)."""
        first, second = self.projection, self.output
        if first.in_features * second.out_features > first.out_features * (first.in_features + second.out_features):
            logits: Tensor = second(first(mixed_XD))
            return logits
        # W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2): the same function with the same gradients, and fewer
        # multiplications here; on PR at 160 features and 75 phones five times fewer.
        weight = second.weight @ first.weight  # (C, D)
        return F.linear(mixed_XD, weight, second.weight @ first.bias + second.bias)


class RecurrentHead(Head):
    """ASR's head: linear, bidirectional LSTMs each followed by dropout (drawn by the caller), linear to characters.

    `stack` neighbouring frames are concatenated before the first LSTM, as the reference's `total_rate` does.
    """

    def __init__(
        self, *, num_layers: int, dim: int, projection: int, hidden: int, depth: int, classes: int, stack: int = 1
    ) -> None:
        super().__init__(num_layers)
        self.stack = stack
        self.projection = nn.Linear(dim, projection)
        widths = [projection * stack] + [2 * hidden] * (depth - 1)
        self.onwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.output = nn.Linear(2 * hidden, classes)

    def forward(self, mixed_FD: Tensor, frames: Ragged, kept: Sequence[Tensor] = ()) -> Tensor:
        """Map weighted sums of all frames (F, D) to logits (B, N, C).

        kept: for each LSTM the dropout mask, 0 or 1 / (1 - p), (P, 2H) on a GPU and (B, N, 2H) on a CPU; empty in
        evaluation.
        """
        logits_BNC: Tensor = (self.packed if mixed_FD.is_cuda else self.padded)(mixed_FD, frames, kept)
        return logits_BNC

    def padded(self, mixed_FD: Tensor, frames: Ragged, kept_BNH: Sequence[Tensor]) -> Tensor:
        """Run two one-way LSTMs over padded batches; the second gets each utterance reversed.

        Same numbers as `packed`. On a CPU, where packing bypasses oneDNN, it takes a tenth of the time for heads of the
        demo's size, and about the same for SUPERB's.
        """
        x_BTH = self.projection(mixed_FD)[frames.rows_BT]
        x_BTH = x_BTH[:, : x_BTH.shape[1] // self.stack * self.stack]
        x_BNH = x_BTH.unflatten(1, (-1, self.stack)).flatten(2)  # (B, N, stack * projection)
        reverse_BN1 = frames.reversed_BN[..., None]
        for layer, (onward, backward) in enumerate(zip(self.onwards, self.backwards, strict=True)):
            ahead_BNH, _ = onward(x_BNH)
            back_BNH, _ = backward(x_BNH.gather(1, reverse_BN1.expand_as(x_BNH)))
            x_BNH = torch.cat([ahead_BNH, back_BNH.gather(1, reverse_BN1.expand_as(back_BNH))], -1)
            if kept_BNH:
                x_BNH = x_BNH * kept_BNH[layer]
        logits_BNC: Tensor = self.output(x_BNH)
        return logits_BNC

    def packed(self, mixed_FD: Tensor, frames: Ragged, kept_PH: Sequence[Tensor]) -> Tensor:
        """Run one bidirectional LSTM over packed utterances: one call of cuDNN for each layer, and no padding."""
        packed = frames.packed
        x_PH = self.projection(mixed_FD)[packed.rows_PS].flatten(1)
        for layer, (onward, backward) in enumerate(zip(self.onwards, self.backwards, strict=True)):
            # States start at 0, for both directions and the utterances of the first batch size: all of them.
            start = x_PH.new_zeros(2, int(np.count_nonzero(frames.stacked_B)), onward.hidden_size)
            weights: list[Tensor] = [*onward.parameters(), *backward.parameters()]
            x_PH, _, _ = torch.lstm(
                x_PH, packed.batch_sizes_N, (start, start), weights, True, 1, 0.0, self.training, True
            )
            if kept_PH:
                x_PH = x_PH * kept_PH[layer]
        logits_BNC: Tensor = self.output(x_PH)[packed.padded_BN]
        return logits_BNC

    def _apply(self, *args: Any, **named: Any) -> "RecurrentHead":
        """Move the head; on a GPU place the weights of both directions in one block, as cuDNN reads them."""
        super()._apply(*args, **named)  # type: ignore[no-untyped-call]
        if self.output.weight.is_cuda:
            for onward, backward in zip(self.onwards, self.backwards, strict=True):
                both = nn.LSTM(onward.input_size, onward.hidden_size, bidirectional=True, device="meta")
                for suffix, one_way in (("", onward), ("_reverse", backward)):
                    for name, parameter in one_way.named_parameters():
                        setattr(both, name + suffix, parameter)
                both.flatten_parameters()  # moves their data; parameters, names and shapes stay
        return self
