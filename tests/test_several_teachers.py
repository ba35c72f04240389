"""One student from two stores: joined by utterance, a weighted mean of their losses, resumed to the bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import SEWConfig, SEWModel, Wav2Vec2FeatureExtractor

from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.run import extract
from extract.store.manifest import Manifest
from extract.store.reader import StoreReader
from tests.train_world import TARGETS, World, make_teacher, make_world, stop_after, student, train_request
from train.config import StudentConfig
from train.loop import train
from train.metrics import RunMetrics
from train.run import Run, TrainRequest, begin

WIDE = (2, 6)  # layers of the second teacher, 24 wide
BOTH: dict[str, Any] = {
    "targets": {"teacher": {"layers": list(TARGETS), "weight": 2.0}, "wide": {"layers": list(WIDE), "weight": 0.5}}
}
SLOW: dict[str, Any] = {"targets": {"teacher": {"layers": list(TARGETS)}, "slow": {"layers": [1, 2]}}}


def make_store(world: World, name: str, upstream: Path | str, **changes: Any) -> Path:
    """Extract an upstream's features of the world's corpus beside its manifest; return the new manifest."""
    manifest = world.manifest.with_name(f"{name}.json")
    settings: dict[str, Any] = {
        "upstream": str(upstream),
        "name": name,
        "corpus": world.corpus,
        "manifest": manifest,
        "store": world.folder / "stores",
        "codec": "int4",
        "pack_frames": 160,
    }
    extract(ExtractConfig(**settings | changes))
    return manifest


def make_slow_teacher(folder: Path) -> Path:
    """Save a SEW of two layers of 12 with random weights: a frame every 40 ms."""
    torch.manual_seed(3)
    shape = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "squeeze_factor": 2,
        "conv_dim": (8,) * 7,
        "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
        "conv_stride": (5, 2, 2, 2, 2, 2, 2),
        "num_feat_extract_layers": 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    SEWModel(SEWConfig(**shape)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world in int8, and stores of a wider teacher in int4 and of a slower one in blocks, in other packs."""
    world = make_world(tmp_path_factory.mktemp("world"), keep=frozenset({"frames", "pooled", "stem"}))
    wide = make_teacher(world.folder / "wide", hidden_size=24, num_attention_heads=3)
    make_store(world, "wide", wide, layers=WIDE)
    make_store(world, "slow", make_slow_teacher(world.folder / "slow"), layers=(1, 2), codec="transform:4")
    for teacher in (world.teacher, wide, world.folder / "slow"):
        shutil.rmtree(teacher)  # training must not need it
    return world


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return the world; outputs of one test lie in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return made


def request(world: World, config: StudentConfig, *others: str, name: str = "tiny") -> TrainRequest:
    manifests = tuple(world.manifest.with_name(f"{other}.json") for other in others)
    here = Path.cwd()
    return replace(
        train_request(world, config, name), other_manifests=manifests, out=here / name, run_folder=here / f"{name}-run"
    )


def stored(world: World, name: str) -> StoreReader:
    return StoreReader.open(world.manifest.with_name(f"{name}.json"), Corpus.open(world.corpus))


def batches_of(run: Run) -> list[Any]:
    training = [part for pack in run.data.sampler.packs for part in run.data.training_parts(int(pack))]
    return [*training, *run.data.dev_batches()]


@pytest.mark.parametrize("micro_frames", [0, 40])
@pytest.mark.parametrize(("name", "changes", "hop"), [("wide", BOTH, 1), ("slow", SLOW, 2)])
def test_targets_of_the_other_store_are_those_of_the_students_frames(
    world: World, name: str, changes: dict[str, Any], hop: int, micro_frames: int
) -> None:
    config = student("distilhubert", **changes, optimiser={"micro_frames": micro_frames})
    run = begin(request(world, config, name))
    other, first = stored(world, name), run.store
    assert other.hop_samples == hop * first.hop_samples and other.num_packs != first.num_packs
    num_packs = {len(set(other.pack_of[list(batch.utterances)])) for batch in batches_of(run)}
    assert max(num_packs) > 1 or (name, micro_frames) != ("wide", 0), "a batch must lie in several packs of the other"
    for batch in batches_of(run):
        # A value for each of the student's frames, that names its utterance and time.
        stamps_F2 = torch.cat(
            [
                torch.stack([torch.full((count,), float(index)), torch.arange(count).float()], 1)
                for index, count in ((index, int(first.num_frames[index])) for index in batch.utterances)
            ]
        )
        matched_G2 = batch.matched(stamps_F2, 1)
        found_LGD = batch.all_targets()[1]
        assert len(matched_G2) == found_LGD.shape[1]
        assert torch.equal(batch.all_targets()[0], batch.targets())
        for index in batch.utterances:
            mine = matched_G2[:, 0] == index
            expected_LTD = other.hidden_at(index, config.targets_in(name).layers)
            count = min(expected_LTD.shape[1], -(-int(first.num_frames[index]) // hop))
            np.testing.assert_allclose(found_LGD[:, mine].numpy(), expected_LTD[:, :count], atol=1e-5)
            last = int(first.num_frames[index]) - 1
            means = [np.mean(range(hop * frame, min(hop * frame + hop - 1, last) + 1)) for frame in range(count)]
            assert matched_G2[mine, 1].tolist() == pytest.approx(means)
            assert count >= expected_LTD.shape[1] - 1


@pytest.mark.parametrize("family", ["distilhubert", "interleaved"])
@pytest.mark.parametrize(("name", "changes", "dim"), [("wide", BOTH, 24), ("slow", SLOW, 12)])
def test_the_loss_is_the_weighted_mean_of_the_losses_of_the_stores(
    world: World, family: str, name: str, changes: dict[str, Any], dim: int
) -> None:
    if name == "slow" and family == "interleaved":
        changes = {"targets": changes["targets"] | {"slow": {"layers": [2]}}}
    config = student(family, **changes, optimiser={"micro_frames": 60})
    run = begin(request(world, config, name))
    run.distiller.eval()
    weights = [changes["targets"][key].get("weight", 1.0) for key in ("teacher", name)]
    for batch in batches_of(run):
        targets = batch.all_targets()
        with torch.no_grad():
            predicted = run.distiller(batch, targets[0])
            losses = run.distiller.store_losses(predicted, targets)
        layers = config.targets_in(name).layers
        assert layers is not None
        assert [one.shape[1] for one in predicted] == [16] * 3 + [dim] * len(layers)
        terms = []
        for one, target in zip(predicted[3:], targets[1], strict=True):
            error = (
                functional.l1_loss(one, target)
                - functional.logsigmoid(functional.cosine_similarity(one, target)).mean()
            )
            terms.append(error if family == "distilhubert" else functional.mse_loss(one, target))
        expected = torch.stack(terms).mean() if family == "distilhubert" else terms[-1] + 0.5 * sum(terms[:-1])
        torch.testing.assert_close(losses[1], expected)
    metrics = train(request(world, config, name))
    dev = np.array([metrics.stores[key].dev for key in ("teacher", name)], dtype=float)
    assert np.isfinite(dev).all() and metrics.loss.dev == pytest.approx(np.average(dev, weights=weights))
    assert [metrics.stores[key].weight for key in ("teacher", name)] == pytest.approx(np.array(weights) / sum(weights))
    assert metrics.dev_by_layer == metrics.stores["teacher"].dev_by_layer
    assert tuple(metrics.stores[name].dev_by_layer) == layers


def _num_utterances(parts: tuple[Any, ...]) -> int:
    return sum(len(part.utterances) for part in parts)


def test_parts_of_a_pack_have_the_gradients_of_the_whole(world: World) -> None:
    """The slower store's frames are another share of a part than the student's own frames."""
    from train.step import _add_gradients

    gradients = []
    for micro_frames in (0, 40):
        config = student("distilhubert", **SLOW, optimiser={"micro_frames": micro_frames})
        run = begin(request(world, config, "slow"))
        run.distiller.eval()
        parts = max((run.data.training_parts(int(pack)) for pack in run.data.sampler.packs), key=_num_utterances)
        assert (len(parts) > 1) == bool(micro_frames)
        np.testing.assert_allclose(np.sum([part.shares for part in parts], axis=0), 1)
        _add_gradients(run, parts, forced=False)
        gradients.append([one.grad for one in run.distiller.parameters() if one.grad is not None])
    for whole, of_parts in zip(*gradients, strict=True):
        torch.testing.assert_close(of_parts, whole, rtol=1e-3, atol=1e-6)


def test_a_store_of_the_same_targets_twice_changes_no_loss(world: World) -> None:
    """Two stores of one teacher: equal predictions have equal losses, and any weights have their mean."""
    manifest = json.loads(world.manifest.read_text())
    manifest["upstream"]["name"] = "again"
    world.manifest.with_name("again.json").write_text(json.dumps(manifest))
    targets = {"teacher": {"layers": [2, 6]}, "again": {"layers": [2, 6], "weight": 3.0}}
    config = student("layerwise", targets=targets)
    run = begin(request(world, config))  # `again` is found beside the manifest
    heads = run.distiller.heads["projections"]
    assert isinstance(heads, nn.ModuleList)
    heads[2:].load_state_dict(heads[:2].state_dict())
    for batch in batches_of(run):
        both = batch.all_targets()
        one, other = run.distiller.eval().store_losses(run.distiller(batch, both[0]), both)
        torch.testing.assert_close(one, other)


def test_a_resumed_run_equals_an_uninterrupted_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {**BOTH, "checkpoint_every_steps": 1, "stem": "stored", "optimiser": {"stem_grad_scale": 0.0, "lr": 1e-3}}
    config = student("interleaved", 6, **changes | {"targets": BOTH["targets"] | {"wide": {"layers": [2, 6]}}})
    whole = train(request(world, config, "wide", name="whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        train(request(world, config, "wide", name="parts"))
    parts = train(request(world, config, "wide", name="parts"))
    assert parts.loss == whole.loss and parts.stores == whole.stores
    expected, found = load_file("whole/model.safetensors"), load_file("parts/model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_origin_of_every_store_is_recorded(world: World) -> None:
    config = student("distilhubert", 2, **BOTH)
    train(request(world, config, "wide"))
    manifest = Manifest.read(world.manifest.with_name("wide.json"))
    made_from = json.loads(Path("tiny/train_config.json").read_text())
    further = made_from["further_teachers"]["wide"]
    assert (further["store_digest"], further["teacher"]) == (manifest.digest, manifest.fingerprint)
    assert made_from["store_digest"] == Manifest.read(world.manifest).digest
    assert json.loads(Path("tiny/config.json").read_text())["retort_other_targets"] == {"wide": list(WIDE)}
    assert manifest.digest in Path("tiny/README.md").read_text()
    metrics = RunMetrics.read(Path("tiny-run/metrics.json"))
    assert metrics.stores["wide"].teacher == manifest.fingerprint
    assert Path("tiny-run/plots/metrics/dev/loss_of_wide.tsv").is_file()


def test_weights_of_the_stores_and_their_digests_decide_the_run(world: World) -> None:
    def key(changes: dict[str, Any], *others: str) -> str:
        return begin(request(world, student("distilhubert", **changes), *others)).key

    plain = key({"targets": list(TARGETS)})
    heavier = {"targets": BOTH["targets"] | {"wide": {"layers": list(WIDE), "weight": 0.6}}}
    keys = [plain, key(BOTH, "wide"), key(heavier, "wide"), key(SLOW, "slow")]
    assert len(set(keys)) == len(keys)
    assert key(BOTH) == keys[1]  # found beside the first manifest
    only = begin(request(world, student("distilhubert", targets={"teacher": {"layers": list(TARGETS)}})))
    assert only.data.layers == TARGETS and not only.further


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": {}}, ["targets", "no store"]),
        ({"targets": {"a": {"weight": 0}}}, ["targets.a.weight", "more than 0"]),
        ({"targets": {"a": {"weight": -1.0}}}, ["targets.a.weight", "-1"]),
        ({"targets": {"a": {"weight": float("nan")}}}, ["targets.a.weight", "nan"]),
        ({"targets": {"a": {"layers": [4, 2]}}}, ["targets.a.layers", "ascending"]),
        ({"targets": {"a": {"layer": [4]}}}, ["targets.a", "layer", "layers, weight"]),
        ({"targets": {"a/b": {}}}, ["targets", "a/b"]),
        ({"targets": {"a": {}, "b": {}}, "codebook": "k"}, ["codebook", "one store"]),
    ],
)
def test_wrong_targets_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RetortError) as caught:
        student("distilhubert", **changes)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_a_gendistiller_has_one_teacher() -> None:
    with pytest.raises(RetortError, match=r"targets: .*gendistiller"):
        student("gendistiller", **BOTH)


def test_stores_that_do_not_belong_together_are_refused(world: World, tmp_path: Path) -> None:
    def refused(changes: dict[str, Any], *others: str, first: str = "teacher") -> str:
        made = replace(request(world, student("distilhubert", **changes), *others))
        made = replace(made, manifest=world.manifest.with_name(f"{first}.json"))
        with pytest.raises(RetortError) as caught:
            begin(made)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    one = {"targets": {"teacher": {}}}
    assert "wide" in refused(one, "wide") and "teacher" in refused(one, "wide")  # not among the targets
    assert "mapping" in refused({"targets": list(TARGETS)}, "wide") and "mapping" in refused({}, "wide")
    assert "gone.json" in refused({"targets": {"teacher": {}, "gone": {}}})
    assert "--name" in refused(BOTH, "wide", "wide")
    assert "no layer 5" in refused({"targets": {"teacher": {}, "wide": {"layers": [5]}}}, "wide")
    assert "multiple of the 640" in refused({**SLOW, "init": "random"}, "teacher", first="slow")
    shutil.copy(world.manifest.with_name("wide.json"), world.manifest.with_name("renamed.json"))
    assert "expected 'renamed'" in refused({"targets": {"teacher": {}, "renamed": {}}})
    world.manifest.with_name("renamed.json").unlink()
    fresh = make_teacher(tmp_path / "fresh", hidden_size=24, num_attention_heads=3)
    make_store(world, "cut", fresh, layers=WIDE, cut_long=1.0)
    assert "--cut-long" in refused({"targets": {"teacher": {}, "cut": {}}}) and "16000" in refused(
        {"targets": {"teacher": {}, "cut": {}}}
    )
    make_store(world, "dropped", fresh, layers=WIDE, pack_frames=40, drop_long=True)
    assert "is dropped" in refused({"targets": {"teacher": {}, "dropped": {}}})
    elsewhere = make_world(tmp_path / "elsewhere", longest_s=0.8)
    with pytest.raises(RetortError, match="corpus"):
        begin(replace(request(world, student("distilhubert", **BOTH)), other_manifests=(elsewhere.manifest,)))
