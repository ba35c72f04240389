"""SUPERB evaluation: feature stores and labels in, one score file for each upstream and task out.

    python -m evaluate run --task T …         train one task's heads from a store, write scores/UPSTREAM/T.json
    python -m evaluate many                   score all upstreams and tasks of params.yaml
    python -m evaluate score scores …         make one table of score files

A task is one file in evaluate/tasks/. No upstream model is loaded here.
This package is run from the repository root and never installed: `evaluate` is another library's import name.
"""
