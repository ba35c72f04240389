"""Folder of a saved student: weights, config, the code that opens them (modeling_retort.py), and its provenance.

AutoModel.from_pretrained(folder, trust_remote_code=True) opens it; train_config.json records what it was made from.
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

from extract.base.files import write_json, written_aside
from extract.corpus import SAMPLE_RATE_HZ
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
MADE_FROM = "train_config.json"  # its presence marks a folder that may be replaced


def save_student(out: Path, student: RetortStudent, made_from: dict[str, Any]) -> None:
    """Write the folder of a student atomically; an older folder is replaced.

    Arguments:
        made_from: JSON value for train_config.json: config, versions, digests of inputs.
    """
    student.cpu().eval()  # type: ignore[no-untyped-call]
    with written_aside(out) as aside:
        aside.mkdir()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            student.save_pretrained(aside)
        except SafetensorError as error:
            if "No space left" in str(error):  # safetensors raises its own error for a full disk
                raise OSError(errno.ENOSPC, "no space left on device", str(out)) from None
            raise
        write_json(aside / "preprocessor_config.json", _PREPROCESSOR | {"do_normalize": student.config.do_normalize})
        write_json(aside / MADE_FROM, made_from)
        # transformers adds its version to the config; without it equal students have equal digests.
        config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
        write_json(
            aside / "config.json",
            {key: value for key, value in config.items() if key != "transformers_version"},
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
