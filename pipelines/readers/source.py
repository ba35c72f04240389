"""What a reader gives: one `Source` an utterance, without opening its audio."""

from dataclasses import dataclass, field
from pathlib import Path

from extract.errors import RetortError


@dataclass(frozen=True, kw_only=True)
class Source:
    """One utterance as its data set holds it. `crop_s` is (start, duration) in seconds; None is the whole file.

    `trim_silence` cuts silence after the gain; what is then shorter than `shortest_s` is left out and counted.
    """

    file: Path
    id: str
    split: str
    speaker: str
    labels: dict[str, str] = field(default_factory=dict)
    crop_s: tuple[float, float] | None = None
    gain_db: float = 0.0
    trim_silence: bool = False
    shortest_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """What the command lets a user choose. `parts` and `lexicon` are LibriSpeech's, `rename` is the folder reader's."""

    parts: tuple[str, ...] = ()
    lexicon: Path | None = None
    rename: dict[str, str] = field(default_factory=dict)


def layout_error(root: Path, what: str, missing: str, tree: str) -> RetortError:
    """The one line for a folder that is no such data set: what is missing, and the tree that was expected."""
    return RetortError(f"{root} is not laid out as {what}: {missing} is missing; expected {tree}")
