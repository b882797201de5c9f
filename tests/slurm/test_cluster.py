"""The tests' own Slurm leaves nothing behind."""

from __future__ import annotations

import contextlib
import subprocess

import pytest

from tests._ranks.launcher import marked_processes
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


class Surprise(Exception):
    """What a test may raise."""


def test_all_of_it_is_gone_after_a_failure_in_the_middle_of_a_job(cluster: Cluster) -> None:
    """`cluster` is another one, beside it: ports and folders are each one's own."""
    with contextlib.suppress(Surprise), Cluster() as own:
        # Deaf to SIGTERM, and one of them out of sight of whoever follows the parents.
        job = own.submit("-N2", '--wrap=trap "" TERM; setsid sleep 600 & srun -N2 sleep 600')
        job.wait_until(lambda: len(sleepers(own)) == 3, "three sleepers")
        raise Surprise
    assert marked_processes(str(own.directory)) == []
    assert not own.directory.exists()
    assert cluster.run("sinfo", "--noheader", "--format=%D").stdout == "2\n"


def sleepers(cluster: Cluster) -> list[int]:
    pids = [str(pid) for pid in marked_processes(str(cluster.directory))]
    shown = subprocess.run(
        ["ps", "-o", "pid=,comm=", "-p", ",".join(pids)],
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    return [int(line.split()[0]) for line in shown.stdout.splitlines() if "sleep" in line]


def test_what_cannot_start_is_gone_too(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.slurm.cluster.NODES", ("n0", "nowhere"))
    own = Cluster()
    with pytest.raises(RuntimeError, match="no two idle nodes"):
        own.__enter__()
    assert marked_processes(str(own.directory)) == []
    assert not own.directory.exists()
