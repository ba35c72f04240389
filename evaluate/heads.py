"""The heads, as the reference has them, and the softmax-weighted layer sum in front of each.

Shapes: L layers, B utterances, T frames of the longest, F frames end to end, D features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """A head over the weighted layer sum. The weights are a softmax over a vector that starts at zero."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layer_logits = nn.Parameter(torch.zeros(num_layers))

    @property
    def layer_weights(self) -> list[float]:
        """The weight of each layer; they sum to one."""
        weights: list[float] = self.layer_logits.detach().softmax(0).tolist()
        return weights

    def sum_layers(self, hidden_LX: Tensor) -> Tensor:
        """The weighted sum over layers: (L, ...) -> (...)."""
        return (self.layer_logits.softmax(0) @ hidden_LX.flatten(1)).view(hidden_LX.shape[1:])


class LinearHead(Head):
    """Linear, Linear, with nothing between: PR on frames, KS, SID, IC and ER on time means.

    The mean over time commutes with it, so on time means it gives what the reference gives on frames.
    """

    def __init__(self, *, num_layers: int, dim: int, projection: int, classes: int) -> None:
        super().__init__(num_layers)
        self.projection = nn.Linear(dim, projection)
        self.output = nn.Linear(projection, classes)

    def forward(self, mixed_XD: Tensor) -> Tensor:
        """Weighted sums (..., dim) -> logits (..., classes)."""
        first, second = self.projection, self.output
        if first.in_features * second.out_features > first.out_features * (first.in_features + second.out_features):
            logits: Tensor = second(first(mixed_XD))
            return logits
        # The product of the two matrices is the same function with the same gradients and here has fewer terms:
        # on PR at 160 features and 75 phones five times fewer.
        weight = second.weight @ first.weight
        return F.linear(mixed_XD, weight, second.weight @ first.bias + second.bias)


@dataclass(frozen=True)
class Ragged:
    """Which rows of F frames end to end make B utterances of up to T frames.

    Rows past an utterance's end repeat its last (or, reversed, its first) frame: never read by a loss or a decoder, and
    behind the end for a recurrence in either direction.
    """

    num_frames_B: Tensor  # int64
    rows_BT: Tensor  # int64, into the F frames
    reversed_BT: Tensor  # int64, into T: frame T' - 1 - t of an utterance of T' frames

    @classmethod
    def of(cls, num_frames_B: Tensor) -> "Ragged":
        time_T = torch.arange(int(num_frames_B.max()))
        last_B1 = num_frames_B[:, None] - 1
        start_B1 = (num_frames_B.cumsum(0) - num_frames_B)[:, None]
        return cls(num_frames_B, start_B1 + time_T.minimum(last_B1), (last_B1 - time_T).clamp(min=0))


class RecurrentHead(Head):
    """ASR's head: Linear, bidirectional LSTMs with dropout (drawn by the caller) after each, Linear to characters.

    `stack` neighbouring frames are put side by side before the first LSTM, as the reference's `total_rate` does.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        dim: int,
        projection: int,
        hidden: int,
        depth: int,
        classes: int,
        stack: int = 1,
    ) -> None:
        super().__init__(num_layers)
        self.stack = stack
        self.projection = nn.Linear(dim, projection)
        widths = [projection * stack] + [2 * hidden] * (depth - 1)
        self.onwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.output = nn.Linear(2 * hidden, classes)

    def forward(self, mixed_FD: Tensor, frames: Ragged, kept_BTH: Sequence[Tensor] = ()) -> Tensor:
        """Weighted sums of all frames end to end -> logits (B, T // stack, C).

        frames: the utterances' rows; kept_BTH: for each LSTM what dropout leaves, 0 or 1 / (1 - p); none in evaluation.
        """
        x_BTH = self.projection(mixed_FD)[frames.rows_BT]
        x_BTH = x_BTH[:, : x_BTH.shape[1] // self.stack * self.stack]
        x_BTH = x_BTH.unflatten(1, (-1, self.stack)).flatten(2)
        reverse_BT1 = Ragged.of(frames.num_frames_B // self.stack).reversed_BT[..., None]
        for layer, (onward, backward) in enumerate(zip(self.onwards, self.backwards, strict=True)):
            # Two one-way LSTMs over padded batches, one of them fed each utterance from its own end: the same numbers
            # as one packed bidirectional LSTM, ten times faster on a CPU, where packing bypasses oneDNN.
            ahead_BTH, _ = onward(x_BTH)
            back_BTH, _ = backward(x_BTH.gather(1, reverse_BT1.expand_as(x_BTH)))
            x_BTH = torch.cat([ahead_BTH, back_BTH.gather(1, reverse_BT1.expand_as(back_BTH))], -1)
            if kept_BTH:
                x_BTH = x_BTH * kept_BTH[layer]
        logits: Tensor = self.output(x_BTH)
        return logits
