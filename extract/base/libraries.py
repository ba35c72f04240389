"""One line, instead of a traceback, where a library does not load.

Imported first by every `__main__.py`, and itself by nothing but the standard library: a command that runs outside the
virtual environment, or with libraries that do not fit each other, then names the library and the lock files that hold
a tested set.
"""

import sys
import traceback
from types import TracebackType

_ROOMS = {"extract", "train", "evaluate", "pipelines", "tests"}
_FIX = "install the tested versions: pip install -r requirements/run.lock (in the virtual environment that runs this)"


def failed_library(error: BaseException, trace: TracebackType | None) -> str | None:
    """Return the name of the library whose import raised `error`, None where the error is something else.

    An import of a module that is not there names it; any other error counts where the innermost module that was being
    executed is not one of ours.
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
    if isinstance(error, ImportError) and error.name:  # a name that another version of the library does not have
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
