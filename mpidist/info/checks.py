"""All that is looked for.

A check is a function that takes the facts of a job and returns the problems that it sees. It is in
force once it stands in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpidist.info import gpu_checks, job_checks, node_checks
from mpidist.info.facts import JobFacts
from mpidist.info.problems import Problem

__all__ = ["CHECKS", "find_problems"]

CHECKS: Sequence[Callable[[JobFacts], Sequence[Problem]]] = (
    job_checks.mpi_starts,
    job_checks.lone_ranks,
    job_checks.crossovers,
    node_checks.shared_memory,
    node_checks.separate_nodes,
    node_checks.threads_of_a_rank,
    node_checks.threads_of_a_node,
    node_checks.oversubscribed,
    gpu_checks.shared_gpus,
    gpu_checks.unused_gpus,
    job_checks.differences,
    node_checks.processor,
    job_checks.hdf5_imports,
    node_checks.clocks,
    node_checks.leftovers,
)
"""All checks, the worst first."""


def find_problems(job: JobFacts) -> Sequence[Problem]:
    """Return what all checks find, in their order."""
    return [problem for check in CHECKS for problem in check(job)]
