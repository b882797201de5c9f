"""One rank of ``python -m mpidist info``: a process that may hang or die without harm.

`mpidist.info.ask` starts it. It writes the facts of the job as JSON to its standard output if it is
the first rank; what libraries print there goes to the error output.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpidist
from mpidist import env
from mpidist.backends.crossovers import choose
from mpidist.backends.node.shared_memory import DIRECTORY
from mpidist.errors import BackendUnavailableError
from mpidist.info import probes
from mpidist.info.facts import CrossoverFacts, JobFacts, Launch, Library, NodeFacts, RankFacts
from mpidist.info.leftovers import mapped_by
from mpidist.info.probes import describe_library, look_at_cupy, look_at_nccl, look_at_node
from mpidist.job.start import found_crossovers

WITH_MPI, ALONE = "with-mpi", "alone"


def job_alone() -> JobFacts:
    """Return what this process knows without MPI."""
    return JobFacts(
        ranks=[_look_at_rank(0, [0], None)],
        nodes=[look_at_node([0])],
        crossovers=_crossovers(None, 1),
        failure=None,
    )


def job_of_ranks(mpi: Any) -> JobFacts | None:
    """Return what all ranks know, on the first of them; collective over all, blocks."""
    world = mpi.COMM_WORLD
    library = describe_library(mpi)
    shared = world.Split_type(mpi.COMM_TYPE_SHARED, key=world.rank)
    ranks = shared.allgather(world.rank)
    # Ranks that MPI has counted are all there, so that none is judged before it has its memory.
    world.Barrier()
    own = _look_at_rank(world.rank, ranks, library)
    node = look_at_node(ranks) if shared.rank == 0 else None
    gathered = world.gather((own, node), root=0)
    # Nobody leaves, and takes its memory along, before all have looked.
    world.Barrier()
    if gathered is None:
        return None
    nodes: list[NodeFacts] = [node for _, node in gathered if node is not None]
    indices = {node.ranks[0]: index for index, node in enumerate(nodes)}
    return JobFacts(
        ranks=[dataclasses.replace(rank, node=indices[rank.node]) for rank, _ in gathered],
        nodes=nodes,
        crossovers=_crossovers(library, max(len(node.ranks) for node in nodes)),
        failure=None,
    )


def _look_at_rank(rank: int, ranks: Sequence[int], library: Library | None) -> RankFacts:
    """Return what this rank knows; `ranks` are those of its node, of which the first stands for it.

    The number of the node is known when all nodes are.
    """
    clock = time.time()
    settings = env.settings()
    if library is None:  # an h5py that was built with MPI would start it
        env.keep_mpi_from_starting()
    cupy = look_at_cupy()
    seen = len(cupy.visible)
    return RankFacts(
        rank=rank,
        node=ranks[0],
        pid=os.getpid(),
        cores=sorted(os.sched_getaffinity(0)),
        blas=probes.blas(),
        hdf5=probes.hdf5(),
        cupy=cupy,
        nccl=look_at_nccl(cupy),
        device=ranks.index(rank) % seen if seen else None,
        gpu_fallback=env.gpu_fallback(),
        python=platform.python_version(),
        executable=sys.executable,
        package=str(Path(mpidist.__file__).parent),
        versions=probes.installed(),
        launch=_launch(library),
        library=library,
        settings=settings,
        clock=clock,
    )


def _launch(library: Library | None) -> Launch:
    evidence = env.launcher_evidence()
    return Launch(
        launcher=evidence.launcher if evidence else "",
        variable=evidence.variable if evidence else "",
        size=evidence.size if evidence else None,
        managers=env.process_managers(),
        slurm_tasks=env.slurm_tasks(),
        tasks_per_node=env.slurm_tasks_per_node(),
        mpirun=_mpirun(library.path if library else ""),
    )


def _mpirun(library: str) -> str:
    """Return the launcher that was installed with the library, else the one of this Python."""
    directories = [Path(library).parents[1] / "bin"] if library else []
    # Not resolved: inside a virtual environment the interpreter is a link to one elsewhere.
    directories.append(Path(sys.executable).parent)
    mpiruns = (
        str(directory / "mpirun")
        for directory in directories
        if os.access(directory / "mpirun", os.X_OK)
    )
    return next(mpiruns, "")


def _crossovers(library: Library | None, ranks: int) -> CrossoverFacts:
    sizes: dict[str, int] = {}
    try:
        crossovers = found_crossovers(library.name if library else "")
    except (ValueError, OSError) as error:
        return CrossoverFacts(ranks=ranks, sizes=sizes, source="", problem=str(error))
    # Those of the user's file are of one library each.
    if library is not None or crossovers.table:
        sizes = dataclasses.asdict(choose(crossovers.table, ranks))
    return CrossoverFacts(
        ranks=ranks, sizes=sizes, source=crossovers.source, problem=crossovers.problem
    )


def main(how: str, seconds: float) -> int:
    """Look, and write; the exit code is 0 whenever there is an answer."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Whoever asks kills this process at the deadline; should it be killed itself, this does.
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        faulthandler.dump_traceback_later(seconds + 5, exit=True, file=nowhere)
        fields: Any = {}
        if how == ALONE:
            fields = dataclasses.asdict(job_alone())
        else:
            from mpidist.backends.mpi.library import load_mpi

            try:
                mpi = load_mpi()
                job = job_of_ranks(mpi)
                fields = {} if job is None else dataclasses.asdict(job)
                if mpi.COMM_WORLD.size == 1:
                    fields["made"] = [str(path) for path in mapped_by("self", DIRECTORY)]
            except BackendUnavailableError as error:
                fields = {"missing": str(error.__context__)}  # what mpi4py said
        with answer:
            json.dump(fields, answer)
        faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
