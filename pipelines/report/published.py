"""Table of official scores among published models.

Figures are those of the models' own papers and of SUPERB's leaderboard: percent, lower is better for PR, ASR, ASV, SD
and SF's CER; QbE is MTWV x 100. superb_s is computed from them as from ours (`evaluate.table`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from evaluate.table import SUPERB_CONSTANTS, superb_s
from pipelines.report.results import Results
from pipelines.report.table import NONE, Cell, TextTable, write_relative

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
    """One model, published or ours. `superb_s` is None without all ten tasks, `params_m` if it was not measured."""

    name: str
    ours: bool
    params_m: float | None
    values: Mapping[str, float]  # term -> percent
    superb_s: float | None

    def cells(self, terms: list[str]) -> list[Cell]:
        """Return the row of the model; only the name of ours is bold."""
        params = NONE if self.params_m is None else f"{self.params_m:.2f}"
        score = NONE if self.superb_s is None else write_relative(self.superb_s)
        return [Cell(self.name, bold=self.ours), *map(Cell, (params, score, *(f"{self.values[t]:.2f}" for t in terms)))]


def published_table(results: Results) -> TextTable | None:
    """Return ours among the published models, best superb_s first, or by name if a model has no superb_s.

    None if the scores are not official. The columns are the terms that ours have.
    """
    if results.official is None:
        return None
    params = {one.name: one.speed.params / 1e6 if one.speed else None for one in results.upstreams}
    models = [_placed(name, True, params[name], values) for name, values in results.official.items()]
    models += [_placed(name, False, params_m, values) for name, (params_m, values) in PUBLISHED.items()]
    if any(model.superb_s is None for model in models):  # fewer than ten tasks: there is no common order
        models.sort(key=lambda model: (not model.ours, model.name))
    else:
        models.sort(key=lambda model: -(model.superb_s or 0.0))
    terms = [term for term in TERMS if all(term in values for values in results.official.values())]
    titles = ["model", "M", "superb_s", *(TERM_TITLES.get(term, term.upper()) for term in terms)]
    return TextTable([(title, "") for title in titles], [model.cells(terms) for model in models])


def _placed(name: str, ours: bool, params_m: float | None, values: Mapping[str, float]) -> Placed:
    return Placed(name, ours, params_m, values, superb_s(values) if values.keys() == SUPERB_CONSTANTS.keys() else None)
