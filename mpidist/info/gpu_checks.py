"""What can be wrong with the GPUs of a job, and with the way in which ranks share them."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist._formatting import format_count
from mpidist.info.facts import JobFacts
from mpidist.info.problems import Problem, warning
from mpidist.info.words import rank_names

__all__ = ["shared_gpus", "unused_gpus"]


def unused_gpus(job: JobFacts) -> Sequence[Problem]:
    """Find GPUs whose arrays cannot be carried, though CuPy is installed."""
    problems = []
    for node in job.nodes:
        ranks = [rank for rank in job.on(node) if rank.cupy.version and rank.nccl.problem]
        if not node.gpus or not ranks:
            continue
        names = rank_names([rank.rank for rank in ranks])
        what = f"{node.host}: no device arrays are carried from its GPUs, {names}"
        cure = "; ".join(dict.fromkeys(rank.nccl.problem for rank in ranks))
        if not all(rank.gpu_fallback for rank in ranks):
            cure += "; or MPIDIST_ENABLE_GPU_FALLBACK=1, by way of the host"
            problems.append(warning("unused_gpus", what, cure))
    return problems


def shared_gpus(job: JobFacts) -> Sequence[Problem]:
    """Find several ranks that would take the same GPU."""
    problems = []
    for node in job.nodes:
        places: dict[str, list[int]] = {}
        for rank in job.on(node):
            if rank.device is not None:
                places.setdefault(rank.cupy.visible[rank.device], []).append(rank.rank)
        most = max(places.items(), key=lambda item: len(item[1]), default=("", []))
        if len(most[1]) < 2:
            continue
        what = (
            f"{node.host}: {rank_names(most[1])} would share the GPU {most[0]}, of "
            f"{format_count(len(places), 'GPU')} that its ranks see"
        )
        cure = (
            "as many ranks on a node as GPUs, and each rank sees all of them (mpirun -n 4, srun "
            "--gpus-per-node=4); or NCCL 2.30.3 or newer with NCCL_MULTI_RANK_GPU_ENABLE=1"
        )
        problems.append(warning("shared_gpus", what, cure))
    return problems
