"""The pytest hooks of `mpirun -n 4 python -m pytest --with-mpi`: no outer run watches here."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest

_GRACE = 10.0  # seconds that ranks have to end a test which has failed on this rank


@dataclass(frozen=True, order=True)
class Ranks:
    """The ranks that an item asks for.

    Attributes
    ----------
    count : int
        All of them.
    hosts : int
        Number of pretended hosts; 0 if they run on this machine, as it is.
    """

    count: int
    hosts: int = 0


def ranks_of(item: pytest.Item) -> Ranks | None:
    """Return the ranks that an item asks for, or None for a test that needs none."""
    callspec = getattr(item, "callspec", None)
    ranks: Ranks | None = callspec.params.get("rank_count") if callspec else None
    return ranks


def deadline_of(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    if mark is None:
        return float(item.config.getini("ranks_timeout"))
    return float(mark.args[0] if mark.args else mark.kwargs["timeout"])


class DirectPlugin:
    """Run the tests marked for this world size; end the job when the ranks' ways part."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD.Dup()
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._nodes = self._comm.allreduce(int(node.rank == 0))
        node.Free()
        self._failed = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the tests for this world, and those that only carry pytest-mpi's own mark."""
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item in items:
            ranks = ranks_of(item)
            if ranks is None:
                fits = item.get_closest_marker("mpi") is not None
            else:
                fits = ranks.count == self._comm.size and ranks.hosts in (0, self._nodes)
            (kept if fits else dropped).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """End this rank at the deadline, and let no rank run on alone after a failure."""
        self._failed = False
        faulthandler.dump_traceback_later(deadline_of(item), exit=True, file=2)
        answer = yield
        faulthandler.cancel_dump_traceback_later()
        self._agree(item.nodeid)
        return answer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Show a failure at once: the other ranks may wait for this one for ever."""
        if report.failed:
            self._failed = True
            self._say(report.longreprtext)

    def _agree(self, test: str) -> None:
        """See [Note: the gate]; here the ranks meet in a collective of a communicator of ours."""
        outcomes = bytearray(self._comm.size)
        request = self._comm.Iallgather(bytes([self._failed]), outcomes)
        deadline = time.monotonic() + _GRACE
        while not request.Test():
            if self._failed and time.monotonic() > deadline:
                self._say(f"{test} failed here and other ranks are still in it: the job ends")
                self._comm.Abort(1)
            time.sleep(0.001)
        if len(set(outcomes)) > 1:
            self._say(f"{test} failed on some ranks only: the job ends")
            self._comm.Abort(1)

    def _say(self, text: str) -> None:
        lines = "".join(f"rank {self._comm.rank}: {line}\n" for line in text.splitlines())
        os.write(2, f"\n{lines}".encode())
