"""Comparison of students across losses: a linear probe from their predictions to the teacher's layers and codes.

A student of cross-entropy has no prediction in the teacher's units, so its error is measured behind a linear map that
is fitted after training, in closed form by ridge regression, for each target layer. Students of other losses get the
same map, so that the errors compare.

Shapes: L target layers, F frames, D dim of the teacher; P = D + 1, with a constant feature.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from extract.store.packing import spread_packs
from train.codes import nearest_words
from train.data import Batch
from train.metrics import CodeScore
from train.run import Run
from train.step import autocast

NUM_PACKS = 32  # of training, spread over the lengths: in the demo 58,000 frames for maps of 161 x 160
RIDGE = 1e-4  # times the mean square of a feature


@torch.no_grad()
def score_codes(run: Run) -> dict[int, CodeScore]:
    """Fit the probes on training packs and score them on the dev split, by teacher layer.

    All processes compute the same: it takes seconds, and nothing is sent.
    """
    assert run.words_LSKD is not None
    words_LSKD = run.words_LSKD.to(run.request.device)
    run.scored.eval()
    maps_LPD = _fit(run)
    sums_L3, num_frames = words_LSKD.new_zeros((len(maps_LPD), 3), dtype=torch.float64), 0
    for batch in run.dev_data.dev_batches(device=run.request.device, stored=not run.request.config.needs_audio):
        predicted, targets_LFD = _predict(run, batch)
        own = _own_codes(run, predicted, words_LSKD)
        for layer, target_FD in enumerate(targets_LFD):
            probed_FD = (_with_one(predicted[layer]) @ maps_LPD[layer]).float()
            labels_F = nearest_words(words_LSKD[layer, :1], target_FD)[:, 0]
            probed_F = nearest_words(words_LSKD[layer, :1], probed_FD)[:, 0]
            sums_L3[layer, 0] += (probed_FD - target_FD).double().square().mean(1).sum()
            sums_L3[layer, 1] += (probed_F == labels_F).sum()
            sums_L3[layer, 2] += (own[layer] == labels_F).sum()
        num_frames += targets_LFD.shape[1]
    run.scored.train()
    rows = (sums_L3 / num_frames).tolist()
    return {layer: CodeScore(*row) for layer, row in zip(run.data.layers, rows, strict=True)}


def _fit(run: Run) -> Tensor:
    """Return the ridge solutions of all layers, float64 (L, P, D), from the normal equations."""
    products: list[tuple[Tensor, Tensor]] = []
    for batch in _training_parts(run):
        predicted, targets_LFD = _predict(run, batch)
        for layer, target_FD in enumerate(targets_LFD):
            values_FP = _with_one(predicted[layer])
            both = values_FP.T @ values_FP, values_FP.T @ target_FD.double()
            if len(products) <= layer:
                products.append(both)
            else:
                products[layer] = (products[layer][0] + both[0], products[layer][1] + both[1])
    maps = []
    for own_PP, cross_PD in products:
        penalty_P = torch.full_like(own_PP[0], float(RIDGE * own_PP.diagonal()[:-1].mean()))
        penalty_P[-1] = 0  # of the constant
        maps.append(torch.linalg.solve(own_PP + penalty_P.diag(), cross_PD))
    return torch.stack(maps)


def _training_parts(run: Run) -> Iterator[Batch]:
    packs: list[int] = np.sort(run.data.sampler.packs)[spread_packs(len(run.data.sampler), NUM_PACKS)].tolist()
    for pack in packs:
        for part in run.data.training_parts(pack, stored=not run.request.config.needs_audio):
            yield part.to(run.request.device)


def _predict(run: Run, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """Return the predictions of a batch, L of (F, D), and its targets (L, F, D)."""
    targets_LFD = batch.targets()
    with autocast(run):
        return run.scored(batch, targets_LFD), targets_LFD


def _own_codes(run: Run, predicted: list[Tensor], words_LSKD: Tensor) -> list[Tensor]:
    """Return the first stage's word of every frame without a probe: by the heads, or nearest to the prediction."""
    if run.scored.layer_loss == "codes":
        return [logits_FSK[:, 0].argmax(1) for logits_FSK in run.scored.code_heads.logits(predicted)]
    return [nearest_words(words_SKD[:1], one)[:, 0] for words_SKD, one in zip(words_LSKD, predicted, strict=True)]


def _with_one(values_FD: Tensor) -> Tensor:
    """Return the values with a constant feature, float64 (F, P)."""
    return torch.nn.functional.pad(values_FD.double(), (0, 1), value=1.0)
