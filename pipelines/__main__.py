"""Commands of the pipeline around the stages: `python -m pipelines corpus | demo | study | report | bench`.

Every command is defined beside its code, so that a change of one does not re-run the stages of the others.
"""

import extract.base.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

import click

from extract.base.errors import CommandGroup
from pipelines.bench import bench_command
from pipelines.demo.corpora import demo_command
from pipelines.readers.command import corpus_command
from pipelines.report import report_command
from pipelines.studies import study_command


@click.group(cls=CommandGroup, help="Data set readers, the embedded demo, studies, the report, and benchmarks.")
def main() -> None:
    pass


main.add_command(corpus_command)
main.add_command(demo_command, "demo")
main.add_command(study_command)
main.add_command(report_command)
main.add_command(bench_command)


if __name__ == "__main__":
    main(prog_name="python -m pipelines")
