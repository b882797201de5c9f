"""The sizes from which on a path is taken: where they come from, and that all ranks have them."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.backends.crossover_file import machine_name, processor, read, write
from mpidist.backends.crossovers import NEVER, SMALL, Crossovers, choose, parse
from mpidist.backends.node.sequencer import supported
from mpidist.errors import CollectiveMismatchError
from mpidist.job.start import found_crossovers
from tests._ranks.launcher import clean_environment

ROOT = str(Path(__file__).parents[2])


def test_text_gives_some_sizes_and_the_rest_have_their_defaults():
    assert parse("small=64, scratch = never") == Crossovers(small=64, scratch=NEVER)
    assert parse("registered=4096") == Crossovers(registered=4096)
    for wrong in ("", "small", "small=-1", "large=3", "small=1k", "small=1;scratch=2"):
        with pytest.raises(ValueError, match="expected sizes in bytes such as"):
            parse(wrong)
    with pytest.raises(ValueError, match=f"small at most {SMALL}"):
        parse(f"small={SMALL + 1}")


def test_the_next_smaller_number_of_ranks_decides():
    table = {2: Crossovers(small=2), 8: Crossovers(small=8)}
    assert [choose(table, ranks).small for ranks in (1, 2, 7, 8, 100)] == [2, 2, 2, 8, 8]
    assert choose({}, 4) == Crossovers()


def test_a_file_keeps_every_machine_and_number_of_ranks(tmp_path):
    path = tmp_path / "deep" / "crossovers.json"
    here, there = machine_name("MPI 1"), machine_name("MPI 2")
    assert processor() in here
    for number in (2, 4):
        write(path, here, number, Crossovers(small=number))
    write(path, there, 2, Crossovers(scratch=NEVER))
    assert read(path, here) == {2: Crossovers(small=2), 4: Crossovers(small=4)}
    assert read(path, there) == {2: Crossovers(scratch=NEVER)}
    assert read(path, "a stranger") == {}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


DAMAGED = [
    "{",
    "[]",
    "[" * 100_000,
    "\x00\x01",
    '{"here": 3}',
    '{"here": {"2": {"tiny": 1}}}',  # of a version with other fields
    '{"here": {"x": {}}}',
    '{"here": {"-2": {}}}',
    '{"here": {"2": {"small": NaN}}}',
    '{"here": {"2": {"small": -1}}}',
    '{"here": {"2": {"scratch": 1.5}}}',
    '{"here": {"2": {"scratch": Infinity}}}',
    '{"here": {"2": {"registered": "1"}}}',
    '{"here": {"2": {"registered": 4611686018427387905}}}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_file_of_something_else_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "crossovers.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"crossovers\.json does not hold .* remove it"):
        read(path, "here")
    write(path, "here", 2, Crossovers(small=3))
    assert read(path, "here") == {2: Crossovers(small=3)}


def forbid(path):
    path.write_text("{}")
    path.chmod(0)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_text("{"), "does not hold what"),
        (lambda path: path.mkdir(), "it is no regular file"),
        (os.mkfifo, "it is no regular file"),
        (forbid, "Permission denied"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=["torn", "directory", "fifo", "unreadable", "loop"],
)
def test_a_cache_that_cannot_be_used_is_left_out_and_reported(tmp_path, monkeypatch, damage, told):
    path = tmp_path / "mpidist" / "crossovers.json"
    path.parent.mkdir()
    damage(path)
    if os.geteuid() == 0 and "Permission" in told:  # who may read everything
        read_text = Path.read_text

        def refuse(self, **options):
            if self == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return read_text(self, **options)

        monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MPIDIST_CROSSOVERS", raising=False)
    found = found_crossovers("MPI 1")
    assert (found.table, found.source) == ({}, "")
    assert told in found.problem
    assert str(path) in found.problem


def test_without_a_home_directory_there_is_no_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-at-all/cache")
    monkeypatch.delenv("MPIDIST_CROSSOVERS", raising=False)
    assert found_crossovers("MPI 1") == ({}, "", "")


@pytest.mark.skipif(not supported(), reason="this processor has no direct path")
@pytest.mark.ranks(2, 4)
def test_every_path_gives_the_sum_in_rank_order(world):
    group = world.duplicate("paths")
    paths = (
        Crossovers(small=SMALL, registered=NEVER, scratch=NEVER),
        Crossovers(small=0, registered=0, scratch=NEVER),
        Crossovers(small=0, registered=NEVER, scratch=0),
    )
    for count in (1, 7, 1023, SMALL // 8, 600_001):
        parts = [np.random.default_rng([rank]).standard_normal(count) for rank in range(world.size)]
        expected = parts[0].copy()
        for part in parts[1:]:
            expected += part
        registered = group.empty(count, np.float64)
        for sizes in paths:
            group.crossovers = sizes
            assert group.crossovers == sizes
            if count * 8 > sizes.small and sizes.registered == sizes.scratch == NEVER:
                continue  # that would be the library's order
            registered[...] = parts[world.rank]
            mpidist.all_reduce(registered, group, out=registered)
            assert registered.tobytes() == expected.tobytes(), (count, sizes)
            if sizes.scratch == NEVER and sizes.small == 0:
                continue
            given = parts[world.rank].copy()
            assert mpidist.all_reduce(given, group).tobytes() == expected.tobytes(), (count, sizes)
            assert given.tobytes() == parts[world.rank].tobytes()
    assert group.duplicate("child").crossovers == paths[-1]
    group.close()


_SHOW = """
import mpidist
world = mpidist.init()
world.print(world.crossovers.small, world.split(0).crossovers.scratch)
"""


@pytest.mark.mpirun
def test_init_takes_what_rank_0_finds(mpirun, tmp_path):
    from mpidist.backends.mpi.library import library_name, load_mpi

    def run(**variables):
        environment = clean_environment() | {"PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(tmp_path)}
        environment["MPIDIST_CROSSOVERS"] = ""
        command = [*mpirun, "-n", "2", sys.executable, "-c", _SHOW]
        return subprocess.run(
            command,
            check=False,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert run(MPIDIST_CROSSOVERS="small=77,scratch=12345").stdout.count("77 12345") == 2
    default = Crossovers()
    cache = tmp_path / "mpidist" / "crossovers.json"
    cache.parent.mkdir()
    cache.write_text('{"torn')
    result = run()
    assert result.stdout.count(f"{default.small} {default.scratch}") == 2
    assert result.stderr.count(f"{cache} does not hold what") == 1
    name = machine_name(library_name(load_mpi()))
    write(cache, name, 2, Crossovers(small=5, scratch=6))
    assert run().stdout.count("5 6") == 2
    (tmp_path / "bad.json").write_text("[1]")
    for wrong in ("small=x", str(tmp_path / "bad.json"), str(tmp_path / "none.json")):
        result = run(MPIDIST_CROSSOVERS=wrong)
        assert result.returncode != 0
        assert "LaunchError: init: MPIDIST_CROSSOVERS of rank 0 cannot be used" in result.stderr


def _wait_for_all_reduce(x, group):
    return mpidist.iall_reduce(x, group).wait()


@pytest.mark.skipif(not supported(), reason="this processor has no direct path")
@pytest.mark.ranks(2, 3)
def test_ranks_that_go_different_ways_are_told_and_get_no_wrong_sums(world):
    group = world.duplicate("ways")
    x = np.full(1000, 1.0)
    ways = (
        Crossovers(small=SMALL, registered=0, scratch=NEVER),
        Crossovers(small=0, registered=0, scratch=0),
        Crossovers(small=0, registered=0, scratch=NEVER),
    )
    for mine in ways:
        for others in ways:
            group.crossovers = mine if group.rank == 0 else others
            if mine == others:
                assert (mpidist.all_reduce(x, group) == group.size).all()
                continue
            with pytest.raises(CollectiveMismatchError, match="have the same crossovers"):
                mpidist.all_reduce(x, group)
    for way in ways:
        group.crossovers = way
        call = mpidist.all_reduce if group.rank == 0 else _wait_for_all_reduce
        with pytest.raises(
            CollectiveMismatchError,
            match="rank 0 called all_reduce",
        ):
            call(x, group)
    assert (x == 1).all()
    group.close()


@pytest.mark.skipif(not supported(), reason="this processor has no direct path")
@pytest.mark.ranks(2)
def test_making_room_for_sums_has_a_deadline(world, monkeypatch):
    group = world.duplicate("room")
    group.crossovers = Crossovers(small=0, registered=NEVER, scratch=0)
    backend, watched = group.transport, []
    share = backend.node_memory._share

    def spy(nbytes):
        watched.append(backend.inside)  # what the watchdog sees
        return share(nbytes)

    monkeypatch.setattr(backend.node_memory, "_share", spy)
    assert (mpidist.all_reduce(np.full(1000, 1.0), group) == 2).all()
    [(waiter, _)] = watched
    assert waiter.operation.startswith("all_reduce #")
    group.close()


def _shared_bytes():
    """Bytes that this process maps of memory that the ranks share."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/shm/#" in line or "/dev/shm/mpidist-" in line:
            start, stop = (int(word, 16) for word in line.split()[0].split("-"))
            total += stop - start
    return total


@pytest.mark.skipif(not supported(), reason="this processor has no direct path")
@pytest.mark.ranks(2)
def test_a_closed_group_gives_its_room_back_at_once(world):
    gc.collect()
    before = _shared_bytes()
    group = world.duplicate("closed")
    group.crossovers = Crossovers(small=0, registered=NEVER, scratch=0)
    gc.disable()
    try:
        mpidist.all_reduce(np.full(1000, 1.0), group)
        assert _shared_bytes() > before + (3 << 20)
        group.close()
        assert _shared_bytes() < before + (1 << 20)
    finally:
        gc.enable()
