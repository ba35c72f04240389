"""Model card of a student: README.md in its folder, with the metadata that the Hugging Face Hub reads.

`train run` writes a card from the folder alone: equal students have equal cards, and DVC finds the folder unchanged.
Scores and the revision of the code come later, from other files: `python -m pipelines card` makes a card with them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.corpus import SAMPLE_RATE_HZ

CARD = "README.md"
MADE_FROM = "train_config.json"  # its presence marks a folder that may be replaced
FURTHER = "further_teachers"  # key of train_config.json: origin of the further stores of targets, by name
WEIGHTS_OF = "student_weights_sha256"  # key of train_config.json: digest of the weights that were exported from
_FACTS = {  # keys of train_config.json, and what a reader is shown of them
    "teacher_id": "teacher",
    "teacher_revision": "its revision",
    "teacher": "fingerprint of its features",
    "store_digest": "digest of the store",
    "dev_store_digest": "digest of the store of the dev split",
    "stem_store_digest": "digest of the store of the stem",
    "corpus_digest": "digest of the corpus",
    "from_teacher": "parts that started as the teacher's",
    "light_stem_sha256": "sha256 of the light stem that it started from",
    "seed": "seed",
    "packs_per_step": "packs per step",
    "versions": "versions",
    WEIGHTS_OF: "sha256 of the weights of the student that was exported",
}
# The Hub's names of tasks; it has none for the others of SUPERB.
_HUB_TASKS = dict.fromkeys(("pr", "asr", "sf"), "automatic-speech-recognition") | dict.fromkeys(
    ("ks", "ic", "er", "sid"), "audio-classification"
)
_LOAD = {
    "hubert": """\
```python
from transformers import AutoModel

student = AutoModel.from_pretrained("{source}").eval()
```

It is a `HubertModel`: `HubertForCTC`, `AutoModelForAudioClassification` and other classes open it too.{padding}
""",
    "retort-student": """\
```python
from transformers import AutoModel

student = AutoModel.from_pretrained("{source}", trust_remote_code=True).eval()
```

`trust_remote_code` runs `modeling_retort.py` of this folder, which needs torch and transformers alone. With
`attention_mask` the forward pass is padding-invariant: batching does not change the features.
""",
}
_LIGHT = "In place of a convolution stem it has a light one, behind a log-Mel filter bank.\n"
_DRIFT = """
Group norm takes its statistics over padding too, as in every HuBERT Base: features of a padded batch depend on the
padding. Run utterances one by one, or in batches of one length, where that matters."""


@dataclass(frozen=True)
class CardScore:
    """One result of the student on a test split, in percent."""

    task: str
    corpus: str
    metric: str
    value: float
    interval: tuple[float, float] | None  # of 95%, by bootstrap


@dataclass(frozen=True, kw_only=True)
class CardExtras:
    """Facts that are not in a student's folder."""

    source: str | None = None  # repository to load from; None: the student's name
    license: str = "unknown"  # an identifier of the Hub
    scores: Sequence[CardScore] = ()
    facts: dict[str, str] = field(default_factory=dict)  # further lines of its origin, by label


def check_student(folder: Path) -> None:
    """Raise RetortError for a folder that neither `train run` nor `train export --format hubert` wrote."""
    if not (folder / MADE_FROM).is_file():
        raise RetortError(
            f"{folder}: {MADE_FROM} not found; give a folder that `train run` or `train export --format hubert` wrote"
        )


def card_text(folder: Path, extras: CardExtras | None = None) -> str:
    """Return the card of a student's folder. Without `extras` it depends on the folder's bytes alone."""
    extras = extras or CardExtras()
    config, made_from = read_json(folder / "config.json"), read_json(folder / MADE_FROM)
    name = str(made_from.get("student", config["model_type"]))
    metadata = _metadata(config, made_from, name, extras)
    drifts = config["feat_extract_norm"] == "group"
    load = _LOAD[config["model_type"]].format(source=extras.source or name, padding=_DRIFT if drifts else "")
    hop_samples, family = math.prod(config["conv_stride"]), made_from.get("config", config).get("family")
    normalises = read_json(folder / "preprocessor_config.json")["do_normalize"]
    about = (
        f"A speech model of {_num_parameters(folder) / 1e6:.2f} M parameters, distilled offline from a teacher's "
        f"stored hidden states (family {family}). It has {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']} features after layer 0, and a frame every {1000 * hop_samples / SAMPLE_RATE_HZ:g} "
        f"ms. Input: mono waveforms at 16 kHz{', of zero mean and unit variance' if normalises else ''}."
    )
    parts = [f"---\n{metadata.to_yaml()}\n---\n", f"# {name}\n", f"{about}\n"]
    if config.get("light_blocks") is not None:
        parts.append(_LIGHT)
    if note := config.get("retort_note"):
        parts.append(f"> {note}\n")
    parts += ["## Load\n", load]
    if extras.scores:
        parts += ["## Scores\n", "On test splits, in percent:\n", "".join(map(_score_line, extras.scores))]
    facts = {label: _shown(key, made_from[key]) for key, label in _FACTS.items() if made_from.get(key) is not None}
    facts |= {f"further teacher {name}": _teacher(one) for name, one in made_from.get(FURTHER, {}).items()}
    facts |= extras.facts
    parts += ["## Made from\n", "".join(f"- {label}: {value}\n" for label, value in facts.items())]
    if settings := made_from.get("config"):
        parts += ["## Settings\n", f"```yaml\n{yaml.safe_dump(settings, sort_keys=True)}```\n"]
    return "\n".join(parts)


def _metadata(config: dict[str, Any], made_from: dict[str, Any], name: str, extras: CardExtras) -> ModelCardData:
    custom = ["custom_code"] if "auto_map" in config else []
    results = [
        EvalResult(
            task_type=_HUB_TASKS.get(score.task, "other"),
            task_name=score.task,
            dataset_type=score.corpus,
            dataset_name=score.corpus,
            dataset_split="test",
            metric_type=score.metric,
            metric_name=f"{score.task} {score.metric}",
            metric_value=round(score.value, 3),
        )
        for score in extras.scores
    ]
    return ModelCardData(
        license=extras.license,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["speech", "knowledge-distillation", "retort", *custom],
        base_model=_base_models(made_from),
        model_name=name if results else None,
        eval_results=results or None,
    )


def _base_models(made_from: dict[str, Any]) -> str | list[str] | None:
    """Return the teachers of the Hub; only these have a revision, the id of another one is a folder."""
    teachers = [made_from, *made_from.get(FURTHER, {}).values()]
    found = [one["teacher_id"] for one in teachers if one.get("teacher_revision")]
    return found if len(found) > 1 else found[0] if found else None


def _teacher(one: dict[str, Any]) -> str:
    """Return a further teacher with its revision, its features and their store as text."""
    revision = f" at {one['teacher_revision']}" if one["teacher_revision"] else ""
    name = _shown("teacher_id", one["teacher_id"])
    return f"{name}{revision}, fingerprint of its features {one['teacher']}, digest of the store {one['store_digest']}"


def _num_parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _shown(key: str, value: Any) -> str:
    """Return a value of train_config.json as text. Of a folder on this machine only the name is shown."""
    if key == "teacher_id" and Path(value).is_absolute():
        return Path(value).name
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _score_line(score: CardScore) -> str:
    bounds = "" if score.interval is None else f" (95% interval {score.interval[0]:.2f} to {score.interval[1]:.2f})"
    return f"- {score.task} on {score.corpus}: {score.metric} {score.value:.2f}{bounds}\n"
