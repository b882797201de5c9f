from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mpidist import Box, ShardedArray, checkpoint
from mpidist.checkpoint.saving import plan as planning
from mpidist.checkpoint.saving.save import saver_of
from mpidist.checkpoint.saving.writing import write_file
from mpidist.errors import (
    CheckpointError,
    CollectiveMismatchError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.testing import run_ranks

GOOD = {"x": np.arange(6.0), "epoch": 3}
TOP, LOWER = Box((0, 0), (2, 3)), Box((1, 0), (3, 3))


def sharded(box, shape=(4, 3), dtype=float):
    return ShardedArray(shape, dtype, {box: np.zeros(box.sizes, dtype)})


BAD = {
    "another shape": (
        {"x": np.zeros(7)},
        CollectiveMismatchError,
        r"'x' is float64\[7\] on rank 1",
    ),
    "another dtype": ({"x": np.zeros(6, int)}, CollectiveMismatchError, r"'x' is int64\[6\]"),
    "another value": ({"epoch": 4}, CollectiveMismatchError, "'epoch' is 4 on rank 1 and 3 on"),
    "objects": ({"x": np.array([{}])}, UnsupportedOperationError, "rank 1: .*'x' has dtype object"),
    "texts": ({"x": np.array(["a"])}, UnsupportedOperationError, "rank 1: .*'x' has dtype <U1"),
    "a set": ({"y": {1}}, UnsupportedOperationError, r"rank 1: .*'y' is a builtins\.set"),
    "a name": ({"../y": 1}, UnsupportedOperationError, r"rank 1: .*'\.\./y' cannot be a name"),
    "no mapping": (3, CheckpointError, "rank 1: AttributeError"),
    "a part of the whole": ({"x": sharded(Box((0,), (2,)), (6,))}, SizeMismatchError, "overlap"),
    "boxes that overlap": ({"s": sharded(LOWER)}, SizeMismatchError, "'s': .*overlap"),
    "a hole": ({"s": sharded(TOP)}, SizeMismatchError, "'s': 6 of 12 elements"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", [checkpoint.save, checkpoint.save_async])
def test_what_one_rank_gives_is_refused_on_all(tmp_path, bad, call):
    changes, error, words = BAD[bad]
    whole = isinstance(changes, dict) and "s" not in changes

    def body(group):
        # Of "s", rank 0 has the top; its other half is what rank 1 has, or has not.
        state = GOOD if whole or group.rank else GOOD | {"s": sharded(TOP)}
        if group.rank == 1:
            state = GOOD | changes if isinstance(changes, dict) else changes
        with pytest.raises(error, match=words) as caught:
            call(tmp_path, state, group, step=1)
        assert "step-000001" in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        checkpoint.save(tmp_path.parent / f"{tmp_path.name}-good", GOOD, group, step=1)
        return type(caught.value), str(caught.value)

    assert len(set(run_ranks(3, body))) == 1


def test_a_complete_checkpoint_is_not_overwritten(tmp_path):
    def body(group):
        checkpoint.save(tmp_path, GOOD, group, step=1)
        with pytest.raises(CheckpointError, match="never overwritten") as caught:
            checkpoint.save(tmp_path, {"x": np.zeros(1)}, group, step=1)
        return str(caught.value)

    assert len(set(run_ranks(2, body))) == 1
    np.testing.assert_array_equal(checkpoint.load_full(tmp_path)["x"], GOOD["x"])


def test_what_a_killed_save_has_left_is_replaced(tmp_path):
    left = tmp_path / "step-000001"
    left.mkdir(parents=True)
    (left / "rank-00007.h5.tmp").write_bytes(b"part")
    run_ranks(2, lambda group: checkpoint.save(tmp_path, GOOD, group, step=1))
    assert not (left / "rank-00007.h5.tmp").exists()
    np.testing.assert_array_equal(checkpoint.load_full(tmp_path)["x"], GOOD["x"])


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"])
def test_a_place_that_cannot_be(tmp_path, name):
    def body(group):
        words = []
        for call in (
            lambda: checkpoint.save(tmp_path / name, GOOD, group, step=1),
            lambda: checkpoint.load(tmp_path / name, GOOD, group),
        ):
            with pytest.raises(
                CheckpointError, match=r"rank 0|cannot be read|no complete"
            ) as caught:
                call()
            words.append(str(caught.value))
        return tuple(words)

    assert len(set(run_ranks(2, body, timeout=5.0))) == 1


def test_a_rank_that_does_not_see_the_directory_is_told_so(tmp_path, monkeypatch):
    """As where ``/tmp`` is another one on each node."""

    def elsewhere(path, *args):
        there = path if path.name == "rank-00000.h5" else tmp_path / "another node" / path.name
        return write_file(there, *args)

    def body(group):
        with pytest.raises(CheckpointError, match=r"rank 1 failed: .*; all ranks must see") as told:
            checkpoint.save(tmp_path, GOOD, group, step=1)
        return str(told.value)

    monkeypatch.setattr("mpidist.checkpoint.saving.save.write_file", elsewhere)
    assert len(set(run_ranks(2, body))) == 1


def test_arrays_may_be_read_only(tmp_path):
    x = np.arange(6.0)
    x.flags.writeable = False
    run_ranks(2, lambda group: checkpoint.save(tmp_path, {"x": x}, group, step=1))
    np.testing.assert_array_equal(checkpoint.load_full(tmp_path)["x"], np.arange(6.0))


def test_the_result_says_what_was_saved(tmp_path):
    def body(group):
        said = {"note": group.rank}  # rank 0's is kept
        return checkpoint.save(tmp_path, GOOD, group, step=1234567, metadata=said)

    for found in run_ranks(3, body):
        assert found.directory == tmp_path / "step-1234567"
        assert (found.step, found.world_size, found.nbytes) == (1234567, 3, 48)
        assert (found.metadata, found.values) == ({"note": 0}, {"epoch": 3})
        assert set(found.arrays) == {"x"}
        assert {"mpidist", "numpy", "h5py", "hdf5", "python"} <= set(found.versions)


LAYOUTS = {
    "as it is": lambda a: a,
    "transposed": lambda a: a.T,
    "every second": lambda a: a[:, ::2],
    "big-endian": lambda a: a.view(a.dtype.newbyteorder(">")),
    "with small ones": lambda a: a,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_beside_the_state(tmp_path, layout):
    """At most 8 MiB, however large the arrays are."""
    large = LAYOUTS[layout](np.ones((3000, 3000), np.float64))  # 69 MiB
    state = {"large": large, "half": large[1000:]}
    if layout == "with small ones":
        state |= {f"small{n}": np.ones(10_000 + n)[::2] for n in range(100)}

    def body(group):
        checkpoint.save(tmp_path, {"warm": np.ones((600, 600)).T}, group, step=1)
        tracemalloc.start()
        checkpoint.save(tmp_path, state, group, step=2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    (peak,) = run_ranks(1, body)
    assert peak < (8 << 20) + (1 << 20)


# -- the same again --------------------------------------------------------------------------------


def test_a_state_of_the_same_shapes_is_not_planned_again(tmp_path, monkeypatch):
    """Until it is another one, on one rank only."""
    planned = []
    make_global_plan = planning.make_global_plan
    monkeypatch.setattr(
        planning, "make_global_plan", lambda d: planned.append(1) or make_global_plan(d)
    )

    def body(group):
        state = {"x": np.arange(6.0), "step": 0}
        for step in range(4):
            state["x"] += 1
            state["step"] = step
            checkpoint.save(tmp_path, state, group, step=step)
        if group.rank == 1:
            state["y"] = np.ones(2)
        checkpoint.save(tmp_path, state, group, step=4)
        state["step"] = group.rank
        with pytest.raises(CollectiveMismatchError, match="'step' is 1 on rank 1 and 0 on rank 0"):
            checkpoint.save(tmp_path, state, group, step=5)
        state["step"] = 6
        with pytest.raises(CheckpointError, match="there is a complete checkpoint of this step"):
            checkpoint.save(tmp_path, state, group, step=4)
        with pytest.raises(CollectiveMismatchError, match="rank 1 saves to"):
            checkpoint.save(tmp_path, state, group, step=6 + group.rank)
        checkpoint.save(tmp_path, state, group, step=6)

    run_ranks(2, body)
    assert len(planned) == 4  # the first, the one with y, and two that are refused
    assert [found.step for found in checkpoint.list(tmp_path)] == [0, 1, 2, 3, 4, 6]
    assert len(list(tmp_path.iterdir())) == 6
    for found in checkpoint.list(tmp_path):
        loaded = checkpoint.load_full(tmp_path, step=found.step)
        assert loaded["step"] == {4: 3}.get(found.step, found.step)
        np.testing.assert_array_equal(loaded["x"], np.arange(6.0) + min(found.step, 3) + 1)
        assert ("y" in loaded) == (found.step > 3)


@pytest.mark.parametrize("where", ["plan", "text", "masked"])
def test_whatever_fails_on_one_rank_before_a_save_is_told_to_all(tmp_path, monkeypatch, where):
    states = {
        "plan": {"x": np.arange(3)},
        "text": {"n": 10**5000},
        "masked": {"x": np.ma.masked_array([1.0, 2.0], [True, False])},
    }

    def no_memory(_):
        raise MemoryError("none left")

    if where == "plan":
        monkeypatch.setattr(planning, "make_global_plan", no_memory)

    def body(group):
        state = states[where] if group.rank == 0 else {}
        with pytest.raises((CheckpointError, UnsupportedOperationError)) as caught:
            checkpoint.save(tmp_path, state, group, step=1)
        return str(caught.value)

    words = run_ranks(2, body)
    assert len(set(words)) == 1
    assert "rank 0" in words[0]


def test_values_are_the_same_in_any_order_of_their_keys(tmp_path):
    values = {"a": 1, "b": [1, 2]}

    def body(group):
        mine = values if group.rank else dict(reversed(values.items()))
        checkpoint.save(tmp_path, {"v": mine}, group, step=1)

    run_ranks(2, body)
    assert checkpoint.load_full(tmp_path) == {"v": values}


def test_ranks_that_kept_another_plan_make_a_new_one(tmp_path):
    """As after an interrupt that came to one rank between the plan and the save."""

    def body(group):
        for step, size in enumerate((3, 5)):
            checkpoint.save(tmp_path, {"x": np.arange(size)}, group, step=step)
            if step == 0:
                first = saver_of(group).planner.last
        if group.rank:
            saver_of(group).planner.last = first._replace(held=saver_of(group).planner.last.held)
        checkpoint.save(tmp_path, {"x": np.arange(5)}, group, step=2)

    run_ranks(2, body)
    assert checkpoint.load_full(tmp_path)["x"].tolist() == [0, 1, 2, 3, 4]
