"""What a user is told when something is wrong, and how every command says it.

A mistake of the user's is a `RetortError`: one line with what is wrong, where, what was expected and how to mend it.
`CommandGroup` prints that line to stderr and exits with status 1; so do a full disk, a path that the system refuses,
too little memory and Ctrl-C. Anything else is a mistake of ours and keeps its traceback.
"""

import errno
import sys
from typing import Any

import click

# What a path that a user gave may meet: not there, not a folder, not a file, not allowed, too long.
_REFUSED = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY,
)  # fmt: skip


class RetortError(ValueError):
    """A mistake that a user can mend. The message is one line: what, where, expected, fix."""


def unknown(what: str, got: str, valid: object) -> RetortError:
    """The error for a name that is none of the valid ones, which it lists."""
    names = ", ".join(sorted(str(name) for name in valid))  # type: ignore[attr-defined]
    return RetortError(f"unknown {what} {got!r}: expected one of {names or '(none)'}")


class CommandGroup(click.Group):
    """A click group whose every error is one line on stderr and exit status 1."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
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
            _stop("interrupted; what was finished is kept, the same command goes on from there")
        except OSError as error:
            if error.errno in _REFUSED and error.filename:
                _stop(f"{error.filename2 or error.filename}: {error.strerror}; give another path, or mend that one")
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            full = error.filename2 or error.filename  # of a copy, the second is the one that is written
            _stop(
                f"no space left on the disk{f' at {full}' if full else ''}: nothing half-written "
                "was kept; make room and run the same command again, it goes on from there"
            )
        except MemoryError as error:
            _stop(f"not enough memory ({error}): give smaller packs or batches, or a machine with more")


def _stop(message: str) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(1)
