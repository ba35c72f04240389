"""Work on many processes by Dask: pieces that need nothing of one another, each kept by whoever finished it.

A cluster of this machine's own lives as long as the run; one that is running is named by its scheduler's address. Its
workers must see every file under the same paths, and must have been started in the repository's root
(`dask worker ADDRESS --nworkers 1 --nthreads 2`). The pieces of a worker that dies go to others; those of a cluster
that dies are done by the next run.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from distributed import Client, KilledWorker, LocalCluster, as_completed
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import NoValidWorkerError

from extract.base.errors import RetortError

_CONNECT_S = 10
Item = TypeVar("Item")
Out = TypeVar("Out")


class DaskPool:
    """`number` processes of this machine with `threads` pieces at a time each, or those of the scheduler at `address`.

    piece: what one is called in messages, such as "shard".
    """

    def __init__(self, *, number: int, address: str | None, threads: int, piece: str) -> None:
        for name in ("distributed", "distributed.client"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a user reads our one line, not Dask's many
        self.cluster: LocalCluster | None = None
        if address is None:
            self.cluster = LocalCluster(
                n_workers=number,
                threads_per_worker=threads,
                processes=True,
                dashboard_address=":0",  # None takes port 8787, with a warning where another cluster has it
                memory_limit=0,  # a worker's memory is bounded by its pieces; Dask would pause it for the model
                silence_logs=logging.CRITICAL,
            )
        self.piece = piece
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

    def once(self, work: Callable[..., Out], *arguments: Any) -> Out:
        """The result of `work` on whichever worker is free."""
        out: Out = self._result(self.client.submit(work, *arguments, pure=False))
        return out

    def each(self, work: Callable[[Item], Out], items: Sequence[Item]) -> Iterator[tuple[Item, Out]]:
        """Every item with its result, as they are finished; the first error is raised and ends the others."""
        futures = {self.client.submit(work, item, pure=False): item for item in items}
        try:
            for future in as_completed(list(futures)):
                yield futures[future], self._result(future)
        finally:
            self.client.cancel(list(futures))

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
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
        except ModuleNotFoundError as error:
            raise RetortError(
                f"a worker of {self.address} cannot import {error.name}: start workers in the repository's root, in "
                "the environment that Retort is installed in"
            ) from None
