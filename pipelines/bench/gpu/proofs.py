"""Proofs of `bench gpu`: a device computes the same as a CPU, as an utterance alone, and as an uninterrupted run.

Shapes: L layers, F frames, D features.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.bench.gpu.records import Asked, Proof, Row, Steps
from pipelines.bench.gpu.world import TrainingWorld, family_shapes

_CLOSE = 1e-4  # relative: float32 sums in another order, and not TF32, which is off by 3e-4 and more
_LIBRARIES = ("torch", "transformers", "numpy", "zarr", "numcodecs", "h5py", "click", "pyyaml")


def versions(asked: Asked) -> Steps:
    """Name the machine, the device and the libraries."""
    import torch

    from extract.base.device import device_model
    from extract.base.machine import describe_machine

    yield Row("Machine", {"": "device", "is": device_model(asked.device)})
    for key, value in describe_machine().items():
        yield Row("Machine", {"": key, "is": value})
    for library in _LIBRARIES:
        yield Row("Machine", {"": library, "is": importlib.metadata.version(library)})
    if torch.device(asked.device).type == "cuda":
        facts = torch.cuda.get_device_properties(torch.device(asked.device))
        yield Row("Machine", {"": "GPU memory", "is": f"{facts.total_memory / 2**30:.0f} GiB"})
        yield Row("Machine", {"": "compute capability", "is": f"{facts.major}.{facts.minor}"})
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)  # to the log


def gpu_tests(asked: Asked) -> Steps:
    """Run the tests that need a GPU, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        yield Row("Tests that need a GPU", {"": "pytest", "is": "not installed"})
        return
    # In order of the time they take; a limit then stops the last.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    files = ["tests"] if not asked.tiny else ["tests/test_timing.py"]
    status = subprocess.run([*command, *files], check=False).returncode
    # 5: no test was selected. Tests are skipped where there is no GPU.
    yield Proof("tests marked gpu pass (status of pytest)", 0 if status in (0, 5) else status, 0)


def codes(asked: Asked) -> Steps:
    """Encode the same pack with numpy and on the device: in every bit without a fit, within rounding with one."""
    import numpy as np
    import torch

    from extract.store.codec import CODECS
    from pipelines.bench.synthetic import hidden_states

    frames, dim = (192, 64) if asked.tiny else (8192, 768)
    hidden_LFD = np.random.default_rng(0).standard_normal((2, frames, dim), dtype=np.float32)
    hidden_LFD[0] *= np.linspace(1e-3, 300, dim, dtype=np.float32)
    hidden_LFD[:, :, 0] = 0  # a feature without values
    for codec in CODECS.values():
        expected, expected_scale = codec.encode(hidden_LFD)
        found = torch.empty(expected.shape, dtype=getattr(torch, str(expected.dtype)), device=asked.device)
        scale = None
        if expected_scale is not None:
            dtype = getattr(torch, str(expected_scale.dtype))
            scale = torch.empty(expected_scale.shape, dtype=dtype, device=asked.device)
        codec.encode_into(found, scale, torch.from_numpy(hidden_LFD).to(asked.device))
        wrong = int((found.cpu().numpy() != expected).sum())
        if scale is not None and expected_scale is not None:
            wrong += int((scale.cpu().numpy() != expected_scale).sum())
        yield Proof(f"{codec.name}: codes and scales that differ from numpy's", wrong, 0)
        values_LFD = torch.empty(hidden_LFD.shape, device=asked.device)
        codec.decode_into(values_LFD, found, scale, torch.arange(frames, device=asked.device))
        wrong = int((values_LFD.cpu().numpy() != codec.decode(expected, expected_scale)).sum())
        yield Proof(f"{codec.name}: decoded values that differ from numpy's", wrong, 0)
    yield from _fitted_codes(asked, hidden_states(2, frames, dim), hidden_states(2, frames, dim, seed=1))


def _fitted_codes(asked: Asked, hidden_LFD: Any, sample_LFD: Any) -> Steps:
    """Encode and decode with codec `transform`, whose matrix products a device rounds in its own way."""
    import torch

    from extract.store.transform import Transform
    from extract.store.transform_fit import fitted_to

    codec = fitted_to(Transform(0.5), sample_LFD)
    expected_LRW, _ = codec.encode(hidden_LFD)
    found_LRW = torch.empty(expected_LRW.shape, dtype=torch.uint8, device=asked.device)
    codec.encode_into(found_LRW, None, torch.from_numpy(hidden_LFD).to(asked.device))
    share = float((found_LRW.cpu().numpy() != expected_LRW).mean())  # of values at a bound between two levels
    yield Proof(f"{codec.name}: share of codes that differ from numpy's", share, 1e-3)
    decoded_LFD, values_LFD = codec.decode(expected_LRW, None), torch.empty(hidden_LFD.shape, device=asked.device)
    rows_F = torch.arange(hidden_LFD.shape[1], device=asked.device)
    codec.decode_into(values_LFD, torch.from_numpy(expected_LRW).to(asked.device), None, rows_F)
    error = float(abs(values_LFD.cpu().numpy() - decoded_LFD).max() / abs(decoded_LFD).max())
    yield Proof(f"{codec.name}: decoded values beside numpy's, relative difference", error, 1e-5)


def exactness(asked: Asked) -> Steps:
    """Compare a padded batch with each utterance alone, for every family of teachers, in fp32 and in TF32."""
    import torch
    from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

    from extract.upstream.card import find_upstream
    from extract.upstream.load import load_upstream

    on_gpu = torch.device(asked.device).type == "cuda"
    for family, shape in family_shapes().items():
        torch.manual_seed(0)
        with TemporaryDirectory(dir=asked.work) as folder:
            model: Any = AutoModel
            model.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
            extractor: Any = Wav2Vec2FeatureExtractor
            extractor(do_normalize=True).save_pretrained(folder)
            errors = {}
            for dtype in ("fp32", "tf32") if on_gpu else ("fp32",):
                # Loading runs the comparison that the manifest records.
                batching = load_upstream(find_upstream(folder), device=asked.device, dtype=dtype).facts.batching
                assert batching is not None
                error = batching["relative_error"]
                errors[dtype] = float("nan") if error is None else float(error)
        yield Row("Batch against each utterance alone, relative error", {"teacher": family, **errors})
        yield Proof(f"{family}: a padded batch equals each utterance alone", errors["fp32"], _CLOSE)


def resumption(asked: Asked) -> Steps:
    """Save a run after two steps, resume it, and compare the third step with that of the uninterrupted run."""
    from train import checkpoint
    from train.run import snapshot

    with TrainingWorld.made(asked) as world:
        os.chdir(world.bench.folder)  # where checkpoints go
        for student in world.students:
            request = world.request(student, precision="fp32", stored=True)
            with world.begun(request) as (run, batches):
                for _ in range(2):
                    world.step(run, batches)
                checkpoint.save(run.checkpoint, snapshot(run))
                expected = world.step(run, batches)
            with world.begun(request) as (run, batches):
                assert run.state.step == 2
                found = world.step(run, batches)
            checkpoint.remove(run.checkpoint)
            difference = abs(found - expected) / abs(expected)
            yield Proof(f"{student}: the first loss after a resumption, relative difference", difference, _CLOSE)


def parts(asked: Asked) -> Steps:
    """Train on packs as a whole and in parts (`optimiser.micro_frames`): losses of two steps must agree."""
    with TrainingWorld.made(asked) as world:
        for student in world.students[:2]:
            losses = []
            for micro_frames in (0, world.bench.options.pack_frames // 3):
                request = world.request(student, precision="fp32", stored=True)
                optimiser = replace(request.config.optimiser, micro_frames=micro_frames)
                request = replace(request, config=replace(request.config, optimiser=optimiser))
                with world.begun(request) as (run, batches):
                    losses.append([world.step(run, batches) for _ in range(2)])
            # The second loss depends on the gradient of the first step.
            difference = max(abs(one - other) / abs(other) for one, other in zip(*losses, strict=True))
            yield Proof(f"{student}: losses from packs in parts, relative difference", difference, _CLOSE)
