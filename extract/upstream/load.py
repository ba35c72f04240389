"""Loading an upstream and checking it on a second of noise, on the device and in the precision of the run.

1. Every hidden state exists, is finite, and has the shape of config.json with one frame per hop; the model's own
   formula of frames agrees. The same input gives the same output twice.
2. A padded batch of utterances of three lengths gives each of them the output of the utterance alone. Otherwise
   utterances are run one by one, without padding, which is exact and slower. The manifest records the measured error.

Bounds of step 2, for each utterance and layer, with the error taken against the utterance alone:

    norm of the error <= bound x norm of the layer     finds a leak of padding into a layer of small values
    each error <= bound x (max(1, rms) + |value|)      fp32 only; rms: root mean square of the layer. The error is
                                                       relative for large values, as rounding of fp32 is

In fp32 the bound is 1e-4: another batch shape changes the norm by about 1e-6, a leak changes it by 1e-3 or more.
Rounding to 16 bits hides small leaks, so fp32 is always measured first. The bounds for 16 bits are exceeded only by
overflow and by values of other frames.

Shapes: B batch, T frames, D features.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ
from extract.store.packing import count_frames
from extract.upstream.card import UpstreamCard
from extract.upstream.forward import Transformer
from extract.upstream.onnx_student import OnnxStudent
from extract.upstream.spec import FBANK, ONNX, Upstream, squeeze_factor

BOUND = {"fp32": 1e-4, "tf32": 0.05, "fp16": 0.05, "bf16": 0.3}  # of a padded batch against each utterance alone
_PROBED_S = (0.5, 0.2, 0.0)  # durations of the three utterances
_FEWEST_FRAMES = (12, 5, 1)  # of the three, for any hop; the last one has one frame
# Errors that a model's code may raise on an input that it can't process.
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
_WIDER = {
    "fp16": "the largest float16 is 65504, use --dtype bf16 or fp32",
    "bf16": "use --dtype fp32",
    "tf32": "use --dtype fp32",
    "fp32": "its weights are damaged or not those of its config.json, download or train it again",
}


def load_upstream(
    card: UpstreamCard,
    *,
    device: str = "cpu",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    layers: tuple[int, ...] | None = None,
    check: bool = True,
) -> Upstream:
    """Load the upstream of a card and check it. check: False for one that was checked before.

    layers: the layers that will be kept, None for all; values of other layers are not checked. Raises RetortError if
    its code would have to be trusted and is not, and if its features are not those that the manifest would state.
    """
    if card.family == FBANK:
        from extract.upstream.fbank import Fbank  # imported late: torchaudio is needed for nothing else

        return Fbank()
    if card.family == ONNX:
        student = OnnxStudent(card, dtype=dtype)
        if check:
            _check_alone(student, card.id, _probes(student), _kept(student, layers), dtype=dtype)
        return student
    upstream = Transformer(card, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if check:
        upstream.facts = replace(upstream.facts, batching=check_upstream(upstream, card.id, layers))
    return upstream


def check_upstream(upstream: Transformer, name: str, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """Check a loaded upstream and, of its values, those of `layers` (None: all); return the batching, for the manifest.

    `mode` is "padded" or "single" (one by one). The errors are those of a padded batch: `max_abs_error` and
    `relative_error` (of the norm) over all layers, and by layer in `layers`; None if it is not a number.
    Raises RetortError for an upstream whose hidden states differ from its config.json.
    """
    _check_formula(upstream, name)
    kept = _kept(upstream, layers)
    probes = _probes(upstream)
    with upstream.in_fp32():
        alone = _check_alone(upstream, name, probes, kept, dtype="fp32")
        batching = _measure(upstream, probes, alone, kept, dtype="fp32")
    if upstream.dtype != "fp32":
        alone = _check_alone(upstream, name, probes, kept, dtype=upstream.dtype)
        if batching["mode"] == "padded":
            batching = _measure(upstream, probes, alone, kept, dtype=upstream.dtype)
    return batching


def _kept(upstream: Upstream, layers: Sequence[int] | None) -> list[int]:
    return [layer for layer in range(upstream.spec.num_layers) if layers is None or layer in layers]


def _probes(upstream: Upstream) -> list[NDArray[np.float32]]:
    """Return noise with a tone, of three lengths; all but the shortest end between two hops, as real utterances do."""
    generator, spec = np.random.default_rng(0), upstream.spec
    probes = []
    for seconds, fewest in zip(_PROBED_S, _FEWEST_FRAMES, strict=True):
        hops = max(fewest, int(seconds * SAMPLE_RATE_HZ) // spec.hop_samples) - 1
        num_samples = spec.receptive_samples + hops * spec.hop_samples + (spec.hop_samples // 2 if hops else 0)
        time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
        tone = np.sin(2 * np.pi * 220 * time_s) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_s))
        probes.append((0.1 * tone + 0.05 * generator.standard_normal(num_samples)).astype(np.float32))
    return probes


def _check_formula(upstream: Transformer, name: str) -> None:
    """Raise RetortError if the model's own formula of frames differs from `count_frames`, which all readers use."""
    formula = getattr(upstream.model, "_get_feat_extract_output_lengths", None)
    if formula is None:
        return  # a student has none; `_check_shapes` compares the frames of its output
    hop, receptive = upstream.spec.hop_samples, upstream.spec.receptive_samples
    num_samples = np.array([receptive, receptive + hop - 1, receptive + hop, 16_000, 160_001, 1_000_003])
    expected = count_frames(num_samples, hop_samples=hop, receptive_samples=receptive)
    try:
        found = np.asarray(formula(torch.from_numpy(num_samples))) // squeeze_factor(upstream.model.config.to_dict())
    except _FAILURES as error:
        raise _unusable(name, "its formula of frames fails", error) from None
    if found.shape != expected.shape or (odd := np.flatnonzero(found != expected)).size:
        index = 0 if found.shape != expected.shape else odd[0]
        raise _other_frames(name, int(num_samples[index]), found.ravel()[index], int(expected[index]), hop)


_States = list[dict[int, NDArray[np.float32]]]  # by probe and kept layer (T, D)


def _check_alone(
    upstream: Transformer | OnnxStudent, name: str, probes: list[NDArray[np.float32]], kept: list[int], *, dtype: str
) -> _States:
    """Return the states of each probe alone. Raises RetortError if they are not as in step 1 above."""
    found: _States = []
    for probe in [*probes, probes[1]]:  # the second one twice, for reproducibility
        try:
            states_1TD = upstream.forward([probe])
        except _FAILURES as error:
            raise _unusable(name, f"its forward pass fails on {len(probe)} samples", error) from None
        _check_shapes(upstream, name, len(probe), states_1TD)
        found.append({layer: _on_cpu(states_1TD[layer][0]) for layer in kept})
    again = found.pop()
    for probe, states_TD in zip(probes, found, strict=True):
        if odd := [layer for layer in kept if not np.isfinite(states_TD[layer]).all()]:
            below = "" if odd[0] == kept[0] else f", or keep --layers below {odd[0]}"
            raise RetortError(
                f"upstream {name}: layer {odd[0]} is not finite on {len(probe) / SAMPLE_RATE_HZ:.2f} s of noise in "
                f"{dtype}; {_WIDER[dtype]}{below}"
            )
    on_cpu = torch.device(upstream.device).type == "cpu"  # other devices may sum in any order
    for layer in kept:
        pair = found[1][layer], again[layer]
        if not (np.array_equal(*pair) if on_cpu else _Gap(*pair).fits(dtype)):
            cause = (
                "its code draws random numbers though it is in eval mode; correct that code (dropout, masking, dither)"
                if dtype == "fp32"
                else f"this device's {dtype} is not reproducible, while its fp32 is; give --dtype fp32"
            )
            raise RetortError(f"upstream {name}: layer {layer} differs between two runs on the same input: {cause}")
    return found


def _check_shapes(upstream: Transformer | OnnxStudent, name: str, num_samples: int, states_1TD: list[Tensor]) -> None:
    spec = upstream.spec
    if len(states_1TD) != spec.num_layers:
        raise RetortError(
            f"upstream {name} returned {len(states_1TD)} hidden states, expected {spec.num_layers}, one more than the "
            "num_hidden_layers of its config.json; config and code are not of one model"
        )
    (expected,) = upstream.num_frames([np.zeros(num_samples, dtype=np.float32)])
    for layer, state_1TD in enumerate(states_1TD):
        shape = tuple(getattr(state_1TD, "shape", ()))
        if len(shape) != 3 or shape[0] != 1 or shape[2] != spec.dim:
            raise RetortError(
                f"upstream {name}: layer {layer} is of shape {shape}, expected (1, frames, {spec.dim}) by the "
                "hidden_size of its config.json; config and code are not of one model"
            )
        if shape[1] != expected:
            raise _other_frames(name, num_samples, shape[1], expected, spec.hop_samples)


def _measure(
    upstream: Transformer, probes: list[NDArray[np.float32]], alone: _States, kept: list[int], *, dtype: str
) -> dict[str, Any]:
    """Measure a padded batch of the probes; return its errors and the mode that follows from them."""
    gaps: dict[int, list[_Gap]] = {}
    try:
        states_BTD = upstream.forward(probes)
        for layer in kept:
            padded_BTD = _on_cpu(states_BTD[layer])
            own = [states_TD[layer] for states_TD in alone]
            gaps[layer] = [_Gap(own_TD, padded_BTD[row, : len(own_TD)]) for row, own_TD in enumerate(own)]
    except _FAILURES:
        gaps = {}  # padded batches fail, single utterances run
    of_all = [gap for of_layer in gaps.values() for gap in of_layer]
    return {
        "mode": "padded" if gaps and all(gap.fits(dtype) for gap in of_all) else "single",
        "dtype": dtype,
        "bound": BOUND[dtype],
        **_figures(of_all),
        "layers": {str(layer): _figures(of_layer) for layer, of_layer in gaps.items()},
    }


class _Gap:
    """Errors of one layer of an utterance, in a padded batch or in a second run, against the utterance alone."""

    def __init__(self, alone_TD: NDArray[np.float32], other_TD: NDArray[np.float32]) -> None:
        own_TD = alone_TD.astype(np.float64)
        error_TD = np.abs(other_TD - own_TD)
        norm = float(np.linalg.norm(own_TD))
        root_mean_square = norm / own_TD.size**0.5
        self.max_abs = float(error_TD.max())
        self.relative = float(np.linalg.norm(error_TD)) / max(norm, 1e-30)
        # The second bound of the module's docstring.
        self.scaled = float((error_TD / (max(1.0, root_mean_square) + np.abs(own_TD))).max())

    def fits(self, dtype: str) -> bool:
        # Comparisons with NaN are false, so that NaN does not fit.
        return self.relative <= BOUND[dtype] and (dtype != "fp32" or self.scaled <= BOUND[dtype])


def _figures(gaps: list[_Gap]) -> dict[str, float | None]:
    """Return the largest errors for the manifest, to two digits; None for an error that is not finite."""
    worst = {
        "max_abs_error": [gap.max_abs for gap in gaps],
        "relative_error": [gap.relative for gap in gaps],
    }
    return {
        name: float(f"{max(values):.2g}") if values and np.isfinite(values).all() else None
        for name, values in worst.items()
    }


def _on_cpu(state: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = state.float().cpu().numpy()
    return values


def _other_frames(name: str, num_samples: int, found: object, expected: int, hop_samples: int) -> RetortError:
    return RetortError(
        f"upstream {name} has {found} frames for {num_samples} samples, expected {expected} (one every {hop_samples} "
        "samples, the product of conv_stride in its config.json); give an upstream with these frames"
    )


def _unusable(name: str, what: str, error: BaseException) -> RetortError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return RetortError(
        f"upstream {name}: {what} ({reason}); expected `hidden_states` and `last_hidden_state` of `input_values` and "
        "`attention_mask`, as from models of transformers"
    )
