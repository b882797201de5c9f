"""A Slurm of two nodes on this machine: started for some tests, and gone afterwards."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests._ranks.launcher import MARK, clean_environment, marked_processes

ROOT = Path(__file__).parents[2]

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "sinfo", "mungekey")
NODES = ("n0", "n1")

# The nodes have more cores than the machine (config_overrides): tests load it less than they claim.
# A requeued job waits until its credentials have expired, 120 s unless said otherwise.
CONFIGURATION = """
ClusterName=mpidist-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:4
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:4
PartitionName=test Nodes=n0,n1 Default=YES
"""

_JOBS = 100
"""More than all tests together submit."""

_READY = 30.0
_POLL = 0.1


def missing() -> str:
    """Say what this machine lacks, or nothing."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    absent = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=path) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} missing): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root only"


class Cluster:
    """munged, slurmctld and two slurmd, with keys, ports and folders of their own.

    Use it as a context manager. Every process that it starts, jobs and their ranks included, has
    the variable MARK in its environment, by which the end finds them all.
    """

    def __init__(self) -> None:
        # Not below pytest's own directory: a socket's path is short, and munged wants one that
        # everybody may enter.
        self.directory = Path(tempfile.mkdtemp(prefix="mpidist-slurm-"))
        self.directory.chmod(0o755)
        self.environment = clean_environment() | {
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            MARK: str(self.directory),
        }
        # [Note: names of segments] MPICH's ranks under pmi2 share memory by a name made of job and
        # step alone, and those that are killed leave it. So no two clusters on this machine have
        # the same numbers of jobs, and each removes what its own have left.
        self._first_job = random.randrange(1_000, 60_000_000)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        """Start it, and wait until both nodes are there."""
        try:
            self._configure()
            key = self.directory / "munge.key"
            subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, timeout=10)
            parts = {"socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
            files = [f"--{name}={self.directory}/munge.{end}" for name, end in parts.items()]
            self._start("munged", "--foreground", f"--key-file={key}", *files)
            self._wait((self.directory / "munge.socket").exists, "munged's socket")
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self._wait(self._all_idle, "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything: jobs first, while there are daemons to end them, then what is left."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.run("scancel", f"--user={getpass.getuser()}", timeout=10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        deadline = time.monotonic() + 5.0
        while (left := marked_processes(str(self.directory))) or self._running():
            for pid in left if time.monotonic() > deadline else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL)
        for job in range(self._first_job, self._first_job + _JOBS):
            for path in segments(job):
                path.unlink(missing_ok=True)
        shutil.rmtree(self.directory)

    def _running(self) -> list[object]:
        return [daemon.args for daemon in self._daemons if daemon.poll() is None]

    # -- what tests do ---------------------------------------------------------------------------

    def srun(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a step of its own, in the environment that the batch scripts give to theirs."""
        return self.run("srun", *command, MPIR_CVAR_CH4_NETMOD="ofi")

    def run(
        self, *command: str, timeout: float = 60.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's; output and errors come together."""
        try:
            return subprocess.run(
                command,
                env=self.environment | environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            told = (error.stdout or b"").decode(errors="replace")
            raise AssertionError(f"{command} has not ended in {timeout:g} s:\n{told}") from None

    def submit(self, *arguments: str, **environment: str) -> Job:
        """Submit a batch job, with these variables besides, and return it."""
        output = self.directory / f"output-{time.monotonic_ns()}"
        command = ["sbatch", "--parsable", f"--output={output}", *arguments]
        done = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), output)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        files = sorted(self.directory.glob("*.out"))
        return "\n".join(f"-- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    # -- how it starts ---------------------------------------------------------------------------

    def _configure(self) -> None:
        (self.directory / "state").mkdir()
        for node in NODES:
            (self.directory / node).mkdir()
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            directory=self.directory,
            first_job=self._first_job,
            ports=_free_ports(3),
        )
        (self.directory / "slurm.conf").write_text(text)
        # GPUs that are counted and handed out, and are not there.
        for number in range(4):
            (self.directory / f"gpu{number}").touch()
        gres = f"NodeName=n[0-1] Name=gpu File={self.directory}/gpu[0-3]\n"
        (self.directory / "gres.conf").write_text(gres)

    def _start(self, *command: str) -> None:
        output = self.directory / f"{command[0]}-{len(self._daemons)}.out"
        with output.open("wb") as file:
            # A pytest that is killed takes the daemons with it.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(process)

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()
        return states == ["idle"] * len(NODES)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _READY
        while not ready():
            if len(self._running()) < len(self._daemons) or time.monotonic() > deadline:
                raise RuntimeError(f"no {what}; running: {self._running()}\n{self.logs()}")
            time.sleep(_POLL)


class Job:
    """A batch job.

    Attributes
    ----------
    number : str
        Slurm's.
    """

    def __init__(self, cluster: Cluster, number: str, output: Path) -> None:
        self._cluster = cluster
        self._output = output
        self.number = number

    @property
    def output(self) -> str:
        """What it has written, over all its starts."""
        return self._output.read_text() if self._output.exists() else ""

    def fact(self, name: str) -> str:
        """Return what scontrol shows under a name, such as JobState."""
        shown = self._cluster.run("scontrol", "--oneliner", "show", "job", self.number).stdout
        facts = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        return facts[name]

    def signal(self, *arguments: str) -> None:
        """Send it a signal, or cancel it: the arguments of scancel."""
        done = self._cluster.run("scancel", *arguments, self.number)
        assert done.returncode == 0, done.stdout

    def wait_until(self, ready: Callable[[], bool], what: str, *, timeout: float = 60.0) -> None:
        """Wait for something, as long as the job is not over."""
        deadline = time.monotonic() + timeout
        while not ready():
            over = self.fact("JobState") not in ("PENDING", "RUNNING", "COMPLETING")
            if (over and not ready()) or time.monotonic() > deadline:
                told = f"{self.fact('JobState')}\n{self.output}\n{self._cluster.logs()}"
                raise AssertionError(f"job {self.number}: no {what}: {told}")
            time.sleep(_POLL)

    def wait(self, *, timeout: float = 60.0) -> str:
        """Wait for its end, starting again included, and return its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_until(lambda: self.fact("JobState") in over, "end", timeout=timeout)
        return self.fact("JobState")


def segments(job: int, steps: int = 4) -> list[Path]:
    """Return where MPICH keeps the shared memory of a job's first steps, node by node."""
    found = []
    for step in range(steps):
        number = 2166136261  # FNV-1a
        for byte in f"{job}.{step}".encode():
            number = (number ^ byte) * 16777619 % 2**32
        found += [Path(f"/dev/shm/mpich_shm_{number:x}_{node}") for node in range(len(NODES))]
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
