"""Export and import: what the other packages read is what was saved, and the other way round."""

from __future__ import annotations

import json
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mpidist import checkpoint
from mpidist.checkpoint.tools import exporting
from mpidist.checkpoint.tools.exporting import FORMATS, export_to, import_from
from mpidist.errors import (
    BackendUnavailableError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    UnsupportedOperationError,
)
from tests.checkpoint.made import METADATA, VALUES, arrays, save

SHARDED = ("model/weight", "moments")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    path = tmp_path_factory.mktemp("saved")
    return save(path, arrays() | VALUES, ranks=3, sharded=SHARDED, metadata=METADATA)


def check(found: Any, expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_safetensors_reads_what_is_exported(saved: checkpoint.Checkpoint, tmp_path: Path) -> None:
    told: list[int] = []
    path = tmp_path / "a.safetensors"
    export_to(path, saved, progress=told.append)
    check(safetensors.numpy.load_file(path), arrays())
    with safetensors.safe_open(path, framework="numpy") as file:
        described = json.loads(file.metadata()["mpidist"])
    assert (described["step"], described["values"]) == (5, VALUES)
    assert sum(told) == saved.nbytes
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_numpy_reads_what_is_exported(saved: checkpoint.Checkpoint, tmp_path: Path) -> None:
    told: list[int] = []
    path = tmp_path / "a.npz"
    export_to(path, saved, progress=told.append)
    with np.load(path, allow_pickle=False) as file:
        described = json.loads(file["mpidist.json"])
        found = {name: file[name] for name in file.files if name != "mpidist.json"}
    expected = arrays()
    assert described["bfloat16"] == ["model/bias"]
    expected["model/bias"] = expected["model/bias"].view(np.uint16)
    check(found, expected)
    assert (described["step"], described["values"]) == (5, VALUES)
    assert sum(told) == saved.nbytes
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_exported_comes_back(
    saved: checkpoint.Checkpoint, tmp_path: Path, suffix: str
) -> None:
    export_to(tmp_path / f"a{suffix}", saved)
    told: list[int] = []
    found = import_from(tmp_path / f"a{suffix}", tmp_path / "new", progress=told.append)
    assert (found.step, found.world_size, found.metadata) == (5, 1, METADATA)
    assert found.values == VALUES
    full = checkpoint.load_full(tmp_path / "new")
    check({name: value for name, value in full.items() if name not in VALUES}, arrays())
    assert checkpoint.verify(tmp_path / "new") == []
    assert sum(told) == saved.nbytes
    with pytest.raises(CheckpointError, match="never overwritten"):
        import_from(tmp_path / f"a{suffix}", tmp_path / "new")
    assert import_from(tmp_path / f"a{suffix}", tmp_path / "new", step=6).step == 6


def test_files_of_safetensors_itself_are_imported(tmp_path: Path) -> None:
    state = arrays() | {"complex": np.array([1 + 2j], np.complex64)}
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not know of which step it is; say it with --step"):
        import_from(tmp_path / "a.safetensors", tmp_path)
    found = import_from(tmp_path / "a.safetensors", tmp_path, step=3)
    assert (found.step, found.metadata, found.values) == (3, {"format": "pt"}, {})
    check(checkpoint.load_full(tmp_path), state)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_files_of_numpy_itself_are_imported(tmp_path: Path, write: Any) -> None:
    state = {k: v for k, v in arrays().items() if v.dtype != ml_dtypes.bfloat16}
    state["fortran"] = np.asfortranarray(np.arange(700_000.0).reshape(700, 1000))
    state["foreign"] = np.arange(5, dtype=">i4")
    write(tmp_path / "a.npz", **state)
    assert import_from(tmp_path / "a.npz", tmp_path, step=0).metadata is None
    state["foreign"] = state["foreign"].astype("i4")
    check(checkpoint.load_full(tmp_path), state)


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_does_not_grow_with_the_arrays(tmp_path: Path, suffix: str) -> None:
    array = np.arange(8 << 20, dtype=np.float32).reshape(4, -1)  # 32 MiB; a row has 8
    found = save(tmp_path / "a", {"array": array}, ranks=2)
    tracemalloc.start()
    try:
        export_to(tmp_path / f"a{suffix}", found)
        import_from(tmp_path / f"a{suffix}", tmp_path / "b")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
    check(checkpoint.load_full(tmp_path / "b"), {"array": array})


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_checkpoint_that_is_damaged_leaves_no_file(tmp_path: Path, suffix: str) -> None:
    array = np.arange(1000.0)
    found = save(tmp_path / "a", {"array": array})
    path = found.directory / "rank-00000.h5"
    content = bytearray(path.read_bytes())
    content[content.index(array.tobytes()) + 100] ^= 1
    path.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointCorruptError, match="is damaged: a part of 'array'"):
        export_to(tmp_path / "out" / f"a{suffix}", found)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    found = save(tmp_path / "a", {"z": np.zeros(2, complex)})
    with pytest.raises(
        UnsupportedOperationError, match=r"keep z \(complex128\) of .*export to \.npz"
    ):
        export_to(tmp_path / "a.safetensors", found)
    with pytest.raises(UnsupportedOperationError, match=r"known are \.safetensors and \.npz"):
        export_to(tmp_path / "a.pt", found)
    export_to(tmp_path / "a.npz", found)
    with pytest.raises(CheckpointError, match="is there already, and never overwritten"):
        export_to(tmp_path / "a.npz", found)
    with pytest.raises(CheckpointError, match=r"none/a\.npz cannot be written: FileNotFoundError"):
        export_to(tmp_path / "none" / "a.npz", found)


def pickled(path: Path) -> None:
    np.savez(path, a=np.array([{"a": 1}], dtype=object))


def records(path: Path) -> None:
    np.savez(path, a=np.zeros(2, [("x", "f4")]))


def no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def half(path: Path) -> None:
    np.savez(path, a=np.arange(100_000.0))
    path.write_bytes(path.read_bytes()[:5000])


def flipped(path: Path) -> None:
    array = np.arange(1000.0)
    np.savez(path, a=array)
    content = bytearray(path.read_bytes())
    content[content.index(array.tobytes()) + 100] ^= 1
    path.write_bytes(content)


def upward(path: Path) -> None:
    np.savez(path, **{"../a": np.zeros(2)})


def no_description(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mpidist.json", '{"bfloat16": [], "values": 3}')


def header(path: Path, text: str) -> None:
    """Write an npz file whose array says this of itself."""
    told = text.encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told)


def many_dimensions(path: Path) -> None:
    header(path, repr({"descr": "<f4", "fortran_order": False, "shape": (1,) * 70}))


def large(path: Path) -> None:
    header(path, repr({"descr": "<f4", "fortran_order": False, "shape": (2**63,)}))


def negative(path: Path) -> None:
    header(path, repr({"descr": "<f4", "fortran_order": False, "shape": (-4,)}))


def cut_text(path: Path) -> None:
    header(path, "{'descr': '<f4', 'shape': (")


def deep_text(path: Path) -> None:
    header(path, "(" * 5000)


def colours(path: Path) -> None:
    np.savez(path, **{"\x1b[31m": np.zeros(2)})


def far_step(path: Path) -> None:
    text = {"bfloat16": [], "values": {}, "metadata": None, "step": 2**64}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mpidist.json", json.dumps(text))


def a_set_of_values(path: Path) -> None:
    text = {"bfloat16": [], "values": {"a/../b": 1}, "metadata": None, "step": 1}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mpidist.json", json.dumps(text))


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (many_dimensions, CheckpointCorruptError, "dimension"),
        (large, CheckpointCorruptError, "damaged"),
        (negative, CheckpointCorruptError, "damaged"),
        (cut_text, CheckpointCorruptError, "damaged"),
        (deep_text, CheckpointCorruptError, "damaged"),
        (colours, UnsupportedOperationError, r"'\\x1b\[31m' cannot be a name"),
        (a_set_of_values, UnsupportedOperationError, r"'a/\.\./b' cannot be a name"),
        (pickled, CheckpointIncompatibleError, "dtype object.* what is pickled is never read"),
        (records, CheckpointIncompatibleError, "'a' has dtype"),
        (no_array, CheckpointCorruptError, "'readme.txt' is no array"),
        (half, CheckpointCorruptError, "BadZipFile"),
        (flipped, CheckpointCorruptError, "is damaged: BadZipFile: Bad CRC-32"),
        (upward, UnsupportedOperationError, "'../a' cannot be a name"),
        (no_description, CheckpointCorruptError, "beside the arrays is damaged"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    tmp_path: Path, make: Any, error: type[Exception], told: str
) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(error, match=told) as caught:
        import_from(tmp_path / "a.npz", tmp_path / "new", step=1)
    assert str(tmp_path / "a.npz") in str(caught.value)
    assert not list((tmp_path / "new").glob("*"))


def test_a_step_that_no_checkpoint_can_have_is_told_with_the_file(tmp_path: Path) -> None:
    far_step(tmp_path / "a.npz")
    with pytest.raises(UnsupportedOperationError, match=r"a\.npz: a step is .* say it with --step"):
        import_from(tmp_path / "a.npz", tmp_path / "new")
    assert import_from(tmp_path / "a.npz", tmp_path / "new", step=4).step == 4


@pytest.mark.parametrize("step", [4, None])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_every_error_of_an_import_names_the_file(
    tmp_path: Path, suffix: str, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    array = {"../a": np.zeros(2)}
    np.savez(path, **array) if suffix == ".npz" else safetensors.numpy.save_file(array, path)
    with pytest.raises(UnsupportedOperationError, match=rf"{path}"):
        import_from(path, tmp_path / "new", step=step)

    def fail(*_: Any) -> None:
        raise LookupError("nobody has thought of this")

    monkeypatch.setattr(exporting, "flatten", fail)
    with pytest.raises(ValueError, match=rf"{path}"):
        import_from(path, tmp_path / "new", step=step)


def test_what_is_no_file_of_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read: FileNotFoundError"):
        import_from(path, tmp_path)
    path.write_bytes(b"no such file" * 10)
    with pytest.raises(CheckpointCorruptError, match="is no file of safetensors, or is damaged"):
        import_from(path, tmp_path)
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}} '
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointIncompatibleError, match=r"cannot keep a \(F8_E4M3\)"):
        import_from(path, tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'mpidist\[safetensors\]'"):
        import_from(tmp_path / "a.safetensors", tmp_path, step=1)
