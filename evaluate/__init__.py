"""SUPERB: feature store + labels -> task scores -> one score.

`python -m evaluate run --task T …` trains one task's heads from a store and writes scores/UPSTREAM/T.json;
`python -m evaluate score scores` makes one table and one score of them. A task is one file in evaluate/tasks/.
This package is run from the repository root and never installed: `evaluate` is another library's import name.
"""
