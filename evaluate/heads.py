"""The reference's heads, each after a softmax-weighted sum of layers.

Shapes: L layers, B utterances, T frames of the longest, F frames of all utterances concatenated, D features, H units,
C classes, X any dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


@dataclass(frozen=True)
class Ragged:
    """Indices that turn F concatenated frames into B padded utterances of T frames.

    Padding repeats an utterance's last frame (reversed: its first). No loss or decoder reads it, and it follows the
    utterance for a recurrence in either direction.
    """

    num_frames_B: Tensor  # int64
    rows_BT: Tensor  # int64, into the F frames
    reversed_BT: Tensor  # int64, into T: frame n - 1 - t of an utterance of n frames

    @classmethod
    def of(cls, num_frames_B: Tensor) -> "Ragged":
        """Return the indices for utterances of these frame counts, int64 (B,)."""
        time_T = torch.arange(int(num_frames_B.max()))
        last_B1 = num_frames_B[:, None] - 1
        start_B1 = (num_frames_B.cumsum(0) - num_frames_B)[:, None]
        return cls(num_frames_B, start_B1 + time_T.minimum(last_B1), (last_B1 - time_T).clamp(min=0))


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

    def forward(self, mixed_FD: Tensor, frames: Ragged, kept_BTH: Sequence[Tensor] = ()) -> Tensor:
        """Map weighted sums of all frames (F, D) to logits (B, T // stack, C).

        kept_BTH: for each LSTM the dropout mask, 0 or 1 / (1 - p); empty in evaluation.
        """
        x_BTH = self.projection(mixed_FD)[frames.rows_BT]
        x_BTH = x_BTH[:, : x_BTH.shape[1] // self.stack * self.stack]
        x_BTH = x_BTH.unflatten(1, (-1, self.stack)).flatten(2)  # (B, T // stack, stack * projection)
        reverse_BT1 = Ragged.of(frames.num_frames_B // self.stack).reversed_BT[..., None]
        for layer, (onward, backward) in enumerate(zip(self.onwards, self.backwards, strict=True)):
            # Two one-way LSTMs over padded batches; the second gets each utterance reversed. Same numbers as one packed
            # bidirectional LSTM, but ten times faster on a CPU, where packing bypasses oneDNN.
            ahead_BTH, _ = onward(x_BTH)
            back_BTH, _ = backward(x_BTH.gather(1, reverse_BT1.expand_as(x_BTH)))
            x_BTH = torch.cat([ahead_BTH, back_BTH.gather(1, reverse_BT1.expand_as(back_BTH))], -1)
            if kept_BTH:
                x_BTH = x_BTH * kept_BTH[layer]
        logits: Tensor = self.output(x_BTH)
        return logits
