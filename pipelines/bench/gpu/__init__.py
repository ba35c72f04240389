"""`python -m pipelines bench gpu`: proofs and rates of one GPU within minutes, with the fewest libraries.

records.py holds what a step yields, proofs.py and rates.py the steps, world.py their models and stores, runner.py
limits, logs and tables.
No step imports dask, DVCLive, rapidfuzz or espeak-ng: docs/profiling.md lists the wheels that a bare machine needs.
"""
