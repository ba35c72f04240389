"""Click options that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from extract import __version__

F = TypeVar("F", bound=Callable[..., Any])


def version_option(command: F) -> F:
    """Add `--version`, which prints the version of Retort and exits."""
    return click.version_option(__version__, prog_name="retort", message="%(prog)s %(version)s")(command)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, shown in the order given."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
