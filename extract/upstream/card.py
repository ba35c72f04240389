"""Identity of an upstream: found, named and fingerprinted without loading it.

An upstream is `fbank`, a local folder or a hub id (`org/name` or `org/name@REVISION`) of the wav2vec 2.0 family, of
w2v-BERT 2.0 or of Whisper, or a Retort student's folder or .onnx file. The manifest records its card.
`extract.upstream.load` loads it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.base.files import sha256_file
from extract.base.validate import check_name, convert
from extract.onnx_file import read_record
from extract.upstream.files import (
    commit_of,
    folder_of,
    local_folder,
    onnx_file,
    own_normalisation,
    split_revision,
    weights_files,
)
from extract.upstream.mel import MEL_FAMILIES
from extract.upstream.spec import FBANK, ONNX, read_config

# Hashed in place of a config.json: a change of fbank's definition must change this text.
_FBANK_RECIPE = "kaldi 80 mel 25/10 ms, deltas 2 x window 5; layer 0 raw, layer 1 CMVN per utterance"


@dataclass(frozen=True)
class UpstreamCard:
    """Identity of an upstream. `folder`, with its files on this machine, is not a part of it."""

    name: str
    id: str  # as given, without its revision
    revision: str | None  # of a hub id: as given, or the commit that was fetched
    family: str
    weights_sha256: str
    config_sha256: str
    normalise: bool  # waveforms to zero mean and unit variance
    note: str | None  # of its maker, shown wherever its scores are shown
    folder: Path | None  # or the .onnx file

    def to_dict(self) -> dict[str, Any]:
        """Return the card as the manifest records it."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that decide its features. Name and folder do not."""
        return {key: getattr(self, key) for key in ("family", "weights_sha256", "config_sha256", "normalise")}


def find_upstream(upstream: str, *, normalise: bool | None = None, name: str | None = None) -> UpstreamCard:
    """Find an upstream and fingerprint it.

    normalise: overrides the checkpoint's own setting. name: of the upstream in results, None for the last part of its
    path or id. Raises RetortError if it can't be found or is not of a supported family.
    """
    if upstream == FBANK:
        if name is not None:
            check_name(name, where="--name")
        return UpstreamCard(
            FBANK if name is None else name, FBANK, None, FBANK, "", _sha256_text(_FBANK_RECIPE), False, None, None
        )
    if (path := onnx_file(upstream)) is not None:
        return _onnx_card(upstream, path, normalise=normalise, name=name)
    folder = folder_of(upstream, weights=True)
    config = read_config(upstream, folder)
    found_id, revision = upstream, None
    if local_folder(upstream) is None:
        found_id, revision = split_revision(upstream)
        revision = revision or commit_of(folder)
    if config["model_type"] in MEL_FAMILIES and normalise is None:
        normalise = False  # their extractors normalise Mel frames, and no waveform unless asked to
    name = Path(found_id).name if name is None else name
    check_name(name, where=f"--name of upstream {upstream!r}")  # the folder of its stores begins with it
    return UpstreamCard(
        name=name,
        id=found_id,
        revision=revision,
        family=config["model_type"],
        weights_sha256=_weights_digest(folder, config),
        config_sha256=_config_digest(folder, config),
        normalise=own_normalisation(folder) if normalise is None else normalise,
        note=convert(str | None, config.get("retort_note"), where=f"{folder / 'config.json'}: retort_note"),
        folder=folder,
    )


def _onnx_card(upstream: str, path: Path, *, normalise: bool | None, name: str | None) -> UpstreamCard:
    record, name = read_record(path), path.name if name is None else name
    check_name(name, where=f"--name of upstream {upstream!r}")
    return UpstreamCard(
        name=name,
        id=upstream,
        revision=None,
        family=ONNX,
        weights_sha256=sha256_file(path),
        config_sha256="",  # the file holds everything
        normalise=record.do_normalize if normalise is None else normalise,
        note=record.note,
        folder=path,
    )


def _weights_digest(folder: Path, config: dict[str, Any]) -> str:
    """Return the sha256 over the digests of the files that transformers opens for the weights."""
    digest = hashlib.sha256()
    for file in weights_files(folder, config):
        digest.update(sha256_file(file).encode())
    return digest.hexdigest()


def _config_digest(folder: Path, config: dict[str, Any]) -> str:
    """Return the sha256 over the config and the modelling code beside it."""
    text = json.dumps(config, sort_keys=True)
    if config.get("conv_pos_batch_norm"):
        text += "exact under padding"  # older stores of such models hold features that depend on padding
    code = "".join(sha256_file(file) for file in sorted(folder.glob("*.py")))
    return _sha256_text(text + code)


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
