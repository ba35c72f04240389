"""`python -m train push DIR USER/NAME`: a student's folder on the Hugging Face Hub, with its model card."""

from pathlib import Path

from extract.base.errors import RetortError
from extract.base.hub import commit_files
from train.card import CARD, card_text, check_student


def push_student(folder: Path, repo: str, *, card: Path | None, private: bool) -> None:
    """Commit the files of a student's folder to a model repository of the Hub, in one commit.

    Arguments:
        card: file that is committed as README.md in place of the folder's own.
    Raises RetortError for a folder that is not a student's, a missing card, and a refusal of the Hub.
    """
    check_student(folder)
    if card is not None and not card.is_file():
        raise RetortError(f"--card {card} not found; make it with `python -m pipelines card {folder} --out {card}`")
    files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    if card is not None:
        files[CARD] = card
    elif CARD not in files:  # a folder of an earlier version
        files[CARD] = card_text(folder).encode()
    commit_files(repo, files, kind="model", message=f"Student {folder.name}", private=private)
