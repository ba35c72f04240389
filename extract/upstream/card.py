"""What an upstream is: found, named and fingerprinted, without loading it.

An upstream is `fbank`, a local folder or a hub id of the wav2vec 2.0 family, or a Retort student's folder. Its card is
what the manifest records; `extract.upstream.forward` runs it.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from extract.base.files import read_json, sha256_file
from extract.base.validate import check_fields, check_name, convert
from extract.upstream.files import check_plain_weights, check_preprocessor, own_normalisation, weights_files
from extract.upstream.files import folder_of as _folder_of

FBANK = "fbank"
FAMILIES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "retort-student")


@dataclass(frozen=True)
class UpstreamCard:
    """Who an upstream is. `folder` is where its files lie on this machine and is not part of its identity."""

    name: str
    id: str
    revision: str | None
    family: str
    weights_sha256: str
    config_sha256: str
    normalise: bool
    note: str | None  # what its maker wants to stand wherever its scores stand
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its features: not the name, not the place."""
        return {key: getattr(self, key) for key in ("family", "weights_sha256", "config_sha256", "normalise")}


@dataclass(frozen=True)
class UpstreamShape:
    """What an upstream gives, as its config says: no weights are needed to know it."""

    num_layers: int  # how many hidden states, layer 0 included
    dim: int
    hop_samples: int
    receptive_samples: int
    stem_dim: int | None  # channels that its convolution stem gives; None without one


FBANK_SHAPE = UpstreamShape(num_layers=2, dim=240, hop_samples=160, receptive_samples=400, stem_dim=None)


def read_shape(upstream: str, *, revision: str | None = None) -> UpstreamShape:
    """The shape of an upstream from its config.json alone; of a hub id nothing else is fetched.

    Raises RetortError when it can't be found, is of no supported family, or its config lacks a field.
    """
    if upstream == FBANK:
        return FBANK_SHAPE
    folder = _folder_of(upstream, revision, weights=False)
    config = _read_config(upstream, folder)
    return UpstreamShape(
        num_layers=config["num_hidden_layers"] + 1,
        dim=config["hidden_size"],
        hop_samples=math.prod(config["conv_stride"]),
        receptive_samples=receptive_field(config["conv_kernel"], config["conv_stride"]),
        stem_dim=config["conv_dim"][-1],
    )


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that one frame of a stack of convolutions sees."""
    field, hop = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field += (kernel - 1) * hop
        hop *= stride
    return field


def check_layers(wanted: tuple[int, ...] | None, num_layers: int, upstream: str) -> tuple[int, ...]:
    """The layers to keep: all of them for None. Raises RetortError for one that is not there, or out of order."""
    if wanted is None:
        return tuple(range(num_layers))
    if odd := [layer for layer in wanted if not 0 <= layer < num_layers]:
        raise RetortError(f"--layers: upstream {upstream} has no layer {odd[0]}; it has 0 to {num_layers - 1}")
    if list(wanted) != sorted(set(wanted)):
        raise RetortError(f"--layers {','.join(map(str, wanted))}: give each layer once, in ascending order")
    return wanted


def check_stem(keep: frozenset[str], stem_dim: int | None, upstream: str) -> int | None:
    """Channels of the stem if it is kept, else None. Raises RetortError for an upstream that has none to keep."""
    if "stem" not in keep:
        return None
    if stem_dim is None:
        raise RetortError(f"--keep stem: upstream {upstream} has no convolution stem; keep frames,pooled")
    return stem_dim


def find_upstream(
    upstream: str, *, revision: str | None = None, normalise: bool | None = None, name: str | None = None
) -> UpstreamCard:
    """Find an upstream and fingerprint it.

    `normalise` overrides the checkpoint's own setting of zero mean and unit variance a waveform.
    Raises RetortError when it can't be found or is of no supported family.
    """
    if upstream == FBANK:
        if name is not None:
            check_name(name, where="--name")
        return UpstreamCard(
            FBANK if name is None else name, FBANK, None, FBANK, "", _sha256_text(_FBANK_RECIPE), False, None, None
        )
    folder = _folder_of(upstream, revision, weights=True)
    config = _read_config(upstream, folder)
    name = Path(upstream).name if name is None else name
    check_name(name, where=f"--name of upstream {upstream!r}")  # its store's folder begins with it
    return UpstreamCard(
        name=name,
        id=upstream,
        revision=revision,
        family=config["model_type"],
        weights_sha256=_weights_digest(folder, config),
        config_sha256=_config_digest(folder, config),
        normalise=own_normalisation(folder) if normalise is None else normalise,
        note=_note(config, folder),
        folder=folder,
    )


def _note(config: dict[str, Any], folder: Path) -> str | None:
    note: str | None = convert(str | None, config.get("retort_note"), where=f"{folder / 'config.json'}: retort_note")
    return note


_FBANK_RECIPE = "kaldi 80 mel 25/10 ms, deltas 2 x window 5; layer 0 raw, layer 1 CMVN per utterance"


def _read_config(upstream: str, folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    family = config.get("model_type", "(none)")
    if family not in FAMILIES:
        raise RetortError(
            f"upstream {upstream} has model_type {family!r}; expected one of {', '.join(FAMILIES)}, or `fbank`"
        )
    check_fields(_SHAPE, config, where=str(folder / "config.json"))
    lengths = {key: len(config[key]) for key in ("conv_kernel", "conv_stride", "conv_dim")}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        raise RetortError(f"{folder / 'config.json'}: the convolutions' lists differ in length: {lengths}")
    sizes = [config["num_hidden_layers"], config["hidden_size"], *(size for key in lengths for size in config[key])]
    if min(sizes) < 1:
        raise RetortError(f"{folder / 'config.json'}: {', '.join(_SHAPE)}: expected numbers of at least 1")
    check_plain_weights(upstream, folder, config)
    check_preprocessor(upstream, folder)
    return config


_SHAPE = {
    "num_hidden_layers": int,
    "hidden_size": int,
    "conv_kernel": list[int],
    "conv_stride": list[int],
    "conv_dim": list[int],
}


def brings_code(config: dict[str, Any]) -> bool:
    """Whether opening a model of this config.json would run code that is not transformers' own."""
    # An attention `OWNER/NAME` is a kernel that transformers fetches from the hub.
    kernels = [value for key, value in config.items() if "attn_implementation" in key]
    return "auto_map" in config or any("/" in str(value) for value in kernels)


def _weights_digest(folder: Path, config: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for file in weights_files(folder, config):
        digest.update(sha256_file(file).encode())
    return digest.hexdigest()


def _config_digest(folder: Path, config: dict[str, Any]) -> str:
    """Over the config and any modelling code that travels with it."""
    text = json.dumps(config, sort_keys=True)
    if config.get("conv_pos_batch_norm"):
        text += "exact under padding"  # stores from before it was hold other values
    code = "".join(sha256_file(file) for file in sorted(folder.glob("*.py")))
    return _sha256_text(text + code)


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
