"""`python -m pipelines bench NAME`: ours, its limit and its alternative, side by side in one run.

command.py holds the commands, measure.py the frame that every benchmark uses (contenders take turns, each in a fresh
process), material.py what they work on where no data and no weights are at hand; the others are one benchmark each.
"""

from pipelines.bench.command import bench_command

__all__ = ["bench_command"]
