"""Which tasks are scored, and the corpus of each: section `tasks` of params.yaml."""

from pathlib import Path
from typing import Any

from extract.base.errors import RetortError


def corpus_of_tasks(params: dict[str, Any], path: Path) -> dict[str, str]:
    """Task -> the corpus that has its labels, in the order of the file.

    Raises RetortError unless section `tasks` gives every corpus a list of tasks, and every task one corpus.
    """
    section = params.get("tasks")
    if not isinstance(section, dict) or not all(
        isinstance(tasks, list) and all(isinstance(task, str) for task in tasks) for tasks in section.values()
    ):
        raise RetortError(f"{path}: `tasks` is {section!r}, expected a list of tasks for each corpus")
    pairs = [(task, corpus) for corpus, tasks in section.items() for task in tasks]
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RetortError(f"{path}: `tasks` names a task twice; each is scored on one corpus")
    return found
