"""Facts of jobs in which nothing is wrong, to be spoilt by a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mpidist.info.facts import (
    Blas,
    CrossoverFacts,
    Cupy,
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

LIBRARY = Library(
    name="MPICH 4.3.0",
    vendor="MPICH",
    standard="4.1",
    abi="mpich",
    path="/opt/mpich/lib/libmpi.so.12",
    thread_level="MPI_THREAD_MULTIPLE",
    cuda_aware=False,
    cuda_evidence="MPIX_Query_cuda_support",
    size=4,
)

LAUNCH = Launch(
    launcher="mpirun",
    variable="PMI_SIZE",
    size=4,
    managers=("PMI",),
    slurm_tasks=None,
    tasks_per_node=None,
    mpirun="/opt/mpich/bin/mpirun",
)

GPU = Gpu(name="Abacus H9", memory=80 << 30, bus_id="00000000:1B:00.0")

NO_GPU = "there is no NVIDIA driver"

RANK = RankFacts(
    rank=0,
    node=0,
    pid=100,
    cores=(0, 1, 2, 3),
    blas=Blas(name="OpenBLAS 0.3", path="/lib/libopenblas.so", threads=1),
    hdf5=Hdf5(version="1.14.6", parallel=False, problem=""),
    cupy=Cupy(version="", runtime="", visible=(), problem=NO_GPU),
    nccl=Nccl(version="", file="", built="", problem=NO_GPU),
    device=None,
    gpu_fallback=False,
    python="3.11.7",
    executable="/venv/bin/python",
    package="/venv/mpidist",
    versions={"mpidist": "0.2.0", "mpi4py": "4.1.0", "numpy": "2.0.0"},
    launch=LAUNCH,
    library=LIBRARY,
    settings={"OMP_NUM_THREADS": "1"},
    clock=1000.0,
)

NODE = NodeFacts(
    host="n0",
    ranks=(0,),
    system="Linux 6.1",
    machine="x86_64",
    processor="Abacus 9",
    cores=4,
    memory=64 << 30,
    direct=True,
    shared=SharedMemory(path="/dev/shm", total=32 << 30, free=30 << 30),
    gpus=(),
    driver="",
    cuda="",
    leftovers=(),
)

LEFTOVER = Leftover(
    name="mpich_shm_1_0",
    maker="MPICH",
    nbytes=3 << 20,
    owner="ada",
    age=7200.0,
    used=False,
)

CROSSOVERS = CrossoverFacts(
    ranks=2, sizes={"small": 1024, "registered": 2048, "scratch": 2**62}, source="", problem=""
)


def a_job(
    *ranks_of_nodes: int, rank: dict[str, Any] | None = None, node: dict[str, Any] | None = None
) -> JobFacts:
    """Return a job with so many ranks on each node; two on one if nothing is said.

    `rank` and `node` replace fields of all ranks and of all nodes.
    """
    counts = ranks_of_nodes or (2,)
    library = dataclasses.replace(LIBRARY, size=sum(counts))
    launch = dataclasses.replace(LAUNCH, size=sum(counts))
    ranks: list[RankFacts] = []
    nodes: list[NodeFacts] = []
    for index, number in enumerate(counts):
        first = len(ranks)
        numbers = range(first, first + number)
        common = {"node": index, "library": library, "launch": launch, **(rank or {})}
        ranks += [dataclasses.replace(RANK, rank=number, **common) for number in numbers]
        nodes.append(
            dataclasses.replace(
                NODE, **{"host": f"n{index}", "ranks": tuple(numbers)} | (node or {})
            )
        )
    return JobFacts(ranks=tuple(ranks), nodes=tuple(nodes), crossovers=CROSSOVERS, failure=None)


def with_ranks(job: JobFacts, fields: Sequence[dict[str, Any]]) -> JobFacts:
    """Return the job with other fields, given for each rank."""
    ranks = [dataclasses.replace(r, **f) for r, f in zip(job.ranks, fields, strict=True)]
    return dataclasses.replace(job, ranks=ranks)


def lone(vendor: str, **launch: Any) -> JobFacts:
    """Return what the first of several ranks sees that do not see each other."""
    library = dataclasses.replace(LIBRARY, name=f"{vendor} 5.0", vendor=vendor, size=1)
    return a_job(1, rank={"library": library, "launch": dataclasses.replace(LAUNCH, **launch)})


def with_gpus(*ranks_of_nodes: int, gpus: int, **fields: Any) -> JobFacts:
    """Return a job whose nodes have so many GPUs, of which each rank takes one, counted around."""
    places = [f"0000:{index:02d}:00.0" for index in range(gpus)]
    rank = {
        "cupy": Cupy(version="14.2.0", runtime="12.9", visible=places, problem=""),
        "nccl": Nccl(version="2.28.3", file="/n/libnccl.so.2", built="2.25.1", problem=""),
    }
    node = {"gpus": [GPU] * gpus, "driver": "550.54", "cuda": "12.4"}
    job = a_job(*ranks_of_nodes, rank=rank | fields, node=node)
    local = [rank - job.nodes[each.node].ranks[0] for rank, each in enumerate(job.ranks)]
    return with_ranks(job, [{"device": number % gpus} for number in local])
