"""The files of an upstream: fetched from the hub, named and checked without loading a model.

Of a hub id only what is opened is fetched: the config, the preprocessor's settings, the modelling code where the config
names it, and the weights in the first of the forms that transformers looks for. Nothing else of the repository is: no
tokenizer, no optimizer, no adapter of another language, no weights of another framework or precision.
"""

import re
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.base.validate import check_fields, check_name, convert
from extract.corpus import SAMPLE_RATE_HZ

# In the order in which transformers looks for them: the digest must be of the file that is opened.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
_SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json")
_OF_OTHER_FRAMEWORKS = ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index")
_EXTRACTOR = "Wav2Vec2FeatureExtractor"


def folder_of(upstream: str, revision: str | None, *, weights: bool) -> Path:
    """The folder of an upstream; a hub id is fetched, without its weights unless `weights`.

    Raises RetortError for a hub id that can't be fetched.
    """
    if Path(upstream).is_dir():
        return Path(upstream)
    folder = _from_hub(upstream, revision, *_SETTINGS)
    if not weights:
        return folder
    if re.fullmatch("[0-9a-f]{40}", folder.name):
        revision = folder.name  # of one commit, whatever is pushed between two requests
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "auto_map" in config:
        folder = _from_hub(upstream, revision, "*.py")
    for name in weights_names(config):
        folder = _from_hub(upstream, revision, name)
        if (folder / name).is_file():
            if name.endswith(_INDEX):
                folder = _from_hub(upstream, revision, *_parts_of(folder, name))
            break
    return folder


def _from_hub(upstream: str, revision: str | None, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(upstream, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RetortError(
            f"upstream {upstream!r} is not a folder here and could not be had from the hub ({reason}); "
            "place its config.json, model.safetensors and preprocessor_config.json in a folder and give that folder"
        ) from None


# --------------------------------------------------------------------------------------------------------- weights


def weights_names(config: dict[str, Any]) -> tuple[str, ...]:
    """The files that may hold the weights, in transformers' order; a config may name one itself."""
    own = config.get("transformers_weights")
    if own is None:
        return WEIGHTS
    own = convert(str, own, where="config.json: transformers_weights")
    check_name(own, where="config.json: transformers_weights")
    return (own,)


def weights_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The files that transformers opens for the weights: one, or an index and its parts.

    Raises RetortError for a folder that has none, and for an index that names a part that is not there.
    """
    names = weights_names(config)
    for name in names:
        if (folder / name).is_file():
            parts = [folder / part for part in _parts_of(folder, name)] if name.endswith(_INDEX) else []
            for part in parts:
                if not part.is_file():
                    raise RetortError(f"{part} does not exist, and {name} names it; download the upstream again")
            return [folder / name, *parts]
    found = [name for name in _OF_OTHER_FRAMEWORKS if (folder / name).is_file()]
    more = f" (found {found[0]}: open it with transformers 4 and save it by `save_pretrained`)" if found else ""
    raise RetortError(f"upstream folder {folder} holds no weights; expected one of {', '.join(names)}{more}")


def _parts_of(folder: Path, index: str) -> list[str]:
    """The files of weights that an index names: of this folder, since transformers would open any other as well."""
    content = read_json(folder / index)
    check_fields({"weight_map": dict[str, str]}, content, where=str(folder / index))
    parts = sorted(set(content["weight_map"].values()))
    for part in parts:
        check_name(part, where=f"{folder / index}: weight_map")
    return parts


def check_plain_weights(upstream: str, folder: Path, config: dict[str, Any]) -> None:
    """Raises RetortError for weights that are quantised, or that a PEFT adapter would change on some machines."""
    if config.get("quantization_config") is not None:
        raise RetortError(
            f"upstream {upstream}: {folder / 'config.json'} has a quantization_config, and features are made from fp32 "
            "weights; give the checkpoint that it was quantised from"
        )
    if (folder / "adapter_config.json").is_file():
        raise RetortError(
            f"upstream {upstream}: {folder / 'adapter_config.json'} is a PEFT adapter, which transformers applies "
            "where peft is installed and ignores elsewhere; merge it (`merge_and_unload`, `save_pretrained`) and give "
            "that folder, or remove the file to use the model without it"
        )


# ---------------------------------------------------------------------------------------------------- preprocessor


def own_normalisation(folder: Path) -> bool:
    """Return whether the checkpoint normalises waveforms. Raises RetortError where its files do not, or disagree."""
    settings = _preprocessors(folder)
    if not settings:
        raise RetortError(
            f"upstream folder {folder} has no preprocessor_config.json (nor a processor_config.json with a "
            "feature_extractor), which says whether waveforms are normalised; place it there or give --normalise or "
            "--no-normalise"
        )
    wanted = {where: value.get("do_normalize", True) for where, value in settings.items()}
    for where, value in wanted.items():
        convert(bool, value, where=f"{where}: do_normalize")
    if len(set(wanted.values())) > 1:
        said = ", ".join(f"{where} says {str(value).lower()}" for where, value in wanted.items())
        raise RetortError(f"do_normalize: {said}; give --normalise or --no-normalise, or remove the wrong file")
    return bool(next(iter(wanted.values())))


def check_preprocessor(upstream: str, folder: Path) -> None:
    """Raises RetortError for a preprocessor whose input is not a 16 kHz mono waveform."""
    for where, settings in _preprocessors(folder).items():
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


def _preprocessors(folder: Path) -> dict[str, dict[str, Any]]:
    """The feature extractor's settings by where they stand: transformers 4 writes one file, transformers 5 the other.

    Where both are there, transformers 5 reads processor_config.json, and 4 the other.
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
