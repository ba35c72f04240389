"""Stage one on many workers: one shard is one Dask task, one upstream is loaded by each worker.

    python -m extract run … --workers 4                       a cluster on this machine, for this run
    python -m extract run … --scheduler tcp://10.0.0.1:8786   one that is running

Every worker must see the corpus, the upstream's folder and the store's root under the same paths, and must have been
started in the repository's root (`dask worker ADDRESS --nworkers 1 --nthreads 2`, with CUDA_VISIBLE_DEVICES for one GPU
each). Two threads a worker: while one shard has its turn at the model, the other is encoded and written. The shards of
a worker that dies go to others; those of a cluster that dies are written by the next run.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from distributed import Client, KilledWorker, LocalCluster, as_completed, get_worker
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import NoValidWorkerError

from extract.corpus import Corpus
from extract.errors import RetortError
from extract.job import SHARDS_IN_HAND, Job, Request, UpstreamFacts, open_writer, seconds_of

_CONNECT_S = 10
_opened: dict[Request, Job] = {}
_opening = threading.Lock()


class OnCluster:
    """Writes shards on a Dask cluster: `workers` processes of this machine, or those of the scheduler at `address`."""

    def __init__(self, request: Request, *, workers: int = 0, address: str | None = None) -> None:
        for name in ("distributed", "distributed.client"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a user reads our one line, not Dask's many
        self.cluster: LocalCluster | None = None
        if address is None:
            request = replace(request, threads=request.threads or max(1, (os.cpu_count() or 1) // workers))
            self.cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=SHARDS_IN_HAND,
                processes=True,
                dashboard_address=":0",  # None takes port 8787, with a warning where another cluster has it
                memory_limit=0,  # a worker's memory is bounded by its two shards; Dask would pause it for the model
                silence_logs=logging.CRITICAL,
            )
        self.request = request
        self.address = address or "of this machine"
        try:
            self.client = Client(self.cluster or address, timeout=_CONNECT_S)
        except (OSError, ValueError) as error:
            raise RetortError(
                f"--scheduler {address}: no Dask scheduler answers there ({str(error).splitlines()[0]}); start one "
                "with `dask scheduler`, and workers in the repository's root with `dask worker ADDRESS --nthreads 2`"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.cluster is not None:
            self.cluster.close()

    def facts(self) -> UpstreamFacts:
        """Of the upstream as a worker loads it."""
        facts: UpstreamFacts = self._result(self.client.submit(_facts, self.request, pure=False))
        return facts

    def write(self, shards: list[int], advance: Callable[[float], None]) -> None:
        """Write `shards`; the first error is raised and ends the others."""
        corpus = Corpus.open(self.request.corpus)
        plan = open_writer(self.request, corpus, self.facts()).plan
        futures = {self.client.submit(_write_shard, self.request, shard, pure=False): shard for shard in shards}
        try:
            for future in as_completed(list(futures)):
                self._result(future)
                advance(sum(seconds_of(corpus, plan, pack) for pack in plan.packs_of(futures[future])))
        finally:
            self.client.cancel(list(futures))

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except KilledWorker as error:
            raise RetortError(
                f"the Dask cluster {self.address} lost worker after worker on one shard ({error.allowed_failures + 1} "
                "tries): look into the workers' logs, memory first; finished shards are kept"
            ) from None
        except (CommClosedError, FutureCancelledError, NoValidWorkerError, TimeoutError) as error:
            raise RetortError(
                f"the Dask cluster {self.address} is gone ({type(error).__name__}); finished shards are kept, "
                "run the same command again"
            ) from None
        except ModuleNotFoundError as error:
            raise RetortError(
                f"a worker of {self.address} cannot import {error.name}: start workers in the repository's root, in "
                "the environment that Retort is installed in"
            ) from None


def _job(request: Request) -> Job:
    """This worker's job: opened once, by whichever of its threads comes first."""
    with _opening:
        if request not in _opened:
            from extract.memory import keep_freed_blocks

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
