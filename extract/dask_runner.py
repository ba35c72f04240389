"""Shards of a store on many processes, by Dask: a shard is a task, and each worker loads the upstream once.

    python -m extract run … --workers 4                       starts a cluster on this machine, for this run
    python -m extract run … --scheduler tcp://10.0.0.1:8786   uses a running cluster (see `extract.base.dask_pool`)

Each worker has two threads: while one shard is in the model, another is encoded and written. For one GPU a worker,
start the workers with CUDA_VISIBLE_DEVICES.
"""

import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self

from distributed import get_worker

from extract.base.dask_pool import DaskPool
from extract.base.errors import RetortError
from extract.base.files import in_main_tree
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.shards import CONCURRENT_SHARDS, Advance, Extraction, LocalRunner
from extract.store.location import is_url, root_text
from extract.store.manifest import initial_weights_path
from extract.upstream.card import UpstreamCard
from extract.upstream.spec import UpstreamFacts


class DaskRunner:
    """`ShardRunner` on the cluster that a config names. The cluster starts with the first store that needs work."""

    def __init__(self, config: ExtractConfig, card: UpstreamCard) -> None:
        self.config = config
        self.card = replace(card, folder=card.folder and card.folder.resolve())
        self._started = ExitStack()

    @cached_property
    def pool(self) -> DaskPool:
        config = self.config
        return self._started.enter_context(
            DaskPool(number=config.workers, address=config.scheduler, threads=CONCURRENT_SHARDS, piece="shard")
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._started.__exit__(kind, error, trace)

    def open(self, extraction: Extraction) -> UpstreamFacts:
        return self.pool.once(_open, self._absolute(extraction.config, extraction.corpus), self.card)

    def write(self, extraction: Extraction, shards: list[int], advance: Advance) -> None:
        config = self._absolute(extraction.config, extraction.corpus)
        for shard, _ in self.pool.each(partial(_write_shard, config, self.card), shards):
            advance(extraction.shard_s(shard))

    def write_initial_weights(self, config: ExtractConfig) -> dict[str, Any]:
        record = self.pool.once(_write_initial_weights, self._absolute(config), self.card)
        if not (path := initial_weights_path(config.manifest)).is_file():
            raise RetortError(f"{path}: not here, a worker wrote it; give a --manifest in a folder that workers share")
        return record

    def _absolute(self, config: ExtractConfig, corpus: Corpus | None = None) -> ExtractConfig:
        """Return the config as workers get it: they may have another working folder."""
        threads, root = config.threads, root_text(config.store)
        if config.scheduler is None:  # the workers share this machine's cores
            threads = threads or max(1, (os.cpu_count() or 1) // config.workers)
        return replace(
            config,
            corpus=config.corpus if corpus is None else corpus.path.resolve(),
            manifest=config.manifest.absolute(),
            store=root if is_url(root) else in_main_tree(root),
            threads=threads,
        )


@dataclass
class _Worker:
    """State of a worker process: one loaded upstream, and the store that it works on."""

    lock: threading.Lock
    loaded: tuple[Any, ...] = ()  # what `runner` was loaded by
    runner: LocalRunner | None = None
    opened: tuple[Any, ...] = ()  # what `extraction` was opened by
    extraction: Extraction | None = None
    facts: UpstreamFacts | None = None

    def load(self, config: ExtractConfig, card: UpstreamCard) -> LocalRunner:
        """Return the runner of a config, in place of an earlier one. Call it with the lock held."""
        if self.runner is None or self.loaded != (config.loading, card):
            from extract.base.malloc import keep_freed_blocks

            keep_freed_blocks()
            self.runner, self.loaded, self.opened = None, (), ()  # frees the earlier upstream first
            self.runner = LocalRunner(replace(config, device=_own_device(config.device)), card)
            self.loaded = config.loading, card
        return self.runner

    def open(self, config: ExtractConfig, card: UpstreamCard) -> tuple[LocalRunner, Extraction, UpstreamFacts]:
        """Open a store, once for all threads and shards of this worker."""
        with self.lock:
            runner = self.load(config, card)
            if self.extraction is None or self.facts is None or self.opened != (config, card):
                self.extraction = Extraction.open(config, card, Corpus.open(config.corpus))
                self.facts, self.opened = runner.open(self.extraction), (config, card)
                if self.extraction.writer.remote:
                    self.extraction.writer.create()  # in this process's own staging folder
            return runner, self.extraction, self.facts


_worker = _Worker(threading.Lock())


def _own_device(device: str) -> str:
    """Return a GPU of its own for each worker of a local cluster, which are named 0, 1, …, if the device is `cuda`."""
    name = get_worker().name
    if device != "cuda" or not isinstance(name, int):
        return device
    import torch

    return f"cuda:{name % torch.cuda.device_count()}"


def _open(config: ExtractConfig, card: UpstreamCard) -> UpstreamFacts:
    return _worker.open(config, card)[2]


def _write_shard(config: ExtractConfig, card: UpstreamCard, shard: int) -> None:
    runner, extraction, _ = _worker.open(config, card)
    if not extraction.writer.finished(shard):  # Dask runs a task again if the worker that ran it dies
        runner.write_shard(extraction, shard)


def _write_initial_weights(config: ExtractConfig, card: UpstreamCard) -> dict[str, Any]:
    with _worker.lock:
        return _worker.load(config, card).write_initial_weights(config)
