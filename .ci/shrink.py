"""Shrink a params.yaml to a job of minutes: python .ci/shrink.py params.yaml"""

import sys
from pathlib import Path

import yaml

STUDENTS = ["distilhubert", "interleaved"]  # one that starts from the teacher's blocks, one that grows

path = Path(sys.argv[1])
params = yaml.safe_load(path.read_text())
params["demo"]["scale"] = 0.04
params["machine"]["evaluate"] = "--workers 1"  # two would import all they need twice, for scores of seconds
params["students"], params["upstreams"] = STUDENTS, ["fbank", "teacher", *STUDENTS]
for student in params["train"].values():
    student["steps"] = 8
for task in params["evaluate"].values():
    if "steps" in task:  # a task without a head has none
        task["steps"], task["dev_evaluations"] = 20, 2
params["report"]["speed"]["rounds"] = 1
path.write_text(yaml.safe_dump(params, sort_keys=False))
