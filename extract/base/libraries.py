"""One-line error, in place of a traceback, for a library that does not load.

Every `__main__.py` imports this module first, and it imports only the standard library. A command that runs outside the
virtual environment, or with library versions that do not fit each other, then names the library and the lock file of
a tested set.
"""

import sys
import traceback
from types import TracebackType

_ROOMS = {"extract", "train", "evaluate", "pipelines", "tests"}
_FIX = "install the tested versions: pip install -r requirements/run.lock (in the virtual environment that runs this)"


def failed_library(error: BaseException, trace: TracebackType | None) -> str | None:
    """Return the name of the library whose import raised `error`, or None for any other error.

    A missing module carries its name. Any other error belongs to the library if the innermost module that was being
    executed is not part of Retort.
    """
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return None if package in _ROOMS else package
    importing = None
    for frame, _ in traceback.walk_tb(trace):
        if frame.f_code.co_name == "<module>":
            importing = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if importing and importing not in _ROOMS | {"__main__"}:
        return importing
    if isinstance(error, ImportError) and error.name:  # the installed version lacks a name
        package = error.name.partition(".")[0]
        return None if package in _ROOMS else package
    return None


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception: one line for a library that does not load, a traceback for anything else."""
    library = failed_library(error, trace)
    if library is None:
        sys.__excepthook__(kind, error, trace)
        return
    reason = " ".join(str(error).split())[:200] or kind.__name__
    print(f"error: the library {library} does not load ({reason}); {_FIX}", file=sys.stderr)


sys.excepthook = explain
