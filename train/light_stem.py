"""Trained light stems: NAME.LIGHT.stem.safetensors beside the manifest NAME.json.

`python -m train stem` writes them (train/light.py), and students that name one in `light_stem` start from it, any
number of students from one file. The file has the tensors of `LightStem` in train/modeling_retort.py, and their origin.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from extract.base.errors import RetortError
from extract.base.files import sha256_file, share, written_aside
from extract.base.validate import check_fields, check_name
from extract.store.reader import StoreReader
from train.config import StudentConfig
from train.modeling_retort import LightStem, RetortStudentConfig
from train.stem import StemShape

LEAST_WINDOW = 400  # samples, 25 ms: a shorter one does not resolve the lowest of the Mel bands


@dataclass(frozen=True, kw_only=True)
class LightStemFacts:
    """Origin of a light stem, and its distance to the teacher's stem."""

    blocks: int
    teacher: str  # sha256 of its weights
    store_digest: str
    corpus_digest: str
    settings: dict[str, Any]  # of train/config.py
    unexplained: float | None  # share of the variance of the normalised stem that is left on dev; None without dev


@dataclass(frozen=True)
class TrainedStem:
    """Content of a file: float32 tensors by name, facts, and the file's sha256."""

    tensors: Mapping[str, Tensor]
    facts: LightStemFacts
    sha256: str = ""

    def write(self, path: Path) -> None:
        """Write the file atomically; equal stems have equal bytes."""
        with written_aside(path) as aside:
            # One key: safetensors writes several in no fixed order.
            save_file(dict(self.tensors), aside, metadata={"stem": json.dumps(asdict(self.facts), sort_keys=True)})
            share(aside)

    @classmethod
    def read(cls, path: Path) -> "TrainedStem":
        """Read a file. Raises RetortError if it is missing, damaged or something else."""
        if not path.is_file():
            raise RetortError(f"{path} not found; run `python -m train stem` with the --name in its name")
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("stem", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise RetortError(
                f"{path}: not a readable light stem ({error}); run `python -m train stem` again"
            ) from None
        hints = {
            "blocks": int, "teacher": str, "store_digest": str, "corpus_digest": str, "settings": dict[str, Any],
            "unexplained": float | None,
        }  # fmt: skip
        found = check_fields(hints, facts if isinstance(facts, dict) else {}, where=str(path))
        return cls(tensors, LightStemFacts(**found), sha256_file(path))


def light_stem_path(manifest: Path, name: str) -> Path:
    """Return the path of a light stem beside its manifest. Raises RetortError for a name that is not plain."""
    check_name(name, where="light_stem")
    return manifest.with_suffix(f".{name}.stem.safetensors")


def new_light_stem(shape: StemShape, *, channels: int, blocks: int) -> LightStem:
    """Return a light stem with random weights from torch's global generator, with the frames of a convolution stem.

    Raises RetortError for a convolution stem of other frames than a light one can have.
    """
    hop, window = shape.hop_samples, shape.receptive_samples
    if hop % 2 or window < LEAST_WINDOW:
        raise RetortError(
            f"light stem: the teacher has frames of {window} samples every {hop}, expected {LEAST_WINDOW} samples or "
            "more and an even hop; train its students with the convolution stem"
        )
    num_layers = len(shape.kernels)
    return LightStem(
        RetortStudentConfig(
            conv_dim=(channels,) * num_layers,
            conv_kernel=shape.kernels,
            conv_stride=shape.strides,
            light_blocks=blocks,
        )
    )


def read_light_stem_of(config: StudentConfig, manifest: Path, store: StoreReader) -> TrainedStem | None:
    """Return the light stem that a student starts from; None if it has a convolution stem.

    Raises RetortError for a file that is missing, damaged, of another teacher or of other channels.
    """
    if config.light_stem is None:
        return None
    path = light_stem_path(manifest, config.light_stem)
    found = TrainedStem.read(path)
    if found.facts.teacher != store.manifest.upstream["weights_sha256"]:
        raise RetortError(f"{path}: it is of another teacher than {store.source}; run `python -m train stem` again")
    channels = len(found.tensors["conv.weight"]) if "conv.weight" in found.tensors else 0
    if channels != config.shape.stem_channels:
        raise RetortError(
            f"shape.stem_channels: got {config.shape.stem_channels}, expected the {channels} channels of {path}"
        )
    return found


def load_light_stem(stem: nn.Module, found: TrainedStem) -> None:
    """Copy a trained light stem into a student's, in place. Raises RetortError if names, shapes or dtypes differ."""
    own, theirs = (
        {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        for tensors in (stem.state_dict(), found.tensors)
    )
    if own != theirs:
        raise RetortError(
            f"light_stem: its file does not have the tensors of {found.facts.blocks} blocks; run `python -m train "
            "stem` again"
        )
    stem.load_state_dict(dict(found.tensors))
