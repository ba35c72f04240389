"""Stores of a training run: which of a student's targets each holds, and whether they belong together.

A run reads the store of its targets. Further ones may hold the targets of other teachers, the features that dev is
scored on, or the stem. All are of one corpus with the same cuts.
"""

from pathlib import Path

import numpy as np

from extract.base.errors import RetortError, unknown
from extract.corpus import Corpus
from extract.store.reader import StoreReader
from train.config import GENERATING, StudentConfig
from train.other_targets import check_frames_fit


def name_of(store: StoreReader) -> str:
    """Return the name of a store's upstream, its key in `targets`."""
    name: str = store.manifest.upstream["name"]
    return name


def open_further(
    config: StudentConfig, first: StoreReader, manifests: tuple[Path, ...], corpus: Corpus
) -> dict[str, StoreReader]:
    """Open the stores of `targets` other than `first`, by name: those of `manifests`, in this order, then the others.

    A store that is not given is looked up beside the first one's manifest, as NAME.json, so that the folder is the
    only dependency of a pipeline. Raises RetortError for stores that differ from `targets` or do not belong together.
    """
    if not isinstance(config.targets, dict):
        if manifests:
            raise RetortError(
                f"targets: got {len(manifests) + 1} manifests, expected a mapping with the name of each upstream as a "
                f"key, such as {name_of(first)!r}; set it, or give one manifest"
            )
        return {}
    given = {name_of(first): first}
    for path in manifests:
        store = StoreReader.open(path, corpus)
        if (name := name_of(store)) in given:
            raise RetortError(
                f"--manifest {path}: its upstream is named {name!r}, as that of {given[name].source}; run `python -m "
                "extract run` with another --name"
            )
        given[name] = store
    for name, store in given.items():
        if name not in config.targets:
            raise unknown(f"targets: --manifest {store.source}: upstream", name, config.targets)
    for name in sorted(config.targets.keys() - given.keys()):
        path = first.source.with_name(f"{name}.json")
        if not path.is_file():
            raise RetortError(
                f"targets: {name!r} is the upstream of none of the manifests, whose upstreams are "
                f"{', '.join(given)}, and {path} is not there; give its manifest with --manifest"
            )
        given[name] = _open_named(path, name, corpus)
    further = {name: store for name, store in given.items() if store is not first}
    for store in further.values():
        _check_cuts(first, store)
        check_frames_fit(first, store)
    return further


def _open_named(path: Path, name: str, corpus: Corpus) -> StoreReader:
    store = StoreReader.open(path, corpus)
    if name_of(store) != name:
        raise RetortError(
            f"{path}: its upstream is named {name_of(store)!r}, expected {name!r} of `targets`; run `python -m extract "
            f"run` with --name {name}, or change the key"
        )
    return store


def _check_cuts(first: StoreReader, other: StoreReader) -> None:
    """Raise RetortError unless both stores have a row for the same parts of the same utterances."""
    for what, found, expected in (
        ("samples of the longest part of a cut utterance", other.manifest.cut_samples, first.manifest.cut_samples),
        ("utterances", other.num_utterances, first.num_utterances),
    ):
        if found != expected:
            raise RetortError(
                f"{other.source}: {what}: got {found}, expected the {expected} of {first.source}; run `python -m "
                "extract run` again with the same corpus and --cut-long"
            )


def choose_targets(config: StudentConfig, store: StoreReader) -> tuple[int, ...]:
    """Return the teacher's layers to predict. Raises RetortError for layers that are not in the store."""
    targets = config.targets_in(name_of(store)).layers or tuple(layer for layer in store.layers if layer > 0)
    _check_layers(store, targets)
    if config.family in GENERATING and config.shape.dim != store.dim:
        raise RetortError(
            f"shape.dim: got {config.shape.dim}, expected the teacher's {store.dim}: a {config.family} reads the "
            "teacher's layers as its input"
        )
    return targets


def _check_layers(store: StoreReader, targets: tuple[int, ...]) -> None:
    if "frames" not in store.keep:
        raise RetortError(
            f"{store.source} keeps {', '.join(sorted(store.keep))}, training needs frames; run `python -m extract "
            "run` again with --keep frames,pooled"
        )
    if missing := [layer for layer in targets if layer not in store.layers]:
        raise RetortError(
            f"targets: {store.source} has no layer {missing[0]}; choose from {', '.join(map(str, store.layers))}"
        )


def open_like(path: Path, option: str, store: StoreReader, corpus: Corpus) -> StoreReader:
    """Open the store of an option.

    Raises RetortError unless it holds the same utterances as `store`, of one corpus, with equal frames of one teacher.
    """
    other = StoreReader.open(path, corpus)
    expected, found = (
        {
            "the teacher's weights": reader.manifest.upstream["weights_sha256"][:12],
            "normalised waveforms": str(reader.manifest.upstream["normalise"]).lower(),
            "samples of the longest part of a cut utterance": reader.manifest.cut_samples,
            "utterances": reader.num_utterances,
        }
        for reader in (store, other)
    )
    for name, value in expected.items():
        if found[name] != value:
            raise RetortError(
                f"{option} {path}: {name}: got {found[name]}, expected the {value} of {store.source}; give a store of "
                "the same teacher and settings, which may have another codec and other layers"
            )
    unequal = ((other.pack_of < 0) != (store.pack_of < 0)) | (other.num_frames != store.num_frames)
    if unequal.any():
        index = int(np.flatnonzero(unequal)[0])
        raise RetortError(
            f"{option} {path}: utterance {store.ids[index]} has {other.num_frames[index]} frames, expected the "
            f"{store.num_frames[index]} of {store.source}; extract both with the same --drop-long and --drop-short"
        )
    return other


def check_dev(config: StudentConfig, layers: tuple[int, ...], store: StoreReader, dev_store: StoreReader) -> None:
    """Raise RetortError if a store lacks what the dev split is scored on.

    layers: targets in `store`, that of the targets.
    """
    if isinstance(config.targets, dict) and len(config.targets) > 1:
        raise RetortError(
            f"--dev-manifest {dev_store.source}: dev is scored on the {len(config.targets)} stores of `targets`; leave "
            "the option out"
        )
    _check_layers(dev_store, layers)
    if config.stem == "stored":
        _check_stem(config, dev_store)


def check_input(
    config: StudentConfig, store: StoreReader, corpus: Corpus, *, stem_store: StoreReader | None = None
) -> None:
    """Raise RetortError for a teacher without a stem, a stored stem that does not fit, and missing waveforms.

    stem_store: of the stored stem, None for `store`.
    """
    if store.manifest.upstream.get("family") == "fbank":
        raise RetortError(
            f"{store.source} holds filter banks, which have no convolution stem for a student to share frames with; "
            "give the manifest of an upstream of the wav2vec 2.0 family"
        )
    if config.stem == "stored":
        _check_stem(config, store if stem_store is None else stem_store)
    elif stem_store is not None:
        raise RetortError(
            f"--stem-manifest {stem_store.source}: got `stem: waveforms`, which reads no stored stem; set stem to "
            "`stored` in the student's section, or leave the option out"
        )
    if config.needs_audio:
        corpus.check_audio(
            "stem: `waveforms` needs"
            if config.stem == "waveforms"
            else "optimiser.stem_frozen: the last steps train the stem and need",
            ", or train without it: `stem: stored` with optimiser.stem_grad_scale 0, from a store made with --keep "
            "frames,pooled,stem",
        )


def _check_stem(config: StudentConfig, store: StoreReader) -> None:
    if "stem" not in store.keep:
        raise RetortError(
            f"stem: {store.source} keeps {', '.join(sorted(store.keep))} but not the stem; run `python -m extract "
            "run` again with --keep frames,pooled,stem, or set stem to `waveforms`"
        )
    if store.stem_dim != config.shape.stem_channels:
        raise RetortError(
            f"shape.stem_channels: got {config.shape.stem_channels}, expected the {store.stem_dim} channels of the "
            f"stem in {store.source}"
        )
