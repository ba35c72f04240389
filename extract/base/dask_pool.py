"""Independent pieces of work on many processes, by Dask. Each piece keeps its own result when it is finished.

A local cluster lives as long as the run. A running cluster is given by its scheduler's address; its workers must see
every file under the same paths, and all its processes must be started in the root of the repository, to import Retort:

    python -m dask scheduler                                       not `dask`, whose import path lacks this folder
    python -m dask worker ADDRESS --nworkers 1 --nthreads 2 --memory-limit 0

If a worker dies, its pieces go to others. If the cluster dies, the next run does what is missing.

On GPUs each worker of a local cluster has one of its own, so more workers than GPUs are refused. Workers of a running
cluster use the first GPU that they see: start each with a CUDA_VISIBLE_DEVICES of its own, as `dask cuda worker` does.
They report their GPUs before the work (`extract.base.device`).
"""

import logging
import multiprocessing.forkserver
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, Worker, as_completed, get_worker
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import NoValidWorkerError
from distributed.utils import get_mp_context

from extract.base.errors import RetortError
from extract.base.machine import can_copy_processes
from extract.base.progress import log

if TYPE_CHECKING:
    from extract.base.device import WorkerGPU

_CONNECT_S = 10
_IN_FLIGHT = 500  # pieces submitted at a time, more than the threads of most clusters
Item = TypeVar("Item")
Out = TypeVar("Out")


class DaskPool(AbstractContextManager["DaskPool"]):
    """A local cluster of `number` processes with `threads` pieces at a time each, or the one at `address`.

    piece: name of a piece of work in messages, such as "shard". device: of the work, as `--device` gives it. imports:
    modules that the work needs, imported once for all workers of a local cluster on a CPU.
    Raises RetortError if no scheduler is at `address`, and for workers without a GPU or on the same while others idle.
    """

    def __init__(
        self,
        *,
        number: int,
        address: str | None,
        threads: int,
        piece: str,
        device: str = "cpu",
        imports: Sequence[str] = (),
    ) -> None:
        for name in ("distributed", "distributed.client"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported here, in one line
        self.cluster: LocalCluster | None = None
        self.device = device
        self._known: frozenset[str] = frozenset()  # workers whose GPUs were looked at
        if address is None:
            if device.startswith("cuda"):
                from extract.base.device import check_local_workers  # late: torch takes seconds

                check_local_workers(device, number)
            with _copied_workers(imports, device):
                self.cluster = LocalCluster(
                    n_workers=number,
                    threads_per_worker=threads,
                    processes=True,
                    dashboard_address=":0",  # None takes port 8787, with a warning if another cluster has it
                    memory_limit=0,  # a worker's memory is bounded by its pieces; Dask would pause it for the model
                    silence_logs=logging.CRITICAL,
                    env=dict(os.environ),  # a copy lacks what was set after the start of the process it was copied from
                )
        self.piece = piece
        self.address = address or "of this machine"
        try:
            self.client = Client(self.cluster or address, timeout=_CONNECT_S)
        except (OSError, ValueError) as error:
            raise RetortError(
                f"--scheduler {address}: no Dask scheduler answers there ({str(error).splitlines()[0]}); in the "
                "repository's root start `python -m dask scheduler`, and `python -m dask worker ADDRESS --nthreads 2`"
            ) from None
        try:
            self._look_at_gpus(refuse=True)
        except RetortError:
            self.client.close()
            raise

    def _look_at_gpus(self, *, refuse: bool = False) -> None:
        """Log what is odd about the GPUs of a running cluster's new workers; `refuse`: raise what is surely wrong."""
        if self.cluster is not None or not self.device.startswith("cuda"):
            return
        if self._known and self.workers <= self._known:
            return
        from extract.base.device import find_shared_gpus

        reported = self.everywhere(_report_gpu, self.device)
        self._known |= reported.keys()
        for finding in find_shared_gpus(reported.values()):
            if finding.wrong and refuse:
                raise RetortError(finding.text)
            log(finding.text)

    def __exit__(self, *error: object) -> None:
        self.client.close()
        if self.cluster is not None:
            self.cluster.close()

    @property
    def num_threads(self) -> int:
        """Number of pieces that run at once on the workers that are there now, 1 if there are none yet."""
        return sum(self.client.nthreads().values()) or 1

    def once(self, work: Callable[..., Out], *arguments: Any) -> Out:
        """Return the result of `work` on any free worker."""
        out: Out = self._result(self.client.submit(work, *arguments, pure=False))
        return out

    def everywhere(self, work: Callable[..., Out], *arguments: Any) -> dict[str, Out]:
        """Return the result of `work` on every worker by its address; wait for the first worker."""

        def run() -> dict[str, Out]:
            if not self.workers:
                log(f"the Dask cluster {self.address} has no workers yet: waiting for the first")
                self.client.wait_for_workers(1)
            made: dict[str, Out] = self.client.run(work, *arguments)
            return made

        return self._explained(run)

    @property
    def workers(self) -> frozenset[str]:
        """Addresses of the workers."""
        return frozenset(self.client.nthreads())

    def each(self, work: Callable[[Item], Out], items: Sequence[Item]) -> Iterator[tuple[Item, Out]]:
        """Yield every item with its result as it finishes. The first error ends the others and is raised.

        At most `_IN_FLIGHT` items are submitted at a time, the first ones by the call itself: the scheduler keeps some
        13 kB for each.
        """
        waiting = iter(items)
        futures = {self.client.submit(work, item, pure=False): item for item in islice(waiting, _IN_FLIGHT)}
        return self._finished(work, waiting, futures)

    def _finished(
        self, work: Callable[[Item], Out], waiting: Iterator[Item], futures: "dict[Future[Any], Item]"
    ) -> Iterator[tuple[Item, Out]]:
        finished = as_completed(list(futures))
        try:
            for future in finished:
                result = self._result(future)
                item = futures.pop(future)
                for following in islice(waiting, 1):
                    futures[submitted := self.client.submit(work, following, pure=False)] = following
                    finished.add(submitted)
                self._look_at_gpus()  # of workers that came later: the run goes on
                yield item, result
        finally:
            self.client.cancel(list(futures))

    def _result(self, future: Any) -> Any:
        """Return a future's result. Raises RetortError as `_explained`."""
        return self._explained(future.result)

    def _explained(self, call: Callable[[], Out]) -> Out:
        """Return the result of a call. Raises RetortError in place of Dask's own errors."""
        try:
            return call()
        except KilledWorker as error:
            raise RetortError(
                f"the Dask cluster {self.address} lost worker after worker on one {self.piece} "
                f"({error.allowed_failures + 1} tries): look into the workers' logs, memory first; finished "
                f"{self.piece}s are kept"
            ) from None
        except (CommClosedError, FutureCancelledError, NoValidWorkerError, TimeoutError) as error:
            raise RetortError(
                f"the Dask cluster {self.address} is gone ({type(error).__name__}); finished {self.piece}s are kept, "
                "run the same command again"
            ) from None
        except (ModuleNotFoundError, RuntimeError) as error:
            # The scheduler, which imports the work too, reports a RuntimeError from the cause.
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, ModuleNotFoundError):
                raise
            raise RetortError(
                f"a process of the Dask cluster {self.address} cannot import {cause.name}: start scheduler and workers "
                "in the repository's root and in Retort's environment, with `python -m dask` in place of `dask`"
            ) from None


@contextmanager
def _copied_workers(modules: Sequence[str], device: str) -> Iterator[None]:
    """Make workers that start inside copies of one process that has imported `modules`, where processes can be copied.

    Importing torch and transformers takes seconds for each worker otherwise.
    """
    if not can_copy_processes(device):
        yield
        return
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context()  # before the next line, which Dask would overrule by its own modules the first time
        import_for_workers(modules, device)
        yield


def import_for_workers(modules: Sequence[str], device: str) -> None:
    """Begin to import the modules of a local pool's workers, so that this process can import its own meanwhile.

    modules, device: `imports` and `device` of the `DaskPool`. Does nothing where processes can't be copied.
    """
    if can_copy_processes(device):
        multiprocessing.set_forkserver_preload(["distributed", *modules])
        multiprocessing.forkserver.ensure_running()


def own_device(device: str, *, local: bool) -> str:
    """Return the device of this worker: in a `local` cluster, whose workers are 0, 1, …, `cuda` is a GPU for each."""
    return f"cuda:{get_worker().name}" if local and device == "cuda" else device


def _report_gpu(device: str, dask_worker: Worker) -> "WorkerGPU":
    """Return the GPU of this worker, which Dask gives to a parameter of this name."""
    from extract.base.device import WorkerGPU

    return WorkerGPU.here(dask_worker.address, device)
