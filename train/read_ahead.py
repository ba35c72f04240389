"""Batches read and copied to the training device ahead of the step that needs them."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from train.data import Batch

T = TypeVar("T")


def read_ahead(items: Iterator[T], depth: int = 2) -> Generator[T]:
    """Yield the same items, up to `depth` of them computed ahead in a background thread.

    Closing the generator ends the thread. An error in the thread is raised where its item would be returned.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending = [pool.submit(next, items, end) for _ in range(depth)]
        while True:
            item = pending.pop(0).result()
            if item is end:
                return
            pending.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]


def read_ahead_on(device: torch.device, packs: Iterator[tuple["Batch", ...]]) -> Generator[tuple["Batch", ...]]:
    """Yield the parts of pack after pack on `device`, read and copied ahead in a background thread.

    On CUDA the thread copies on a stream of its own, so that copies run beside the kernels of the step before. The
    pinned memory of a batch is used again by torch's allocator once its copy has ended.
    """
    if device.type == "cuda":
        yield from _copied_ahead(device, packs)
        return
    with closing(read_ahead(packs)) as ahead:
        for parts in ahead:
            yield tuple(part.to(device) for part in parts)


def _copied_ahead(device: torch.device, packs: Iterator[tuple["Batch", ...]]) -> Generator[tuple["Batch", ...]]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied() -> Iterator[tuple[tuple["Batch", ...], torch.cuda.Event]]:
        for parts in packs:
            with torch.cuda.stream(stream):
                moved = tuple(part.to(device) for part in parts)
                done = stream.record_event()
            yield moved, done

    with closing(read_ahead(copied())) as ahead:
        for parts, done in ahead:
            training = torch.cuda.current_stream(device)
            training.wait_event(done)
            for part in parts:
                part.record_stream(training)  # the allocator of `stream` waits for the step before it uses them again
            yield parts
