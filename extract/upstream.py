"""What an upstream is: found, named and fingerprinted, without loading it.

An upstream is `fbank`, a local folder or a hub id of the wav2vec 2.0 family, or a Retort student's folder. Its card is
what the manifest records; `extract.forward` runs it.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.checks import check_fields, check_name, check_type
from extract.errors import RetortError
from extract.files import read_json, sha256_file

FBANK = "fbank"
FAMILIES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "retort-student")
_CONFIG = ("*.json", "*.py")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


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
        weights_sha256=_weights_digest(folder),
        config_sha256=_config_digest(folder, config),
        normalise=_own_normalisation(folder) if normalise is None else normalise,
        note=_note(config, folder),
        folder=folder,
    )


def _note(config: dict[str, Any], folder: Path) -> str | None:
    note: str | None = config.get("retort_note")
    check_type(str | None, note, where=f"{folder / 'config.json'}: retort_note")
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


def _folder_of(upstream: str, revision: str | None, *, weights: bool) -> Path:
    if Path(upstream).is_dir():
        return Path(upstream)
    if not weights:
        return _from_hub(upstream, revision, *_CONFIG)
    folder = _from_hub(upstream, revision, *_CONFIG, "*.safetensors")
    if not list(folder.glob("*.safetensors")):
        folder = _from_hub(upstream, revision, *_CONFIG, "pytorch_model.bin")
    return folder


def _from_hub(upstream: str, revision: str | None, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(upstream, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RetortError(
            f"upstream {upstream!r} is no folder here and could not be had from the hub ({reason}); "
            "place its config.json, model.safetensors and preprocessor_config.json in a folder and give that folder"
        ) from None


def _weights_digest(folder: Path) -> str:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            files = [folder / name]
            if name.endswith(".index.json"):
                files += _parts_of(folder, name)
            digest = hashlib.sha256()
            for file in files:
                digest.update(sha256_file(file).encode())
            return digest.hexdigest()
    raise RetortError(f"upstream folder {folder} holds no weights; expected one of {', '.join(_WEIGHTS)}")


def _parts_of(folder: Path, index: str) -> list[Path]:
    """The files of weights that an index names: of this folder, since transformers would open any other as well."""
    content = read_json(folder / index)
    check_fields({"weight_map": dict[str, str]}, content, where=str(folder / index))
    parts = sorted(set(content["weight_map"].values()))
    for part in parts:
        check_name(part, where=f"{folder / index}: weight_map")
        if not (folder / part).is_file():
            raise RetortError(f"{folder / part} does not exist, and {index} names it; download the upstream again")
    return [folder / part for part in parts]


def _config_digest(folder: Path, config: dict[str, Any]) -> str:
    """Over the config and any modelling code that travels with it."""
    text = json.dumps(config, sort_keys=True)
    code = "".join(sha256_file(file) for file in sorted(folder.glob("*.py")))
    return _sha256_text(text + code)


def _own_normalisation(folder: Path) -> bool:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise RetortError(
            f"upstream folder {folder} has no preprocessor_config.json, which says whether waveforms are normalised; "
            "place it there or give --normalise or --no-normalise"
        )
    wanted = read_json(path).get("do_normalize", True)
    check_type(bool, wanted, where=f"{path}: do_normalize")
    return bool(wanted)


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
