"""The page about the format is true: a reader made after it reads and verifies what was saved."""

from __future__ import annotations

import base64
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import xxhash

from mpidist import ShardedArray, checkpoint
from mpidist.arrays.boxes import Box, split_evenly
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from tests.docs.pages import DOCS, EXAMPLES_DIRECTORY

FILE = EXAMPLES_DIRECTORY / "read_checkpoint.py"
READER: dict[str, Any] = runpy.run_path(str(FILE))

RNG = np.random.default_rng(0)
COLUMNS = RNG.normal(size=(700, 3, 300)).astype(np.float32)  # 3 boxes of 840 kB
ROWS = RNG.normal(size=(1200, 900))  # 3 boxes of 2.9 MB
ORIGINALS = {
    "columns": COLUMNS,
    "rows": ROWS,
    "whole": RNG.integers(-9, 9, size=(5, 250_000)),
    "layer/half": RNG.normal(size=(7, 9)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5 + 1j),
    "empty": np.empty((0, 4), np.float16),
    "flags": np.array([True, False, True]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a checkpoint that three ranks have saved."""
    path = tmp_path_factory.mktemp("saved")

    def body(group: ProcessGroup) -> None:
        state: dict[str, Any] = dict(ORIGINALS)
        for name, dimension in (("columns", 2), ("rows", 0)):
            array = ORIGINALS[name]
            start, size = split_evenly(array.shape[dimension], group.size)[group.rank]
            offsets, sizes = [0] * array.ndim, list(array.shape)
            offsets[dimension], sizes[dimension] = start, size
            box = Box(tuple(offsets), tuple(sizes))
            state[name] = ShardedArray(array.shape, array.dtype, {box: array[box.slices]})
        state["loss"] = float("nan")
        checkpoint.save(path, state, group, step=100, metadata={"name": "größer"})

    run_ranks(3, body)
    return path / "step-000100"


def test_the_reader_knows_nothing_of_mpidist() -> None:
    assert not re.search(r"^\s*(import|from) mpidist", FILE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("with_h5py", [False, True])
def test_the_reader_reads_what_was_saved(saved: Path, *, with_h5py: bool) -> None:
    manifest, arrays = READER["read_checkpoint"](saved, with_h5py=with_h5py)
    assert arrays.keys() == ORIGINALS.keys()
    for name, original in ORIGINALS.items():
        stored = original.view(np.uint16) if original.dtype == ml_dtypes.bfloat16 else original
        assert (arrays[name].dtype, arrays[name].shape) == (stored.dtype, stored.shape)
        np.testing.assert_array_equal(arrays[name], stored)
    assert manifest["values"] == {"loss": {"mpidist:float": "nan"}}
    assert manifest["metadata"] == {"name": "größer"}


def test_there_are_boxes_of_each_kind(saved: Path) -> None:
    """Else the reader has not been tried on all that the page says."""
    manifest, _ = READER["read_checkpoint"](saved)
    datasets = {box["dataset"] for a in manifest["arrays"].values() for box in a["boxes"]}
    assert {"packed/float32", "packed/bfloat16", "arrays/rows[0:400, 0:900]"} <= datasets
    lengths = {len(box["digests"]) for a in manifest["arrays"].values() for box in a["boxes"]}
    assert {0, 12} < lengths, "boxes with no chunk, one, and several"


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.h5"])
def test_the_reader_sees_damage(saved: Path, name: str, tmp_path: Path) -> None:
    for file in saved.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == name:
            place = 300 if name == "manifest.json" else 2 << 20
            data[place] ^= 1
        (tmp_path / file.name).write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|JSON|delimiter|control"):
        READER["read_checkpoint"](tmp_path)


def test_the_tiles_on_the_page_are_so() -> None:
    page = (DOCS / "checkpoint-format.md").read_text(encoding="utf-8")
    numbers = r"\(([\d, ]+)\)"
    row = rf"^\| {numbers} \| (\d+) \| {numbers} \| (\d+) \|"
    rows = re.findall(row, page, re.MULTILINE)
    assert len(rows) >= 6
    for sizes, itemsize, chunk, count in rows:
        shape, expected = ([int(n) for n in re.findall(r"\d+", t)] for t in (sizes, chunk))
        assert READER["chunk_sizes"](shape, int(itemsize)) == expected
        pairs = zip(shape, expected, strict=True)
        assert math.prod(-(-size // part) for size, part in pairs) == int(count)


def test_what_another_program_writes_is_loaded(tmp_path: Path) -> None:
    """Written after the page: one file, boxes that are regions of a dataset, spaces in the JSON."""
    array = RNG.normal(size=(600, 500)).astype(np.float32)
    directory = tmp_path / "step-000007"
    directory.mkdir()
    with h5py.File(directory / "all.h5", "w") as file:
        byte = file.create_dataset("w", data=array).id.get_offset()
    boxes = [
        {
            "file": 0,
            "dataset": "w",
            "first": 123 * column,
            "offsets": [0, 123 * column],
            "sizes": [600, size],
            "digests": base64.b64encode(tile_digests(array[:, 123 * column :][:, :size])).decode(),
        }
        for column, size in ((1, 377), (0, 123))
    ]
    place = {"byte": byte, "shape": [600, 500]}
    size = (directory / "all.h5").stat().st_size
    body = {
        "format": "mpidist checkpoint",
        "version": 1,
        "id": "0" * 32,
        "step": 7,
        "created": "2026-11-21T16:00:00+00:00",
        "world_size": 2,
        "versions": {"another program": "1.0"},
        "crossovers": None,
        "metadata": None,
        "values": {"best": {"mpidist:float": "-inf"}},
        "files": [{"name": "all.h5", "size": size, "datasets": {"w": place}, "added": "later"}],
        "arrays": {"w": {"dtype": "float32", "shape": [600, 500], "boxes": boxes}},
        "added": "later",
    }
    rest = json.dumps(body).encode()
    digest = xxhash.xxh3_128_hexdigest(rest).encode()
    (directory / "manifest.json").write_bytes(b'{"digest":"' + digest + b'",' + rest[1:] + b"\n")

    loaded = checkpoint.load_full(tmp_path)
    np.testing.assert_array_equal(loaded["w"], array)
    assert loaded["best"] == -np.inf
    np.testing.assert_array_equal(READER["read_checkpoint"](directory)[1]["w"], array)


def tile_digests(box: np.ndarray[Any, Any]) -> bytes:
    """Return the digests of a box of two dimensions."""
    a, b = READER["chunk_sizes"](box.shape, box.dtype.itemsize)
    return b"".join(
        xxhash.xxh3_64_digest(box[i : i + a, j : j + b].tobytes())
        for i in range(0, box.shape[0], a)
        for j in range(0, box.shape[1], b)
    )
