"""Files of an upstream: fetched from the hub, named and checked without loading a model.

Of a hub id only the files that are used are fetched: the config, the settings of the preprocessor, the modelling code
if the config names it, and the weights in the first format that transformers looks for. No tokenizer, optimizer,
adapter, or weights of another framework or precision are fetched.

`org/name@REVISION` is a hub id at a branch, tag or commit. A folder on this machine of the same name comes first.
"""

import re
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from extract.base.files import find_input, read_json
from extract.base.validate import check_fields, check_name, convert
from extract.corpus import SAMPLE_RATE_HZ

# In the order of transformers: the digest must be of the file that is opened.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
_SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json")
_OF_OTHER_FRAMEWORKS = ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index")
_EXTRACTOR = "Wav2Vec2FeatureExtractor"


_COMMIT = re.compile("[0-9a-f]{40}")  # name of a snapshot's folder in the hub's cache
_CONVERT = (
    "looks like a fairseq checkpoint: convert it with convert_hubert_original_pytorch_checkpoint_to_pytorch.py of "
    "transformers' repository (src/transformers/models/hubert; wav2vec2, wavlm, wav2vec2_bert and whisper have their "
    "own), and give the folder "
    "that it writes"
)


def local_folder(upstream: str) -> Path | None:
    """Return the folder on this machine that an upstream names, None for a hub id. Raises RetortError for a file."""
    path = find_input(upstream)
    if path.is_file():
        fix = f"which {_CONVERT}" if path.suffix == ".pt" else "give the folder with config.json and the weights"
        raise RetortError(f"upstream {upstream!r} is not a folder but a file, {fix}")
    return path if path.is_dir() else None


def onnx_file(upstream: str) -> Path | None:
    """Return the .onnx file that an upstream names, None for any other source. Raises RetortError if it is missing."""
    path = find_input(upstream)
    if path.suffix != ".onnx" or path.is_dir():
        return None
    if not path.is_file():
        raise RetortError(f"upstream {upstream!r} does not exist; `python -m train export FOLDER` writes such a file")
    return path


def split_revision(upstream: str) -> tuple[str, str | None]:
    """Return a hub id and its revision, None for a source without one.

    Raises RetortError for an empty revision.
    """
    hub_id, at, revision = upstream.rpartition("@")
    if not at:
        return upstream, None
    if not revision:
        raise RetortError(
            f"upstream {upstream!r}: the revision after @ is empty; give {hub_id}@REVISION (a branch, tag or commit), "
            f"or {hub_id}"
        )
    return hub_id, revision


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder in the hub's cache, None if its name is not one."""
    return folder.name if _COMMIT.fullmatch(folder.name) else None


def folder_of(upstream: str, *, weights: bool) -> Path:
    """Return the folder of an upstream; a hub id is fetched, with its weights if `weights`.

    Raises RetortError for a file and for a hub id that can't be fetched.
    """
    if (local := local_folder(upstream)) is not None:
        return local
    upstream, revision = split_revision(upstream)
    folder = _from_hub(upstream, revision, *_SETTINGS)
    if not weights:
        return folder
    revision = commit_of(folder) or revision  # all files of one commit, even if another is pushed meanwhile
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "auto_map" in config:
        folder = _from_hub(upstream, revision, "*.py")
    for name in weights_names(config):
        folder = _from_hub(upstream, revision, name)
        if (folder / name).is_file():
            if name.endswith(_INDEX):
                folder = _from_hub(upstream, revision, *_parts_of(folder, name))
            break  # transformers opens the first format that exists
    return folder


def _from_hub(upstream: str, revision: str | None, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = "" if revision is None else f" at revision {revision!r}"
    try:
        return Path(snapshot_download(upstream, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RetortError(
            f"upstream {upstream!r} is not a folder on this machine and could not be fetched from the hub{at} "
            f"({reason}); put its config.json, model.safetensors and preprocessor_config.json into a folder and "
            "give that folder"
        ) from None


# --------------------------------------------------------------------------------------------------------- weights


def weights_names(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of files that may hold the weights, in the order of transformers; a config may name its own."""
    own = config.get("transformers_weights")
    if own is None:
        return WEIGHTS
    own = convert(str, own, where="config.json: transformers_weights")
    check_name(own, where="config.json: transformers_weights")
    return (own,)


def weights_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the files that transformers opens for the weights: one file, or an index and its parts.

    Raises RetortError for a folder without weights and for an index that names a missing part.
    """
    names = weights_names(config)
    for name in names:
        if (folder / name).is_file():
            parts = [folder / part for part in _parts_of(folder, name)] if name.endswith(_INDEX) else []
            for part in parts:
                if not part.is_file():
                    raise RetortError(f"{part}, which {name} names, does not exist; download the upstream again")
            return [folder / name, *parts]
    found = [name for name in _OF_OTHER_FRAMEWORKS if (folder / name).is_file()]
    more = f" (found {found[0]}: open it with transformers 4 and save it by `save_pretrained`)" if found else ""
    raise RetortError(f"upstream folder {folder} holds no weights; expected one of {', '.join(names)}{more}")


def _parts_of(folder: Path, index: str) -> list[str]:
    """Return the files of weights that an index names. Raises RetortError for one outside of the folder."""
    content = read_json(folder / index)
    check_fields({"weight_map": dict[str, str]}, content, where=str(folder / index))
    parts = sorted(set(content["weight_map"].values()))
    for part in parts:
        check_name(part, where=f"{folder / index}: weight_map")
    return parts


def check_plain_weights(upstream: str, folder: Path, config: dict[str, Any]) -> None:
    """Raise RetortError for quantised weights and for a PEFT adapter, which only some machines would apply."""
    if config.get("quantization_config") is not None:
        raise RetortError(
            f"upstream {upstream}: {folder / 'config.json'} has a quantization_config, expected fp32 weights; give the "
            "checkpoint that it was quantised from"
        )
    if (folder / "adapter_config.json").is_file():
        raise RetortError(
            f"upstream {upstream}: {folder / 'adapter_config.json'} is a PEFT adapter, which transformers applies "
            "where peft is installed and ignores elsewhere; merge it (`merge_and_unload`, `save_pretrained`) and give "
            "that folder, or remove the file to use the model without it"
        )


# ---------------------------------------------------------------------------------------------------- preprocessor


def own_normalisation(folder: Path) -> bool:
    """Return True if the checkpoint normalises waveforms. Raises RetortError if its files do not state it or differ."""
    settings = preprocessors(folder)
    if not settings:
        raise RetortError(
            f"upstream folder {folder} has no preprocessor_config.json (nor a processor_config.json with a "
            "feature_extractor), which states whether waveforms are normalised; add it, or give --normalise or "
            "--no-normalise"
        )
    wanted = {where: value.get("do_normalize", True) for where, value in settings.items()}  # transformers' default
    for where, value in wanted.items():
        convert(bool, value, where=f"{where}: do_normalize")
    if len(set(wanted.values())) > 1:
        found = ", ".join(f"{where}: {str(value).lower()}" for where, value in wanted.items())
        raise RetortError(f"do_normalize differs ({found}); give --normalise or --no-normalise, or remove one file")
    return bool(next(iter(wanted.values())))


def check_preprocessor(upstream: str, folder: Path) -> None:
    """Raise RetortError for a preprocessor whose input is not a 16 kHz mono waveform."""
    for where, settings in preprocessors(folder).items():
        kind = settings.get("feature_extractor_type", _EXTRACTOR)
        if kind != _EXTRACTOR:
            raise RetortError(
                f"upstream {upstream}: {where}: feature_extractor_type: got {kind!r}, expected {_EXTRACTOR!r}: the "
                "model must read waveforms; give another upstream"
            )
        rate = settings.get("sampling_rate", SAMPLE_RATE_HZ)
        if isinstance(rate, bool) or rate != SAMPLE_RATE_HZ:
            raise RetortError(
                f"upstream {upstream}: {where}: sampling_rate: got {rate!r}, expected {SAMPLE_RATE_HZ}, the rate of "
                "every corpus; give a checkpoint for 16 kHz"
            )
        size = settings.get("feature_size", 1)
        if isinstance(size, bool) or size != 1:
            raise RetortError(
                f"upstream {upstream}: {where}: feature_size: got {size!r}, expected 1, a mono waveform; give another "
                "upstream"
            )


def preprocessors(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of the feature extractor by file.

    transformers 4 writes and reads preprocessor_config.json, transformers 5 writes processor_config.json and prefers
    it. A folder may have both.
    """
    found: dict[str, dict[str, Any]] = {}
    path = folder / "processor_config.json"
    if path.is_file():
        whole = read_json(path)
        for key in ("feature_extractor", "audio_processor"):
            if isinstance(whole.get(key), dict):
                found[f"{path}: {key}"] = whole[key]
                break
    path = folder / "preprocessor_config.json"
    if path.is_file():
        found[str(path)] = read_json(path)
    return found


def check_config_file(folder: Path) -> None:
    """Raise RetortError for a folder without config.json, such as one with a fairseq checkpoint."""
    path = folder / "config.json"
    if path.is_file():
        return
    if found := sorted(folder.glob("*.pt")):
        raise RetortError(f"{path} does not exist, and {found[0].name} {_CONVERT}")
    raise RetortError(
        f"{path} does not exist; expected a folder that `save_pretrained` of transformers wrote, or a student that "
        "`python -m train run` finished"
    )
