"""Folder of a saved student: weights, config, the code that opens them (modeling_retort.py), and its provenance.

AutoModel.from_pretrained(folder, trust_remote_code=True) opens it; train_config.json records what it was made from, and
README.md is its model card.
"""

import errno
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from extract.base.files import share, write_json, written_aside
from extract.corpus import SAMPLE_RATE_HZ
from train.card import CARD, MADE_FROM, card_text
from train.modeling_retort import RetortStudent

# Settings of transformers' feature extractor; do_normalize, which differs between upstreams, is added below.
_PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": SAMPLE_RATE_HZ,
}


def save_student(out: Path, student: RetortStudent, made_from: dict[str, Any]) -> None:
    """Write the folder of a student atomically; an older folder is replaced.

    Arguments:
        made_from: JSON value for train_config.json: config, versions, digests of inputs.
    """
    student.cpu().eval()  # type: ignore[no-untyped-call]
    with written_aside(out) as aside:
        write_model(aside, student, do_normalize=student.config.do_normalize)
        describe(aside, made_from)


def describe(folder: Path, made_from: dict[str, Any]) -> None:
    """Write the provenance of a model, and its card, into its folder."""
    write_json(folder / MADE_FROM, made_from)
    (folder / CARD).write_text(card_text(folder), encoding="utf-8")


def write_model(folder: Path, model: PreTrainedModel, *, do_normalize: bool) -> None:
    """Make a folder with the weights, the config and the settings of the feature extractor. Equal models, equal bytes.

    do_normalize: the model expects waveforms of zero mean and unit variance.
    """
    folder.mkdir()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        if "No space left" in str(error):  # safetensors raises its own error for a full disk
            raise OSError(errno.ENOSPC, "no space left on device", str(folder)) from None
        raise
    share(folder / "model.safetensors")
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR | {"do_normalize": do_normalize})
    # transformers adds its version to the config; without it equal models have equal digests.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != "transformers_version"})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
