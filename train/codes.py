"""Discrete targets: labels from a codebook, and their cross-entropy.

A label is the number of the nearest word of `extract codebook`, computed from the decoded targets on their device: a
matrix product for each stage, so that no labels are stored. With several stages the words are those of residual vector
quantisation, and each stage has labels of its own. A linear head for each target layer maps the student's prediction of
that layer to the logits of all stages. Every frame has the loss, none is masked (docs/methods.md, Discrete targets).

Shapes: L target layers, S stages, K words of a stage, F frames, D dim of the teacher.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.base.errors import RetortError
from extract.store.codebook import Codebook
from extract.store.reader import StoreReader


def words_of(codebook: Codebook, layers: Sequence[int], store: StoreReader) -> Tensor:
    """Return the words of some layers, float32 (L, S, K, D).

    Raises RetortError for a codebook of another teacher, without a layer, or of another dim.
    """
    remedy = "run `python -m extract codebook` on this manifest"
    if codebook.teacher != store.manifest.upstream["weights_sha256"]:
        raise RetortError(f"codebook: it is of another teacher than {store.source}; {remedy}")
    if missing := [layer for layer in layers if layer not in codebook.words]:
        raise RetortError(f"codebook: no words for layer {missing[0]}, which `targets` has; {remedy}")
    words_LSKD = np.stack([codebook.words[layer] for layer in layers])
    if words_LSKD.shape[-1] != store.dim:
        raise RetortError(f"codebook: words of {words_LSKD.shape[-1]} features, expected {store.dim}; {remedy}")
    return torch.from_numpy(words_LSKD)


def nearest_words(words_SKD: Tensor, values_FD: Tensor) -> Tensor:
    """Return the number of the word of each frame and stage, int64 (F, S)."""
    found = []
    with torch.autocast(values_FD.device.type, enabled=False):  # in 16 bits many words would be equally near
        rest_FD = values_FD.float()
        for words_KD in words_SKD:
            # argmin |x - w|^2 = argmin |w|^2 - 2 x.w
            number_F = torch.addmm(words_KD.square().sum(1), rest_FD, words_KD.T, alpha=-2).argmin(1)
            rest_FD = rest_FD - words_KD[number_F]
            found.append(number_F)
    return torch.stack(found, 1)


class CodeHeads(nn.Module):
    """A linear map from the prediction of each target layer to the logits of its words, for training only."""

    words_LSKD: Tensor

    def __init__(self, words_LSKD: Tensor) -> None:
        super().__init__()
        _, num_stages, num_words, dim = words_LSKD.shape
        self.register_buffer("words_LSKD", words_LSKD, persistent=False)  # in its own file, not in checkpoints
        self.maps = nn.ModuleList(nn.Linear(dim, num_stages * num_words) for _ in words_LSKD)

    def logits(self, predicted: list[Tensor]) -> list[Tensor]:
        """Return the logits of each layer, float32 (F, S, K), of predictions (F, D)."""
        shape = self.words_LSKD.shape[1:3]
        return [one(values_FD).float().unflatten(1, shape) for one, values_FD in zip(self.maps, predicted, strict=True)]

    def losses(self, predicted: list[Tensor], targets_LFD: Tensor) -> list[Tensor]:
        """Return the cross-entropy of each layer in nats, the mean over frames and stages, float32 scalars."""
        labels = [nearest_words(*pair) for pair in zip(self.words_LSKD, targets_LFD, strict=True)]
        return [
            functional.cross_entropy(logits_FSK.flatten(0, 1), labels_FS.flatten())
            for logits_FSK, labels_FS in zip(self.logits(predicted), labels, strict=True)
        ]
