"""`python -m extract many`: the requests of one upstream on all scored corpora, from params.yaml.

The section `features` maps each corpus to the parts to keep, `store` has the layout of all stores, and `upstreams` maps
each name to its source. The features of CORPUS are recorded in manifests/UPSTREAM/CORPUS.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.params import configured, read_params, read_section
from extract.base.validate import convert, parse
from extract.config import ExtractConfig
from extract.upstream.configured import brings_own_code, read_upstreams
from extract.upstream.files import local_folder, onnx_file
from extract.upstream.spec import FBANK


@dataclass(frozen=True)
class StoreParams:
    """Section `store` of params.yaml."""

    root: str
    codec: str
    pack_frames: int
    shard_packs: int
    pack_frames_fbank: int | None = None  # filter banks have twice the frames of the others; None: as the others


def read_configs(params: Path, name: str, *, corpora: Path, out: Path, **options: Any) -> list[ExtractConfig]:
    """Read the requests of the upstream `name`, one for each corpus of the section `features` that is configured.

    corpora: folder of CORPUS.json. out: folder of NAME/CORPUS.json to write. options: fields of `ExtractConfig` that a
    params file does not have. A student's own code is trusted if it is this repository's, byte for byte.
    Raises RetortError for an unknown upstream or corpus, with the valid names.
    """
    upstreams = read_upstreams(params)
    if name not in upstreams:
        raise unknown(f"upstream of {params}", name, upstreams)
    features = convert(dict[str, str], read_section(params, "features"), where=f"{params}: features")
    if not features:
        raise RetortError(f"{params}: features: expected at least one corpus, such as `librispeech: frames,pooled`")
    features = configured(features, "features", read_params(params), params)
    if not features:
        raise RetortError(
            f"{params}: `corpora` has no corpus with a line in `features`; add one, such as `librispeech`"
        )
    store = parse(StoreParams, read_section(params, "store"), where=f"{params}: store")
    source = upstreams[name].source
    fbank_frames = store.pack_frames_fbank if source == FBANK else None
    options["trust_remote_code"] |= onnx_file(source) is None and brings_own_code(local_folder(source))
    return [
        ExtractConfig(
            upstream=source,
            name=name,
            corpus=corpora / f"{corpus}.json",
            manifest=out / name / f"{corpus}.json",
            store=store.root,
            codec=store.codec,
            keep=frozenset(keep.split(",")),
            pack_frames=fbank_frames or store.pack_frames,
            shard_packs=store.shard_packs,
            **options,
        )
        for corpus, keep in features.items()
    ]
