"""Commands of the pipeline around the stages: `python -m pipelines corpus | demo | study | report | card | bench`.

Every command is defined beside its code, so that a change of one does not re-run the stages of the others. Its module
is imported when the command is asked for: a machine that has the libraries of one command needs no others.
"""

import extract.base.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

import importlib

import click

from extract.base.errors import CommandGroup

# Name of a command -> its module, and its name there.
COMMANDS = {
    "corpus": ("pipelines.readers.command", "corpus_command"),
    "demo": ("pipelines.demo.corpora", "demo_command"),
    "study": ("pipelines.studies", "study_command"),
    "report": ("pipelines.report", "report_command"),
    "card": ("pipelines.card", "card_command"),
    "bench": ("pipelines.bench", "bench_command"),
}


class LateGroup(CommandGroup):
    """The commands of `COMMANDS`, imported late."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=LateGroup, help="Data set readers, the demo, studies, the report, model cards, and benchmarks.")
def main() -> None:
    pass


if __name__ == "__main__":
    main(prog_name="python -m pipelines")
