"""What is here, and what is wrong with it: the form of what ``python -m mpidist info`` tells.

The facts are collected by a process of its own for each rank, so that an MPI library which hangs or
dies as it starts takes nothing along; checks judge them, and a text shows them.
"""

from __future__ import annotations

from mpidist.info.facts import (
    FORMAT,
    Blas,
    CrossoverFacts,
    Failure,
    Hdf5,
    JobFacts,
    Launch,
    Leftover,
    Library,
    NodeFacts,
    RankFacts,
    SharedMemory,
)
from mpidist.info.gpu_facts import Cupy, Gpu, Nccl
from mpidist.info.problems import Problem

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
