"""What `compare` finds between two checkpoints, against numpy on the whole arrays."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpidist.checkpoint.tools.differences import Difference, compare
from mpidist.checkpoint.tools.resharding import Reader
from mpidist.errors import CheckpointCorruptError, CheckpointMissingShardError
from tests.checkpoint.made import METADATA, VALUES, arrays, save

SHARDED = ("model/weight", "moments")


def test_the_same_is_the_same_however_it_was_cut(tmp_path: Path) -> None:
    first = save(tmp_path / "a", arrays() | VALUES, ranks=4, sharded=SHARDED, metadata=METADATA)
    for ranks in (4, 3):
        state = arrays() | VALUES
        second = save(tmp_path / str(ranks), state, ranks=ranks, step=9, metadata=METADATA)
        told: list[int] = []
        assert compare(first, second, progress=told.append) == []
        assert sum(told) == first.nbytes


def test_what_is_equal_by_digest_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.zeros((1000, 1000))
    first = save(tmp_path / "a", {"array": array}, ranks=2)
    array[700, 900] = 1e-3
    second = save(tmp_path / "b", {"array": array}, ranks=2)
    seen: list[int] = []
    read = Reader.read

    def noted(self: Reader, name: str, box: Any) -> Any:
        seen.append(box.count)
        return read(self, name, box)

    monkeypatch.setattr(Reader, "read", noted)
    (found,) = compare(first, second)
    assert (found.elements, found.largest) == (1, 1e-3)
    assert sum(seen) * 8 <= 2 << 18  # one chunk of each


NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize(
    ("dtype", "one", "other", "elements", "largest"),
    [
        ("f4", [1, NAN, 0.0, INF], [1, NAN, -0.0, INF], 0, None),
        ("f4", [1, NAN, NAN, 2], [1, 5, NAN, 2.5], 2, 0.5),
        ("f8", [NAN, 1], [1, 1], 1, NAN),
        ("f8", [INF, -INF, 1], [-INF, -INF, 1], 1, INF),
        ("f2", [60000, 1], [-60000, 1], 1, 120000),
        ("i1", [-128, 3], [127, 3], 1, 255),
        ("i8", [-(2**63), 0], [2**63 - 1, 1], 2, 2.0**64),
        ("u8", [0, 7], [2**64 - 1, 7], 1, 2.0**64),
        ("?", [True, False, True], [False, False, False], 2, 1),
        ("c8", [3j, 1], [4, 1], 1, 5),
        (ml_dtypes.bfloat16, [1, NAN, 3], [1.5, NAN, 1], 2, 2),
    ],
)
def test_numbers_of_every_kind(
    tmp_path: Path, dtype: Any, one: Any, other: Any, elements: int, largest: float | None
) -> None:
    a, b = np.array(one, dtype), np.array(other, dtype)
    found = compare(save(tmp_path / "a", {"x": a}), save(tmp_path / "b", {"x": b}))
    assert [difference.elements for difference in found] == [elements] * (elements > 0)
    if found:
        np.testing.assert_equal(found[0].largest, largest)


def test_arrays_that_were_cut_differently_are_read(tmp_path: Path) -> None:
    a = arrays()
    b = {name: array.copy() for name, array in a.items()}
    rng = np.random.default_rng(3)
    for name in SHARDED:
        places = rng.integers(0, b[name].size, 50)
        b[name].reshape(-1)[places] += rng.normal(size=50).astype(b[name].dtype)
    first = save(tmp_path / "a", a, ranks=4, sharded=SHARDED)
    second = save(tmp_path / "b", b, ranks=3, sharded=("model/weight",))
    found = {difference.name: difference for difference in compare(first, second)}
    assert found.keys() == set(SHARDED)
    for name in SHARDED:
        apart = np.abs(a[name].astype(np.float64) - b[name].astype(np.float64))
        assert found[name].elements == np.count_nonzero(apart)
        assert found[name].largest == apart.max()


def test_names_shapes_values_and_metadata(tmp_path: Path) -> None:
    first = save(
        tmp_path / "a",
        {"a": np.zeros(3), "b": np.zeros(3), "c": np.zeros((2, 3)), "n": 1, "o": {"p": 1, "q": 2}},
        metadata={"run": "x", "loss": NAN},
    )
    second = save(
        tmp_path / "b",
        {"b": np.zeros(3, "f4"), "c": np.zeros((3, 2)), "d": np.zeros(1), "n": 1.0, "o": {"p": 3}},
        metadata={"run": "y", "loss": NAN},
    )
    assert compare(first, second) == [
        Difference("array", "a", "only in the first"),
        Difference("array", "b", "float64[3] and float32[3]"),
        Difference("array", "c", "float64[2, 3] and float64[3, 2]"),
        Difference("array", "d", "only in the second"),
        Difference("value", "n", "1 and 1.0"),
        Difference("value", "o/p", "1 and 3"),
        Difference("value", "o/q", "only in the first"),
        Difference("metadata", "metadata/run", "'x' and 'y'"),
    ]


def test_damage_is_no_difference(tmp_path: Path) -> None:
    array = np.arange(1000.0)
    first = save(tmp_path / "a", {"array": array})
    second = save(tmp_path / "b", {"array": array + 1})
    path = second.directory / "rank-00000.h5"
    content = bytearray(path.read_bytes())
    content[content.index((array + 1).tobytes()) + 6] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match="is damaged"):
        compare(first, second)
    path.unlink()
    with pytest.raises(CheckpointMissingShardError, match="is missing"):
        compare(first, second)


def test_memory_does_not_grow_with_the_arrays(tmp_path: Path) -> None:
    array = np.zeros((4096, 1024), np.float64)  # 32 MiB
    first = save(tmp_path / "a", {"array": array}, ranks=2)
    second = save(tmp_path / "b", {"array": array + 1}, ranks=3)
    tracemalloc.start()
    try:
        (found,) = compare(first, second)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.elements, found.largest) == (array.size, 1)
    assert peak < 30 << 20
