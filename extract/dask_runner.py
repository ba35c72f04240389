"""Stage one on many workers: one shard is one Dask task, one upstream is loaded by each worker.

    python -m extract run … --workers 4                       a cluster on this machine, for this run
    python -m extract run … --scheduler tcp://10.0.0.1:8786   one that is running (see `extract.base.dask_pool`)

For one GPU each, start workers with CUDA_VISIBLE_DEVICES. Two threads a worker: while one shard has its turn at the
model, the other is encoded and written.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

from distributed import get_worker

from extract.base.dask_pool import DaskPool
from extract.corpus import Corpus
from extract.shards import SHARDS_IN_HAND, Job, Request, UpstreamFacts, open_writer, seconds_of

_opened: dict[Request, Job] = {}
_opening = threading.Lock()


class DaskRunner:
    """Writes shards on a Dask cluster: `workers` processes of this machine, or those of the scheduler at `address`."""

    def __init__(self, request: Request, *, workers: int = 0, address: str | None = None) -> None:
        if address is None:
            request = replace(request, threads=request.threads or max(1, (os.cpu_count() or 1) // workers))
        self.request = request
        self.workers = DaskPool(number=workers, address=address, threads=SHARDS_IN_HAND, piece="shard")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.workers.__exit__(kind, error, trace)

    def facts(self) -> UpstreamFacts:
        """Of the upstream as a worker loads it."""
        return self.workers.once(_facts, self.request)

    def write(self, shards: list[int], advance: Callable[[float], None]) -> None:
        """Write `shards`; the first error is raised and ends the others."""
        corpus = Corpus.open(self.request.corpus)
        plan = open_writer(self.request, corpus, self.facts()).packing
        for shard, _ in self.workers.each(partial(_write_shard, self.request), shards):
            advance(sum(seconds_of(corpus, plan, pack) for pack in plan.packs_of(shard)))


def _job(request: Request) -> Job:
    """This worker's job: opened once, by whichever of its threads comes first."""
    with _opening:
        if request not in _opened:
            from extract.base.malloc import keep_freed_blocks

            keep_freed_blocks()
            _opened.clear()  # one upstream a worker
            _opened[request] = Job.open(replace(request, device=_own_device(request.device)))
        return _opened[request]


def _own_device(device: str) -> str:
    """`cuda` means a GPU of its own to each worker of a local cluster, which are named 0, 1, …"""
    name = get_worker().name
    if device != "cuda" or not isinstance(name, int):
        return device
    import torch

    return f"cuda:{name % torch.cuda.device_count()}"


def _facts(request: Request) -> UpstreamFacts:
    return _job(request).facts


def _write_shard(request: Request, shard: int) -> None:
    job = _job(request)
    if not job.writer.finished(shard):  # a task that ran before its worker died
        job.write_shard(shard)
