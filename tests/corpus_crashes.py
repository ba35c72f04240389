"""Writing a corpus in a process that is killed, or whose disk is full (tests/test_corpus_writer.py)."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extract.corpus_writer import CorpusWriter, Utterance


def write_resumably(path: Path, utterances: list[Utterance]) -> int:
    """Write a corpus whose sources are the utterances; return how many of them an earlier writer had written."""
    with CorpusWriter(path, name="c", reader="folder", resumable=True) as writer:
        found = list(writer.resume(one.id for one in utterances))
        assert found == [{"at": position} for position in range(len(found))]
        for position in range(len(found), len(utterances)):
            writer.add(utterances[position], signature=utterances[position].id, found={"at": position})
        writer.finish({"lexicon": {"é": "x"}}, {"dropped": []})
    return len(found)


def killed_at(call: int, path: Path, utterances: list[Utterance]) -> None:
    """Write a corpus, and be killed within the `call`-th change of a file: half of what is written reaches it."""
    left = iter(range(call))

    def wrapped(name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def change(*arguments: Any, **named: Any) -> Any:
            if next(left, None) is None:
                if name == "pwrite":
                    function(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return change

    for name in ("pwrite", "ftruncate", "fsync", "replace", "unlink"):
        setattr(os, name, wrapped(name))
    write_resumably(path, utterances)


def write_up_to(size: int, path: Path, utterances: list[Utterance]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        write_resumably(path, utterances)
    except OSError as error:
        sys.exit(error.errno)
