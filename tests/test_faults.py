"""Faults of long extractions, reproduced: kills, concurrent runs, damaged bytes, a full disk, changed inputs."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import HubertConfig, HubertModel

from extract.config import ExtractConfig
from extract.corpus_writer import write_corpus
from extract.run import extract
from extract.store.manifest import Manifest
from pipelines.demo.recording import write_audio
from tests.conftest import TINY, noise_utterances, save_teacher
from tests.processes import WARM, Command, run_command


@pytest.fixture
def config(teacher: Path, tmp_path: Path) -> ExtractConfig:
    write_corpus(
        tmp_path / "long.h5", name="long", reader="folder", utterances=noise_utterances(60, seed=1, shortest=15_000)
    )
    return ExtractConfig(
        upstream=str(teacher),
        corpus=tmp_path / "long.json",
        store=tmp_path / "whole",
        manifest=tmp_path / "whole.json",
        pack_frames=128,
        shard_packs=2,
        threads=1,
    )


def elsewhere(config: ExtractConfig, name: str) -> ExtractConfig:
    folder = config.manifest.parent
    return replace(config, store=folder / name, manifest=folder / f"{name}.json")


def command(config: ExtractConfig, *more: str) -> list[str]:
    return [
        *("extract", "run", "--upstream", config.upstream, "--corpus", str(config.corpus)),
        *("--store", str(config.store), "--manifest", str(config.manifest), "--threads", str(config.threads)),
        *("--pack-frames", str(config.pack_frames), "--shard-packs", str(config.shard_packs), *more),
    ]


def run(config: ExtractConfig, *more: str) -> "subprocess.CompletedProcess[str]":
    return run_command(*command(config, *more))


def test_killed_again_and_again_the_store_is_bit_identical(config: ExtractConfig, tmp_path: Path) -> None:
    whole, _ = extract(config)
    killed = elsewhere(config, "killed")
    draw, kills, longest_s = random.Random(0), 0, 0.3
    while True:
        process = WARM.Process(target=extract, args=(killed,))
        process.start()
        process.join(draw.uniform(0, longest_s))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
        longest_s *= 1.15  # at some length one finishes, on any machine
    assert kills >= 5
    resumed = Manifest.read(killed.manifest)
    assert resumed.objects == whole.objects
    left = [path.name for path in killed.store.rglob("*") if path.is_file()]
    right = [path.name for path in config.store.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(right)  # the run that finishes removes the temporary files of killed ones


def test_two_extractors_on_one_store_do_no_harm(config: ExtractConfig) -> None:
    whole, _ = extract(config)
    shared = elsewhere(config, "shared")
    rivals = [Command(*command(shared)) for _ in range(2)]
    for rival in rivals:
        _, errors = rival.communicate(timeout=300)
        assert rival.returncode == 0, errors
    assert Manifest.read(shared.manifest).objects == whole.objects
    verified = run_command("extract", "verify", str(shared.manifest))
    assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize("damage", ["flipped bit", "truncated"])
def test_damage_is_named_and_only_it_is_repaired(config: ExtractConfig, damage: str) -> None:
    manifest, _ = extract(config)
    shard = manifest.folder / "hidden/c/1/0/0/0"
    good = shard.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in manifest.folder.glob("hidden/c/*/0/0/0")}
    shard.write_bytes(good[:200] + bytes([good[200] ^ 16]) + good[201:] if damage == "flipped bit" else good[:-7])
    verify = ("extract", "verify", str(config.manifest))
    named = run_command(*verify)
    assert named.returncode == 1
    assert named.stderr.count("\n") == 1 and "hidden/c/1/0/0/0" in named.stderr
    repaired = run(config)
    assert repaired.returncode == 0, repaired.stderr
    assert shard.read_bytes() == good
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if before[path] != after[path]} == {shard}
    assert run_command(*verify).returncode == 0
    assert Manifest.read(config.manifest).objects == manifest.objects
    assert not list(manifest.folder.rglob("*.damaged"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "retort", str(place)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_after_room_is_made(
    config: ExtractConfig, small_disk: Path
) -> None:
    whole, _ = extract(config)
    assert sum(size for size, _ in whole.objects.values()) > 400_000
    full = replace(config, store=small_disk / "stores", manifest=config.manifest.with_name("full.json"))
    stopped = run(full)
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith("error: no space left on the disk")
    assert "Traceback" not in stopped.stderr
    assert not full.manifest.exists()
    kept = sorted(small_disk.glob("stores/*/*/shards/*.json"))
    assert kept
    assert not [path for path in small_disk.rglob("*") if path.name.endswith((".aside", ".partial"))]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    before = [path.stat().st_mtime_ns for path in kept]
    going_on = run(full)
    assert going_on.returncode == 0, going_on.stderr
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert Manifest.read(full.manifest).objects == whole.objects


def test_a_full_disk_stops_the_demos_speech_with_its_own_name(small_disk: Path) -> None:
    with pytest.raises(OSError) as stopped:  # libsndfile would raise "System error"
        for number in range(20):
            write_audio(small_disk / f"{number}.flac", np.random.default_rng(number).normal(size=32_000) * 0.1)
    assert stopped.value.errno == errno.ENOSPC


def test_a_changed_corpus_or_teacher_is_another_store(config: ExtractConfig, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(config.upstream, teacher)
    config = replace(config, upstream=str(teacher))
    first, _ = extract(config)
    # The audio changes and its card does not: refused before anything is computed.
    write_corpus(tmp_path / "other.h5", name="long", reader="folder", utterances=noise_utterances(5, seed=2))
    shutil.copy(tmp_path / "other.h5", tmp_path / "long.h5")
    refused = run(config)
    assert refused.returncode == 1
    assert f"corpus {tmp_path / 'long.h5'} has digest" in refused.stderr and refused.stderr.count("\n") == 1
    # Another corpus of the same name with its card, then another teacher in the same folder: new stores.
    write_corpus(tmp_path / "long.h5", name="long", reader="folder", utterances=noise_utterances(5, seed=2))
    second, worked = extract(config)
    assert worked and second.store["path"] != first.store["path"]
    save_teacher(HubertModel(HubertConfig(**TINY)), teacher)
    third, worked = extract(config)
    assert worked and third.fingerprint != second.fingerprint
    assert first.folder.is_dir() and second.folder.is_dir()  # finished stores are kept
