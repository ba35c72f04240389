"""GPUs of workers (too many of them, none, or one for several), and precisions that a device lacks."""

import pytest
import torch

from extract.base.device import WorkerGPU, check_dtype, check_local_workers, find_shared_gpus, set_float32
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


def test_float32_is_ieee_or_tf32_in_every_kernel_of_cuda() -> None:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    try:
        for kind, precision in (("tf32", "high"), ("ieee", "highest"), ("tf32", "high")):
            set_float32(kind)
            assert {cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision} == {kind}
            # torch.compile reads torch's older settings; an error follows where they contradict the newer ones.
            assert torch.get_float32_matmul_precision() == precision
            assert cuda.matmul.allow_tf32 == cudnn.allow_tf32 == (kind == "tf32")
    finally:
        set_float32("ieee")


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "said"),
    [
        ("tf32", "cpu", (0, 0), "--dtype tf32: expected a CUDA device, got cpu; give fp32, bf16 or fp16"),
        ("bf16", "cpu", (0, 0), None),
        ("tf32", "cuda", (8, 0), None),
        ("bf16", "cuda", (9, 0), None),
        ("tf32", "cuda", (7, 5), "--dtype tf32: T4 has compute capability 7.5, expected 8.0 or more; give fp32"),
        ("bf16", "cuda", (7, 5), "--dtype bf16: T4 has compute capability 7.5, expected 8.0 or more; give fp16"),
        ("fp16", "cuda", (7, 5), None),
        ("fp32", "cuda", (7, 5), None),
    ],
)
def test_dtypes_of_devices(
    dtype: str, device: str, capability: tuple[int, int], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    if said is None:
        check_dtype(dtype, torch.device(device), option="--dtype")
    else:
        with pytest.raises(RetortError) as raised:
            check_dtype(dtype, torch.device(device), option="--dtype")
        assert str(raised.value) == said
