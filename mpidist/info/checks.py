"""Checks of a job's facts: what may be wrong, and the cure.

A check is a function that takes the facts of a job and returns the problems that it sees. Add it
to `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpidist._formatting import format_bytes, format_count, format_ranges
from mpidist.info.facts import JobFacts, Launch, NodeFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is wrong.

    Attributes
    ----------
    check : str
        Which check has found it.
    fatal : bool
        Whether no job can run like this; else it is slower than it must be, or may surprise.
    what, cure : str
        What was found, and what to do.
    """

    check: str
    fatal: bool
    what: str
    cure: str


def fatal(check: str, what: str, cure: str) -> Problem:
    """Return a problem with which no job can run."""
    return Problem(check=check, fatal=True, what=what, cure=cure)


def warning(check: str, what: str, cure: str) -> Problem:
    """Return a problem with which jobs run."""
    return Problem(check=check, fatal=False, what=what, cure=cure)


def rank_names(ranks: Sequence[int]) -> str:
    """Return ``rank 1`` or ``ranks 0-3, 6``."""
    return f"rank{'s' * (len(ranks) > 1)} {format_ranges(ranks)}"


def by_value(values: Sequence[str]) -> str:
    """Return the value of all ranks; or each value with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return values[0]
    return "; ".join(f"{value} ({rank_names(members)})" for value, members in ranks.items())


_INSTALL = (
    "install an MPI library and mpi4py (pip install 'mpidist[mpich]'), or use the site's MPI: load "
    "its module, so that libmpi.so can be found, or set MPI4PY_LIBMPI to its path"
)

_FIND_OUT = (
    "read what the library wrote; try one rank without a launcher, to see which of the two is at "
    "fault"
)

_TOO_LITTLE = "; a bus error mostly means that there is too little shared memory"

_MORE_TIME = "; a large job may need more time (--timeout)"


def mpi_starts(job: JobFacts) -> Sequence[Problem]:
    """Find that MPI is missing, dies or hangs."""
    failure = job.failure
    if failure is None:
        return []
    if failure.kind == "missing":
        what = f"MPI cannot be loaded: {failure.reason}"
        named = job.first.settings.get("MPI4PY_LIBMPI")
        cure = f"MPI4PY_LIBMPI={named} must name a libmpi.so that can be loaded, or be unset"
        return [fatal("mpi_starts", what, cure if named else _INSTALL)]
    cure = _FIND_OUT
    if failure.kind == "late":
        cure += _MORE_TIME
    if "SIGBUS" in failure.reason:
        cure += _TOO_LITTLE
    if job.first.launch.variable:
        cure += f"; launcher and library must come from the same MPI{_where(job.first.launch)}"
    return [fatal("mpi_starts", f"MPI does not start: {failure.reason}", cure)]


def lone_ranks(job: JobFacts) -> Sequence[Problem]:
    """Find that a launcher started several ranks which do not see each other."""
    launch, library = job.first.launch, job.first.library
    if library is None or library.size > 1 or launch.size is None or launch.size == 1:
        return []
    open_mpi = library.vendor == "Open MPI"
    what = (
        f"{launch.launcher} started {launch.size} processes ({launch.variable}={launch.size}), and "
        f"{library.name} sees one: {launch.size} jobs of one rank each"
    )
    if launch.slurm_tasks == launch.size and open_mpi:
        what += "; Open MPI finds the other ranks by PMIx only, which this srun does not offer"
        cure = (
            "srun --mpi=pmix; where srun --mpi=list does not show it, mpirun inside the allocation"
        )
    elif launch.slurm_tasks == launch.size:
        cure = "srun --mpi=pmi2, or --mpi=pmix where the library was built with it"
    else:
        what += "; the launcher belongs to another MPI"
        cure = f"start the job with the library's own mpirun{_where(launch)}"
    return [fatal("lone_ranks", what, cure)]


def _where(launch: Launch) -> str:
    return f": {launch.mpirun}" if launch.mpirun else ""


def crossovers(job: JobFacts) -> Sequence[Problem]:
    """Find crossovers that `init` would refuse, or leave out."""
    problem = job.crossovers.problem
    if not problem:
        return []
    if job.crossovers.sizes:
        return [warning("crossovers", f"left out: {problem}", "remove the file, and measure again")]
    cure = "correct or unset MPIDIST_CROSSOVERS, or remove the file"
    return [fatal("crossovers", f"no job of several ranks starts: {problem}", cure)]


def differences(job: JobFacts) -> Sequence[Problem]:
    """Find ranks that run other software than the rest."""
    problems = []
    libraries = [rank.library.name if rank.library else "no MPI" for rank in job.ranks]
    facts = {"Python": [rank.python for rank in job.ranks], "the MPI library": libraries}
    packages = sorted({package for rank in job.ranks for package in rank.versions})
    for package in packages:
        facts[package] = [rank.versions.get(package, "none") for rank in job.ranks]
    facts["NCCL"] = [rank.nccl.version or "none" for rank in job.ranks]
    facts["MPIDIST_ENABLE_GPU_FALLBACK"] = [str(int(rank.gpu_fallback)) for rank in job.ranks]
    facts["mpidist's place"] = [rank.package for rank in job.ranks]
    for name, values in facts.items():
        if len(set(values)) > 1:
            what = f"{name} differs between ranks: {by_value(values)}"
            cure = "one environment for all nodes, on a file system that they share"
            problems.append(warning("differences", what, cure))
    return problems


def hdf5_imports(job: JobFacts) -> Sequence[Problem]:
    """Find an h5py that cannot be imported. A serial HDF5 is all that mpidist needs."""
    reasons = {rank.hdf5.problem for rank in job.ranks} - {""}
    cure = "pip install --force-reinstall h5py"
    return [
        warning("hdf5_imports", f"h5py cannot be imported: {reason}", cure)
        for reason in sorted(reasons)
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
        per_rank = max(1, usable // len(node.ranks))
        what = (
            f"{node.host}: {format_count(len(ranks), 'rank')} with up to {most} BLAS threads each, "
            f"{threads} in all, on {format_count(usable, 'core')}"
        )
        cure = f"export OMP_NUM_THREADS={per_rank} before the launcher"
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


def unused_gpus(job: JobFacts) -> Sequence[Problem]:
    """Find GPUs whose arrays cannot be carried, though CuPy is installed."""
    problems = []
    for node in job.nodes:
        ranks = [rank for rank in job.on(node) if rank.cupy.version and rank.nccl.problem]
        if not node.gpus or not ranks:
            continue
        names = rank_names([rank.rank for rank in ranks])
        what = f"{node.host}: no device arrays are carried from its GPUs, {names}"
        cure = "; ".join(dict.fromkeys(rank.nccl.problem for rank in ranks))
        if not all(rank.gpu_fallback for rank in ranks):
            cure += "; or MPIDIST_ENABLE_GPU_FALLBACK=1, by way of the host"
            problems.append(warning("unused_gpus", what, cure))
    return problems


def shared_gpus(job: JobFacts) -> Sequence[Problem]:
    """Find several ranks that would take the same GPU."""
    problems = []
    for node in job.nodes:
        ranks_of: dict[str, list[int]] = {}
        for rank in job.on(node):
            if rank.device is not None:
                ranks_of.setdefault(rank.cupy.visible[rank.device], []).append(rank.rank)
        most = max(ranks_of.items(), key=lambda item: len(item[1]), default=("", []))
        if len(most[1]) < 2:
            continue
        what = (
            f"{node.host}: {rank_names(most[1])} would share the GPU {most[0]}, of "
            f"{format_count(len(ranks_of), 'GPU')} that its ranks see"
        )
        cure = (
            "as many ranks on a node as GPUs, and each rank sees all of them (mpirun -n 4, srun "
            "--gpus-per-node=4); or NCCL 2.30.3 or newer with NCCL_MULTI_RANK_GPU_ENABLE=1"
        )
        problems.append(warning("shared_gpus", what, cure))
    return problems


CHECKS: Sequence[Callable[[JobFacts], Sequence[Problem]]] = (
    mpi_starts,
    lone_ranks,
    crossovers,
    shared_memory,
    separate_nodes,
    threads_of_a_rank,
    threads_of_a_node,
    oversubscribed,
    shared_gpus,
    unused_gpus,
    differences,
    processor,
    hdf5_imports,
    clocks,
    leftovers,
)
"""All checks, the worst first."""


def find_problems(job: JobFacts) -> Sequence[Problem]:
    """Return what all checks find, in their order."""
    return [problem for check in CHECKS for problem in check(job)]
