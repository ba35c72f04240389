"""Training of s3prl's heads on small random features: losses, metrics and outputs, as JSON on stdout.

    PYTHONPATH=. python tests/parity/record_training.py > tests/parity/training.json

It runs in s3prl's environment (docs/parity.md). Heads, losses, layer sum, optimiser and metrics are s3prl's; features,
labels and initial parameters are those of inputs.py. The loop is that of s3prl's runner: layer sum, loss, clipped
gradient, step.

Shapes: B utterances, L layers, T frames, D features.
"""

import argparse
import collections
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas
import torch
from lxml import etree
from s3prl.downstream.asr.expert import DownstreamExpert as Asr
from s3prl.downstream.ctc.expert import DownstreamExpert as Ctc
from s3prl.downstream.diarization.expert import DownstreamExpert as Diarization
from s3prl.downstream.fluent_commands.expert import DownstreamExpert as Intent
from s3prl.downstream.quesst14_dtw.expert import DownstreamExpert as Query
from s3prl.downstream.sv_voxceleb1 import model as verification
from s3prl.downstream.sv_voxceleb1.utils import EER
from s3prl.optimizers import get_optimizer
from s3prl.upstream.interfaces import Featurizer

from tests.parity import inputs

FOLDER = Path(tempfile.mkdtemp())
ROWS = {split: [i for i, own in enumerate(inputs.SPLITS) if own == split] for split in ("train", "dev", "test")}
RECURRENT = {
    "module": "LSTM",
    "bidirection": True,
    "dim": [inputs.HIDDEN] * 2,
    "dropout": [0.0, 0.0],
    "layer_norm": [False, False],
    "proj": [False, False],
    "sample_rate": [1, 1],
    "sample_style": "concat",
    "total_rate": -1,
}


class Upstream(torch.nn.Module):
    """Hidden states of the utterances in `rows`, padded with zeros, whatever the waveforms hold."""

    def __init__(self, task):
        super().__init__()
        self.task, self.rows = task, [0]

    def get_downsample_rates(self, key):
        return inputs.FRAME_SAMPLES

    def forward(self, waveforms):
        states = [torch.from_numpy(inputs.features(self.task, row)).transpose(0, 1) for row in self.rows]  # (T, L, D)
        return {"hidden_states": list(torch.nn.utils.rnn.pad_sequence(states, batch_first=True).unbind(2))}


class Features:
    """Layer sum of one task."""

    def __init__(self, task):
        self.task, self.upstream = task, Upstream(task)
        self.featurizer = Featurizer(self.upstream, upstream_device="cpu")

    def __call__(self, rows):
        """Return the weighted sum of each utterance, (T, D)."""
        self.upstream.rows = rows
        waveforms = [torch.zeros(inputs.num_samples(self.task, row)) for row in rows]
        return self.featurizer(waveforms, self.upstream(waveforms))


def fill(named, values):
    """Set parameters to the values of inputs.py, by name."""
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(values(name, tuple(parameter.shape))))


def linear(name, module):
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def train(features, head, loss, *, optimiser="Adam", clip=1.0):
    """Return the loss of each step; an epoch is one batch."""
    modules = [features.featurizer, head]
    settings = {"name": "TorchOptim", "torch_optim_name": optimiser, "lr": inputs.LEARNING_RATE}
    optimiser = get_optimizer(modules, inputs.num_steps(features.task), settings)
    losses = []
    for _ in range(inputs.num_steps(features.task)):
        value = loss(ROWS["train"])
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], clip)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(value.item())
    return {"losses": losses, "layer_weights": features.featurizer.weights.softmax(0).tolist()}


def output_rows(head_output, symbols):
    """Set the rows of an output layer, one for each symbol; a symbol None is never chosen."""
    with torch.no_grad():
        for row, symbol in enumerate(symbols):
            weight = inputs.parameter(f"output {symbol}", head_output.in_features)
            head_output.weight[row] = torch.from_numpy(weight * (symbol is not None))
            head_output.bias[row] = float(inputs.parameter(f"bias {symbol}", 1)[0]) if symbol is not None else -1e4


def recurrent(model):
    """Return the parameters of the LSTMs by name."""
    return {
        f"lstm{number}.{name}": parameter
        for number, layer in enumerate(model.rnns)
        for name, parameter in layer.layer.named_parameters()
    }


def ctc(task, head, label_of, metrics):
    """Train a head with CTC and return its metrics on dev and test."""
    features = Features(task)

    def run(rows, split, records):
        return head(split, features(rows), [label_of(row) for row in rows], list(map(str, rows)), records)

    head.train()
    result = train(features, head, lambda rows: run(rows, "train", collections.defaultdict(list)))
    head.eval()
    for split in ("dev", "test"):
        records = collections.defaultdict(list)
        with torch.no_grad():
            for row in ROWS[split]:  # one utterance a batch, as s3prl evaluates
                run([row], split, records)
        result[split] = metrics(records)
    return result


def ctc_expert(text, model, metric):
    """Return the CTC expert of PR or SF."""
    return Ctc(
        inputs.DIM,
        inputs.FRAME_SAMPLES,
        {
            "corpus": {"name": "synthetic"},
            "text": text,
            "model": {"project_dim": inputs.PROJECTION, "zero_infinity": True, **model},
            "metric": [metric],
            "metric_higher_better": metric == "slot_type_f1",
        },
        str(FOLDER),
    )


def phone_recognition():
    (FOLDER / "phones").write_text("\n".join(inputs.PHONES))
    text = {"mode": "word", "vocab_file": str(FOLDER / "phones")}
    expert = ctc_expert(text, {"select": "FrameLevel"}, "per")
    fill(linear("projection", expert.projector), inputs.by_name)
    output_rows(expert.model.linear, expert.tokenizer._vocab_list)
    from s3prl.downstream.ctc.metric import per

    return ctc(
        "pr",
        expert,
        lambda row: expert.tokenizer.encode(" ".join(inputs.phones(row))),
        lambda records: {"per": 100 * per(records["hypothesis"], records["groundtruth"])},
    )


def slot_filling():
    characters = sorted(set("".join(inputs.WORDS)))
    (FOLDER / "characters").write_text("\n".join([*characters, " "]) + "\n")
    (FOLDER / "slots").write_text("\n".join(["O", *inputs.KINDS]))
    text = {
        "mode": "character-slot",
        "vocab_file": str(FOLDER / "characters"),
        "slots_file": str(FOLDER / "slots"),
    }
    expert = ctc_expert(text, {"select": "RNNs", "RNNs": RECURRENT}, "slot_type_f1")
    fill(linear("projection", expert.projector) | recurrent(expert.model), inputs.by_name)
    output_rows(expert.model.linear, [*expert.tokenizer._vocab_list, *expert.tokenizer.slots])

    def label_of(row):
        spoken = inputs.words(row)
        words = " ".join(inputs.WORDS[word] for word in spoken)
        slots = " ".join(inputs.SLOTS[word] for word in spoken)
        # As in all.iob.snips.txt: the first and the last word are dropped.
        return expert.tokenizer.encode(f"BOS {words} EOS\tO {slots} O")

    from s3prl.downstream.ctc.metric import slot_type_f1, slot_value_cer

    def metrics(records):
        pair = records["hypothesis"], records["groundtruth"]
        return {"f1": 100 * slot_type_f1(*pair), "cer": 100 * slot_value_cer(*pair)}

    return ctc("sf", expert, label_of, metrics)


def speech_recognition():
    characters = sorted(set("".join(inputs.WORDS)))
    (FOLDER / "char.dict").write_text("".join(f"{character} 1\n" for character in ["|", *characters]))
    expert = Asr(
        inputs.DIM,
        inputs.FRAME_SAMPLES,
        {
            "datarc": {
                "dict_path": str(FOLDER / "char.dict"),
                "zero_infinity": True,
                "decoder_args": {"decoder_type": "None"},
            },
            "modelrc": {"project_dim": inputs.PROJECTION, "select": "RNNs", "RNNs": RECURRENT},
        },
        str(FOLDER),
    )
    fill(linear("projection", expert.projector) | recurrent(expert.model), inputs.by_name)
    # s3prl has a class for padding beside the blank; no target holds it.
    ours = {"<s>": "<pad>", "<pad>": None, "</s>": "<eos>", "|": " "}
    output_rows(expert.model.linear, [ours.get(symbol, symbol) for symbol in expert.dictionary.symbols])

    def label_of(row):
        # s3prl's own loader ends each transcript with a space; here it has none.
        line = " ".join("|".join(inputs.WORDS[word] for word in inputs.words(row)))
        return expert.dictionary.encode_line(line, line_tokenizer=str.split, add_if_not_exist=False).tolist()

    def metrics(records):
        names = ("pred_tokens", "pred_words", "target_tokens", "target_words")
        uer, wer = expert._compute_metrics(*(records[name] for name in names))
        return {"wer": wer, "cer": uer}

    return ctc("asr", expert, label_of, metrics)


def intents():
    (FOLDER / "data").mkdir()
    for split, name in (("train", "train"), ("dev", "valid"), ("test", "test")):
        rows = [[f"class{number}" for number in inputs.classes(row)] for row in ROWS[split]]
        table = pandas.DataFrame(rows, columns=["action", "object", "location"])
        table.to_csv(FOLDER / "data" / f"{name}_data.csv")
    settings = {
        "datarc": {"file_path": str(FOLDER)},
        "modelrc": {
            "projector_dim": inputs.PROJECTION,
            "select": "UtteranceLevel",
            "UtteranceLevel": {"pooling": "MeanPooling"},
        },
    }
    expert = Intent(inputs.DIM, settings, str(FOLDER))
    fill(linear("projection", expert.projector) | linear("output", expert.model.post_net.linear), inputs.by_name)
    features = Features("ic")

    def run(rows, records):
        return expert("train", features(rows), [inputs.classes(row) for row in rows], list(map(str, rows)), records)

    result = train(features, expert, lambda rows: run(rows, collections.defaultdict(list)))
    for split in ("dev", "test"):
        records = collections.defaultdict(list)
        with torch.no_grad():
            run(ROWS[split], records)
        result[split] = {"acc": 100 * float(np.mean(records["acc"]))}
    return result


def verify():
    """Train as s3prl's expert does, which itself needs a GPU: its parts without it."""
    head = torch.nn.Module()
    head.connector = torch.nn.Linear(inputs.DIM, inputs.HIDDEN)
    head.model = verification.Model(
        input_dim=inputs.HIDDEN,
        agg_dim=inputs.POOLED,
        agg_module_name="SP",
        module_name="XVector",
        utterance_module_name="UtteranceExtractor",
        hparams={"agg_dim": inputs.POOLED, "dropout_p": 0.0, "batch_norm": False},
    )
    head.objective = verification.AMSoftmaxLoss(hidden_dim=inputs.HIDDEN, speaker_num=inputs.SPEAKERS, s=30.0, m=0.4)
    extractor, last = head.model.framelevel_feature_extractor.module, head.model.utterancelevel_feature_extractor
    named = linear("projection", head.connector) | linear("embedding", last.linear1) | linear("utterance", last.linear2)
    for number, layer in enumerate(extractor):
        named |= linear(f"tdnn{number}", layer.kernel)  # weight: (out, context x in), the frame before the feature
    fill(named | {"speakers": head.objective.W}, inputs.by_name)
    features = Features("asv")

    def mask(summed):
        return torch.zeros(len(summed), summed[0].shape[0] - 14)

    def loss(rows):
        summed = features(rows)
        embedded = head.model(head.connector(torch.stack(summed)), mask(summed))
        return head.objective(embedded, torch.tensor([inputs.speaker(row) for row in rows]))

    result = train(features, head, loss, optimiser="AdamW", clip=1000.0)
    with torch.no_grad():
        rows = ROWS["dev"] + ROWS["test"]
        summed = features(rows)
        embedded = head.model.inference(head.connector(torch.stack(summed)), mask(summed))
        embedded = torch.nn.functional.normalize(embedded, dim=-1)
    pairs = [(a, b) for a in range(len(rows)) for b in range(a)]
    scores = [float(torch.nn.functional.cosine_similarity(embedded[a], embedded[b], dim=-1)) for a, b in pairs]
    targets = [int(inputs.speaker(rows[a]) == inputs.speaker(rows[b])) for a, b in pairs]
    eer, _ = EER(np.array(targets), np.array(scores))
    return {**result, "scores": scores, "test": {"eer": 100 * eer}}


def diarization():
    settings = {
        "datarc": {"num_speakers": 2},
        "loaderrc": {"train_batchsize": 8, "eval_batchsize": 1},
        "modelrc": {"rnn_layers": 1, "hidden_size": inputs.HIDDEN},
        "scorerc": {"save_predictions": False},
    }
    expert = Diarization(inputs.DIM, inputs.FRAME_SAMPLES, settings, str(FOLDER))
    named = {f"lstm.{name}": parameter for name, parameter in expert.model.rnn.named_parameters()}
    fill(named | linear("output", expert.model.linear), inputs.by_name)
    features = Features("sd")

    def run(rows):
        labels = [inputs.active_frames(row).astype(np.float32) for row in rows]
        lengths = [len(label) for label in labels]
        return expert("train", features(rows), labels, lengths, None, collections.defaultdict(list))

    result = train(features, expert, run)
    with torch.no_grad():
        logits = expert.model(torch.stack(features(ROWS["test"])))
    return {**result, "probabilities": logits.sigmoid().numpy().round(7).tolist()}


def query_by_example():
    """Return the scores of the first documents for each query, by layer; nothing is trained."""
    by_layer = []
    for layer in range(inputs.NUM_LAYERS):
        settings = {
            "max_workers": 1,
            "feature_normalization": True,
            "silence_frame": None,
            "datarc": {},
            "dtwrc": {
                "dist_method": "cosine_exp",
                "minmax_norm": True,
                "step_pattern": "asymmetric",
                "subsequence": True,
            },
        }
        expert = Query(inputs.DIM, settings, str(FOLDER))
        queries, documents = inputs.queries_and_documents()
        expert.test_dataset = argparse.Namespace(n_queries=len(queries))
        states = [torch.from_numpy(states_LTD[layer]) for states_LTD in queries + documents]
        names = [f"q{i}" for i in range(len(queries))] + [f"d{i}" for i in range(len(documents))]
        records = {"features": [], "audio_names": []}
        expert("test", states, names, records)
        expert.log_records("test", records)
        root = etree.parse(str(FOLDER / "benchmark.stdlist.xml")).getroot()
        found = {terms.get("termid"): {term.get("file"): float(term.get("score")) for term in terms} for terms in root}
        by_layer.append([[found[q][d] for d in names[len(queries) :]] for q in names[: len(queries)]])
    return {"scores": by_layer}


def main():
    """Print the results of all tasks."""
    torch.set_num_threads(1)
    tasks = {
        "pr": phone_recognition,
        "asr": speech_recognition,
        "sf": slot_filling,
        "ic": intents,
        "asv": verify,
        "sd": diarization,
        "qbe": query_by_example,
    }
    chosen = sys.argv[1:] or list(tasks)
    print("{", ",\n".join(f'"{name}": {json.dumps(tasks[name]())}' for name in chosen), "}", sep="\n")


if __name__ == "__main__":
    main()
