"""The JSON form, on which programs rely."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mpidist.info.checks import warning
from mpidist.info.command import as_fields
from mpidist.info.facts import FORMAT, Failure, JobFacts
from tests.info.made_up import GPU, LEFTOVER, a_job

# Names may be added. If one goes, or means something else, FORMAT has to be counted up.
NAMES = {
    2: """
    crossovers.problem crossovers.ranks crossovers.sizes.registered crossovers.sizes.scratch
    crossovers.sizes.small crossovers.source date failure.kind failure.output failure.reason
    format nodes.cores nodes.cuda nodes.direct nodes.driver nodes.gpus.bus_id nodes.gpus.memory
    nodes.gpus.name nodes.host nodes.leftovers.age nodes.leftovers.maker nodes.leftovers.name
    nodes.leftovers.nbytes nodes.leftovers.owner nodes.leftovers.used nodes.machine nodes.memory
    nodes.processor nodes.ranks nodes.shared.free nodes.shared.path nodes.shared.total
    nodes.system problems.check problems.cure problems.fatal problems.what ranks.blas.name
    ranks.blas.path ranks.blas.threads ranks.clock ranks.cores ranks.cupy.problem
    ranks.cupy.runtime ranks.cupy.version ranks.cupy.visible ranks.device ranks.executable
    ranks.gpu_fallback ranks.hdf5.parallel ranks.hdf5.problem ranks.hdf5.version
    ranks.launch.launcher ranks.launch.managers ranks.launch.mpirun ranks.launch.size
    ranks.launch.slurm_tasks ranks.launch.tasks_per_node ranks.launch.variable ranks.library.abi
    ranks.library.cuda_aware ranks.library.cuda_evidence ranks.library.name ranks.library.path
    ranks.library.size ranks.library.standard ranks.library.thread_level ranks.library.vendor
    ranks.nccl.built ranks.nccl.file ranks.nccl.problem ranks.nccl.version ranks.node
    ranks.package ranks.pid ranks.python ranks.rank ranks.settings.OMP_NUM_THREADS
    ranks.versions.mpi4py ranks.versions.mpidist ranks.versions.numpy
    """
}


def complete() -> JobFacts:
    """Return facts in which nothing is left out."""
    failure = Failure(kind="died", reason="r", output=("o",))
    job = a_job(2, 1, node={"leftovers": (LEFTOVER,), "gpus": (GPU,)})
    return dataclasses.replace(job, failure=failure)


def names(value: Any, prefix: str = "") -> set[str]:
    """Return the names of all values inside one, without their places in lists."""
    if isinstance(value, dict):
        found = [
            names(inner, f"{prefix}.{name}" if prefix else name) for name, inner in value.items()
        ]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        found = [names(inner, prefix) for inner in value]
    else:
        return {prefix}
    return set().union(*found)


def test_the_names_of_the_json_form_are_kept() -> None:
    fields = as_fields(complete(), [warning("c", "w", "c")], date="d")
    assert fields["format"] == FORMAT
    assert names(json.loads(json.dumps(fields))) >= set(NAMES[FORMAT].split())


def test_the_json_form_is_read_again() -> None:
    job = complete()
    fields = json.loads(json.dumps(dataclasses.asdict(job)))
    assert JobFacts.from_fields(fields, job.failure) == job


def test_without_mpi_it_is_read_again() -> None:
    job = a_job(1, rank={"library": None}, node={"shared": None})
    assert JobFacts.from_fields(json.loads(json.dumps(dataclasses.asdict(job))), None) == job
