from __future__ import annotations

import json
import math

import numpy as np
import pytest
import xxhash

from mpidist import Box
from mpidist.arrays import BFLOAT16
from mpidist.checkpoint.manifest import (
    Manifest,
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
)
from mpidist.errors import CheckpointCorruptError, CheckpointError, CheckpointIncompatibleError

FILES = (
    StoredFile(
        "rank-00000.h5",
        3016,
        {"packed/float32": StoredDataset(2048, (9,)), "w[0:2, 0:2]": StoredDataset(3000, (2, 2))},
    ),
    StoredFile("rank-00001.h5", 2048, {"packed/bfloat16": StoredDataset(1024, (5,))}),
)

VALUES = {"epoch": 3, "far": [math.inf, -math.inf], "none": None, "ünï": {"a": [True, 1e300, -0.0]}}


def arrays():
    def box(offsets, sizes, *place):
        digests = b"8 bytes." if math.prod(sizes) else b""
        return StoredBox(Box(offsets, sizes), *place, digests)

    return {
        "v": StoredArray(
            np.dtype(np.float32),
            (3, 2),
            (
                box((0, 0), (1, 2), 0, "packed/float32", 3),
                box((1, 0), (2, 2), 0, "w[0:2, 0:2]", 0),
            ),
        ),
        "half": StoredArray(BFLOAT16, (5,), (box((0,), (5,), 1, "packed/bfloat16", 0),)),
        "empty": StoredArray(np.dtype(bool), (0, 4), ()),
        "scalar": StoredArray(np.dtype("f4"), (), (box((), (), 0, "packed/float32", 8),)),
    }


def manifest(**changes):
    given = {
        "id": "an id",
        "step": 7,
        "created": "2025-01-02T03:04:05.678+00:00",
        "world_size": 2,
        "versions": {"mpidist": "1"},
        "crossovers": {"registered": 5},
        "metadata": {"note": "any"},
        "values": VALUES,
        "files": FILES,
        "arrays": arrays(),
    }
    return Manifest(**given | changes)


def signed(body):
    """A manifest with a right digest, whatever it says."""
    text = json.dumps(body)
    return f'{{"digest":"{xxhash.xxh3_128_hexdigest(text.encode())}",{text[1:]}\n'.encode()


def body_of(data):
    body = json.loads(data)
    del body["digest"]
    return body


def test_what_is_read_is_what_was_written():
    for one in (manifest(), manifest(arrays={}, files=(), values={}, metadata=math.nan)):
        data = one.to_bytes()
        assert data.isascii()
        read = Manifest.from_bytes(data, "here")
        assert read == one or repr(read) == repr(one)  # not-a-number is not itself
    assert Manifest.from_bytes(signed(body_of(manifest().to_bytes())), "here") == manifest()


def test_any_changed_byte_is_found_or_changes_nothing():
    one = manifest()
    data = one.to_bytes()
    errors = 0
    for place, byte in enumerate(data):
        for other in {byte ^ 1, byte ^ 4, byte ^ 128, ord("9"), ord(" ")} - {byte}:
            changed = data[:place] + bytes([other]) + data[place + 1 :]
            try:
                read = Manifest.from_bytes(changed, "here")
            except CheckpointError:
                errors += 1
            else:
                assert read == one, place
    assert errors > 4 * len(data) - 10


@pytest.mark.parametrize("length", [0, 1, 100, -2])
def test_a_manifest_that_was_cut_off(length):
    with pytest.raises(CheckpointCorruptError, match="here is not, or not all of"):
        Manifest.from_bytes(manifest().to_bytes()[:length], "here")


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"[1]", b'"x"', b"{}", b'{"digest":1}', b"\xff\xfe", b"[" * 10_000],
)
def test_what_is_no_manifest(data):
    with pytest.raises(CheckpointCorruptError, match="here is not"):
        Manifest.from_bytes(data, "here")


def test_a_later_version_is_not_guessed_at():
    body = body_of(manifest().to_bytes()) | {"version": 2, "arrays": "of another kind"}
    with pytest.raises(CheckpointIncompatibleError, match=r"here has version 2 .* later mpidist"):
        Manifest.from_bytes(signed(body), "here")


def test_another_format():
    body = body_of(manifest().to_bytes()) | {"format": "something else"}
    with pytest.raises(CheckpointCorruptError):
        Manifest.from_bytes(signed(body), "here")


def forged(change):
    body = body_of(manifest().to_bytes())
    change(body)
    return signed(body)


def box_of(body):
    return body["arrays"]["v"]["boxes"][1]


LIES = {
    "a file elsewhere": lambda b: b["files"][0].update(name="../rank-00000.h5"),
    "an absolute file": lambda b: b["files"][0].update(name="/etc/passwd"),
    "the directory itself": lambda b: b["files"][0].update(name=".."),
    "a file without a name": lambda b: b["files"][0].update(name=""),
    "a name that ends early": lambda b: b["files"][0].update(name="rank\0.h5"),
    "a short file": lambda b: b["files"][0].update(size=3015),
    "a dataset before its file": lambda b: b["files"][0]["datasets"]["w[0:2, 0:2]"].update(byte=-1),
    "a dataset behind its file": lambda b: b["files"][0]["datasets"]["w[0:2, 0:2]"].update(
        byte=10**30
    ),
    "a dataset of another shape": lambda b: b["files"][0]["datasets"]["w[0:2, 0:2]"].update(
        shape=[4, 1]
    ),
    "a huge dataset": lambda b: b["files"][0]["datasets"]["w[0:2, 0:2]"].update(shape=[2**62, 8]),
    "a negative shape": lambda b: b["files"][0]["datasets"]["w[0:2, 0:2]"].update(shape=[-2, -2]),
    "no such file": lambda b: box_of(b).update(file=2),
    "a file from the end": lambda b: box_of(b).update(file=-1),
    "no such dataset": lambda b: box_of(b).update(dataset="w"),
    "a first element outside": lambda b: box_of(b).update(first=1),
    "a first element far away": lambda b: box_of(b).update(first=10**30),
    "a negative first element": lambda b: box_of(b).update(first=-1),
    "boxes that overlap": lambda b: box_of(b).update(offsets=[0, 0]),
    "a box outside": lambda b: box_of(b).update(offsets=[2, 0]),
    "a hole": lambda b: b["arrays"]["v"].update(shape=[4, 2]),
    "no boxes": lambda b: b["arrays"]["v"].update(boxes=[]),
    "a large array of nothing": lambda b: b["arrays"]["empty"].update(shape=[2**70, 4]),
    "other dimensions": lambda b: b["arrays"]["v"].update(shape=[6]),
    "a dtype that runs code": lambda b: b["arrays"]["v"].update(dtype="object"),
    "a wider dtype": lambda b: b["arrays"]["v"].update(dtype="complex128"),
    "digests cut off": lambda b: box_of(b).update(digests="OCBieXRl"),
    "digests of other letters": lambda b: box_of(b).update(digests="OCBieXRlcy4=?"),
    "a size that is text": lambda b: b["files"][0].update(size="many"),
    "a shape of fractions": lambda b: b["arrays"]["v"].update(shape=[3.0, 2.0]),
    "an infinite step": lambda b: b.update(step=math.inf),
    "no files": lambda b: b.pop("files"),
    "files of another kind": lambda b: b.update(files={"a": 1}),
    "arrays of another kind": lambda b: b.update(arrays=[1]),
    "values of another kind": lambda b: b.update(versions=3),
    "a float that is none": lambda b: b.update(metadata={"mpidist:float": "none"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_contradicts_itself(lie):
    """Whoever forges one can make the digest right, too."""
    with pytest.raises(CheckpointCorruptError, match="here contradicts itself"):
        Manifest.from_bytes(forged(LIES[lie]), "here")
