"""User-facing errors, and the click group and options that the commands of every room share.

A mistake that a user can correct is a `RetortError`: one line with what is wrong, where, what was expected and how to
fix it. `CommandGroup` prints that line to stderr and exits with status 1. It does the same for a full disk, a path
that the system refuses, too little memory and Ctrl-C. Any other exception is a defect of Retort and keeps its
traceback.
"""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import click

from extract import __version__
from extract.base.progress import run_id

F = TypeVar("F", bound=Callable[..., Any])

# Errors of the system for a path that a user gave. Each is reported with the path.
_REFUSED = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY,
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)


class RetortError(ValueError):
    """A mistake that a user can correct. The message is one line: what, where, expected, fix."""


def unknown(what: str, got: str, valid: Iterable[object]) -> RetortError:
    """Return the error for a name that is not among the valid ones: it lists them, and names the most similar one."""
    names = sorted(map(str, valid))
    alike = [name for name in names if name.startswith(got)] if got else []
    alike = alike or difflib.get_close_matches(got, names)
    guess = f"; did you mean {alike[0]!r}?" if alike else ""
    return RetortError(f"unknown {what} {got!r}: expected one of {', '.join(names) or '(none)'}{guess}")


def is_full_disk(error: BaseException) -> bool:
    """Return True for an error that a full disk or an exhausted quota raises."""
    return isinstance(error, OSError) and error.errno in _FULL


class CommandGroup(click.Group):
    """A click group with `--version`, whose every user-facing error is one line on stderr and exit status 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        click.version_option(__version__, prog_name="retort", message="%(prog)s %(version)s")(self)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False  # click would print its own errors and exit with status 2
        from extract.base.stage import log_stage  # late, as it imports this module

        run_id()  # before any process starts that shares it
        try:
            log_stage()
            return super().main(*args, **kwargs)
        except RetortError as error:
            _stop(str(error))
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(1)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            where = f" (see `{context.command_path} --help`)" if context else ""
            _stop(error.format_message() + where)
        except (click.Abort, KeyboardInterrupt):
            _stop("interrupted; finished work is kept, run the same command again to continue")
        except OSError as error:
            _stop(_line_of(error))
        except MemoryError as error:
            _stop(f"not enough memory ({error}): use smaller packs or batches, or a machine with more memory")


def shared_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Join click options that several commands share into one decorator; `--help` lists them in the order given."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _line_of(error: OSError) -> str:
    """Return the error line for a full disk or a refused path. Raises the error itself if it is neither."""
    path = error.filename2 or error.filename  # of a copy, filename2 is the file that is written
    if error.errno in _REFUSED and path:
        return f"{path}: {error.strerror}; give another path, or correct that one"
    if is_full_disk(error):
        where = f" at {path}" if path else ""
        return (
            f"no space left on the disk{where}; free some space and run the same command again, finished work is kept"
        )
    raise error


def _stop(message: str) -> NoReturn:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(1)
