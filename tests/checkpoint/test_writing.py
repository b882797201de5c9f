from __future__ import annotations

import h5py
import numpy as np
import pytest

from mpidist import Box
from mpidist.arrays.namespaces import BFLOAT16, DTYPES
from mpidist.checkpoint.format import files
from mpidist.checkpoint.format.manifest import ALIGNMENT, digests_of
from mpidist.checkpoint.saving.writing import HostBox, write_file
from tests.checkpoint.cases import bits, random_array, small_sizes

HERE = {"id": "an id", "step": 3, "rank": 0, "world_size": 1}


def whole(name, data):
    return HostBox.of(name, Box.whole(data.shape), data)


def test_any_file_opens_in_plain_h5py(tmp_path):
    large = random_array(np.dtype(np.float32), (513, 1024), 1)
    other = random_array(np.dtype(np.float16), (2, 1 << 19), 2)
    boxes = [
        whole("deep/large", large),
        HostBox.of("part", Box((2, 0), (2, 1 << 19)), other),
        whole("small", np.arange(6.0).reshape(2, 3)),
        whole("scalar", np.array(2.5)),
        whole("empty", np.empty((0, 3), np.int8)),
    ]
    written = write_file(tmp_path / "rank-00000.h5", boxes, HERE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rank-00000.h5"]
    with h5py.File(tmp_path / "rank-00000.h5") as file:
        np.testing.assert_array_equal(file["arrays/deep/large[0:513, 0:1024]"][()], large)
        assert bits(file["arrays/part[2:4, 0:524288]"][()]) == bits(other)
        assert file["packed/float64"][()].tolist() == [0, 1, 2, 3, 4, 5, 2.5]
        assert file["packed/int8"].shape == (0,)
        for name, dataset in written.file.datasets.items():
            assert file[name].shape == dataset.shape
            if file[name].size:
                assert file[name].id.get_offset() == dataset.byte
                assert file[name].compression is None
                assert file[name].chunks is None
            if file[name].nbytes >= ALIGNMENT:
                assert dataset.byte % ALIGNMENT == 0
        assert file.attrs["id"] in ("an id", b"an id")
        assert (file.attrs["step"], file.attrs["world_size"]) == (3, 1)
    assert written.file.size == (tmp_path / "rank-00000.h5").stat().st_size
    assert {name: box.digests for name, box in written.boxes} == {
        box.name: digests_of(box.data) for box in boxes
    }


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("own", [1 << 20, 16])
def test_every_dtype_lies_in_the_file_as_it_is(tmp_path, dtype, own):
    data = random_array(dtype, (5, 7), 3)
    with small_sizes(64, 8, own):
        written = write_file(tmp_path / "f.h5", [whole("x", data)], HERE)
    (name, dataset), (_, identity) = written.file.datasets.items()
    assert (tmp_path / "f.h5").read_bytes()[identity.byte :][:5] == b"an id"
    read = (tmp_path / "f.h5").read_bytes()[dataset.byte : dataset.byte + data.nbytes]
    assert read == data.tobytes()
    with h5py.File(tmp_path / "f.h5") as file:
        stored = file[name][()]
        if dtype == BFLOAT16:
            assert file[name].attrs[files.TAG] in ("bfloat16", b"bfloat16")
            assert stored.dtype == np.uint16
            stored = stored.view(BFLOAT16)
        assert bits(stored.reshape(5, 7)) == bits(data)


def reversed_bytes(data):
    return data.astype(data.dtype.newbyteorder(">"))


ORDERS = {
    "transposed": lambda data: np.array(data.T, order="C").T,
    "every second": lambda data: np.repeat(data, 2, axis=1)[:, ::2],
    "backwards": lambda data: data[::-1, ::-1].copy()[::-1, ::-1],
    "big-endian": reversed_bytes,
    "transposed big-endian": lambda data: reversed_bytes(np.array(data.T, order="C")).T,
    "not aligned": lambda data: np.frombuffer(b"x" + data.tobytes(), data.dtype, offset=1).reshape(
        data.shape
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [1 << 20, 16])
def test_memory_in_any_order_is_the_same_file(tmp_path, order, block):
    data = random_array(np.dtype(np.complex64), (40, 30), 4)
    with small_sizes(64, 8, block):
        boxes = [whole("x", data), whole("y", data[3:])]
        plain = write_file(tmp_path / "plain.h5", boxes, HERE)
        turned = ORDERS[order](data)
        assert np.ascontiguousarray(turned, data.dtype).tobytes() == data.tobytes()
        boxes = [whole("x", turned), whole("y", turned[3:])]
        other = write_file(tmp_path / "other.h5", boxes, HERE)
    assert plain.boxes == other.boxes
    with h5py.File(tmp_path / "plain.h5") as a, h5py.File(tmp_path / "other.h5") as b:
        for name in plain.file.datasets:
            assert a[name][()].tobytes() == b[name][()].tobytes()


def test_many_small_arrays_are_few_datasets(tmp_path):
    boxes = [whole(f"x{n}", np.full((2, 3), n, ("f4", "f8")[n % 2])) for n in range(300)]
    written = write_file(tmp_path / "f.h5", boxes, HERE)
    assert set(written.file.datasets) == {
        "mpidist id",
        "packed/float32",
        "packed/float64",
    }
    with h5py.File(tmp_path / "f.h5") as file:
        for name, box in written.boxes:
            packed = file[box.dataset][box.first : box.first + 6]
            assert packed.tolist() == [float(name[1:])] * 6
