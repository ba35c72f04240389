"""GPUs of workers: too many of them, none, or one for several."""

import pytest
import torch

from extract.base.device import WorkerGPU, check_local_workers, find_shared_gpus
from extract.base.errors import RetortError


@pytest.mark.parametrize(
    ("device", "workers", "said"),
    [
        ("cuda", 4, None),
        ("cuda:3", 1, None),
        ("cpu", 64, None),
        ("cuda", 5, "--workers 5: this machine has 4 CUDA devices; give --workers 4 at most"),
        ("cuda:0", 2, "--workers 2: all would share --device cuda:0"),
        ("cuda:4", 1, "--device cuda:4: this machine has 4 CUDA devices"),
    ],
)
def test_workers_of_a_machine_with_four_gpus(
    device: str, workers: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if said is None:
        check_local_workers(device, workers)
    else:
        with pytest.raises(RetortError, match=said):
            check_local_workers(device, workers)


def worker(port: int, gpu: str | None, *, num_visible: int = 1, visible: str | None = "0") -> WorkerGPU:
    return WorkerGPU(f"tcp://10.0.0.1:{port}", "node1", gpu, num_visible, visible)


def test_gpus_that_are_not_shared() -> None:
    # Where Slurm confines each task to its GPU, all have the same index and other UUIDs.
    assert not find_shared_gpus([worker(1, "a"), worker(2, "b"), worker(3, "c", num_visible=4, visible=None)])
    assert not find_shared_gpus([])


@pytest.mark.parametrize(("num_visible", "wrong"), [(1, False), (4, True)])
def test_workers_that_share_a_gpu(num_visible: int, wrong: bool) -> None:
    sharing = [worker(port, "a", num_visible=num_visible, visible=None) for port in (1, 2)]
    (finding,) = find_shared_gpus([*sharing, worker(3, "b")])
    assert finding.wrong == wrong
    assert all(text in finding.text for text in ("GPU a", "tcp://10.0.0.1:1 on node1", "tcp://10.0.0.1:2 on node1"))
    assert "tcp://10.0.0.1:3" not in finding.text


def test_a_worker_without_a_gpu() -> None:
    (finding,) = find_shared_gpus([worker(1, None, num_visible=0), worker(2, "a")])
    assert finding.wrong
    assert "tcp://10.0.0.1:1 on node1" in finding.text and "tcp://10.0.0.1:2" not in finding.text


def test_the_gpu_of_this_process() -> None:
    found = WorkerGPU.here("tcp://10.0.0.1:1", "cuda:0")
    assert found.num_visible == torch.cuda.device_count()
    assert (found.gpu is None) == (found.num_visible == 0)
