from __future__ import annotations

import itertools
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mpidist import Box, ShardedArray, checkpoint
from mpidist.arrays.boxes import split_evenly
from mpidist.checkpoint.format.manifest import ALIGNMENT
from mpidist.checkpoint.loading import load as loading
from mpidist.checkpoint.loading import reading
from mpidist.checkpoint.loading.reading import BoxRequest, Files, read_items
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointMissingShardError,
    CheckpointNotFoundError,
    DistributedError,
    UnsupportedOperationError,
)
from mpidist.testing import run_ranks
from tests.checkpoint.cases import bits, random_array

BIG = random_array(np.dtype(np.float32), (2048, 2048), 5)


def cut(size, rank, dimension, shape=(2048, 2048)):
    """An even part of an array, along a dimension."""
    start, length = split_evenly(shape[dimension], size)[rank]
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dimension], sizes[dimension] = start, length
    return Box(tuple(offsets), tuple(sizes))


def piece_of(array, box):
    return ShardedArray(array.shape, array.dtype, {box: array[box.slices].copy()})


@pytest.fixture(scope="module")
def in_rows(tmp_path_factory):
    """BIG, saved by four ranks that hold rows of it, and some small things."""
    path = tmp_path_factory.mktemp("rows")

    def body(group):
        state = {
            "big": piece_of(BIG, cut(4, group.rank, 0)),
            "small": {"a": np.arange(5), "b": np.arange(6.0).reshape(2, 3)},
            "epoch": 3,
            "config": {"lr": [0.1]},
        }
        checkpoint.save(path, state, group, step=7, metadata="meta")

    run_ranks(4, body)
    return path


@dataclass
class Reads:
    """Where bytes have been read, by rank."""

    places: list[tuple[str, str, int, int]] = field(default_factory=list)

    @property
    def nbytes(self):
        return sum(length for *_, length in self.places)

    def of(self, rank):
        return sum(length for thread, *_, length in self.places if thread == f"rank-{rank}")


@pytest.fixture
def reads(monkeypatch):
    """Count the bytes that the system reads out of files of arrays."""
    noted = Reads()
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        noted.places.append((threading.current_thread().name, name, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return noted


def load_columns(group, path):
    box = cut(group.size, group.rank, 1)
    mine = ShardedArray(BIG.shape, BIG.dtype, {box: np.zeros(box.sizes, np.float32)})
    checkpoint.load(path, {"big": mine}, group)
    assert bits(mine.pieces[box]) == bits(BIG[box.slices].copy())


def test_a_node_reads_each_byte_once(in_rows, reads):
    run_ranks(4, load_columns, in_rows)
    assert reads.nbytes == BIG.nbytes
    places = sorted((name, offset, length) for _, name, offset, length in reads.places)
    for (name, offset, length), (other, later, _) in itertools.pairwise(places):
        assert name != other or offset + length <= later
    # And the ranks share the work.
    assert all(reads.of(rank) == BIG.nbytes // 4 for rank in range(4))


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (8, 4)])
def test_nodes_read_what_they_need(in_rows, reads, ranks, per_node):
    run_ranks(ranks, load_columns, in_rows, ranks_per_node=per_node)
    for node in range(2):
        read = sum(reads.of(rank) for rank in range(node * per_node, (node + 1) * per_node))
        assert read == BIG.nbytes // 2


def test_of_narrow_columns_whole_runs_are_read(in_rows, reads):
    """Of 2 KiB in each row, 4 KiB: what a file system reads of it anyway."""
    run_ranks(4, load_columns, in_rows, ranks_per_node=1)
    assert [reads.of(rank) for rank in range(4)] == [BIG.nbytes // 2] * 4


def test_what_all_want_is_read_once_per_node(in_rows, reads):
    def body(group):
        here = np.zeros_like(BIG)
        checkpoint.load(in_rows, {"big": here}, group)
        assert bits(here) == bits(BIG)

    run_ranks(3, body)
    assert reads.nbytes == BIG.nbytes


def test_uneven_columns_cost_little_more(in_rows, reads):
    """A cut inside chunks: 4 KiB more per row, at each side."""

    def body(group):
        box = Box((3, 700), (2000, 500))
        mine = ShardedArray(BIG.shape, BIG.dtype, {box: np.zeros(box.sizes, np.float32)})
        checkpoint.load(in_rows, {"big": mine}, group)
        assert bits(mine.pieces[box]) == bits(BIG[box.slices].copy())

    run_ranks(1, body)
    assert reads.nbytes <= (2000 * 4 + 64 * 4) * (500 + 2048)


def test_units_cover_what_is_wanted_once(in_rows):
    manifest = checkpoint.latest(in_rows).manifest
    wanted = [
        BoxRequest("big", Box((100, 0), (1000, 30))),
        BoxRequest("big", Box((90, 1000), (1000, 900))),
        BoxRequest("big", Box((95, 1100), (2, 1))),
        BoxRequest("small/a", Box((1,), (2,))),
        BoxRequest("small/a", Box((0,), (0,))),
    ]
    items = read_items(manifest, wanted)
    painted = np.zeros(BIG.shape, int)
    for item in items:
        stored = manifest.arrays[item.name].boxes[item.number].box
        assert item.region.count * manifest.arrays[item.name].dtype.itemsize == item.nbytes
        if item.name == "big":
            painted[stored.slices][item.region.slices] += 1
    assert painted.max() == 1
    for want in wanted[:3]:
        assert (painted[want.box.slices] == 1).all()
    assert painted[:64].max() == 0
    assert [item.name for item in items].count("small/a") == 1
    places = [(item.file, item.byte) for item in items]
    assert places == sorted(places)


def test_shares_are_equal_and_fit_the_slots(in_rows):
    manifest = checkpoint.latest(in_rows).manifest
    items = read_items(manifest, [BoxRequest("big", Box.whole(BIG.shape))])
    for size in (1, 3, 4):
        shares = loading.batches(items, size)
        sums = [sum(item.nbytes for batch in share for item in batch) for share in shares]
        assert sum(sums) == BIG.nbytes
        assert max(sums) - min(sums) <= 2 * max(item.nbytes for item in items)
        for share in shares:
            assert all(sum(map(loading.aligned_size, batch)) <= loading.BUFFER for batch in share)


# -- what does not fit -----------------------------------------------------------------------------


class Counter:
    def __init__(self):
        self.arrays = {"a": np.full(5, -1), "b": np.full((2, 3), -1.0)}

    def state_dict(self):
        return self.arrays

    def load_state_dict(self, state):
        raise AssertionError("must not be called")


def box_of(*sizes):
    return ShardedArray((2048, 2048), "f4", {Box((0, 0), sizes): np.full(sizes, -1, "f4")})


WRONG = {
    "a shape": ({"small/a": np.full(6, -1)}, r"small/a: expected int64\[6\], saved was int64\[5\]"),
    "a dtype": ({"small/a": np.full(5, -1.0)}, r"small/a: expected float64\[5\], saved was int64"),
    "a name": ({"small/c": np.full(5, -1)}, "small/c: not in it"),
    "a value": ({"epochs": 0}, "epochs: not in it"),
    "an array for a value": ({"epoch": np.full((), -1)}, "epoch: not in it"),
    "a value for an array": ({"small/a": 3}, "small/a: not in it"),
    "a global shape": (
        {"big": ShardedArray((2048, 2047), "f4", {})},
        r"big: expected float32\[2048, 2047\]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_was_not_saved_changes_nothing(in_rows, wrong):
    changes, words = WRONG[wrong]

    def body(group):
        good = {"small": {"b": np.full((2, 3), -1.0)}, "big": box_of(30, 4)}
        state = good | changes if group.rank == 1 else good
        with pytest.raises(CheckpointIncompatibleError, match=words) as caught:
            checkpoint.load(in_rows, state, group)
        assert "rank 1" in str(caught.value)
        for array in (good["small"]["b"], *good["big"].pieces.values()):
            assert (array == -1).all()
        checkpoint.load(in_rows, good, group)
        np.testing.assert_array_equal(good["small"]["b"], np.arange(6.0).reshape(2, 3))
        return str(caught.value)

    assert len(set(run_ranks(3, body))) == 1


def test_an_object_must_have_all_arrays_that_were_saved_of_it(in_rows):
    def body(group):
        less = Counter()
        del less.arrays["b"]
        with pytest.raises(CheckpointIncompatibleError, match="small/b: saved, but 'small' has no"):
            checkpoint.load(in_rows, {"small": less}, group)
        assert (less.arrays["a"] == -1).all()

    run_ranks(2, body)


def test_read_only_arrays_are_refused_before_anything_changes(in_rows):
    def body(group):
        a, b = np.full(5, -1), np.full((2, 3), -1.0)
        b.flags.writeable = False
        with pytest.raises(CheckpointIncompatibleError, match="'small/b' is a read-only array"):
            checkpoint.load(in_rows, {"small": {"a": a, "b": b}}, group)
        assert (a == -1).all()

    run_ranks(2, body)


def test_what_cannot_be_kept_cannot_be_loaded(in_rows):
    def body(group):
        state = {"small": {"a": {1} if group.rank else np.full(5, -1)}}
        with pytest.raises(UnsupportedOperationError, match=r"rank 1: .* builtins\.set"):
            checkpoint.load(in_rows, state, group)

    run_ranks(2, body)


@pytest.mark.parametrize("step", [8, "newest", None, -1])
def test_a_step_that_is_not_there(in_rows, step):
    def body(group):
        with pytest.raises(CheckpointNotFoundError):
            checkpoint.load(in_rows, {}, group, step=step)

    run_ranks(2, body)


def test_only_a_part_may_be_loaded(in_rows):
    def body(group):
        a = np.zeros(5, int)
        state = {"small": {"a": a}} if group.rank else {"big": box_of(1, 2048)}
        found = checkpoint.load(in_rows, state, group, step=7)
        assert (found.step, found.metadata, found.values["config"]) == (7, "meta", {"lr": [0.1]})
        if group.rank:
            np.testing.assert_array_equal(a, np.arange(5))
        else:
            (row,) = state["big"].pieces.values()
            assert bits(row) == bits(BIG[:1])

    run_ranks(3, body)
    assert checkpoint.load_full(in_rows, names=["epoch"]) == {"epoch": 3}
    full = checkpoint.load_full(in_rows, names=["small/b", "epoch"])
    assert list(full) == ["small/b", "epoch"]
    with pytest.raises(CheckpointIncompatibleError, match=r"has nothing named \['c'\]"):
        checkpoint.load_full(in_rows, names=["epoch", "c"])


def damaged(path, how):
    """Spoil the file of rank 2."""
    directory = path / "step-000001"
    found = checkpoint.latest(path)
    dataset = found.manifest.files[2].datasets["packed/float64"]
    file = directory / "rank-00002.h5"
    if how == "missing":
        file.unlink()
    elif how == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    else:
        data = bytearray(file.read_bytes())
        data[dataset.byte + 3] ^= 16
        file.write_bytes(data)


@pytest.mark.parametrize("per_node", [None, 1, 2])
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("missing", CheckpointMissingShardError),
        ("cut off", CheckpointCorruptError),
        ("flipped", CheckpointCorruptError),
    ],
)
def test_damage_is_the_same_error_on_all_ranks(tmp_path, how, error, per_node):
    x = np.arange(300.0).reshape(30, 10)
    run_ranks(
        3,
        lambda g: checkpoint.save(
            tmp_path, {"x": piece_of(x, cut(3, g.rank, 0, x.shape))}, g, step=1
        ),
    )
    damaged(tmp_path, how)

    def body(group):
        mine = piece_of(np.zeros_like(x), cut(group.size, group.rank, 0, x.shape))
        with pytest.raises(error, match=r"rank-00002\.h5") as caught:
            checkpoint.load(tmp_path, {"x": mine}, group)
        return str(caught.value)

    assert len(set(run_ranks(4, body, ranks_per_node=per_node))) == 1
    with pytest.raises(error, match=r"rank-00002\.h5"):
        checkpoint.load_full(tmp_path)


def test_what_is_not_verified_is_not_compared(tmp_path):
    run_ranks(
        3,
        lambda g: checkpoint.save(
            tmp_path, {"x": piece_of(np.ones((30, 10)), cut(3, g.rank, 0, (30, 10)))}, g, step=1
        ),
    )
    damaged(tmp_path, "flipped")
    full = checkpoint.load_full(tmp_path, verify=False)
    assert np.count_nonzero(full["x"] != 1) == 1


def test_a_rank_that_cannot_copy_tells_the_others(in_rows, monkeypatch):
    """Not only what files may raise: the ranks of a node would wait for it."""
    scatter = loading.scatter

    def failing(manifest, item, data, targets):
        if threading.current_thread().name == "rank-1":
            raise MemoryError("no more of it")
        scatter(manifest, item, data, targets)

    monkeypatch.setattr(loading, "scatter", failing)
    monkeypatch.setattr(reading, "MAX_READ", 1 << 18)
    monkeypatch.setattr(loading, "BUFFER", 1 << 19)  # so that they meet several times

    def body(group):
        with pytest.raises(CheckpointError, match="rank 1: MemoryError: no more of it") as caught:
            checkpoint.load(in_rows, {"big": np.zeros_like(BIG)}, group)
        return str(caught.value)

    assert len(set(run_ranks(3, body, timeout=10.0))) == 1


def test_files_are_closed(in_rows):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        checkpoint.load_full(in_rows, names=["small/a"])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    manifest = checkpoint.latest(in_rows).manifest
    with Files(checkpoint.latest(in_rows).directory, manifest) as files:
        (item,) = read_items(manifest, [BoxRequest("small/a", Box((0,), (5,)))])
        files.load([item], [np.empty(64, np.uint8)])
        assert files.read == item.nbytes == 40


def test_many_columns_are_loaded_into_many_others(tmp_path):
    """Neither who reads nor who copies looks at all of them for each."""
    data = np.arange(4 * 3000, dtype=np.float32).reshape(4, 3000)
    saved = {Box((0, n), (4, 1)): data[:, n : n + 1] for n in range(3000)}
    found = np.zeros_like(data)
    wanted = {
        Box((row, n), (2, 1)): found[row : row + 2, n : n + 1]
        for n in range(3000)
        for row in (0, 2)
    }

    def state(pieces):
        return {"x": ShardedArray(data.shape, data.dtype, pieces)}

    before = time.process_time()
    run_ranks(1, lambda g: checkpoint.save(tmp_path, state(saved), g, step=1))
    run_ranks(1, lambda g: checkpoint.load(tmp_path, state(wanted), g))
    assert time.process_time() - before < 10
    np.testing.assert_array_equal(found, data)


# -- many ------------------------------------------------------------------------------------------

MANY = int(os.environ.get("MPIDIST_TEST_ARRAYS", "2000"))


@pytest.mark.timeout(600)
def test_many_small_arrays(tmp_path):
    """Of 100,000: ``MPIDIST_TEST_ARRAYS=100000 python -m pytest ... -k many_small``."""
    data = np.random.default_rng(1).normal(size=(MANY, 6)).astype(np.float32)

    def save(group):
        state = {f"layer{n}/w": data[n] for n in range(MANY)}
        checkpoint.save(tmp_path, state, group, step=1)

    def load(group):
        state = {f"layer{n}/w": np.zeros(6, np.float32) for n in range(MANY)}
        checkpoint.load(tmp_path, state, group)
        np.testing.assert_array_equal(np.stack(list(state.values())), data)

    run_ranks(2, save, timeout=300.0)
    run_ranks(2, load, timeout=300.0)
    found = checkpoint.latest(tmp_path)
    assert all(
        set(file.datasets) == {"packed/float32", "mpidist id"} for file in found.manifest.files
    )
    sizes = [file.datasets["packed/float32"].shape[0] for file in found.manifest.files]
    assert sum(sizes) == 6 * MANY
    assert max(sizes) - min(sizes) <= 6
    files = sum((found.directory / file.name).stat().st_size for file in found.manifest.files)
    assert files < data.nbytes + 2 * (ALIGNMENT + 4096)


@pytest.mark.parametrize("per_node", [2, 1])
def test_a_rank_that_cannot_tell_what_to_read_keeps_nobody_waiting(in_rows, monkeypatch, per_node):
    class Own(DistributedError):
        """Known to one program only."""

    divided = loading.divided_read_items

    def failing(manifest, wanted, reader):
        if threading.current_thread() in culprits:
            raise Own("mine")
        return divided(manifest, wanted, reader)

    culprits = set()
    monkeypatch.setattr(loading, "divided_read_items", failing)

    def body(group):
        if group.rank == 1:
            culprits.add(threading.current_thread())
        with pytest.raises(CheckpointError, match="rank 1: mine"):
            checkpoint.load(in_rows, {"small/a": np.zeros(5, int)}, group, step=7)

    run_ranks(2, body, ranks_per_node=per_node)
