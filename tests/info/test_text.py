"""The report as it is shown: made of facts that are made up."""

from __future__ import annotations

import dataclasses

from mpidist.info.checks import by_value, fatal, rank_names, warning
from mpidist.info.facts import Failure, JobFacts
from mpidist.info.text import render_facts
from tests.info.made_up import GPU, LEFTOVER, NODE, a_job, lone, with_ranks


def told(job: JobFacts, *problems: object) -> str:
    return render_facts(job, problems, date="today")


def line(text: str, label: str) -> str:
    """Return the only line with this label, without it."""
    (found,) = [one for one in text.splitlines() if one.startswith(f"  {label} ")]
    return found[2 + len(label) :].strip()


def test_names_of_ranks() -> None:
    assert rank_names([1]) == "rank 1"
    assert rank_names([1, 2]) == "ranks 1-2"


def test_a_value_of_all_is_told_once() -> None:
    assert by_value(["a", "a"]) == "a"
    assert by_value(["a", "b", "a"]) == "a (ranks 0, 2); b (rank 1)"


def test_no_line_is_long_or_ends_in_blanks() -> None:
    job = a_job(4, rank={"settings": {"OMPI_MCA_x": "word " * 40}})
    lines = told(job, warning("c", "what " * 50, "cure " * 50)).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(one == one.rstrip() for one in lines)


def test_everything_is_told() -> None:
    text = told(a_job(2))
    assert text.startswith("mpidist 0.2.0, 2 ranks on 1 node, today\n")
    assert line(text, "library") == "MPICH 4.3.0, MPI 4.1, MPI_THREAD_MULTIPLE"
    assert line(text, "file") == "/opt/mpich/lib/libmpi.so.12"
    assert line(text, "mpi4py") == "4.1.0, ABI mpich"
    assert line(text, "CUDA-aware") == "no, it says (MPIX_Query_cuda_support)"
    assert line(text, "launcher") == "mpirun: PMI_SIZE=2, PMI"
    assert line(text, "crossovers") == "small 1 KiB, registered 2 KiB, scratch never (default)"
    assert "Node n0 (ranks 0-1)\n" in text
    assert line(text, "cores") == "4, 4 usable; 4 for each rank, in part the same"
    assert line(text, "shared memory") == "32 GiB in /dev/shm, 30 GiB free"
    assert line(text, "GPUs") == "none"
    assert line(text, "BLAS") == "OpenBLAS 0.3, 1 thread per rank"
    assert line(text, "HDF5") == "1.14.6, serial, which is all it needs"
    assert line(text, "packages") == "mpidist 0.2.0, mpi4py 4.1.0, numpy 2.0.0"
    assert "Settings\n  OMP_NUM_THREADS=1\n" in text
    assert text.endswith("Wrong\n  nothing was found\n")


def test_problems_come_last_with_their_cures() -> None:
    text = told(a_job(), fatal("a", "it is broken", "mend it"), warning("b", "slow", "wait"))
    assert text.endswith(
        "Wrong\n"
        "  fatal         it is broken\n"
        "    cure        mend it\n"
        "  warning       slow\n"
        "    cure        wait\n"
    )


def test_what_differs_between_ranks_is_told_with_the_ranks() -> None:
    fields = [{"settings": {"OMP_NUM_THREADS": "1"}}, {"settings": {}}, {"python": "3.12.1"}]
    text = told(with_ranks(a_job(3), fields))
    assert "OMP_NUM_THREADS=1 (ranks 0, 2); OMP_NUM_THREADS not set (rank 1)" in text
    assert "3.11.7, /venv/bin/python (ranks 0-1); 3.12.1, /venv/bin/python (rank 2)" in text


def test_nodes_that_are_alike_are_told_together() -> None:
    text = told(a_job(2, 2))
    assert "Nodes n0 (ranks 0-1), n1 (ranks 2-3)\n" in text
    assert text.count("processor") == 1


def test_nodes_that_differ_are_told_apart() -> None:
    job = a_job(2, 2)
    gpus = [GPU, GPU]
    large = dataclasses.replace(NODE, host="n1", ranks=[2, 3], gpus=gpus, driver="550.1")
    text = told(dataclasses.replace(job, nodes=[job.nodes[0], large]))
    assert "Node n0 (ranks 0-1)\n" in text
    assert "Node n1 (ranks 2-3)\n" in text
    assert "  GPUs          2 x Abacus H9, 80 GiB, driver 550.1\n" in text


def test_a_large_job_is_told_in_few_lines() -> None:
    cores = [{"cores": [rank % 4]} for rank in range(400)]
    text = told(with_ranks(a_job(*[4] * 100), cores))
    assert len(text.splitlines()) < 40
    assert "and 92 more" in text
    assert line(text, "cores") == "4, 4 usable; 1 for each rank"


def test_files_in_shared_memory_are_counted() -> None:
    files = [
        LEFTOVER,
        dataclasses.replace(LEFTOVER, age=90.0),
        dataclasses.replace(LEFTOVER, used=True, age=3.0),
    ]
    text = told(a_job(node={"leftovers": files}))
    assert "2 of MPICH, ada's, not in use: 6 MiB, the newest 90 s old\n" in text
    assert "1 of MPICH, ada's, in use: 3 MiB, the newest 3 s old\n" in text


def test_a_library_that_failed_is_told_with_its_last_words() -> None:
    failure = Failure(kind="died", reason="ended by SIGBUS", output=["first", "last"])
    job = dataclasses.replace(a_job(1, rank={"library": None}), failure=failure)
    text = told(job)
    assert line(text, "library") == "not started: ended by SIGBUS"
    assert "  it wrote      first\n  it wrote      last\n" in text


def test_lone_ranks_are_told_in_the_first_line() -> None:
    assert "4 processes that do not see each other; this is the first" in told(lone("MPICH"))
