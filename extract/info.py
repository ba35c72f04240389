"""Tables of `extract info`: the content of a manifest."""

from collections.abc import Iterator

from rich.table import Table

from extract.cost import as_bytes, outweighed
from extract.store.codecs import codec_named
from extract.store.manifest import Manifest


def tables_of(manifest: Manifest, *, title: str) -> Iterator[Table]:
    """Yield a table of the store, then those of the errors by layer: of the codec and of the precision, where known."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in _rows(manifest).items():
        if value:
            table.add_row(name, value)
    yield table
    for part, by_layer in ((manifest.codec, manifest.codec_error), (manifest.dtype, manifest.dtype_error)):
        if by_layer:
            columns = ("layer", "signal to noise (dB)", "max abs error")
            errors = Table(*columns, title=f"error of {part}", title_justify="left")
            for layer in map(str, (*manifest.layers, "stem")):  # JSON sorts layers as text: 12 before 4
                if figures := by_layer.get(layer):
                    errors.add_row(layer, str(figures.get("snr_db")), str(figures.get("max_abs_error")))
            yield errors


def _rows(it: Manifest) -> dict[str, str]:
    """Return the rows of `info`; a row without a value is left out."""
    frames, packs = it.plan["num_frames"], it.plan["num_packs"]
    rows = packs * it.plan["pack_frames"]
    revision = it.upstream.get("revision")
    hours = frames * it.hop_samples / 16_000 / 3600
    return {
        "upstream": f"{it.upstream['name']} ({it.upstream['id']}" + (f"@{revision})" if revision else ")"),
        "parameters": f"{it.upstream['num_parameters'] / 1e6:.2f} M",
        "note": it.upstream["note"] or "",
        "weights": it.upstream["weights_sha256"][:12],
        "corpus": f"{it.corpus['name']}, {it.corpus['num_utterances']} utterances, {hours:.2f} h",
        "cut": _cut(it),
        "frames": f"{frames} of {it.dim} features every {it.hop_samples} samples, {len(it.layers)} layers",
        "convention": it.convention,
        "keeps": f"{', '.join(it.keep)}; {it.codec}, computed in {it.dtype}, attention {it.attention}",
        "device": it.device or "",
        "batches": _batches(it),
        "packs": f"{packs} of {it.plan['pack_frames']} frames in {it.plan['num_shards']} shards, "
        f"{100 * frames / max(1, rows):.1f}% filled",
        "bits a value": _bits_a_value(it),
        "codec": _parameters(it),
        "dropped": f"{it.num_dropped} utterances, longer than a pack or shorter than a frame" if it.num_dropped else "",
        "size": f"{it.num_bytes / 1e6:.1f} MB in {it.num_objects} objects at {it.location}",
        "fingerprint": it.fingerprint[:12],
        "digest": it.digest[:12],
    }


def _cut(manifest: Manifest) -> str:
    """Return the cut of long utterances as text, empty for whole ones."""
    if not (samples := manifest.cut_samples):
        return ""
    return f"{manifest.corpus['num_cut']} longer than {samples / 16_000:g} s, into parts that count as utterances"


def _batches(manifest: Manifest) -> str:
    """Return the batching of utterances as text, with the error of a padded batch against each utterance alone."""
    if (batching := manifest.batching) is None:
        return ""
    mode = {"padded": "padded", "single": "utterances one by one"}.get(batching.get("mode", ""), "")
    error = batching.get("max_abs_error")
    off = "fails" if error is None else f"is off by {error} at most"
    return f"{mode}; a padded batch {off} ({batching.get('dtype')})"


def _bits_a_value(manifest: Manifest) -> str:
    """Return the bits on disk of one feature of one frame, beside those of the codec in a full pack."""
    values = manifest.plan["num_frames"] * len(manifest.layers) * manifest.dim
    if "frames" not in manifest.keep or not values:
        return ""
    stored = sum(size for name, (_, size) in manifest.totals.items() if name in ("hidden", "scale"))
    frames = manifest.plan["pack_frames"]
    full = codec_named(manifest.codec).nbytes(1, frames, manifest.dim) / (frames * manifest.dim)
    return f"{8 * stored / values:.3f} on the disk, {8 * full:.3f} in a full pack"


def _parameters(manifest: Manifest) -> str:
    """Return the size of a fitted codec's parameters as text, empty for another codec."""
    _, parameter_bytes = manifest.totals.get("codec", (0, 0))
    codes_bytes = sum(size for name, (_, size) in manifest.totals.items() if name in ("hidden", "stem"))
    if not parameter_bytes:
        return ""
    if parameter_bytes <= codes_bytes:
        return f"{as_bytes(parameter_bytes)} of parameters"
    return outweighed(parameter_bytes, codes_bytes)
