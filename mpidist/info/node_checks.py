"""What can be wrong with a node, and with the way in which ranks share it."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist._formatting import format_bytes, format_count
from mpidist.info.facts import JobFacts, NodeFacts
from mpidist.info.problems import Problem, warning
from mpidist.info.words import rank_names

__all__ = [
    "clocks",
    "leftovers",
    "oversubscribed",
    "processor",
    "separate_nodes",
    "shared_memory",
    "threads_of_a_node",
    "threads_of_a_rank",
]

_MIB = 1 << 20

_NEEDS = {"MPICH": _MIB, "Open MPI": 16 * _MIB}
"""Bytes of shared memory that a library takes for each rank when it starts."""

_OLD = 60.0
"""Seconds after which a file that nobody uses is not that of a job which is just starting."""

_CLOCKS = 1.0
"""Seconds by which the clocks of nodes may differ."""


def shared_memory(job: JobFacts) -> Sequence[Problem]:
    """Find that there is too little memory for ranks to share."""
    library = job.first.library
    need = _NEEDS.get(library.vendor, _MIB) if library else _MIB
    problems = []
    for node in job.nodes:
        shared, ranks = node.shared, _ranks_here(job, node)
        if shared is None:
            what = f"{node.host} has no /dev/shm that can be written"
        elif shared.total < need * ranks:
            what = f"{shared.path} of {node.host} is tiny, {format_bytes(shared.total)}"
        elif shared.free < _MIB * ranks:
            what = f"{shared.path} of {node.host} is full, {format_bytes(shared.free)} free"
        else:
            continue
        what += f", for {format_count(ranks, 'rank')}: MPI takes {format_bytes(need)} for each, "
        what += "mpidist more"
        cure = (
            "in a container, a larger one (docker run --shm-size=2g, or --ipc=host); else remove "
            "what others left there. MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS=8 lets MPICH take an "
            "eighth, OMPI_MCA_btl_sm_backing_directory=/tmp gives Open MPI another place"
        )
        problems.append(warning("shared_memory", what, cure))
    return problems


def _ranks_here(job: JobFacts, node: NodeFacts) -> int:
    """Return the ranks of a node, those included that do not see each other."""
    launch = job.first.launch
    lone = len(job.ranks) == 1 and launch.size is not None
    return max(len(node.ranks), (launch.tasks_per_node or launch.size or 1) if lone else 1)


def threads_of_a_rank(job: JobFacts) -> Sequence[Problem]:
    """Find ranks with more BLAS threads than cores, as those that are bound to one core."""
    wrong = [rank for rank in job.ranks if (rank.blas.threads or 1) > len(rank.cores)]
    if not wrong:
        return []
    threads = max(rank.blas.threads or 1 for rank in wrong)
    cores = min(len(rank.cores) for rank in wrong)
    what = (
        f"{rank_names([rank.rank for rank in wrong])}: {threads} BLAS threads, and only "
        f"{format_count(cores, 'core')} to run on"
    )
    cure = f"export OMP_NUM_THREADS={cores}"
    if any(len(rank.cores) < job.nodes[rank.node].cores for rank in wrong):
        cure += (
            f"; or bind each rank to {threads} cores: srun --cpus-per-task={threads}, mpirun "
            f"--map-by slot:PE={threads} (Open MPI), mpirun -bind-to core:{threads} (MPICH)"
        )
    return [warning("threads_of_a_rank", what, cure)]


def threads_of_a_node(job: JobFacts) -> Sequence[Problem]:
    """Find more BLAS threads of all ranks than the cores that they share."""
    problems = []
    for node in job.nodes:
        ranks = [rank for rank in job.on(node) if (rank.blas.threads or 1) <= len(rank.cores)]
        threads, usable = sum(rank.blas.threads or 1 for rank in ranks), job.usable(node)
        most = max((rank.blas.threads or 1 for rank in ranks), default=1)
        if threads <= usable or most == 1:
            continue
        each = max(1, usable // len(node.ranks))
        what = (
            f"{node.host}: {format_count(len(ranks), 'rank')} with up to {most} BLAS threads each, "
            f"{threads} in all, on {format_count(usable, 'core')}"
        )
        cure = f"export OMP_NUM_THREADS={each} before the launcher"
        if "OPENBLAS_NUM_THREADS" in job.first.settings:
            cure += "; OPENBLAS_NUM_THREADS is set, and counts more"
        problems.append(warning("threads_of_a_node", what, cure))
    return problems


def oversubscribed(job: JobFacts) -> Sequence[Problem]:
    """Find more ranks than the cores on which they may run."""
    problems = []
    for node in job.nodes:
        ranks, usable = len(node.ranks), job.usable(node)
        if ranks <= usable:
            continue
        what = f"{node.host}: {ranks} ranks on {format_count(usable, 'core')}"
        cure = "fewer ranks; for a test it does no harm, but is slow"
        if usable < node.cores:
            what += f", though it has {node.cores}"
            cure = (
                "let the ranks use them: srun --cpus-per-task, mpirun --bind-to none (Open MPI), "
                "-bind-to none (MPICH); in a container, its limit of processors"
            )
        problems.append(warning("oversubscribed", what, cure))
    return problems


def separate_nodes(job: JobFacts) -> Sequence[Problem]:
    """Find ranks on one machine that cannot share memory, each in a container of its own."""
    if len(job.ranks) == 1 or any(len(node.ranks) > 1 for node in job.nodes):
        return []
    tasks = job.first.launch.tasks_per_node or 1
    hosts = [node.host for node in job.nodes]
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if tasks == 1 and not twice:
        return []
    why = f"Slurm has {tasks} tasks on a node" if tasks > 1 else f"several are on {twice[0]}"
    what = f"no two ranks share memory, though {why}: each seems to be in a container of its own"
    cure = (
        "let the containers of a node share /dev/shm and process numbers (docker run --ipc=host "
        "--pid=host), or start one container per node and the ranks inside it"
    )
    return [warning("separate_nodes", what, cure)]


def processor(job: JobFacts) -> Sequence[Problem]:
    """Find processors on which no direct path is known to be right."""
    machines = sorted({node.machine for node in job.nodes if not node.direct})
    if not machines:
        return []
    what = f"no direct path on {', '.join(machines)}: it relies on how x86-64 orders memory"
    cure = "none is needed; results are the same, at the MPI library's speed"
    return [warning("processor", what, cure)]


def clocks(job: JobFacts) -> Sequence[Problem]:
    """Find nodes whose clocks differ."""
    times = [job.ranks[node.ranks[0]].clock for node in job.nodes]
    spread = max(times) - min(times)
    if spread < _CLOCKS:
        return []
    late = job.nodes[times.index(min(times))].host
    early = job.nodes[times.index(max(times))].host
    what = f"the clocks of {early} and {late} differ by {spread:.1f} s: times in logs mislead"
    return [warning("clocks", what, "let the administrator synchronise them (chrony, NTP)")]


def leftovers(job: JobFacts) -> Sequence[Problem]:
    """Find files in shared memory that no process uses."""
    problems = []
    for node in job.nodes:
        files = [file for file in node.leftovers if file.used is False and file.age > _OLD]
        if not files or node.shared is None:
            continue
        makers = " and ".join(sorted({file.maker for file in files}))
        what = (
            f"{node.host}: {format_count(len(files), 'file')} of {makers} in {node.shared.path}, "
            f"{format_bytes(sum(file.nbytes for file in files))}, in use by no process that can be "
            "seen from here: left by jobs that are over"
        )
        cure = "python -m mpidist info --clean on that node removes those of the user who runs it"
        problems.append(warning("leftovers", what, cure))
    return problems
