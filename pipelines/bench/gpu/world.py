"""Models, corpora and stores that the steps of `bench gpu` share."""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from extract.corpus import SAMPLE_RATE_HZ
from extract.corpus_writer import Utterance
from pipelines.bench import synthetic
from pipelines.bench.gpu.records import Asked
from pipelines.bench.measure import Bench
from pipelines.bench.options import CeilingOptions, TrainOptions

if TYPE_CHECKING:
    from train.run import Run, TrainRequest

_TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
    "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_SPOKEN, _SPOKEN_TINY = synthetic.Lengths(8, 13), synthetic.Lengths(1, 2)  # 8 s: the crop of speaker verification
_LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}


def family_shapes() -> dict[str, dict[str, Any]]:
    """Return arguments of AutoConfig.for_model of seven tiny teachers: every arrangement of norms and convolutions."""
    found = {}
    for family in ("wav2vec2", "hubert", "wavlm"):
        found[f"{family} base"] = {"model_type": family, **_TINY}
        found[f"{family} large"] = {"model_type": family, **_TINY, **_LARGE}
    found["data2vec"] = {"model_type": "data2vec-audio", **_TINY, "conv_pos_kernel_size": 5}
    return found


@dataclass(frozen=True)
class TrainingWorld:
    """A teacher, noise, a store of all of its layers with the stem, and the students of its study."""

    bench: Bench[TrainOptions]
    students: tuple[str, ...]

    @classmethod
    @contextmanager
    def made(cls, asked: Asked) -> "Iterator[TrainingWorld]":
        """Make the world in a folder that is removed at the end."""
        from extract.run import extract
        from extract.store.manifest import KEEP
        from pipelines.bench import train

        options = TrainOptions(
            shape="hubert-demo" if asked.tiny else "hubert-base",
            student="distilhubert",
            seconds=12.0 if asked.tiny else 1200.0,
            pack_frames=800 if asked.tiny else 8192,
            steps=1 if asked.tiny else 10,
            device=asked.device,
            rounds=1,
        )
        students: tuple[str, ...] = ("distilhubert", "gendistiller")
        if not asked.tiny:
            students = ("distilhubert", "layerwise-12x384", "interleaved-12x384", "gendistiller", "gendistiller-2d")
        with TemporaryDirectory(dir=asked.work) as folder:
            bench = Bench(options, Path(folder).absolute())
            train.write_params(bench)
            synthetic.make_teacher(bench.teacher, options.shape)
            synthetic.make_noise(bench.corpus, synthetic.LENGTHS["long"], seconds=options.seconds)
            extract(bench.extract_config(keep=KEEP, device=options.device, initial_blocks=2))
            yield cls(bench, students)

    def request(self, student: str, *, precision: Literal["fp32", "bf16"], stored: bool) -> "TrainRequest":
        """Return the request of a student, one pack a step."""
        from pipelines.bench import train

        bench = replace(self.bench, options=replace(self.bench.options, student=student, dtype=precision))
        config = train.student_config(bench)
        config = replace(config, optimiser=replace(config.optimiser, accumulate=1))
        return train.request_of(bench, config, frozen=stored, stored=stored)

    @contextmanager
    def begun(self, request: "TrainRequest") -> "Iterator[tuple[Run, Generator[Any]]]":
        """Begin or resume a run; yield it with the batches that follow its state."""
        from train.run import begin

        run = begin(request)
        with closing(run.data.training_batches(run.state.packs, device=request.device)) as batches:
            yield run, batches

    def step(self, run: "Run", batches: "Generator[Any]") -> float:
        """Run the next step of a run; return its loss."""
        from train.optimiser import learning_rate
        from train.step import collect, train_step

        config, state = run.request.config, run.state
        train_step(run, batches, state.step, learning_rate(config, run.stages[0], state.step))
        (loss,) = collect(run)  # waits for the device
        state.step, state.packs = state.step + 1, state.packs + run.request.packs_per_step
        return loss


@dataclass(frozen=True)
class HeadWorld:
    """Noise with the labels of every task that trains on frames, and a store of noise for it."""

    bench: Bench[CeilingOptions]
    tiny: bool

    @classmethod
    @contextmanager
    def made(cls, asked: Asked) -> "Iterator[HeadWorld]":
        """Make the world in a folder that is removed at the end."""
        from extract.base.files import write_json
        from extract.corpus import Corpus
        from extract.corpus_writer import write_corpus
        from extract.run import make_store, progress_of
        from extract.shards import Extraction
        from pipelines.bench.free import CARD, FreeRunner, FreeUpstream

        num_layers, dim = (2, 32) if asked.tiny else (13, 768)
        with TemporaryDirectory(dir=asked.work) as folder:
            bench = Bench(CeilingOptions(pack_frames=1024 if asked.tiny else 8192, rounds=1), Path(folder))
            # A batch of VoxCeleb has 50 utterances, twice as many as there are speakers here.
            utterances = list(_labelled(8 if asked.tiny else 100, _SPOKEN_TINY if asked.tiny else _SPOKEN))
            trials = [[1, utterances[2].id, utterances[3].id]]
            write_corpus(
                bench.corpus, name="noise", reader=synthetic.NOISE, utterances=utterances, metadata={"trials": trials}
            )
            config, corpus = bench.extract_config(upstream=CARD.id), Corpus.open(bench.corpus)
            upstream = FreeUpstream(num_layers=num_layers, dim=dim, longest=_SPOKEN.longest_frames)
            extraction = Extraction.open(config, CARD, corpus, upstream.spec)
            manifest = make_store(extraction, FreeRunner(config, upstream), progress_of(CARD, [corpus]))
            write_json(bench.manifest, manifest.to_dict())
            yield cls(bench, asked.tiny)

    def step_of(self, task: str, *, device: str, batch_size: int | None) -> tuple[Callable[[], None], int]:
        """Return a function that trains a task's head on its next batch, and the utterances of a batch.

        batch_size: None for that of the published recipe.
        """
        from evaluate.jobs import open_features
        from evaluate.sweep import begin
        from evaluate.tasks import TASKS

        features = replace(
            open_features(TASKS[task], manifest=self.bench.manifest, corpus=self.bench.corpus), device=device
        )
        recipe = TASKS[task].recipe()
        recipe = replace(recipe, batch_size=batch_size or recipe.batch_size)
        if self.tiny:
            sizes = {key: 8 for key in ("hidden", "projection", "pooled") if hasattr(recipe, key)}
            recipe = replace(recipe, **sizes)
        problem: Any = _problems()[task](features, recipe)
        training, batches, number = begin(problem, 1e-4, recipe), problem.batches(recipe.seed, 0), count(1)
        return lambda: training.step(problem, next(batches), next(number), recipe.clip_norm), recipe.batch_size


def _problems() -> dict[str, Any]:
    """Return the training problem of each task that trains on frames."""
    from evaluate.tasks.asr import SpeechRecognition
    from evaluate.tasks.asv import Verification
    from evaluate.tasks.pr import PhoneRecognition
    from evaluate.tasks.sd import Diarization
    from evaluate.tasks.sf import SlotFilling

    return {
        "asr": SpeechRecognition,
        "pr": PhoneRecognition,
        "sf": SlotFilling,
        "asv": Verification,
        "sd": Diarization,
    }


def _labelled(num: int, lengths: synthetic.Lengths) -> Iterator[Utterance]:
    """Yield noise with random labels: four utterances for dev and two for test, the others to train on."""
    generator = np.random.default_rng(synthetic.SEED)
    for index, one in enumerate(islice(synthetic.noise(lengths, math.inf), num)):
        seconds = len(one.samples) / SAMPLE_RATE_HZ
        words = max(1, round(2.5 * seconds))  # about the rates of read speech, as for the phones below
        text = " ".join("".join(generator.choice(list("ABCDEFGH"), 5)) for _ in range(words))
        turns = f"a 0 {seconds / 2:.2f}; b {seconds / 3:.2f} {seconds:.2f}"
        labels = {
            "phones": " ".join(f"p{phone}" for phone in generator.integers(70, size=max(1, round(12 * seconds)))),
            "text": text,
            "slots": " ".join(generator.choice(["O", "city", "date"], words)),
            "segments": turns,
            "rttm": turns,
        }
        split = {0: "dev", 1: "dev", 2: "test", 3: "test", 4: "dev", 5: "dev"}.get(index, "train")
        speaker = f"speaker{index % 4 if split != 'dev' else index % 2}"
        yield replace(one, id=f"{speaker}/{index}/0", split=split, speaker=speaker, labels=labels)
