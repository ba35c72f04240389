"""`python -m pipelines bench NAME`: each part of the pipeline against its upper bound and the usual approach.

options.py holds the options of each benchmark, measure.py the record of a benchmark and the one way to run it, page.py
tables and sentences, synthetic.py corpora and models without real data. Every other file is one benchmark.
"""

from pipelines.bench.command import bench_command

__all__ = ["bench_command"]
