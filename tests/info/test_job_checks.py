from __future__ import annotations

import dataclasses
import typing

import pytest

from mpidist.info.checks import (
    crossovers,
    differences,
    find_problems,
    hdf5_imports,
    lone_ranks,
    mpi_starts,
)
from mpidist.info.facts import CrossoverFacts, Failure, Hdf5, JobFacts
from tests.info.made_up import LIBRARY, RANK, a_job, lone, with_ranks


def failed(failure: Failure, **fields: typing.Any) -> JobFacts:
    job = a_job(1, rank={"library": None, **fields})
    return dataclasses.replace(job, failure=failure)


@pytest.mark.parametrize("counts", [(1,), (2,), (4,), (2, 2), (1, 3)])
def test_nothing_is_wrong_where_nothing_is(counts: tuple[int, ...]) -> None:
    assert find_problems(a_job(*counts)) == []


def test_a_missing_library_is_to_be_installed_or_named() -> None:
    (problem,) = mpi_starts(failed(Failure(kind="missing", reason="no libmpi", output=())))
    assert problem.fatal
    assert "no libmpi" in problem.what
    assert "pip install 'mpidist[mpich]'" in problem.cure
    assert "MPI4PY_LIBMPI" in problem.cure


def test_a_library_that_was_named_wrongly_is_named_again() -> None:
    settings = {"MPI4PY_LIBMPI": "/nowhere"}
    missing = Failure(kind="missing", reason="cannot load /nowhere", output=())
    (problem,) = mpi_starts(failed(missing, settings=settings))
    assert problem.cure.startswith("MPI4PY_LIBMPI=/nowhere must name")


@pytest.mark.parametrize(
    ("kind", "reason", "told", "not_told"),
    [
        ("died", "ended with exit code 16", "/opt/mpich/bin/mpirun", "--timeout"),
        ("died", "ended by SIGBUS", "too little shared memory", "--timeout"),
        ("late", "no answer within 60 s", "--timeout", "shared memory"),
    ],
)
def test_a_library_that_does_not_start(kind: str, reason: str, told: str, not_told: str) -> None:
    (problem,) = mpi_starts(failed(Failure(kind=kind, reason=reason, output=("a", "b"))))
    assert problem.fatal
    assert problem.what == f"MPI does not start: {reason}"
    assert told in problem.cure
    assert not_told not in problem.cure


@pytest.mark.parametrize(
    ("vendor", "launch", "what", "cure"),
    [
        (
            "Open MPI",
            {"launcher": "srun", "variable": "SLURM_STEP_NUM_TASKS", "slurm_tasks": 4},
            "by PMIx only",
            "srun --mpi=pmix",
        ),
        # PMI is there, and Open MPI does not know it
        ("Open MPI", {"variable": "PMI_SIZE", "slurm_tasks": 4}, "by PMIx only", "srun --mpi=pmix"),
        (
            "MPICH",
            {"launcher": "srun", "variable": "SLURM_STEP_NUM_TASKS", "slurm_tasks": 4},
            "4 jobs of one rank each",
            "srun --mpi=pmi2",
        ),
        ("Open MPI", {}, "belongs to another MPI", "/opt/mpich/bin/mpirun"),
        # mpirun of another vendor inside a batch script, whose own step has one task
        ("MPICH", {"slurm_tasks": 1}, "belongs to another MPI", "/opt/mpich/bin/mpirun"),
    ],
)
def test_ranks_that_do_not_see_each_other(
    vendor: str, launch: dict[str, typing.Any], what: str, cure: str
) -> None:
    (problem,) = lone_ranks(lone(vendor, **launch))
    assert problem.fatal
    assert what in problem.what
    assert cure in problem.cure


@pytest.mark.parametrize(
    "job",
    [
        a_job(4),
        a_job(1),
        lone("MPICH", size=1),
        lone("Open MPI", size=None, variable="PMIX_RANK"),
        lone("MPICH", size=None, variable="", launcher=""),
        failed(Failure(kind="late", reason="no answer", output=())),
    ],
    ids=["four", "one", "mpirun -n 1", "no size", "no launcher", "no library"],
)
def test_no_lone_ranks(job: JobFacts) -> None:
    assert lone_ranks(job) == []


def test_crossovers_that_init_would_refuse() -> None:
    bad = CrossoverFacts(ranks=2, sizes={}, source="", problem="expected sizes in bytes")
    (problem,) = crossovers(dataclasses.replace(a_job(), crossovers=bad))
    assert problem.fatal
    assert "no job of several ranks starts: expected sizes in bytes" in problem.what
    assert "MPIDIST_CROSSOVERS" in problem.cure


def test_crossovers_that_init_would_leave_out() -> None:
    left_out = dataclasses.replace(a_job().crossovers, problem="x.json: Permission denied")
    (problem,) = crossovers(dataclasses.replace(a_job(), crossovers=left_out))
    assert not problem.fatal
    assert problem.what == "left out: x.json: Permission denied"


def test_an_h5py_that_cannot_be_imported_is_told_once() -> None:
    broken = Hdf5(version="", parallel=False, problem="ImportError: libhdf5.so")
    (problem,) = hdf5_imports(a_job(2, rank={"hdf5": broken}))
    assert not problem.fatal
    assert "ImportError: libhdf5.so" in problem.what


@pytest.mark.parametrize("parallel", [False, True])
def test_serial_and_parallel_hdf5_are_both_right(parallel: bool) -> None:
    hdf5 = Hdf5(version="1.14.6", parallel=parallel, problem="")
    assert hdf5_imports(a_job(2, rank={"hdf5": hdf5})) == []


def test_ranks_with_other_versions_are_named() -> None:
    job = a_job(3)
    other = {"versions": {**RANK.versions, "numpy": "2.1.0"}}
    (problem,) = differences(with_ranks(job, [{}, {}, other]))
    assert problem.what == "numpy differs between ranks: 2.0.0 (ranks 0-1); 2.1.0 (rank 2)"


def test_ranks_with_other_libraries_and_pythons_are_named() -> None:
    library = dataclasses.replace(LIBRARY, name="MPICH 4.2.0")
    problems = differences(with_ranks(a_job(2), [{}, {"library": library, "python": "3.12.1"}]))
    assert [problem.what.partition(" differs")[0] for problem in problems] == [
        "Python",
        "the MPI library",
    ]
