"""What can be wrong with the software of a job, and with the way in which it was started."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist.info.facts import JobFacts, Launch
from mpidist.info.problems import Problem, fatal, warning
from mpidist.info.words import by_value

__all__ = ["crossovers", "differences", "hdf5_imports", "lone_ranks", "mpi_starts"]

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
