"""What a save is asked for: the place, the values, and what is refused before a byte is written."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from mpidist import Box, ShardedArray, checkpoint
from mpidist.arrays.namespaces import DTYPES
from mpidist.checkpoint import directory
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CollectiveMismatchError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks


def test_a_rank_that_means_another_step_spoils_nothing(tmp_path: Path) -> None:
    """Else rank 1 would put its file into the complete checkpoint of step 5."""

    def body(group: ProcessGroup) -> None:
        checkpoint.save(tmp_path, {"x": np.arange(4)}, group, step=5)
        with pytest.raises(CollectiveMismatchError, match=r"rank 1 saves to .*step-000005"):
            checkpoint.save(tmp_path, {"x": np.zeros(4)}, group, step=6 - group.rank)

    run_ranks(2, body)
    assert [found.step for found in checkpoint.list(tmp_path)] == [5]
    np.testing.assert_array_equal(checkpoint.load_full(tmp_path)["x"], np.arange(4))


def test_a_step_that_no_checkpoint_can_have_is_refused_on_all_ranks(tmp_path: Path) -> None:
    """Also where one rank alone is wrong: the others do not wait for it."""
    expected = r"a step is a whole number from 0 to 2\*\*63 - 1, got "
    steps: list[Any] = [-1, 2**63, 2**64, 1.5, "5", True, np.bool_(True), None]

    def body(group: ProcessGroup, step: Any) -> None:
        words = expected + re.escape(repr(step))
        with pytest.raises(UnsupportedOperationError, match=f"rank 1: {words}"):
            checkpoint.save(tmp_path, {}, group, step=step if group.rank else 3)
        with pytest.raises(ValueError, match=words):
            checkpoint.save_async(tmp_path, {}, group, step=step)
        with pytest.raises(CheckpointNotFoundError, match=words):
            checkpoint.load(tmp_path, {}, group, step=step)

    run_ranks(2, lambda group: [body(group, step) for step in steps])
    assert list(tmp_path.iterdir()) == []
    run_ranks(2, lambda group: checkpoint.save(tmp_path, {}, group, step=np.int64(2**63 - 1)))
    assert [found.step for found in checkpoint.list(tmp_path)] == [2**63 - 1]
    assert checkpoint.verify(tmp_path) == []


def test_every_directory_that_a_save_makes_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure may take the path to a checkpoint whose save has returned."""
    synced: list[Path] = []
    monkeypatch.setattr(directory, "sync_directory", synced.append)
    directory.create_directory(tmp_path / "a" / "b" / "step-000001", "an id")
    assert set(synced) == {tmp_path, tmp_path / "a"}  # their entries a, and b; the rest at commit


def test_numbers_of_numpy_and_of_python_are_the_same(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> None:
        loss = np.float64(0.5) if group.rank else 0.5
        checkpoint.save(tmp_path, {"loss": loss, "far": -math.inf}, group, step=0)

    run_ranks(2, body)
    assert checkpoint.load_full(tmp_path) == {"loss": 0.5, "far": -math.inf}


@pytest.mark.parametrize("value", [np.longdouble(1), {"mpidist:float": "1"}, {1: 2}, {3}])
def test_a_value_that_would_not_come_back_is_refused(tmp_path: Path, value: Any) -> None:
    def body(group: ProcessGroup) -> None:
        with pytest.raises(UnsupportedOperationError, match="rank 0: checkpoint: 'x'"):
            checkpoint.save(tmp_path, {"x": value}, group, step=0)

    run_ranks(2, body)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_may_be_written_by_another_program(tmp_path: Path) -> None:
    """Its digest is of its bytes, however these write a number; and every byte counts."""
    run_ranks(1, lambda group: checkpoint.save(tmp_path, {"x": 1e16}, group, step=0))
    path = tmp_path / "step-000000" / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["digest"]
    text = json.dumps(body, indent=1).replace("1e+16", "10000000000000000.0")
    assert "1e" not in text.split('"values"')[1]
    path.write_text(f'{{"digest":"{xxhash.xxh3_128_hexdigest(text.encode())}",{text[1:]}\n')
    assert checkpoint.load_full(tmp_path) == {"x": 1e16}
    path.write_text(path.read_text().replace("\n ", "\n  ", 1))
    with pytest.raises(CheckpointCorruptError, match="was edited"):
        checkpoint.load_full(tmp_path)


def test_every_dtype_and_order_of_bytes_is_kept(tmp_path: Path) -> None:
    native = {str(dtype): np.arange(6).astype(dtype).reshape(2, 3) for dtype in DTYPES}
    foreign = {f"foreign {name}": x.astype(x.dtype.newbyteorder(">")) for name, x in native.items()}
    state = native | foreign
    run_ranks(2, lambda group: checkpoint.save(tmp_path, state, group, step=0))
    found = checkpoint.load_full(tmp_path)
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], array)

    def body(group: ProcessGroup) -> None:
        mine = {name: np.zeros_like(array) for name, array in state.items()}
        checkpoint.load(tmp_path, mine, group)
        for name, array in state.items():
            np.testing.assert_array_equal(mine[name], array)

    run_ranks(2, body)


def save_once(path: Path, state: Any, group: ProcessGroup) -> None:
    checkpoint.save(path, state, group, step=1)


def test_a_manifest_of_another_save_is_refused_though_its_arrays_are_the_same(
    tmp_path: Path,
) -> None:
    """The digests agree; its values are of the other save."""
    for run, lr in (("a", 0.1), ("b", 0.2)):
        state, where = {"x": np.arange(5.0), "lr": lr}, tmp_path / run
        run_ranks(1, lambda group, where=where, state=state: save_once(where, state, group))
    theirs = (tmp_path / "b/step-000001/manifest.json").read_bytes()
    (tmp_path / "a/step-000001/manifest.json").write_bytes(theirs)
    with pytest.raises(CheckpointCorruptError, match=r"rank-00000\.h5 is not of the save"):
        checkpoint.load_full(tmp_path / "a")


def test_an_array_inside_an_array_of_another_rank_is_refused_on_both(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> None:
        name = "a" if group.rank == 0 else "a/b"
        with pytest.raises(UnsupportedOperationError, match="'a' is an array, so that 'a/b'"):
            checkpoint.save(tmp_path, {name: np.zeros(1)}, group, step=1)

    run_ranks(2, body)
    assert list(tmp_path.iterdir()) == []


def test_any_name_that_datasets_may_have_is_free_for_arrays(tmp_path: Path) -> None:
    large = np.arange(1 << 18, dtype=np.float32)
    state = {"packed/float32/w": large, "mpidist id": large, "arrays/x": large, "x": large[:3]}
    run_ranks(2, lambda group: save_once(tmp_path, state, group))
    found = checkpoint.load_full(tmp_path)
    assert found.keys() == state.keys()
    assert all(found[name].tobytes() == state[name].tobytes() for name in state)


def test_integers_of_numpy_are_plain_ones_in_boxes(tmp_path: Path) -> None:
    start, size = np.int64(1), np.int64(2)
    box = Box((start,), (size,))
    array = ShardedArray(
        (np.int64(3),), np.float64, {box: np.ones(2), Box((0,), (1,)): np.zeros(1)}
    )
    run_ranks(1, lambda group: save_once(tmp_path, {"x": array}, group))
    assert checkpoint.load_full(tmp_path)["x"].tolist() == [0, 1, 1]
