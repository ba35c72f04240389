"""A Slurm cluster of one machine, for as long as a test: munged, slurmctld and slurmd with files in a folder.

It needs Debian's slurm-wlm and munge, no service and no configuration of the system. Its one node has four GPUs by name
alone, so that job scripts are accepted as they are and Slurm gives each task a CUDA_VISIBLE_DEVICES of its own.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

DAEMONS = ("munged", "slurmctld", "slurmd")
_GPUS = ("null", "zero", "full", "random")  # Slurm wants devices
_PATH = f"{os.environ['PATH']}:/usr/sbin"
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,kill_invalid_depend
ReturnToService=2
KillWait=5
FirstJobId=41
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1048576 Gres=gpu:4
PartitionName=main Nodes={host} Default=YES
"""


def missing() -> str:
    """Return the daemons that this machine lacks; empty if a cluster can run."""
    absent = [name for name in DAEMONS if shutil.which(name, path=_PATH) is None]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


@dataclass
class Slurm:
    """The cluster, as a context manager. `environment`: variables by which Slurm's commands find it."""

    folder: Path
    environment: dict[str, str] = field(init=False)
    _daemons: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def __enter__(self) -> "Slurm":
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        host, user = socket.gethostname(), "root" if os.getuid() == 0 else str(os.getuid())
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=host, user=user, ports=_free_ports()))
        (folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{name}\n" for name in _GPUS))
        (folder / "plugstack.conf").write_text("\n")
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self._start("munged", "--foreground", "--force", *(
                f"--{name}={folder / file}"
                for name, file in (
                    ("key-file", "munge.key"), ("socket", "munge.socket"), ("pid-file", "munged.pid"),
                    ("log-file", "munged.log"), ("seed-file", "munged.seed"),
                )
            ))  # fmt: skip
            _until(lambda: (folder / "munge.socket").exists(), "munged's socket")
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            _until(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T", check=False), "idle node")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if len(self._daemons) == len(DAEMONS):
            self.run("scancel", "--user", str(os.getuid()), check=False)
            deadline = time.monotonic() + 10
            while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.log").open("wb")
        self._daemons.append(
            subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        )
        log.close()

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """Run one of Slurm's commands; return its output."""
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Submit a job; return its number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def job(self, number: str) -> Mapping[str, str]:
        """Return the fields of a job as scontrol prints them, such as JobState and Restarts."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        return dict(part.partition("=")[::2] for part in shown.split(" "))

    def until(self, condition: Callable[[], bool], what: str, *numbers: str) -> None:
        """Wait for a condition that one of these jobs brings about."""
        _until(lambda: condition() or not self.left(*numbers), what, 600)
        assert condition(), f"the jobs ended without {what}"

    def left(self, *numbers: str) -> str:
        """Return the lines of squeue for these jobs, empty if they have ended."""
        return self.run("squeue", "--noheader", f"--jobs={','.join(numbers)}")

    def wait(self, *numbers: str, logs: Sequence[Path] = ()) -> None:
        """Wait for jobs and assert that each of their tasks was completed; a failure shows the logs."""
        _until(lambda: not self.left(*numbers), "end of the jobs", 600)
        states = [line for number in numbers for line in self.run("scontrol", "-o", "show", "job", number).splitlines()]
        text = "\n".join(path.read_text() for path in logs if path.exists())
        assert all("JobState=COMPLETED" in line for line in states), text


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.2)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
