"""The facts of a job and what is wrong with it, as ``python -m mpidist info --json`` prints them.

The facts are collected by a process of its own for each rank, so that an MPI library which hangs or
dies as it starts takes nothing along; checks judge them, and a text shows them.
"""

from __future__ import annotations

from mpidist.info.checks import Problem
from mpidist.info.facts import (
    FORMAT,
    Blas,
    CrossoverFacts,
    Cupy,
    Failure,
    Gpu,
    Hdf5,
    JobFacts,
    Launch,
    Leftover,
    Library,
    Nccl,
    NodeFacts,
    RankFacts,
    SharedMemory,
)

__all__ = [
    "FORMAT",
    "Blas",
    "CrossoverFacts",
    "Cupy",
    "Failure",
    "Gpu",
    "Hdf5",
    "JobFacts",
    "Launch",
    "Leftover",
    "Library",
    "Nccl",
    "NodeFacts",
    "Problem",
    "RankFacts",
    "SharedMemory",
]
