"""Runs of s3prl on a corpus of the demo with the recipe of demo.yaml; the metrics of each as a line of JSON on stdout.

    PYTHONPATH=S3PRL python tests/parity/run_s3prl.py DEMO STUDENT OUT TASK SEED …

It runs in s3prl's environment (docs/parity.md). DEMO: folder with the demo's data sets (`data/demo`); STUDENT: folder
of a student. s3prl's own command trains and measures, with its data sets, heads, losses, optimiser and metrics; the
upstream is docs/s3prl_upstream/expert.py. TASK: asr, sf, asv, sd or qbe.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import soundfile
import torch
import yaml
from lxml import etree
from s3prl import hub, run_downstream
from s3prl.downstream.asr.model import RNNLayer
from s3prl.downstream.sv_voxceleb1 import dataset as verification

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(tempfile.mkdtemp())
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"


def recurrent(recipe, **expert):
    """Return the head's settings, those of ASR and SF."""
    depth = 2
    return {
        "project_dim": recipe["projection"],
        "select": "RNNs",
        "RNNs": {
            "total_rate": -1,
            "module": "LSTM",
            "bidirection": True,
            "dim": [recipe["hidden"]] * depth,
            "dropout": [recipe["dropout"]] * depth,
            "layer_norm": [False] * depth,
            "proj": [False] * depth,
            "sample_rate": [1] * depth,
            "sample_style": "concat",
        },
        **expert,
    }


def asr(demo, recipe):
    """LibriSpeech; lists of files by length as its preprocessing writes them."""
    libri, lists = demo / "librispeech" / "LibriSpeech", FOLDER / "lists"
    lists.mkdir()
    for split in ("train-clean-100", "dev-clean", "test-clean"):
        files = sorted((libri / split).rglob("*.flac"))
        rows = [
            f"{n},{path.relative_to(libri)},{soundfile.info(path).frames / 160:.0f}" for n, path in enumerate(files)
        ]
        (lists / f"{split}.csv").write_text("\n".join([",file_path,length", *rows]) + "\n")
    (FOLDER / "char.dict").write_text("".join(f"{symbol} 1\n" for symbol in "|" + CHARACTERS))
    data = {split: [split] for split in ("dev-clean", "test-clean")}
    data |= {"train": ["train-clean-100"], "num_workers": 0, "eval_batch_size": 1, "zero_infinity": True}
    data |= {"libri_root": str(libri), "bucket_file": str(lists), "dict_path": str(FOLDER / "char.dict")}
    data |= {"batch_size": recipe["batch_size"], "decoder_args": {"decoder_type": "None"}}
    return {"datarc": data, "modelrc": recurrent(recipe)}


def sf(demo, recipe):
    """SNIPS: speakers by split, from the names of its files."""
    snips = demo / "snips" / "SNIPS"
    speakers = {
        split: sorted({path.name.split("-")[0] for path in (snips / split).glob("*.wav")})
        for split in ("train", "valid", "test")
    }
    (FOLDER / "characters").write_text("\n".join([" ", *CHARACTERS]) + "\n")
    iob = {
        slot for line in (snips / "all.iob.snips.txt").read_text().splitlines() for slot in line.split("\t")[1].split()
    }
    (FOLDER / "slots").write_text("\n".join(["O", *sorted(iob - {"O"})]))
    corpus = {f"{split}_speakers": names for split, names in speakers.items()}
    corpus |= {"name": "snips", "path": str(snips), "train": ["train"], "dev": ["valid"], "test": ["test"]}
    corpus |= {"bucketing": True, "batch_size": recipe["batch_size"], "num_workers": 0}
    text = {"mode": "character-slot", "vocab_file": str(FOLDER / "characters"), "slots_file": str(FOLDER / "slots")}
    return {
        "corpus": corpus,
        "text": text,
        "model": recurrent(recipe, zero_infinity=True),
        "save_best_on": ["dev"],
        "metric_higher_better": True,
        "metric": ["slot_type_f1", "slot_value_cer"],
    }


def asv(demo, recipe):
    """VoxCeleb1 without the speakers that Retort's reader holds out for dev, a fifth by the digest of their names."""
    voices, own = demo / "voxceleb1_trials", FOLDER / "voxceleb1"
    speakers = sorted((voices / "dev" / "wav").iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    for speaker in speakers[len(speakers) // 5 :]:
        shutil.copytree(speaker, own / "dev" / "wav" / speaker.name)
    shutil.copytree(voices / "test", own / "test")
    # s3prl keeps the lengths of one corpus beside its code.
    shutil.rmtree(Path(verification.__file__).parent / ".wav_lengths", ignore_errors=True)
    trials = str(voices / "veri_test2.txt")
    data = {"vad_config": {"min_sec": 32000}, "file_path": str(own), "max_timestep": round(16000 * recipe["crop_s"])}
    data |= {"train_meta_data": trials, "dev_meta_data": trials, "test_meta_data": trials}
    data |= {"train_batch_size": recipe["batch_size"], "eval_batch_size": 1, "num_workers": 0}
    head = {
        "module": "XVector",
        "input_dim": recipe["hidden"],
        "agg_module": "SP",
        "utter_module": "UtteranceExtractor",
    }
    head |= {"module_config": {"XVector": {"agg_dim": recipe["pooled"], "dropout_p": 0.0, "batch_norm": False}}}
    head |= {"ObjectiveLoss": "AMSoftmaxLoss", "LossConfig": {"AMSoftmaxLoss": {"s": 30.0, "m": 0.4}}}
    return {"datarc": data, "modelrc": head}


def sd(demo, recipe):
    """Libri2Mix: Kaldi folders whose paths are made absolute."""
    for split in ("train", "dev", "test"):
        shutil.copytree(demo / "librimix" / "data" / split, FOLDER / split)
        lines = [line.split() for line in (FOLDER / split / "wav.scp").read_text().splitlines()]
        (FOLDER / split / "wav.scp").write_text("".join(f"{name} {demo / 'librimix' / path}\n" for name, path in lines))
    loader = {f"{split}_dir": str(FOLDER / split) for split in ("train", "dev", "test")}
    loader |= {"num_workers": 0, "train_batchsize": recipe["batch_size"], "eval_batchsize": 1}
    data = {"chunk_size": 2000, "subsampling": 1, "label_delay": 0, "num_speakers": 2, "rate": 16000}
    data |= {"frame_shift": None}
    model = {"rnn_layers": 1, "hidden_size": recipe["hidden"]}
    return {"datarc": data, "loaderrc": loader, "modelrc": model, "scorerc": {"save_predictions": True}}


def qbe(demo, _):
    """QUESST 2014."""
    return {
        "max_workers": 1,
        "feature_normalization": True,
        "silence_frame": None,
        "datarc": {"dataset_root": str(demo / "quesst14" / "quesst14Database"), "num_workers": 0, "batch_size": 1},
        "dtwrc": {"dist_method": "cosine_exp", "minmax_norm": True, "step_pattern": "asymmetric", "subsequence": True},
    }


# Of each task: s3prl's name, the expert's settings, splits that are evaluated during training, file of the best head.
TASKS = {
    "asr": ("asr", asr, ["dev-clean"], "dev-clean-best.ckpt", "test-clean"),
    "sf": ("ctc", sf, ["dev"], "dev-best.ckpt", "test"),
    "asv": ("sv_voxceleb1", asv, ["test"], None, None),
    "sd": ("diarization", sd, ["dev"], "best-states-dev.ckpt", "test"),
}


def run(*words):
    """Run s3prl's command; return what it prints."""
    printed = io.StringIO()
    sys.argv = ["run_downstream", "--device", "cpu", *map(str, words)]
    with contextlib.redirect_stdout(printed):
        run_downstream.main()
    return printed.getvalue()


def search(demo, student, out):
    """Search QUESST's documents with each layer alone; return the scores by layer, query and document."""
    expert = qbe(demo, None)
    (FOLDER / "config.yaml").write_text(yaml.safe_dump({"runner": {}, "downstream_expert": expert}))
    found = {}
    for split in ("dev", "eval"):
        for layer in range(3):
            folder = out / f"qbe-{split}-{layer}"
            words = ["-u", "customized_upstream", "-k", student, "-d", "quesst14_dtw", "-l", layer, "-t", split]
            run("-m", "evaluate", "-p", folder, "-c", FOLDER / "config.yaml", *words)
            queries = etree.parse(str(folder / "benchmark.stdlist.xml")).getroot()
            found[f"{split} {layer}"] = {
                query.get("termid"): {term.get("file"): float(term.get("score")) for term in query} for query in queries
            }
    return found


def configuration(task, demo):
    """Return s3prl's configuration of a task."""
    recipe = yaml.safe_load((ROOT / "tests/parity/demo.yaml").read_text())["evaluate"][task]
    _, settings, evaluated, _, _ = TASKS[task]
    runner = {
        "total_steps": recipe["steps"],
        "gradient_clipping": 1000.0 if task == "asv" else 1.0,
        "gradient_accumulate_steps": 1,
        "log_step": recipe["steps"],
        "eval_step": recipe["steps"] // recipe["dev_evaluations"],
        "save_step": recipe["steps"],
        "max_keep": 1,
        "eval_dataloaders": evaluated,
    }
    adam = "AdamW" if task == "asv" else "Adam"
    optimizer = {"name": "TorchOptim", "torch_optim_name": adam, "lr": recipe["learning_rates"][0]}
    return {"runner": runner, "optimizer": optimizer, "downstream_expert": settings(demo, recipe)}


def train(task, student, seed, out):
    """Train and measure; return what s3prl prints on the way and on test: (name, number) pairs."""
    name, _, _, best, split = TASKS[task]
    words = ["-u", "customized_upstream", "-k", student, "-d", name, "-c", FOLDER / "config.yaml", "--seed", seed]
    printed = run("-m", "train", "-p", out, *words)
    if best is not None:
        printed += run("-m", "evaluate", "-t", split, "-e", out / best)
    return [
        (label, float(value))
        for label, value in re.findall(r"^(\S.*?)[: ] ?(\d\S*)$", printed, flags=re.MULTILINE)
        if not label.startswith("[")
    ]


def upstream(*, remembered):
    """Return the class of docs/s3prl_upstream/expert.py.

    remembered: run each utterance alone and once; it then has the hidden states that a store has, and the frame that
    s3prl adds to some utterances of a batch is 0.
    """
    spec = importlib.util.spec_from_file_location("expert", ROOT / "docs/s3prl_upstream/expert.py")
    expert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(expert)
    known = {}

    class Remembered(expert.UpstreamExpert):
        def forward(self, wavs):
            found = []
            for wav in wavs:
                key = hashlib.sha256(wav.numpy().tobytes()).digest()
                if key not in known:
                    known[key] = torch.stack(super().forward([wav])["hidden_states"])[:, 0].transpose(0, 1)
                found.append(known[key])
            return {"hidden_states": list(torch.nn.utils.rnn.pad_sequence(found, batch_first=True).unbind(2))}

    return Remembered if remembered else expert.UpstreamExpert


def padded_lstm(self, input_x, x_len):
    """Run a recurrent layer of s3prl over padded utterances: the same numbers as packed, in a tenth of the CPU time."""
    time_T = torch.arange(input_x.shape[1])
    last_B1 = torch.as_tensor(x_len).long()[:, None] - 1
    reverse_BT1 = torch.where(time_T <= last_B1, last_B1 - time_T, time_T)[..., None]
    start = input_x.new_zeros(1, len(input_x), self.layer.hidden_size)
    outputs = []
    for suffix in ("", "_reverse"):
        weights = [
            getattr(self.layer, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        x = input_x.gather(1, reverse_BT1.expand_as(input_x)) if suffix else input_x
        x, _, _ = torch.lstm(x, (start, start), weights, True, 1, 0.0, self.training, False, True)
        outputs.append(x.gather(1, reverse_BT1.expand_as(x)) if suffix else x)
    output = torch.cat(outputs, -1)
    return (self.dp(output) if self.dropout > 0 else output), x_len


def main(demo, student, out, task, seeds):
    """Print a line for each seed; files of the runs lie in `out`."""
    hub.customized_upstream = upstream(remembered=task != "asv")  # ASV draws its crops at random
    torch.Tensor.cuda = lambda self: self  # the expert of ASV moves its masks to a GPU
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader.__init__
    # s3prl forgets its setting num_workers after the training split.
    torch.utils.data.DataLoader.__init__ = lambda *args, **named: loader(*args, **(named | {"num_workers": 0}))
    if task == "qbe":  # nothing is trained
        print(json.dumps(search(demo, student, out)))
        return
    RNNLayer.forward = padded_lstm
    (FOLDER / "config.yaml").write_text(yaml.safe_dump(configuration(task, demo)))
    for seed in seeds:
        printed = train(task, student, seed, out / f"{task}-{seed}")
        print(json.dumps({"task": task, "seed": seed, "printed": printed}), flush=True)


if __name__ == "__main__":
    demo, student, out, task, *seeds = sys.argv[1:]
    main(Path(demo).resolve(), Path(student).resolve(), Path(out).resolve(), task, list(map(int, seeds)))
