"""The process environment: the only module that reads it.

Evidence of a launcher means that some program started this process as one rank of several. It is
read from variables that the launchers set for each rank, never from ``SLURM_NTASKS``: inside a
batch script plain ``python`` sees the job's task count there although it is one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_SETTINGS = (
    "MPIDIST_",
    "MPI4PY_",
    "OMP_",
    "OPENBLAS_",
    "GOTO_",
    "MKL_",
    "BLIS_",
    "MPIR_CVAR_",
    "MPICH_",
    "I_MPI_",
    "MV2_",
    "UCX_",
    "FI_",
    "PSM2_",
    "NCCL_",
    "CUDA_",
    "CUPY_",
    "NVIDIA_VISIBLE_DEVICES",
    "HDF5_",
    "OMPI_MCA_",
    "PRTE_MCA_",
    "PMIX_MCA_",
)
# What Open MPI's launchers set by themselves for every rank.
_OPEN_MPI_OWN = (
    "OMPI_MCA_PREFIXES",
    "OMPI_MCA_num_procs",
    "OMPI_MCA_initial_wdir",
    "OMPI_MCA_cpu_type",
)
_SECRET = ("SECRET", "TOKEN", "PASSWORD", "KEY")

_MARK = "MPIDIST_RANK_PROCESS"
"""Set by `init` for the processes that a rank starts, which inherit its launcher's variables."""

_RANK = (
    "PMIX_NAMESPACE",
    "PMIX_RANK",
    "PMI_RANK",
    "PMI_FD",
    "PMI_PORT",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
)
"""What tells one rank from another, also from those of a job that a rank starts."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a launcher left in the environment: who set which variable, and what it says.

    `size` is the number of ranks that it promises; None where the launcher does not say.
    """

    launcher: str
    variable: str
    size: int | None

    @property
    def several(self) -> bool:
        """Whether more than one rank is promised."""
        return self.size is not None and self.size > 1


def _integer(variable: str) -> int | None:
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        return None


def launcher_evidence() -> Evidence | None:
    """Return what says that an MPI launcher started this process, or None.

    It is the variable that promises the most ranks: a job step of Slurm with several tasks counts
    although the PMI of a single task stands beside it.
    """
    evidence_list = []
    for launcher, variable in (
        ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("a PMI launcher (MPICH's mpirun, srun --mpi=pmi2)", "PMI_SIZE"),
        ("srun", "SLURM_STEP_NUM_TASKS"),
    ):
        size = _integer(variable)
        # A Slurm step of one task is the batch script itself, or a lone process: no evidence.
        if size is not None and (size > 1 or launcher != "srun"):
            evidence_list.append(Evidence(launcher, variable, size))
    if not evidence_list and "PMIX_RANK" in os.environ:
        evidence_list.append(Evidence("a PMIx launcher", "PMIX_RANK", None))
    return max(evidence_list, key=lambda evidence: evidence.size or 0, default=None)


def store_evidence() -> Evidence | None:
    """Return what RANK and WORLD_SIZE say, the variables of plain processes, or None."""
    rank, size = _integer("RANK"), _integer("WORLD_SIZE")
    if rank is None or size is None:
        return None
    return Evidence("RANK and WORLD_SIZE", "WORLD_SIZE", size)


def crossovers() -> str | None:
    """Return ``MPIDIST_CROSSOVERS``: sizes as text, or the path of a file; None if not set."""
    return os.environ.get("MPIDIST_CROSSOVERS") or None


def debug() -> bool:
    """Whether ``MPIDIST_DEBUG`` asks for checks that cost time.

    All collectives are compared before they begin, and what an FSDP has gathered becomes NaN.
    """
    return os.environ.get("MPIDIST_DEBUG", "0") not in ("", "0")


def dump_directory() -> str:
    """Return where reports go as JSON: ``MPIDIST_DUMP``, or the current directory."""
    return os.environ.get("MPIDIST_DUMP") or "."


def dump_requested() -> bool:
    """Whether ``MPIDIST_DUMP`` asks for the records of every job that ends with an error."""
    return bool(os.environ.get("MPIDIST_DUMP"))


def log_level() -> str:
    """Return ``MPIDIST_LOG``, the name of a level of the logger ``mpidist``; none if not set."""
    return os.environ.get("MPIDIST_LOG", "").strip().lower()


def trace_directory() -> str | None:
    """Return ``MPIDIST_TRACE``: where the trace of the whole job goes; None for no trace."""
    return os.environ.get("MPIDIST_TRACE") or None


def cache_directory() -> str:
    """Return the directory for what can be measured again, as XDG says; it may begin with ``~``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return f"{base}/mpidist"


def gpu_fallback() -> bool:
    """Whether ``MPIDIST_ENABLE_GPU_FALLBACK`` lets device arrays travel through the host."""
    return os.environ.get("MPIDIST_ENABLE_GPU_FALLBACK", "0") not in ("", "0")


def cuda_aware_mpi() -> bool | None:
    """Return ``MPIDIST_CUDA_AWARE_MPI``: whether MPI gets device arrays; None if not set."""
    text = os.environ.get("MPIDIST_CUDA_AWARE_MPI", "")
    return text != "0" if text else None


def allows_shared_devices() -> bool:
    """Whether NCCL, where it is able to, lets several ranks use one GPU."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") not in ("", "0")


def visible_devices() -> str | None:
    """Return ``CUDA_VISIBLE_DEVICES``; None if not set, which shows all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def ranks_per_node() -> int | None:
    """Return ``MPIDIST_RANKS_PER_NODE``: pretend that nodes have this many ranks, for tests."""
    return _integer("MPIDIST_RANKS_PER_NODE")


def omp_num_threads() -> str:
    """Return ``OMP_NUM_THREADS``, or nothing where it is not set."""
    return os.environ.get("OMP_NUM_THREADS", "")


def launcher_rank() -> int:
    """Return the rank that a launcher gave to this process; 0 where there is none."""
    for variable in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        rank = _integer(variable)
        if rank is not None:
            return rank
    return 0


def launched_remotely() -> bool:
    """Whether daemons of Open MPI's launcher, PRRTE, start ranks of this job on other nodes."""
    if "PRTE_LAUNCHED" not in os.environ:
        return False
    # NAMESPACE@0.DAEMON;tcp4://ADDRESS: mpirun itself is daemon 0, and serves its own node.
    remote = "@0.0;" not in os.environ.get("PMIX_SERVER_URI2", "")
    return remote or _integer("OMPI_COMM_WORLD_LOCAL_SIZE") != _integer("OMPI_COMM_WORLD_SIZE")


def delay_aborts_of_open_mpi(delay: int) -> None:
    """Let Open MPI wait so many seconds before it ends a job by itself; changes the environment."""
    os.environ.setdefault("OMPI_MCA_opal_abort_delay", str(delay))


def mark_rank() -> None:
    """Leave a mark for the processes that this rank starts or forks; changes the environment."""
    import json

    global _marked_by  # noqa: PLW0603  # of this process, as the environment is
    _marked_by = os.getpid()
    mark = {"host": os.uname().nodename, "pid": _marked_by, "rank": _rank_identity()}
    os.environ[_MARK] = json.dumps(mark | {"socket": _launcher_socket()})


_marked_by: int | None = None


def inherited_rank() -> int | None:
    """Return the process whose rank's environment this one has inherited, or None.

    That is the number of a process of this host that has called `init`. There is none for that
    process itself, and for the ranks of a job that it has started: these have a launcher of their
    own.
    """
    if _MARK not in os.environ:
        return None
    import json

    try:
        mark = json.loads(os.environ[_MARK])
        marked = mark["host"], mark["rank"]
        pid, socket = mark["pid"], mark["socket"]
    except (KeyError, TypeError, ValueError):
        return None
    if _marked_by == os.getpid() or marked != (os.uname().nodename, _rank_identity()):
        return None
    # Ranks of two jobs of MPICH may have the same numbers, but each has a connection of its own,
    # which a child has closed if it has not inherited it.
    return None if _launcher_socket() not in ("", socket) else int(pid)


def _rank_identity() -> list[str]:
    return [os.environ.get(name, "") for name in _RANK]


def _launcher_socket() -> str:
    """Return which socket is the connection to a PMI launcher, or nothing where there is none."""
    try:
        target = os.readlink(f"/proc/self/fd/{os.environ['PMI_FD']}")  # noqa: PTH115  # no path
    except (KeyError, OSError):
        return ""
    return target if target.startswith("socket:") else ""


def process_managers() -> tuple[str, ...]:
    """Return the interfaces by which a rank can find the others: ``PMI``, ``PMIx``, or both."""
    variables = {"PMI": ("PMI_FD", "PMI_RANK", "PMI_PORT"), "PMIx": ("PMIX_RANK",)}
    return tuple(name for name, names in variables.items() if any(v in os.environ for v in names))


def slurm_tasks() -> int | None:
    """Return how many tasks this step of Slurm has; None outside Slurm."""
    return _integer("SLURM_STEP_NUM_TASKS")


def slurm_tasks_per_node() -> int | None:
    """Return the most tasks that this step of Slurm has on one node; None outside Slurm."""
    # Such as 4(x2),1: four tasks on each of two nodes, and one on a third.
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    try:
        return max(int(part.partition("(")[0]) for part in text.split(","))
    except ValueError:
        return None


def settings() -> dict[str, str]:
    """Return the variables that change what MPI, BLAS, NCCL and mpidist do, but for secrets."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SETTINGS)
        and name not in (*_OPEN_MPI_OWN, _MARK)
        and not any(word in name for word in _SECRET)
    }


def keep_mpi_from_starting() -> None:
    """Let imports of mpi4py in this process not initialise MPI; changes the environment."""
    os.environ["MPI4PY_RC_INITIALIZE"] = "0"
