"""Shrink a params.yaml to a job of minutes: python .ci/shrink.py params.yaml"""

import sys
from pathlib import Path

import yaml

STUDENTS = ["distilhubert", "interleaved"]  # one that starts from the teacher's blocks, one that grows

path = Path(sys.argv[1])
params = yaml.safe_load(path.read_text())
params["demo"]["scale"] = 0.04
params["machine"]["evaluate"] = "--workers 1"  # a second process imports everything again, for scores of seconds
params["students"] = STUDENTS
params["upstreams"] = {name: params["upstreams"][name] for name in ("fbank", "teacher", *STUDENTS)}
params["train"]["defaults"]["steps"] = 8
for task in params["evaluate"].values():
    if "steps" in task:  # qbe trains nothing
        task["steps"], task["dev_evaluations"] = 20, 2
params["report"]["speed"]["rounds"] = 1
path.write_text(yaml.safe_dump(params, sort_keys=False))
