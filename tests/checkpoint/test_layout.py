"""What is foreseen of the files of a save is what they turn out to be."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.format import view as views
from mpidist.checkpoint.format.manifest import ID_DATASET
from mpidist.errors import CheckpointError
from mpidist.testing import run_ranks

LARGE = np.arange(3 * 700 * 400, dtype=np.float32).reshape(2100, 400)
ROWS = np.arange(12.0).reshape(6, 2)


def save(group, path, asynchronous=False):
    rows = ShardedArray(
        (6, 2), float, {Box((2 * group.rank, 0), (2, 2)): ROWS[2 * group.rank :][:2]}
    )
    state = {"large": LARGE, "rows": rows, "one": np.array(7), "none": np.empty((0, 3)), "t": 5}
    if asynchronous:
        return checkpoint.save_async(path, state, group, step=1).wait()
    return checkpoint.save(path, state, group, step=1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_view_is_made_from_a_plan_and_shows_what_was_saved(tmp_path, monkeypatch, asynchronous):
    foreseen = []
    create = views.create_view

    def note(path, manifest):
        foreseen.append(manifest)
        create(path, manifest)

    monkeypatch.setattr(views, "create_view", note)
    found = run_ranks(3, save, tmp_path, asynchronous)[0]
    (early,) = foreseen
    late = found.manifest
    assert [f.name for f in early.files] == [f.name for f in late.files]
    for before, after in zip(early.files, late.files, strict=True):
        shapes = {name: dataset.shape for name, dataset in after.datasets.items()}
        shapes.pop(ID_DATASET)
        assert {name: dataset.shape for name, dataset in before.datasets.items()} == shapes
    for name, array in late.arrays.items():
        boxes = tuple(stored._replace(digests=b"") for stored in array.boxes)
        assert early.arrays[name] == replace(array, boxes=boxes)
    with h5py.File(found.directory / "view.h5") as view:
        assert (view["large"][()] == LARGE).all()
        assert (view["rows"][()] == ROWS).all()
        assert view["one"][()] == 7
        assert view["none"].shape == (0, 3)


def test_a_view_that_cannot_be_made_ends_the_save(tmp_path, monkeypatch):
    def fail(path, manifest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(views, "create_view", fail)
    with pytest.raises(CheckpointError, match=r"rank 0 failed: OSError: .* No space"):
        run_ranks(3, save, tmp_path)
    assert checkpoint.list(tmp_path) == []
