"""What a run of a task is asked: frozen dataclasses whose defaults are the reference's values.

`evaluate:` in params.yaml overrides them, and every difference is noted beside the score.
"""

from dataclasses import dataclass, fields

from extract.base.errors import RetortError

RUN_ONLY = frozenset({"memory_gb"})  # how a run is done, not what it computes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every task shares; what only trained ones do is in `Recipe`."""

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise RetortError(f"seed is {self.seed}, expected 0 or more")

    @property
    def amount(self) -> float:
        """What a whole run tells its `Progress`."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """What every trained task shares. Batches hold whole utterances; Adam, no schedule, best dev checkpoint.

    `weight_decay` is AdamW's.
    """

    learning_rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    steps: int = 200_000
    batch_size: int = 32
    dev_evaluations: int = 100  # evenly spaced over the steps, the last one at the end
    clip_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "dev_evaluations", "clip_norm"):
            if getattr(self, name) <= 0:
                raise RetortError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise RetortError("learning_rates must be a list of one or more numbers above 0")
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise RetortError("learning_rates names a rate twice")
        if self.weight_decay < 0:
            raise RetortError(f"weight_decay is {self.weight_decay}, expected 0 or more")

    @property
    def amount(self) -> float:
        return self.steps


def differences(recipe: Settings) -> list[str]:
    """What this run's recipe changes of the reference's, one note a field; nothing where they agree."""
    reference = type(recipe)()
    own = {"seed", *RUN_ONLY}
    return [
        f"{field.name} {_plain(getattr(recipe, field.name))} (reference {_plain(getattr(reference, field.name))})"
        for field in fields(recipe)
        if field.name not in own and getattr(recipe, field.name) != getattr(reference, field.name)
    ]


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{item:g}" for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
