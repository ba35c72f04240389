"""Statistics of a store's layers: norms, standard deviations and linear CKA, computed out of core with dask.array.

`python -m extract stats M.json [--out stats/NAME] [--max-packs N]` writes NAME.json and two figures.

Memory is bounded for a store of any size. `hidden_array` is lazy, in the store's own chunks: one pack of one layer,
decoded when a task needs it. Sums are taken shard by shard, so that at most one shard is decoded at a time; the state
is one D x D matrix (float64) for every pair of layers. dask reads only and never writes a store. Padding rows of a pack
never enter an array.

Shapes: L layers, N frames (of all utterances in store order), D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.base.files import write_json, written_aside
from extract.base.progress import ProgressBar
from extract.cka import linear_cka
from extract.store.packing import spread_packs
from extract.store.reader import StoreReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

NEAR_DEAD = 0.01  # of the layer's mean standard deviation: a feature below it carries almost no information


@dataclass(frozen=True)
class LayerStats:
    """One layer. The standard deviation of each feature is over all frames of the store."""

    mean_norm: float  # of a frame, L2
    std_mean: float  # over the features' standard deviations
    std_std: float
    near_dead_share: float  # of features whose standard deviation is at most NEAR_DEAD x std_mean


@dataclass(frozen=True)
class StoreStats:
    """Statistics of a store. `cka_LL` is symmetric with ones on the diagonal, and nan for a constant layer."""

    layers: tuple[int, ...]
    by_layer: tuple[LayerStats, ...]
    cka_LL: NDArray[np.float64]
    num_packs: int
    num_frames: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": {str(layer): one.__dict__ for layer, one in zip(self.layers, self.by_layer, strict=True)},
            "linear_cka": [[None if np.isnan(value) else value for value in row] for row in self.cka_LL.tolist()],
            "num_packs": self.num_packs,
            "num_frames": self.num_frames,
            "near_dead": NEAR_DEAD,
        }


def hidden_array(reader: StoreReader, packs: Sequence[int]) -> Any:
    """Return the frames of some packs as a lazy dask array, float32 (L, N, D), one chunk for each layer and pack.

    A chunk is read and decoded when it is needed, without the padding at the pack's end.
    """
    num_frames = tuple(int(reader.num_frames[reader.utterances_of(pack)].sum()) for pack in packs)

    def read(block_info: Any = None) -> NDArray[np.float32]:
        layer, pack, _ = block_info[None]["chunk-location"]
        return reader.own_frames(packs[pack], layers=[reader.layers[layer]])

    return da.map_blocks(  # type: ignore[no-untyped-call]
        read,
        name=f"hidden-{uuid4().hex}",  # without a name dask hashes `read`, and with it the reader's manifest and index
        chunks=((1,) * len(reader.layers), num_frames, (reader.dim,)),
        dtype=np.float32,
        meta=np.empty((0, 0, 0), dtype=np.float32),
    )


class Moments:
    """Running sums over frames, float64: norms, and first and second moments about a pivot.

    The pivot is the first pack's mean. Without it, a large mean would cancel the digits of the second moments.
    """

    def __init__(self, pivot_LD: NDArray[np.float32]) -> None:
        num_layers, dim = pivot_LD.shape
        self.pivot_LD = pivot_LD
        self.num_frames = 0  # N so far
        self.norm_L = np.zeros(num_layers)  # sum over frames of the L2 norm
        self.sum_LD = np.zeros((num_layers, dim))  # sum over frames of (x - pivot)
        self.pairs = [(one, other) for one in range(num_layers) for other in range(one, num_layers)]
        # sum over frames of (x - pivot)(y - pivot)' for every pair of layers, each (D, D)
        self.products = {pair: np.zeros((dim, dim)) for pair in self.pairs}

    def add(self, hidden_LND: Any) -> None:
        """Add a dask array of frames, (L, N, D): every chunk is read once and used for all sums."""
        centred_LND = hidden_LND - self.pivot_LD[:, None]
        lazy = (
            da.sqrt((hidden_LND**2).sum(axis=2)).sum(axis=1, dtype=np.float64),
            centred_LND.sum(axis=1, dtype=np.float64),
            [da.tensordot(centred_LND[one], centred_LND[other], axes=(0, 0)) for one, other in self.pairs],
        )
        # one compute for all sums, so that dask reads each chunk once
        norm_L, sum_LD, products = da.compute(*lazy)  # type: ignore[no-untyped-call]
        self.num_frames += hidden_LND.shape[1]
        self.norm_L += norm_L
        self.sum_LD += sum_LD
        for pair, product_DD in zip(self.pairs, products, strict=True):
            self.products[pair] += product_DD

    def covariance(self, one: int, other: int) -> NDArray[np.float64]:
        """Return the centred covariance of two layers' features, float64 (D, D)."""
        mean_LD = self.sum_LD / self.num_frames  # of x - pivot: the pivot cancels in the covariance
        return self.products[one, other] / self.num_frames - np.outer(mean_LD[one], mean_LD[other])

    def layer(self, layer: int) -> LayerStats:
        """Return the statistics of one layer."""
        # rounding can make the variance of a constant feature slightly negative
        std_D = np.sqrt(np.maximum(np.diag(self.covariance(layer, layer)), 0.0))
        return LayerStats(
            mean_norm=float(self.norm_L[layer] / self.num_frames),
            std_mean=float(std_D.mean()),
            std_std=float(std_D.std()),
            near_dead_share=float((std_D <= NEAR_DEAD * std_D.mean()).mean()),
        )

    def linear_cka(self) -> NDArray[np.float64]:
        """Return linear CKA of every pair of layers, float64 (L, L)."""
        energy_LL = np.zeros((len(self.norm_L),) * 2)
        for one, other in self.pairs:
            energy_LL[one, other] = energy_LL[other, one] = np.square(self.covariance(one, other)).sum()
        own_L = np.diag(energy_LL)
        return linear_cka(energy_LL, own_L, own_L)


def measure(reader: StoreReader, *, max_packs: int | None = None) -> StoreStats:
    """Return the statistics of a store, or of `max_packs` packs spread over the utterance lengths, in one pass.

    Raises RetortError for a store without frames.
    """
    if max_packs is not None and max_packs < 1:
        raise RetortError(f"--max-packs {max_packs}: expected at least 1")
    packs = spread_packs(reader.num_packs, max_packs or reader.num_packs).tolist()
    first_LND = hidden_array(reader, packs[:1])
    moments = Moments(first_LND.mean(axis=1).compute())
    shard_packs = reader.manifest.plan["shard_packs"]
    with ProgressBar(f"stats {reader.source}", total=len(packs), unit="packs") as bar:
        for _, shard in groupby(packs, key=lambda pack: pack // shard_packs):
            mine = list(shard)
            moments.add(hidden_array(reader, mine))
            bar.advance(len(mine))
    by_layer = tuple(moments.layer(layer) for layer in range(len(reader.layers)))
    return StoreStats(reader.layers, by_layer, moments.linear_cka(), len(packs), moments.num_frames)


def write_stats(stats: StoreStats, reader: StoreReader, out: Path) -> list[Path]:
    """Write OUT-layers and OUT-cka as .png and .svg, then OUT.json, each atomically; return the paths."""
    manifest = reader.manifest
    title = f"{manifest.upstream['name']} on {manifest.corpus['name']}"
    written = []
    for name, figure in (("layers", draw_layers(stats, title)), ("cka", draw_cka(stats, title))):
        for kind in ("png", "svg"):
            written.append(out.with_name(f"{out.name}-{name}.{kind}"))
            _save(figure, written[-1], kind)
    written.append(out.with_name(f"{out.name}.json"))
    of = {
        "upstream": manifest.upstream["name"],
        "corpus": manifest.corpus["name"],
        "codec": manifest.codec,
        "store_digest": manifest.digest,
        "store_packs": reader.num_packs,
    }
    write_json(written[-1], of | stats.to_dict())
    return written


def _save(figure: "Figure", path: Path, kind: str) -> None:
    import matplotlib

    # Equal statistics give equal bytes: no date, and no random ids in the SVG.
    with written_aside(path) as aside, matplotlib.rc_context({"svg.hashsalt": "retort"}):
        figure.savefig(aside, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})


def draw_layers(stats: StoreStats, title: str) -> "Figure":
    """Return a figure of norms and standard deviations by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    norms, stds = figure.subplots(1, 2)
    layers = [str(layer) for layer in stats.layers]
    mean, std = (np.array([getattr(one, f"std_{of}") for one in stats.by_layer]) for of in ("mean", "std"))
    norms.plot(layers, [one.mean_norm for one in stats.by_layer], "o-")
    norms.set_title("mean norm of a frame", fontsize=10)
    stds.errorbar(layers, mean, yerr=std, fmt="o-", capsize=3)
    stds.set_title("std of a feature: mean ± std over features", fontsize=10)
    for axes in (norms, stds):
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0, top=1.05 * axes.dataLim.y1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_cka(stats: StoreStats, title: str) -> "Figure":
    """Return a heat map of linear CKA of every pair of layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(stats.cka_LL, vmin=0, vmax=1, origin="lower", cmap="viridis")
    ticks = range(len(stats.layers))
    axes.set_xticks(ticks, [str(layer) for layer in stats.layers])
    axes.set_yticks(ticks, [str(layer) for layer in stats.layers])
    axes.set(xlabel="layer", ylabel="layer")
    figure.colorbar(image, label="linear CKA")
    figure.suptitle(title, fontsize=10)
    return figure


def table_of(stats: StoreStats) -> "Table":
    """Return the statistics by layer, with linear CKA to the layer before and to the last one."""
    from rich.table import Table

    table = Table(
        *("layer", "norm", "std of features", "near-dead", "CKA before", "CKA last"),
        title=f"{stats.num_frames:,} frames of {stats.num_packs:,} packs",
        title_justify="left",
    )
    for row, (layer, one) in enumerate(zip(stats.layers, stats.by_layer, strict=True)):
        table.add_row(
            str(layer),
            f"{one.mean_norm:.4g}",
            f"{one.std_mean:.4g} ± {one.std_std:.4g}",
            f"{100 * one.near_dead_share:.1f}%",
            f"{stats.cka_LL[row, row - 1]:.4f}" if row else "",
            f"{stats.cka_LL[row, -1]:.4f}",
        )
    return table
