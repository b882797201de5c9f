"""How a job starts: find out what launched this process, and make the group of all ranks.

A transport is imported when it is used: the others, and what they need of the standard library,
would be a third of the time that importing this package takes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpidist import env
from mpidist._arguments import seconds
from mpidist.backends.crossovers import Crossovers
from mpidist.errors import BackendUnavailableError, LaunchError
from mpidist.group import ProcessGroup
from mpidist.group.state import abandon_groups
from mpidist.log import configure

if TYPE_CHECKING:
    from mpidist.backends.job import JobTransport

__all__ = ["init"]

_TIMEOUT = 1800.0
_WARN_AFTER = 60.0

LAYOUT = 3
"""Version of what ranks exchange: messages, shared memory, arguments. Each change adds one."""

_VERSION_NBYTES = 64
"""Bytes of the first message of a job. This never changes, so that any two versions compare."""

_OPEN_FILES = 65536
"""Files that a rank may have open, where its hard limit allows it; often it starts with 1,024."""


def init(
    backend: str | None = None,
    *,
    comm: Any = None,
    timeout: float = _TIMEOUT,
    warn_after: float = _WARN_AFTER,
) -> ProcessGroup:
    """Join the job, and return the group of all its ranks.

    Parameters
    ----------
    backend : {"hybrid", "mpi", "simulated"}, optional
        The transport of host arrays: ``"mpi"``, or ``"simulated"`` for one rank in this process.
        When omitted: MPI, if a launcher started this process as a rank or `comm` is given; else one
        rank, and MPI is not started. In that case device arrays are carried, too, by NCCL, where
        every rank has it and a GPU; if CuPy has been imported, `local_rank` chooses the GPU, unless
        the program has done so. ``"hybrid"`` imports CuPy, and is an error where device arrays
        cannot be carried.
    comm : mpi4py.MPI.Intracomm, optional
        Its ranks are the group's; duplicated. ``MPI.COMM_WORLD`` when omitted.
    timeout : float or datetime.timedelta, optional
        Seconds after which a wait fails and the group is broken. The first is for all ranks to call
        `init`; the last, for all processes to end when all have reached their exits.
    warn_after : float or datetime.timedelta, optional
        Seconds after which a wait logs a warning, and again at each doubling.

    Returns
    -------
    ProcessGroup
        The world; other groups are made of it.

    Raises
    ------
    LaunchError
        If a launcher promised several ranks and MPI sees one: the job would run as that many
        strangers, each believing that it is alone. If a rank has started or forked this process,
        which is no rank. If the ranks run different versions of mpidist.
    BackendUnavailableError
        If the transport's library is missing; of ``"hybrid"`` also if a rank has no GPU or no NCCL,
        unless ``MPIDIST_ENABLE_GPU_FALLBACK=1`` lets device arrays go by way of the host.

    Notes
    -----
    Collective over all ranks of the job; blocks. With several ranks it wraps `sys.excepthook` and
    `threading.excepthook`, so that an exception on one rank ends the whole job, and registers an
    exit handler, so that nobody waits for a rank that has left; not inside pytest and IPython.
    May be called again. MPI is finalised when the interpreter exits. Over MPI it raises the soft
    limit of open files to the hard one, at most to 65,536; processes started later inherit that.
    """
    configure(env.log_level(), warn=env.launcher_rank() == 0)
    timeout = seconds(timeout, "init: timeout")
    warn_after = seconds(warn_after, "init: warn_after")
    evidence = env.launcher_evidence()
    devices = None if backend is None else backend == "hybrid"
    if backend in (None, "hybrid"):
        backend = "mpi" if evidence is not None or comm is not None else _without_launcher()
    if backend == "mpi":
        world = _init_mpi(evidence, comm, timeout, warn_after)
    elif backend == "simulated":
        from mpidist.backends.simulated.backend import SimulatedBackend
        from mpidist.backends.simulated.network import Network

        lone = SimulatedBackend(Network(1), 0)
        world = ProcessGroup.over(lone, timeout=timeout, warn_after=warn_after)
        _trace(env.trace_directory(), world)
    else:
        raise BackendUnavailableError(
            f"init: there is no backend {backend!r}; expected 'hybrid', 'mpi' or 'simulated' (one "
            "rank in this process)"
        )
    if devices is not False:
        _add_devices(world, required=devices is True)
    return world


def _add_devices(world: ProcessGroup, *, required: bool) -> None:
    """Let a world carry device arrays if all its ranks can; collective."""
    from mpidist.backends.device.hybrid import carry_devices, use_device, why_not

    asked = required or env.gpu_fallback()
    reason, fallback = _first_reason(world, why_not(asked=asked))
    if reason is not None and required and not fallback:
        raise BackendUnavailableError(f"init('hybrid'): {reason}")
    carry_devices(world.transport, reason, fallback=fallback)
    if world.transport.device is not None:
        use_device(world.local_rank)


def _first_reason(world: ProcessGroup, reason: str | None) -> tuple[str | None, bool]:
    """Return why the first rank that cannot carry device arrays cannot, None if all can.

    Also whether they may be staged, which all ranks have to allow. Collective.
    """
    from mpidist._types import MIN
    from mpidist.backends.device.hybrid import may_stage
    from mpidist.collectives import all_reduce, broadcast_object

    allowed = may_stage()
    if world.size == 1:
        return reason, allowed
    own = [world.size if reason is None else world.rank, allowed, not allowed]
    first, by_all, by_none = all_reduce(np.array(own), world, op=MIN).tolist()
    if first == world.size:
        return None, False
    described = f"on rank {first}, {reason}"
    if not by_all and not by_none:
        described += "; and MPIDIST_ENABLE_GPU_FALLBACK=1 is set, with a GPU, on some ranks only"
    first_reason: str = broadcast_object(described, world, root=first)
    return first_reason, bool(by_all)


def _without_launcher() -> str:
    """Return the backend of a process that no MPI launcher started."""
    processes = env.store_evidence()
    if processes is not None and processes.several:
        raise LaunchError(
            f"init: RANK and WORLD_SIZE promise {processes.size} processes without MPI, which "
            "needs the TCP backend; it is not built yet. Start the job with mpirun or srun, or "
            "unset RANK and WORLD_SIZE to run as one rank"
        )
    return "simulated"


def _raise_open_files() -> None:
    """Raise the soft limit of open files: an MPI library opens some for each rank and group."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # not here, as in some containers
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _init_mpi(
    evidence: env.Evidence | None, comm: Any, timeout: float, warn_after: float
) -> ProcessGroup:
    began = time.monotonic()
    _refuse_inherited_rank()
    from mpidist.backends.mpi.job import MpiJob
    from mpidist.job import end, forks

    _raise_open_files()
    if evidence is not None:
        env.mark_rank()
    with end.loading(1 if evidence is None else evidence.size, timeout):
        job: JobTransport = MpiJob()
    _refuse_lone_ranks(evidence, job)
    forks.guard(job.name, job.rank)
    job.when_ended(_abandon_groups_of_mpi)
    ranks = job.world(comm)
    with end.starting(job, ranks, began, timeout) as notices:
        ranks.connect()
        _compare_versions(ranks.all_gather)
        received = None if notices is None else notices()
        backend = ranks.backend(received)
        several = backend.size > 1
        world = ProcessGroup.over(backend, timeout=timeout, warn_after=warn_after, answers=several)
    directory = env.trace_directory()
    if several:
        table, directory = _agreed(world, job.library)
        world.transport.take(table)
    end.track(world)
    _trace(directory, world)
    return world


def _compare_versions(all_gather: Callable[[bytes], Sequence[bytes]]) -> None:
    """Raise on all ranks unless all have the same version and layout.

    One all-gather of 64 bytes, by a function that returns the messages of all ranks.
    """
    from mpidist._version import __version__

    own = f"{__version__}, layout {LAYOUT}".encode()[:_VERSION_NBYTES]
    names = [name.rstrip(b"\0") for name in all_gather(own.ljust(_VERSION_NBYTES, b"\0"))]
    if set(names) == {own}:
        return
    described = []
    for name in dict.fromkeys(names):
        ranks = ", ".join(str(rank) for rank, other in enumerate(names) if other == name)
        described.append(f"{name.decode(errors='replace')} on rank {ranks}")
    raise LaunchError(
        "init: the ranks run different versions of mpidist, which do not understand each other: "
        f"{'; '.join(described)}. Install the same one on all nodes, and "
        "look at PATH and PYTHONPATH of the job"
    )


def _abandon_groups_of_mpi() -> None:
    """Let every verb raise once the program has called MPI.Finalize: the library would abort."""
    abandon_groups("mpi", "MPI has been finalised; call MPI.Finalize last, or leave it to exit")


def _trace(directory: str | None, world: ProcessGroup) -> None:
    """Begin the trace of the job, if one is wanted; collective."""
    if directory is None:
        return
    from mpidist.job import end
    from mpidist.tracing.session import begin_job_trace

    try:
        begin_job_trace(directory, world, end.end_trace_at_exit)
    except OSError as error:
        raise LaunchError(f"init: there can be no MPIDIST_TRACE={directory}: {error}") from error


def _agreed(world: ProcessGroup, library: str) -> tuple[Mapping[int, Crossovers], str | None]:
    """Return the crossovers and the directory for traces that rank 0 finds; collective."""
    from mpidist.collectives import broadcast_object

    table: Mapping[int, Crossovers] = {}
    problem = None
    if world.rank == 0:
        try:
            measured = found_crossovers(library)
        except (ValueError, OSError) as error:
            problem = str(error)
        else:
            table = measured.table
            if measured.problem:
                world.log.warning("init: %s. The default crossovers are used", measured.problem)
    found_by_first = (table, problem, env.trace_directory())
    table, problem, directory = broadcast_object(found_by_first, world, root=0)
    if problem is not None:
        raise LaunchError(
            f"init: MPIDIST_CROSSOVERS of rank 0 cannot be used: {problem}; correct it, or unset it"
        )
    return table, directory


class FoundCrossovers(NamedTuple):
    """The sizes at which paths change, by the number of ranks on a node.

    They come from ``source``: ``MPIDIST_CROSSOVERS`` or the path of a file. Table and source are
    empty where nothing was found; `problem` says why the user's file is left out, if it is.
    """

    table: Mapping[int, Crossovers]
    source: str
    problem: str = ""


def found_crossovers(library: str) -> FoundCrossovers:
    """Find the sizes at which paths change, in the environment or in the user's file.

    The file is a cache of measurements with an MPI library of this name and version: if it cannot
    be used, it is left out.

    Raises
    ------
    ValueError
        If what ``MPIDIST_CROSSOVERS`` gives cannot be used.
    OSError
        If the file that it names cannot be read.
    """
    from pathlib import Path

    from mpidist.backends.crossover_file import machine_name, read, user_file
    from mpidist.backends.crossovers import parse

    given = env.crossovers()
    if given is not None and "=" in given:
        return FoundCrossovers({1: parse(given)}, "MPIDIST_CROSSOVERS")
    machine = machine_name(library)
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"MPIDIST_CROSSOVERS names the file {given}, and there is none")
        table = read(Path(given), machine)
        return FoundCrossovers(table, given if table else "")
    path = user_file()
    try:
        table = read(path, machine)
    except (ValueError, OSError) as error:
        return FoundCrossovers({}, "", str(error))
    return FoundCrossovers(table, str(path) if table else "")


def _refuse_inherited_rank() -> None:
    """Raise in a process that a rank has started or forked: MPI would take it for the rank."""
    rank = env.inherited_rank()
    if rank is None:
        return
    raise LaunchError(
        f"init: this process ({os.getpid()}) has inherited the launcher's variables of a rank "
        f"(process {rank}, which has called init), but it is no rank: one rank started or forked "
        "it. MPI cannot start here. To work alone, call mpidist.init('simulated'), or start it "
        "without the launcher's variables (PMI*, PMIX*, OMPI*, PRTE*, SLURM*); to work with "
        "several ranks, start it by mpirun or srun of its own, from the job script; or let the "
        "ranks themselves do what it is to do"
    )


def _refuse_lone_ranks(evidence: env.Evidence | None, job: JobTransport) -> None:
    """Raise if this process is one of several ranks that do not see each other."""
    if evidence is None or not evidence.several or job.size > 1:
        return
    raise LaunchError(
        f"init: {evidence.launcher} started {evidence.size} processes ({evidence.variable}="
        f"{evidence.size}), but the MPI library here ({job.library}) sees only one. Launcher and "
        "library must come from the same MPI: use the mpirun that lies beside this Python, or "
        "the site's module with mpi4py on its libmpi (MPI4PY_LIBMPI); under Slurm, srun --mpi=pmix "
        "for Open MPI and srun --mpi=pmi2 for MPICH"
    )
