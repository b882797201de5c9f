"""Ranks that srun started on two nodes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

WHERE = """
import json, os
import mpidist

with mpidist.init() as world:
    node, cross = world.node_group(), world.cross_group()
    print("RANK " + json.dumps({
        "node": [world.node_rank, world.num_nodes, os.environ["SLURMD_NODENAME"]],
        "local": [world.local_rank, world.local_size],
        "slurm": [int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_LOCALID"])],
        "rank": [world.rank, world.size, int(os.environ["SLURM_PROCID"])],
        "node group": [world.rank_of(rank) for rank in node.ranks],
        "cross group": None if cross is None else [world.rank_of(rank) for rank in cross.ranks],
    }), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def told(output: str) -> list[dict[str, Any]]:
    """Return what the ranks have printed, in the order of the ranks."""
    found = [json.loads(line) for line in re.findall(r"RANK (\{.*?\})", output)]
    return sorted(found, key=lambda ranks: ranks["rank"])


@pytest.mark.parametrize("tasks", [[2, 2], [3, 1]])
def test_ranks_are_on_both_nodes_and_know_it(pmi2: Cluster, script: Path, tasks: list[int]) -> None:
    script.write_text(WHERE)
    each = ["--ntasks-per-node=2"] if tasks == [2, 2] else ["--distribution=block"]
    ended = pmi2.srun("-N2", f"-n{sum(tasks)}", *each, "--mpi=pmi2", sys.executable, str(script))
    assert ended.returncode == 0, ended.stdout
    ranks = told(ended.stdout)
    assert [r["rank"] for r in ranks] == [[i, 4, i] for i in range(4)]
    nodes = [node for node, count in enumerate(tasks) for _ in range(count)]
    places = [place for count in tasks for place in range(count)]
    assert [r["node"] for r in ranks] == [[node, 2, f"n{node}"] for node in nodes]
    assert [r["local"] for r in ranks] == [
        [place, tasks[node]] for node, place in zip(nodes, places, strict=True)
    ]
    assert [r["slurm"] for r in ranks] == [list(pair) for pair in zip(nodes, places, strict=True)]
    for node, place, rank in zip(nodes, places, ranks, strict=True):
        here = [r for r in range(4) if nodes[r] == node]
        across = [r for r in range(4) if places[r] == place]
        assert rank["node group"] == here
        assert rank["cross group"] == (across if place < min(tasks) else None)


def test_mpirun_inside_a_batch_script_starts_ranks_on_both_nodes(
    pmi2: Cluster, script: Path, mpirun: list[str]
) -> None:
    script.write_text(WHERE.replace('"SLURM_LOCALID"', '"SLURM_NODEID"').replace("PROC", "NODE"))
    command = " ".join([*mpirun, "-n", "4", sys.executable, str(script)])
    job = pmi2.submit("-N2", "--ntasks-per-node=2", f"--wrap={command}")
    assert job.wait() == "COMPLETED", job.output
    ranks = told(job.output)
    assert [r["node"][:2] for r in ranks] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    assert {r["node"][2] for r in ranks} == {"n0", "n1"}
    assert [r["cross group"] for r in ranks] == [[0, 2], [1, 3]] * 2


HIERARCHICAL = """
import json
import numpy as np
import mpidist
from mpidist.backends import algorithms

lanes = []
plain = algorithms.pipelined_all_reduce

def noted(lane, *args):
    lanes.append(lane.size)
    return plain(lane, *args)

algorithms.pipelined_all_reduce = noted  # what slices go through on their way to the other node
with mpidist.init() as world:
    parts = [
        np.random.default_rng(rank).standard_normal(500_003).astype(np.float32)
        for rank in range(world.size)
    ]
    expected = (parts[0] + parts[1]) + (parts[2] + parts[3])
    buffer = world.empty(parts[0].shape, np.float32)
    buffer[...] = parts[world.rank]
    mpidist.all_reduce(buffer, world, out=buffer)
    registered, same = list(lanes), bool((buffer == expected).all())
    x = parts[world.rank].copy()
    mpidist.all_reduce(x, world, out=x)
    same = same and bool((x == expected).all())
    ordinary = lanes[len(registered):]
    print("RANK " + json.dumps({
        "rank": world.rank, "registered": registered, "same": same, "ordinary": ordinary,
        "cross": world.cross_group().size,
    }), flush=True)
"""


def test_sums_go_by_nodes_and_equal_numpy(pmi2: Cluster, script: Path) -> None:
    script.write_text(HIERARCHICAL)
    ended = pmi2.srun(
        "-N2", "-n4", "--ntasks-per-node=2", "--mpi=pmi2", sys.executable, str(script)
    )
    assert ended.returncode == 0, ended.stdout
    ranks = told(ended.stdout)
    assert [r["rank"] for r in ranks] == [0, 1, 2, 3]
    for rank in ranks:
        # First each node's sum in the order of its ranks, then slice by slice between the nodes.
        assert rank["same"]
        assert set(rank["registered"]) == set(rank["ordinary"]) == {rank["cross"]} == {2}


@pytest.mark.mpirun
def test_without_a_pmi_that_fits_the_ranks_are_refused_with_the_cure(
    cluster: Cluster, script: Path, mpirun: list[str]
) -> None:
    script.write_text("import mpidist\nmpidist.init()\nprint('it runs')\n")
    for pmi in ("none", "pmi2") if "--oversubscribe" in mpirun else ("none",):  # Open MPI
        ended = cluster.srun("-N2", "-n2", f"--mpi={pmi}", sys.executable, str(script))
        assert ended.returncode == 1, ended.stdout
        assert "it runs" not in ended.stdout
        assert ended.stdout.count("mpidist.errors.LaunchError: init: ") == 2
        assert "started 2 processes" in ended.stdout
        assert "srun --mpi=pmix for Open MPI and srun --mpi=pmi2 for MPICH" in ended.stdout


@pytest.mark.mpirun
def test_plain_python_inside_a_batch_script_is_one_rank(cluster: Cluster, script: Path) -> None:
    script.write_text(
        "import os, sys\nimport mpidist\n"
        "with mpidist.init() as world:\n"
        "    print(f\"size {world.size}, SLURM_NTASKS {os.environ['SLURM_NTASKS']}\")\n"
        "    assert 'mpi4py' not in sys.modules\n"
    )
    job = cluster.submit("-N2", "-n4", f"--wrap={sys.executable} {script}")
    assert job.wait() == "COMPLETED", job.output
    assert job.output == "size 1, SLURM_NTASKS 4\n"
