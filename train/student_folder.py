"""The folder that a student is: weights, config, the code that opens them, and what they were made from."""

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
from train.checkpoint import full_disk
from train.modeling_retort import RetortStudent

# What transformers' feature extractor reads; only do_normalize differs between upstreams.
_PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": SAMPLE_RATE_HZ,
}


MADE_FROM = "train_config.json"


def save_student(out: Path, student: RetortStudent, made_from: dict[str, Any]) -> None:
    """Write a folder that AutoModel opens with trust_remote_code=True, aside and renamed; an older one is replaced."""
    student.cpu().eval()  # type: ignore[no-untyped-call]
    with written_aside(out) as aside:
        aside.mkdir()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            student.save_pretrained(aside)
        except SafetensorError as error:
            if "No space left" in str(error):
                raise full_disk(out) from None
            raise
        write_json(aside / "preprocessor_config.json", _PREPROCESSOR | {"do_normalize": student.config.do_normalize})
        write_json(aside / MADE_FROM, made_from)
        # transformers writes the version of the day into the config; the digest of a student must not hang on it.
        config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
        write_json(
            aside / "config.json",
            {key: value for key, value in config.items() if key != "transformers_version"},
        )


def versions() -> dict[str, str]:
    """The versions of what computed a result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
