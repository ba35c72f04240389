"""The tasks. A new one is a file beside this one and a line in TASKS."""

from typing import Any

from evaluate.task import Task
from evaluate.tasks.asr import ASR
from evaluate.tasks.asv import ASV
from evaluate.tasks.er import ER
from evaluate.tasks.ic import IC
from evaluate.tasks.ks import KS
from evaluate.tasks.pr import PR
from evaluate.tasks.qbe import QBE
from evaluate.tasks.sd import SD
from evaluate.tasks.sf import SF
from evaluate.tasks.sid import SID

TASKS: dict[str, Task[Any]] = {
    "pr": PR,
    "asr": ASR,
    "ks": KS,
    "ic": IC,
    "sid": SID,
    "er": ER,
    "sf": SF,
    "asv": ASV,
    "sd": SD,
    "qbe": QBE,
}
