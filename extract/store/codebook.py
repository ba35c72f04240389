"""Codebooks of a store: NAME.CODEBOOK.codebook.safetensors beside the manifest NAME.json.

`python -m extract codebook` writes them and training reads them. The file has one tensor `layer.N` for each layer,
float32 (stages, words, dim). Frame t has one word of each stage: the first stage's word nearest to t, then the second
stage's word nearest to what is left of t, and so on (residual vector quantisation).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from extract.base.errors import RetortError
from extract.base.files import sha256_file, share, written_aside
from extract.base.validate import check_fields, check_name

_PREFIX = "layer."
_FIELDS: dict[str, Any] = {"teacher": str, "store_digest": str, "unexplained": dict[int, tuple[float, ...]]}


@dataclass(frozen=True)
class Codebook:
    """Words of each layer, with the store that they were fitted to."""

    words: dict[int, NDArray[np.float32]]  # by layer: (stages, words, dim)
    unexplained: dict[int, tuple[float, ...]]  # by layer: share of the variance that is left after each stage
    teacher: str  # sha256 of the upstream's weights
    store_digest: str
    sha256: str = ""  # of the file

    def write(self, path: Path) -> None:
        """Write the file atomically; equal codebooks have equal bytes."""
        facts = {"teacher": self.teacher, "store_digest": self.store_digest, "unexplained": self.unexplained}
        tensors = {f"{_PREFIX}{layer}": words_SKD for layer, words_SKD in self.words.items()}
        with written_aside(path) as aside:
            # One key: safetensors writes several in no fixed order.
            save_file(tensors, aside, metadata={"codebook": json.dumps(facts, sort_keys=True)})
            share(aside)

    @classmethod
    def read(cls, path: Path) -> "Codebook":
        """Read a file. Raises RetortError if it is missing, damaged or something else."""
        remedy = "run `python -m extract codebook` again"
        if not path.is_file():
            raise RetortError(f"{path} not found; run `python -m extract codebook` with the --name in its name")
        try:
            with safe_open(path, framework="np") as file:
                facts = json.loads((file.metadata() or {}).get("codebook", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise RetortError(f"{path}: not a readable codebook ({error}); {remedy}") from None
        words = {}
        for name, words_SKD in tensors.items():
            number = name.removeprefix(_PREFIX)
            whole = words_SKD.ndim == 3 and words_SKD.size and words_SKD.dtype == np.float32
            if not number.isdecimal() or not whole or not np.isfinite(words_SKD).all():
                raise RetortError(
                    f"{path}: {name} is {words_SKD.dtype} {words_SKD.shape}, expected tensors {_PREFIX}N of finite "
                    f"float32 (stages, words, dim); {remedy}"
                )
            words[int(number)] = words_SKD
        if len({words_SKD.shape for words_SKD in words.values()}) != 1:
            raise RetortError(f"{path}: expected layers of one shape, got {len(words)} layers; {remedy}")
        found = check_fields(_FIELDS, facts if isinstance(facts, dict) else {}, where=str(path))
        return cls(dict(sorted(words.items())), **found, sha256=sha256_file(path))


def codebook_path(manifest: Path, name: str) -> Path:
    """Return the path of a codebook beside its manifest. Raises RetortError for a name that is not plain."""
    check_name(name, where="codebook")
    return manifest.with_suffix(f".{name}.codebook.safetensors")
