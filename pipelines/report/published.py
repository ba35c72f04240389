"""The place of official scores among published models.

Figures are those of the models' own papers and of SUPERB's leaderboard: percent, lower is better for PR, ASR, ASV, SD
and SF's CER; QbE is MTWV x 100. superb_s is computed from them as from ours (`evaluate.table`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluate.table import SUPERB_CONSTANTS, superb_s

TERMS = ("pr", "asr", "ks", "ic", "sid", "asv", "sd", "er", "sf_f1", "sf_cer", "qbe")
TERM_TITLES = {"sf_f1": "SF F1", "sf_cer": "SF CER", "qbe": "QbE"}
_ROWS: dict[str, tuple[float, tuple[float, ...]]] = {  # parameters in millions, TERMS
    "HuBERT Base": (94.68, (5.41, 6.42, 96.30, 98.34, 81.42, 5.11, 5.88, 64.92, 88.53, 25.20, 7.36)),
    "WavLM Base+": (94.70, (3.92, 5.59, 97.37, 99.00, 89.42, 4.07, 3.50, 68.65, 90.58, 21.20, 9.88)),
    "DistilHuBERT": (23.49, (16.27, 13.37, 95.98, 94.99, 73.54, 8.55, 6.19, 63.02, 82.57, 35.59, 5.11)),
    "FitHuBERT": (22.49, (13.32, 12.09, 96.27, 91.25, 55.71, 8.00, 6.84, 59.82, 84.06, 32.46, 4.89)),
    "LightHuBERT small": (27.00, (6.60, 8.33, 96.07, 98.23, 69.70, 5.42, 5.85, 64.12, 87.58, 26.90, 7.64)),
    "DPHuBERT": (23.59, (9.67, 10.47, 96.36, 97.92, 76.83, 5.84, 5.92, 63.16, 86.86, 28.26, 6.93)),
    "DPWavLM": (23.59, (8.22, 10.19, 96.27, 98.58, 82.11, 5.98, 5.53, 65.24, 87.68, 26.11, 8.74)),
    "ARMHuBERT": (26.45, (7.72, 9.96, 96.88, 97.07, 65.03, 5.68, 7.10, 62.86, 87.59, 26.06, 6.35)),
    "STaRHuBERT-L": (26.63, (7.97, 8.91, 96.56, 97.50, 78.66, 5.45, 5.83, 63.48, 88.01, 25.36, 6.77)),
}
PUBLISHED = {name: (params, dict(zip(TERMS, values, strict=True))) for name, (params, values) in _ROWS.items()}


@dataclass(frozen=True)
class Placed:
    """One line: a model, published or ours, with its terms; `superb_s` is None without all ten tasks."""

    name: str
    ours: bool
    params_m: float
    values: Mapping[str, float]
    superb_s: float | None


def place(ours: Mapping[str, tuple[float, Mapping[str, float]]]) -> list[Placed]:
    """Ours among the published, best first by superb_s, or by name where there is none.

    ours: name -> parameters in millions, terms in percent.
    """
    lines = [
        Placed(name, mine, params_m, values, superb_s(values) if values.keys() == SUPERB_CONSTANTS.keys() else None)
        for mine, models in ((True, ours), (False, PUBLISHED))
        for name, (params_m, values) in models.items()
    ]
    if any(line.superb_s is None for line in lines):
        return sorted(lines, key=lambda line: (not line.ours, line.name))
    return sorted(lines, key=lambda line: -(line.superb_s or 0.0))


def shown_terms(lines: Sequence[Placed]) -> list[str]:
    """The terms that ours have."""
    ours = [line.values for line in lines if line.ours]
    return [term for term in TERMS if all(term in values for values in ours)]


def term_title(term: str) -> str:
    return TERM_TITLES.get(term, term.upper())
