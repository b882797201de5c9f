"""Processes that are ranks for many tests, so that a test costs no start of an interpreter."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from tests.nccl_stub import raw

__all__ = ["Team"]

_SECONDS = 20.0


class Team:
    """Up to `size` ranks, each a process; a job is a module's function, called on all of them.

    Parameters
    ----------
    size : int
        Processes to start.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def call(self, size: int, job: Callable[..., Any], *args: Any, **variables: str) -> list[Any]:
        """Return what ``job(rank, size, *args)`` returns on each of the first `size` ranks.

        `variables` are in the environment while it runs.
        """
        self.post(size, job, *args, **variables)
        return [self.answer(rank) for rank in range(size)]

    def post(self, size: int, job: Callable[..., Any], *args: Any, **variables: str) -> None:
        """Begin a call; `answer` is asked for each rank's result."""
        if not self.processes:
            self._start()
        for rank in range(size):
            self._pipes[rank].send((job, (rank, size, *args), variables))

    def run(self, size: int, job: Callable[..., Any], *args: Any, **variables: str) -> list[Any]:
        """Return what ``job(communicator, *args)`` returns on each rank of a new communicator."""
        (made,) = self.call(1, _make_id)
        return self.call(size, _with_communicator, made, job, *args, **variables)

    def answer(self, rank: int) -> Any:
        """Return what a rank's job has returned; kill the team if the job failed or hangs."""
        if not self._pipes[rank].poll(_SECONDS):
            self.close()
            raise AssertionError(f"rank {rank} hung; the team was killed")
        failed, answer = self._pipes[rank].recv()
        if failed:
            self.close()  # the others may wait for this rank
            raise AssertionError(f"rank {rank}:\n{answer}")
        return answer

    def close(self) -> None:
        """Kill the processes; the next call starts new ones."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self.processes, self._pipes = [], []


def _serve(pipe: Connection, rank: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        try:
            job, args, variables = pipe.recv()
        except EOFError:
            return
        os.environ.update(variables)
        try:
            answer = False, job(*args)
        except BaseException:
            answer = True, traceback.format_exc()
        for name in variables:
            del os.environ[name]
        pipe.send(answer)


def _make_id(rank: int, size: int) -> bytes:
    return raw.unique_id()


def _with_communicator(
    rank: int, size: int, made: bytes, job: Callable[..., Any], *args: Any
) -> Any:
    raw.library().nccl_stub_set_device(rank)
    communicator = raw.Communicator.of_rank(size, made, rank)
    answer = job(communicator, *args)
    communicator.destroy()
    return answer
