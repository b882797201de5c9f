"""A checkpoint of an earlier mpidist loads, and what is saved today looks the same."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from tests.checkpoint import old_state
from tests.checkpoint.cases import bits


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the old checkpoint."""
    path = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).with_name("old.tar.xz")) as archive:
        archive.extractall(path, filter="data")
    return path


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_loads_on_any_number_of_ranks(old: Path, size: int) -> None:
    def body(group: ProcessGroup) -> checkpoint.Checkpoint:
        state = {
            "model": {
                "large": np.zeros((512, 512), np.float32),
                "half": np.zeros(70, BFLOAT16),
                "flag": np.array(False),
            },
            "columns": np.zeros((64, 600), np.float32),
            "rows": np.zeros((6, 2), np.int64),
            "nothing": np.empty((0, 3)),
            "rng": np.random.Generator(np.random.PCG64(4)),
            "epoch": 0,
            "loss": 0.0,
            "names": [],
        }
        loaded = checkpoint.load(old, state, group)
        model, rng = state["model"], state["rng"]
        assert bits(model["large"]) == bits(old_state.LARGE)
        assert bits(model["half"]) == bits(old_state.HALF)
        assert bits(model["flag"]) == bits(np.array(True))
        assert bits(state["columns"]) == bits(old_state.COLUMNS)
        assert bits(state["rows"]) == bits(np.arange(12).reshape(6, 2))
        expected = np.random.Generator(np.random.PCG64(3)).bit_generator.state
        assert rng.bit_generator.state == expected
        return loaded

    loaded = run_ranks(size, body)[0]
    assert (loaded.step, loaded.world_size) == (7, 2)
    assert loaded.metadata == {"run": "old"}
    values = loaded.values
    assert (values["epoch"], values["loss"], values["names"]) == (3, float("inf"), ["a", "b"])
    assert checkpoint.verify(old) == []


def test_the_same_state_is_written_in_the_same_way(old: Path, tmp_path: Path) -> None:
    old_state.save(str(tmp_path))
    before, after = (checkpoint.latest(path).manifest for path in (old, tmp_path))
    assert after.arrays == before.arrays  # with places and digests of all parts
    assert [file.name for file in after.files] == [file.name for file in before.files]
    for one, other in zip(after.files, before.files, strict=True):
        assert {name: dataset.shape for name, dataset in one.datasets.items()} == {
            name: dataset.shape for name, dataset in other.datasets.items()
        }
    unlike = {"id": "", "created": "", "versions": {}, "files": (), "crossovers": None}
    assert replace(after, **unlike) == replace(before, **unlike)
    assert after.to_bytes().count(b'"crossovers"') == 1
