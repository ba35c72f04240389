"""Long utterances in parts: exact samples, features of each part alone, training, resumption, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from evaluate.__main__ import main as evaluate_main
from extract.__main__ import main
from extract.base.errors import RetortError
from extract.compare import compare_stores
from extract.config import ExtractConfig
from extract.corpus import CUT_GRID, Corpus
from extract.run import extract
from extract.stats import measure
from extract.store.mirror import mirror
from extract.store.reader import StoreReader
from tests.conftest import noise_utterances
from tests.train_world import World, make_world, stop_after, student, train_request
from train.loop import train
from train.run import begin

LONG = 16_000  # samples; a quarter of the corpus is longer


@pytest.fixture
def cut(config: ExtractConfig) -> ExtractConfig:
    return replace(config, cut_long=1.0, layers=(0, 4), keep=frozenset({"frames", "pooled", "stem"}))


def parts_of(corpus: Corpus) -> dict[str, list[int]]:
    """Return the rows of each utterance, by its id."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(corpus.ids):
        rows.setdefault(name.split("#")[0], []).append(row)
    return rows


def test_parts_are_the_utterance(corpus: Corpus) -> None:
    parts = corpus.cut_long(LONG)
    assert list(parts_of(parts)) == list(corpus.ids)
    for index, (name, rows) in enumerate(parts_of(parts).items()):
        np.testing.assert_array_equal(np.concatenate([parts.samples(row) for row in rows]), corpus.samples(index))
        is_long = len(corpus.samples(index)) > LONG
        assert (len(rows) > 1) == is_long == bool(parts.is_part[rows].all())
        numbers = [f"{name}#{number:04d}" for number in range(1, len(rows) + 1)]
        assert [parts.ids[row] for row in rows] == (numbers if is_long else [name])
        assert {parts.splits[row] for row in rows} == {corpus.splits[index]}
        assert {parts.speakers[row] for row in rows} == {corpus.speakers[index]}
    assert parts.num_cut == (corpus.num_samples > LONG).sum() > 0
    assert (parts.digest, parts.cut_samples) == (corpus.digest, LONG)
    assert parts.select("dev").tolist() == [row for row, split in enumerate(parts.splits) if split == "dev"]
    assert corpus.cut_long(0) is corpus
    with pytest.raises(RetortError, match=r"parts, which have no label 'keyword'; .* without --cut-long"):
        parts.label("keyword")
    assert corpus.cut_long(LONG * 2).label("keyword") == corpus.label("keyword")  # nothing is that long


def test_lengths_of_parts(corpus: Corpus) -> None:
    """For any length: no part above the limit, none below a third of it, all alike to a step of the grid."""
    generator = np.random.default_rng(3)
    for limit in (16_000, 16_001, 20_000, 320_000):
        num_samples = np.concatenate([np.arange(limit - 3, limit + 3), generator.integers(400, 2_000_000, 60)])
        start = np.cumsum(num_samples) - num_samples
        whole = replace(corpus, num_samples=num_samples, start=start, ids=_numbered(corpus, len(start)))
        whole = replace(whole, splits=corpus.splits.take(np.zeros(len(start), dtype=np.int64)))
        parts = whole.cut_long(limit)
        assert parts.num_samples.max() <= limit and parts.num_samples.sum() == num_samples.sum()
        np.testing.assert_array_equal(parts.start[1:], (parts.start + parts.num_samples)[:-1])
        assert not ((parts.start - start[parts.utterance]) % CUT_GRID).any()
        own = parts.num_samples[parts.is_part]
        assert own.min() > limit // 3
        mean = num_samples[parts.utterance] / np.bincount(parts.utterance)[parts.utterance]
        assert np.abs(parts.num_samples - mean).max() <= CUT_GRID


def _numbered(corpus: Corpus, count: int) -> object:
    return type(corpus.ids).of([[f"n{number}".encode() for number in range(count)]])


def test_an_id_like_that_of_a_part(corpus: Corpus) -> None:
    long, short = (np.flatnonzero(is_long)[0] for is_long in (corpus.num_samples > LONG, corpus.num_samples <= LONG))
    names = [f"{corpus.ids[long]}#0002" if row == short else name for row, name in enumerate(corpus.ids)]
    renamed = replace(corpus, ids=type(corpus.ids).of([[name.encode() for name in names]]))
    with pytest.raises(RetortError, match="#0002' is the id of an utterance and of a part"):
        renamed.cut_long(LONG)


def test_features_are_those_of_each_part_alone(cut: ExtractConfig, corpus: Corpus) -> None:
    manifest, _ = extract(cut)
    assert manifest.corpus == {
        "name": "noise", "digest": corpus.digest, "cut_samples": LONG,
        "num_utterances": len(corpus.cut_long(LONG)), "num_cut": int((corpus.num_samples > LONG).sum()),
    }  # fmt: skip
    reader = StoreReader.open(cut.manifest, corpus)
    parts = reader.rows_of(corpus)
    assert reader.ids == list(parts.ids)
    model, prepare = HubertModel.from_pretrained(cut.upstream).eval(), Wav2Vec2FeatureExtractor(do_normalize=True)
    for row in np.flatnonzero(parts.is_part):
        samples = corpus.samples(int(parts.utterance[row]))
        first = parts.start[row] - corpus.start[parts.utterance[row]]
        own = samples[first : first + parts.num_samples[row]].astype(np.float32) / 32_768
        values = prepare(own, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            expected = model(values, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(reader.hidden_at(row)[1], expected[4][0].numpy(), atol=5e-3)
        assert reader.stem_at(row).shape == (len(expected[4][0]), 16)
    # One frame of each cut needs audio from both sides; the others are on the grid of the whole utterance's.
    whole, num_parts = (corpus.num_samples - 400) // 320 + 1, np.bincount(parts.utterance)
    np.testing.assert_array_equal(np.bincount(parts.utterance, reader.num_frames), whole - (num_parts - 1))


def test_a_cut_is_part_of_the_fingerprint_and_else_absent(cut: ExtractConfig, config: ExtractConfig) -> None:
    manifest, _ = extract(cut)
    plain, _ = extract(replace(cut, cut_long=0.0, manifest=config.manifest.with_name("plain.json")))
    assert plain.corpus.keys() == {"name", "digest", "num_utterances"} and plain.cut_samples == 0
    prints = {replace(cut, cut_long=seconds).fingerprint({}) for seconds in (0.0, 1.0, 1.5)}
    assert len(prints) == 3 and manifest.fingerprint != plain.fingerprint


def test_damaged_resumed_and_copied(cut: ExtractConfig, corpus: Corpus, tmp_path: Path) -> None:
    first, _ = extract(cut)
    (first.folder / "manifest.json").unlink()
    for path in [*first.folder.glob("shards/00001.json"), *first.folder.glob("hidden/c/1/**/*")]:
        if path.is_file():
            path.unlink()
    again, worked = extract(cut)
    assert worked and again.digest == first.digest and again.objects == first.objects
    assert CliRunner().invoke(main, ["verify", str(cut.manifest)]).exit_code == 0
    mirror(cut.manifest, str(tmp_path / "far"), new_manifest=tmp_path / "far.json")
    assert StoreReader.open(tmp_path / "far.json", corpus).rows_of(corpus).num_cut == first.corpus["num_cut"]
    shown = CliRunner().invoke(main, ["info", str(cut.manifest)])
    assert f"{first.corpus['num_cut']} longer than 1 s" in shown.output
    assert measure(StoreReader.open(cut.manifest)).num_frames == first.plan["num_frames"]


def test_the_plan_counts_parts(cut: ExtractConfig, corpus: Corpus) -> None:
    options = ["--upstream", cut.upstream, "--corpus", str(cut.corpus), "--sample-s", "0", "--layers", "0,4"]
    done = CliRunner().invoke(main, ["plan", *options, "--pack-frames", "64", "--cut-long", "1"])
    assert done.exit_code == 0, done.output
    rows = dict(line.strip("│ ").split("│") for line in done.output.splitlines() if line.count("│") == 3)
    found = {name.strip(): value.strip() for name, value in rows.items()}
    assert found["utterances"] == str(len(corpus.cut_long(LONG)))
    assert found["cut"].startswith(f"{(corpus.num_samples > LONG).sum()} longer than 1 s")
    refused = CliRunner().invoke(main, ["plan", *options, "--pack-frames", "64"])
    assert refused.exit_code == 1 and "cut them with --cut-long 1, or drop them with --drop-long" in refused.output


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose utterances are up to 1.4 s long, in parts of at most 1 s."""
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path, longest_s=1.4, cut_long=1.0)


def test_a_student_trains_from_parts_resumed_or_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student("distilhubert", 6, checkpoint_every_steps=1)
    whole = train(train_request(world, config, "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config, "parts"))
    assert train(train_request(world, config, "parts")).loss == whole.loss
    expected, found = (load_file(world.folder / f"students/{name}/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    run = begin(train_request(world, config, "again"))
    assert run.corpus.num_cut == 5
    batches = [part for pack in run.data.sampler.packs for part in run.data.training_parts(int(pack))]
    trained = sorted(row for batch in batches for row in batch.utterances)
    assert trained == run.corpus.select("train").tolist()
    assert sum(int(batch.num_samples_B.sum()) for batch in batches) == sum(
        count for count, split in zip(run.corpus.num_samples, run.corpus.splits, strict=True) if split == "train"
    )


def test_stores_compare_if_they_are_cut_alike(cut: ExtractConfig, tmp_path: Path) -> None:
    assert cut.corpus is not None
    extract(cut)
    extract(replace(cut, upstream=cut.upstream, normalise=False, manifest=tmp_path / "student.json"))
    extract(replace(cut, cut_long=0.0, manifest=tmp_path / "plain.json"))
    alike = compare_stores(cut.manifest, tmp_path / "student.json", cut.corpus, "train")
    assert alike.problem is None and alike.num_utterances > 16
    other = compare_stores(cut.manifest, tmp_path / "plain.json", cut.corpus, "train")
    assert other.problem is not None and "cut differently" in other.problem


def test_a_score_needs_whole_utterances(cut: ExtractConfig, tmp_path: Path) -> None:
    """Parts in a split that no task reads do no harm; in another one they are an error."""
    from extract.corpus_writer import write_corpus

    utterances = noise_utterances(24, shortest=2_000, longest=15_000)
    long = replace(noise_utterances(1, shortest=40_000, longest=40_001)[0], id="long", split="other")
    arguments = ["run", "--task", "ks", "--upstream", "cut", "--config", str(tmp_path / "params.yaml")]
    recipe = {"learning_rates": [0.01], "steps": 3, "batch_size": 4, "dev_evaluations": 1}
    (tmp_path / "params.yaml").write_text(json.dumps({"evaluate": {"ks": recipe}}))
    scores = {}
    for split in ("other", "dev"):
        path = tmp_path / split / "long.h5"
        write_corpus(path, name="long", reader="folder", utterances=[replace(long, split=split), *utterances])
        for seconds in (0.0, 1.0):
            manifest = tmp_path / split / f"{seconds:g}.json"
            extract(replace(cut, corpus=path.with_suffix(".json"), cut_long=seconds, manifest=manifest))
            out = tmp_path / split / f"{seconds:g}-ks.json"
            done = CliRunner().invoke(
                evaluate_main,
                [
                    *arguments,
                    "--manifest",
                    str(manifest),
                    "--corpus",
                    str(path.with_suffix(".json")),
                    "--out",
                    str(out),
                ],
            )
            scores[split, seconds] = done
            if (split, seconds) == ("dev", 1.0):
                assert done.exit_code == 1 and not out.exists()
                assert "holds 'long#0001', a part of an utterance of split 'dev' (3 such)" in done.output
            else:
                assert done.exit_code == 0, done.output
    whole, parts = (json.loads((tmp_path / f"other/{seconds}-ks.json").read_text()) for seconds in (0, 1))
    assert (whole["test"], whole["dev"], whole["num_test"]) == (parts["test"], parts["dev"], parts["num_test"])
    assert whole["store_digest"] != parts["store_digest"]
