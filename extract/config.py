"""Request of stage one: what to extract and how, validated once.

`ExtractConfig` is the one request type. The options of `extract run` and `plan`, the rows of params.yaml (`extract
many`), the local runner and the workers of a Dask cluster all use it. It is frozen, picklable and hashable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.files import sha256_json
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.store.codecs import codec_named
from extract.store.manifest import KEEP_DEFAULT, check_keep

# fp32 is IEEE; tf32: products of 10 bits of mantissa, on CUDA; bf16 and fp16: an autocast. Weights stay fp32.
DTYPES = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """One upstream on one corpus. Raises RetortError for a value that no command accepts."""

    upstream: str  # `fbank`, a local folder, an .onnx file, or a hub id: org/name or org/name@REVISION
    corpus: Path  # corpora/NAME.json, or the .h5 itself
    manifest: Path = Path("manifest.json")  # the JSON to write; `extract plan` writes none
    store: Path | str = Path("stores")  # root of all stores: a folder or a URL
    name: str | None = None  # of the upstream in results; None for the last part of `upstream`
    layers: tuple[int, ...] | None = None  # None for all
    codec: str = "int8"
    keep: frozenset[str] = KEEP_DEFAULT
    pack_frames: int = 8192  # frames of a pack, one micro-batch
    shard_packs: int = 4  # packs of a shard, one unit of work
    cut_long: float = 0.0  # seconds; longer utterances become parts of at most so much; 0: they stay whole
    drop_long: bool = False
    drop_short: bool = False
    normalise: bool | None = None  # waveforms to zero mean, unit variance; None for the checkpoint's own setting
    dtype: str = "fp32"
    device: str = "cpu"
    initial_blocks: int = 0  # first Transformer blocks in the file of initial weights; 0 for no such file
    trust_remote_code: bool = False
    threads: int = 0  # torch threads of a process; 0 for torch's own choice
    workers: int = 0  # processes of a Dask cluster on this machine; 0 for this process alone
    scheduler: str | None = None  # address of a running Dask cluster

    def __post_init__(self) -> None:
        codec_named(self.codec)  # raises for an unknown name, and for a rate that can't be
        check_keep(self.keep)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for option in ("workers", "threads", "initial_blocks"):
            if getattr(self, option) < 0:
                raise RetortError(f"--{option.replace('_', '-')} {getattr(self, option)}: expected 0 or more")
        if not (self.cut_long == 0 or 1 <= self.cut_long <= 86_400):
            raise RetortError(f"--cut-long {self.cut_long:g}: expected 0 (no cut), or 1 to 86400 seconds")
        if self.workers and self.scheduler:
            raise RetortError("--workers starts a Dask cluster, --scheduler uses a running one: give one of them")

    def open_corpus(self) -> Corpus:
        """Open the corpus, with long utterances cut. Raises RetortError as `Corpus.open`."""
        return Corpus.open(self.corpus).cut_long(self.cut_samples)

    @property
    def loading(self) -> tuple[Any, ...]:
        """Fields that decide how an upstream is loaded: two corpora that agree in them can share one model."""
        return self.layers, self.dtype, self.device, self.trust_remote_code, self.threads

    @property
    def cut_samples(self) -> int:
        """Samples of the longest part of a cut utterance, 0 for whole utterances (`Corpus.cut_long`)."""
        return round(self.cut_long * SAMPLE_RATE_HZ)

    def fingerprint(self, upstream: Mapping[str, Any]) -> str:
        """Return the sha256 over everything that decides a store's bytes, except the corpus.

        upstream: the identity of the upstream, from its card.
        """
        recipe: dict[str, Any] = {
            "format_version": 2,  # of the arrays and objects; that of the manifest may differ
            "upstream": upstream,
            "keep": sorted(self.keep),
            **{
                key: getattr(self, key)
                for key in ("layers", "codec", "pack_frames", "shard_packs", "drop_long", "dtype")
            },
        }
        # Absent where they are not used: stores older than these options keep their fingerprint.
        if self.drop_short:
            recipe["drop_short"] = True
        if self.cut_samples:
            recipe["cut_samples"] = self.cut_samples
        return sha256_json(recipe)
