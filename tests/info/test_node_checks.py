from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from mpidist.info.checks import (
    clocks,
    leftovers,
    oversubscribed,
    processor,
    separate_nodes,
    shared_memory,
    threads_of_a_node,
    threads_of_a_rank,
)
from mpidist.info.facts import Blas, Failure, JobFacts, Leftover, SharedMemory
from tests.info.made_up import LAUNCH, LEFTOVER, LIBRARY, NODE, RANK, a_job, lone, with_ranks

MIB = 1 << 20


def blas(threads: int | None) -> Blas:
    return dataclasses.replace(RANK.blas, threads=threads)


def with_memory(job: JobFacts, total: int, free: int) -> JobFacts:
    shared = SharedMemory(path="/dev/shm", total=total, free=free)
    nodes = [dataclasses.replace(node, shared=shared) for node in job.nodes]
    return dataclasses.replace(job, nodes=nodes)


@pytest.mark.parametrize(
    ("vendor", "ranks", "total", "free", "what"),
    [
        ("MPICH", 4, 4 * MIB, 4 * MIB, None),
        ("MPICH", 4, 4 * MIB - 1, 4 * MIB - 1, "/dev/shm of n0 is tiny, 4 MiB, for 4 ranks"),
        ("MPICH", 2, 64 * MIB, 1 * MIB, "/dev/shm of n0 is full, 1 MiB free, for 2 ranks"),
        ("Open MPI", 4, 64 * MIB, 60 * MIB, None),
        ("Open MPI", 4, 63 * MIB, 63 * MIB, "MPI takes 16 MiB for each"),
        # of others nothing is known: as the least
        ("Intel MPI", 4, 4 * MIB, 4 * MIB, None),
    ],
)
def test_too_little_shared_memory(
    vendor: str, ranks: int, total: int, free: int, what: str | None
) -> None:
    library = dataclasses.replace(LIBRARY, vendor=vendor)
    problems = shared_memory(with_memory(a_job(ranks, rank={"library": library}), total, free))
    assert len(problems) == (what is not None)
    for problem in problems:
        assert what in problem.what
        assert "--shm-size" in problem.cure


def test_no_shared_memory() -> None:
    (problem,) = shared_memory(a_job(2, node={"shared": None}))
    assert problem.what.startswith("n0 has no /dev/shm that can be written, for 2 ranks")


def test_memory_of_ranks_that_could_not_start_counts() -> None:
    job = with_memory(a_job(1, rank={"library": None, "launch": LAUNCH}), 2 * MIB, 2 * MIB)
    failure = Failure(kind="died", reason="ended by SIGBUS", output=())
    (problem,) = shared_memory(dataclasses.replace(job, failure=failure))
    assert "for 4 ranks" in problem.what
    (problem,) = shared_memory(with_memory(lone("MPICH", tasks_per_node=3), 2 * MIB, 2 * MIB))
    assert "for 3 ranks" in problem.what


@pytest.mark.parametrize(
    ("cores", "threads", "wrong"),
    [([0], 1, False), ([0], 4, True), ([0, 1], 2, False), ([0, 1], 4, True), ([0], None, False)],
)
def test_a_rank_with_more_threads_than_cores(
    cores: list[int], threads: int | None, wrong: bool
) -> None:
    problems = threads_of_a_rank(a_job(1, rank={"cores": cores, "blas": blas(threads)}))
    assert len(problems) == wrong
    for problem in problems:
        assert f"{threads} BLAS threads" in problem.what
        assert f"export OMP_NUM_THREADS={len(cores)}" in problem.cure


def test_ranks_that_are_bound_to_a_core_are_named_with_the_way_out() -> None:
    bound = [{"cores": [core], "blas": blas(4)} for core in range(2)]
    job = with_ranks(a_job(2), bound)
    (problem,) = threads_of_a_rank(job)
    assert problem.what == "ranks 0-1: 4 BLAS threads, and only 1 core to run on"
    assert "--cpus-per-task=4" in problem.cure
    assert threads_of_a_node(job) == []  # told once


def test_binding_is_not_blamed_for_a_machine_with_few_cores() -> None:
    (problem,) = threads_of_a_rank(a_job(1, rank={"blas": blas(8)}))
    assert problem.cure == "export OMP_NUM_THREADS=4"


@pytest.mark.parametrize(
    ("ranks", "threads", "each"),
    [(2, 2, None), (2, 3, 2), (4, 4, 1), (4, 1, None), (4, None, None), (8, 1, None)],
)
def test_more_threads_than_cores_of_the_node(
    ranks: int, threads: int | None, each: int | None
) -> None:
    problems = threads_of_a_node(a_job(ranks, rank={"blas": blas(threads)}))
    assert len(problems) == (each is not None)
    for problem in problems:
        assert f"{ranks * (threads or 1)} in all, on 4 cores" in problem.what
        assert problem.cure == f"export OMP_NUM_THREADS={each} before the launcher"


def test_the_variable_that_counts_more_is_told() -> None:
    settings = {"OPENBLAS_NUM_THREADS": "4"}
    (problem,) = threads_of_a_node(a_job(4, rank={"blas": blas(4), "settings": settings}))
    assert problem.cure.endswith("OPENBLAS_NUM_THREADS is set, and counts more")


def test_ranks_with_cores_of_their_own_do_not_disturb_each_other() -> None:
    fields = [{"cores": [2 * r, 2 * r + 1], "blas": blas(2)} for r in range(4)]
    job = with_ranks(a_job(4), fields)
    assert [*threads_of_a_node(job), *threads_of_a_rank(job), *oversubscribed(job)] == []


def test_each_node_is_judged_by_itself() -> None:
    problems = threads_of_a_node(a_job(1, 4, rank={"blas": blas(2)}))
    assert [problem.what.partition(":")[0] for problem in problems] == ["n1"]


@pytest.mark.parametrize(("ranks", "wrong"), [(4, False), (5, True)])
def test_more_ranks_than_cores(ranks: int, wrong: bool) -> None:
    problems = oversubscribed(a_job(ranks))
    assert [problem.what for problem in problems] == ["n0: 5 ranks on 4 cores"] * wrong


def test_ranks_that_share_one_core_of_many() -> None:
    (problem,) = oversubscribed(a_job(2, rank={"cores": [0]}))
    assert problem.what == "n0: 2 ranks on 1 core, though it has 4"
    assert "--bind-to none" in problem.cure


def same_host(job: JobFacts) -> JobFacts:
    return dataclasses.replace(
        job, nodes=[dataclasses.replace(node, host="box") for node in job.nodes]
    )


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (a_job(1, 1), None),
        (same_host(a_job(1, 1)), "several are on box"),
        (same_host(a_job(2, 1)), None),  # nodes that are pretended, say
        (
            a_job(1, 1, rank={"launch": dataclasses.replace(LAUNCH, tasks_per_node=2)}),
            "Slurm has 2 tasks on a node",
        ),
        (a_job(1, 1, rank={"launch": dataclasses.replace(LAUNCH, tasks_per_node=1)}), None),
        (a_job(2, rank={"launch": dataclasses.replace(LAUNCH, tasks_per_node=2)}), None),
        (lone("MPICH", tasks_per_node=2), None),  # told by another check
    ],
)
def test_ranks_in_containers_of_their_own(job: JobFacts, told: str | None) -> None:
    problems = separate_nodes(job)
    assert len(problems) == (told is not None)
    for problem in problems:
        assert told in problem.what
        assert "--ipc=host" in problem.cure


def test_other_processors_have_no_direct_path() -> None:
    (problem,) = processor(a_job(2, 2, node={"machine": "aarch64", "direct": False}))
    assert "no direct path on aarch64" in problem.what
    assert not problem.fatal


@pytest.mark.parametrize(("seconds", "wrong"), [(0.5, False), (90.0, True)])
def test_clocks_that_differ(seconds: float, wrong: bool) -> None:
    times = [{"clock": 1000.0}, {"clock": 1000.0}, {"clock": 1000.0 + seconds}]
    problems = clocks(with_ranks(a_job(2, 1), times))
    told = "the clocks of n1 and n0 differ by 90.0 s: times in logs mislead"
    assert [problem.what for problem in problems] == [told] * wrong


def test_clocks_of_one_node_are_one_clock() -> None:
    """A rank that is late by seconds does not make them two."""
    assert clocks(with_ranks(a_job(2), [{"clock": 1000.0}, {"clock": 1090.0}])) == []


def job_with(files: Sequence[Leftover]) -> JobFacts:
    return a_job(2, node={"leftovers": files})


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, True),
        ({"used": True}, False),
        ({"used": None}, False),
        ({"age": 5.0}, False),  # of a job that is just starting
    ],
)
def test_files_that_nobody_uses(fields: dict[str, object], wrong: bool) -> None:
    problems = leftovers(job_with([dataclasses.replace(LEFTOVER, **fields)]))
    assert len(problems) == wrong
    for problem in problems:
        assert "n0: 1 file of MPICH in /dev/shm, 3 MiB" in problem.what
        assert "info --clean" in problem.cure


def test_the_made_up_node_has_as_many_cores_as_its_ranks_may_use() -> None:
    assert NODE.cores == len(RANK.cores)
