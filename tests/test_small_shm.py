"""A /dev/shm of 1 MiB: less than an MPI library wants, and less than one array needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests._ranks.launcher import MARK, clean_environment, end_job

pytestmark = [pytest.mark.mpirun, pytest.mark.timeout(100)]

ROOT = Path(__file__).parents[1]
MOUNT = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'

SETTINGS = {
    # As docs/cluster.rst says: without it, MPICH takes 1 MiB per rank and dies if there is less.
    "MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS": "8",
    # Inside a namespace of users everybody is root.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}

SCRIPT = """
import os

import numpy as np

import mpidist
from mpidist import nn
from mpidist.parallel import DDP

disk = os.statvfs("/dev/shm")
assert disk.f_blocks * disk.f_frsize == 1 << 20

world = mpidist.init(timeout=60)
size, rank = world.size, world.rank
others = np.arange(size)

for dtype in (np.float32, np.float64, np.int16):
    x = world.empty(1 << 20, dtype)
    x[...] = rank + 1
    mpidist.all_reduce(x, world, out=x)
    assert (x == size * (size + 1) // 2).all()

x = np.full(300_000, rank, np.float64)
assert (mpidist.all_reduce(x, world) == others.sum()).all()
assert (mpidist.iall_reduce(x, world, op=mpidist.MAX).wait() == size - 1).all()
assert (mpidist.broadcast(x, world, root=size - 1) == size - 1).all()
gathered = mpidist.all_gather(x, world)
assert (gathered.reshape(size, -1) == others[:, None]).all()
assert (mpidist.reduce_scatter(gathered, world) == rank * size).all()
assert (mpidist.all_to_all(gathered, world) == rank).all()
y = mpidist.sendrecv(x, world, dst=(rank + 1) % size, src=(rank - 1) % size)
assert (y == (rank - 1) % size).all()
assert mpidist.all_gather_object({"rank": rank}, world) == [{"rank": r} for r in range(size)]

def batch(rank):
    rng = np.random.default_rng(rank)
    return rng.standard_normal((4, 700)), rng.standard_normal((4, 700))

model = nn.Linear(700, 700, rng=0, dtype=np.float64)
with DDP(model, world) as ddp:
    for _ in range(3):
        inputs, dy = batch(rank)
        y, ctx = ddp.forward(inputs, nn.Mode(training=True))
        ddp.backward(ctx, dy)
        expected = np.mean([b.T @ a for a, b in map(batch, others)], axis=0)
        np.testing.assert_allclose(model.weight.grad, expected, rtol=1e-12, atol=1e-12)
        for parameter in model.parameters():
            parameter.zero_grad()
os.write(1, f"all right on rank {rank}\\n".encode())
"""


def with_small_shm() -> list[str]:
    """Return the start of a command that gets a /dev/shm of its own, or skip the test."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare (util-linux), so that no test can mount a /dev/shm of its own")
    refused = ""
    for flags in ("-m", "-rm"):
        command = [unshare, flags, "sh", "-c", MOUNT, "sh"]
        tried = subprocess.run(
            [*command, "true"], capture_output=True, text=True, check=False, timeout=20
        )
        if tried.returncode == 0:
            return command
        refused = tried.stderr.strip()
    pytest.skip(f"the kernel lets nobody mount a /dev/shm of one's own here: {refused}")


@pytest.mark.parametrize("size", [2, 4])
def test_everything_works(size, tmp_path, mpirun):
    small = with_small_shm()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*small, *mpirun, "-n", str(size), sys.executable, str(script)],
        env=clean_environment() | SETTINGS | {"PYTHONPATH": path, MARK: str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=80)[0].decode(errors="replace")
    finally:
        end_job(process, tmp_path)
    assert process.returncode == 0, output
    for rank in range(size):
        assert f"all right on rank {rank}" in output
    assert output.count("no memory shared by the ranks of this node") == 1, output
