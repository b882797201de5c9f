from __future__ import annotations

import copy
import json
import math
import os
import time
from random import Random

import numpy as np
import pytest
import xxhash

from mpidist import Box
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.checkpoint.format import parsing
from mpidist.checkpoint.format.manifest import (
    Manifest,
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
)
from mpidist.checkpoint.format.parsing import parse_manifest
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
        read = parse_manifest(data, "here")
        assert read == one or repr(read) == repr(one)  # not-a-number is not itself
    assert parse_manifest(signed(body_of(manifest().to_bytes())), "here") == manifest()


def test_any_changed_byte_is_found_or_changes_nothing():
    one = manifest()
    data = one.to_bytes()
    errors = 0
    for place, byte in enumerate(data):
        for other in {byte ^ 1, byte ^ 4, byte ^ 128, ord("9"), ord(" ")} - {byte}:
            changed = data[:place] + bytes([other]) + data[place + 1 :]
            try:
                read = parse_manifest(changed, "here")
            except CheckpointError:
                errors += 1
            else:
                assert read == one, place
    assert errors > 4 * len(data) - 10


@pytest.mark.parametrize("length", [0, 1, 100, -2])
def test_a_manifest_that_was_cut_off(length):
    with pytest.raises(CheckpointCorruptError, match="here is not, or not all of"):
        parse_manifest(manifest().to_bytes()[:length], "here")


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"[1]", b'"x"', b"{}", b'{"digest":1}', b"\xff\xfe", b"[" * 10_000],
)
def test_what_is_no_manifest(data):
    with pytest.raises(CheckpointCorruptError, match="here is not"):
        parse_manifest(data, "here")


def test_a_later_version_is_not_guessed_at():
    body = body_of(manifest().to_bytes()) | {"version": 2, "arrays": "of another kind"}
    with pytest.raises(CheckpointIncompatibleError, match=r"here has version 2 .* later mpidist"):
        parse_manifest(signed(body), "here")


def test_another_format():
    body = body_of(manifest().to_bytes()) | {"format": "something else"}
    with pytest.raises(CheckpointCorruptError):
        parse_manifest(signed(body), "here")


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
    "a name that is no path": lambda b: b["arrays"].update({"a//b": b["arrays"].pop("half")}),
    "a shape of fractions": lambda b: b["arrays"]["v"].update(shape=[3.0, 2.0]),
    "an infinite step": lambda b: b.update(step=math.inf),
    "no files": lambda b: b.pop("files"),
    "files of another kind": lambda b: b.update(files={"a": 1}),
    "arrays of another kind": lambda b: b.update(arrays=[1]),
    "values of another kind": lambda b: b.update(versions=3),
    "a float that is none": lambda b: b.update(metadata={"mpidist:float": "none"}),
    "a name that leads elsewhere": lambda b: b["arrays"].update({"../v": b["arrays"].pop("v")}),
    "a name that starts elsewhere": lambda b: b["arrays"].update({"/v": b["arrays"].pop("v")}),
    "no name": lambda b: b["values"].update({"": 1}),
    "a value that leads elsewhere": lambda b: b["values"].update({"a/../b": 1}),
    "a name that clears the screen": lambda b: b["arrays"].update(
        {"\x1b[2J": b["arrays"].pop("half")}
    ),
    "a name of two lines": lambda b: b["values"].update({"a\nb": 1}),
    "a name that runs backwards": lambda b: b["values"].update({"a\u202eb": 1}),
    "half a character": lambda b: b["values"].update({"a\ud800": 1}),
    "a name of a novel": lambda b: b["values"].update({"a" * 5000: 1}),
    "a name inside an array": lambda b: b["arrays"].update({"v/a": b["arrays"].pop("half")}),
    "a file that clears the screen": lambda b: b["files"][0].update(name="\x1b[2J"),
    "one file twice": lambda b: b["files"][0].update(name="rank-00001.h5"),
    "a dataset that clears the screen": lambda b: b["files"][1]["datasets"].update(
        {"\x9b2J": {"byte": 0, "shape": [1]}}
    ),
    "a version that clears the screen": lambda b: b["versions"].update(numpy="2\x1b[2J"),
    "a version that is a number": lambda b: b["versions"].update(numpy=2),
    "a date that clears the screen": lambda b: b.update(created="\x1b[2J"),
    "an id that clears the screen": lambda b: b.update(id="\x1b[2J"),
    "an id that is none": lambda b: b.update(id=None),
    "an id that no file has": lambda b: b.update(id="\u00fc"),
    "a shape of 2**63": lambda b: b["arrays"]["empty"].update(shape=[0, 2**63]),
    "a shape of too many bytes": lambda b: b["arrays"]["empty"].update(shape=[0, 2**40, 2**40]),
    "a negative length": lambda b: b["arrays"]["empty"].update(shape=[0, -1]),
    "too many dimensions": lambda b: b["arrays"]["empty"].update(shape=[0] * 33),
    "70 dimensions": lambda b: b["arrays"]["scalar"].update(
        shape=[1] * 70,
        boxes=[b["arrays"]["scalar"]["boxes"][0] | {"offsets": [0] * 70, "sizes": [1] * 70}],
    ),
    "a dataset of 70 dimensions": lambda b: b["files"][1]["datasets"].update(
        x={"byte": 0, "shape": [1] * 70}
    ),
    "no rank": lambda b: b.update(world_size=0),
    "a negative number of ranks": lambda b: b.update(world_size=-1),
    "a number of ranks that is text": lambda b: b.update(world_size="2"),
    "a number of ranks that is true": lambda b: b.update(world_size=True),
    "a step that is text": lambda b: b.update(step="7"),
    "a fraction of a step": lambda b: b.update(step=7.0),
    "a negative step": lambda b: b.update(step=-1),
    "a step of 2**64": lambda b: b.update(step=2**64),
    "values that are a list": lambda b: b.update(values=[1]),
    "values that are a float": lambda b: b.update(values={"mpidist:float": "inf"}),
    "a float that is a list": lambda b: b.update(metadata={"mpidist:float": [1]}),
    "a float of another kind": lambda b: b.update(metadata={"mpidist:float": "1e5"}),
    "a box of text": lambda b: box_of(b).update(offsets="10"),
    "boxes of text": lambda b: b["arrays"]["v"].update(boxes="ab"),
    "a box that is a list": lambda b: b["arrays"]["v"].update(boxes=[[1]]),
    "a box in a file that is true": lambda b: box_of(b).update(file=True),
    "a box that begins at 2**63": lambda b: box_of(b).update(offsets=[2**63, 0]),
}


def check(data):
    """A manifest is valid, or refused as corrupt; what is valid is written as it was read."""
    try:
        read = parse_manifest(data, "here")
    except (CheckpointCorruptError, CheckpointIncompatibleError):
        return False
    again = parse_manifest(read.to_bytes(), "here")
    assert again.to_bytes() == read.to_bytes()
    assert again.arrays == read.arrays
    assert read.world_size > 0
    assert 0 <= read.step < 2**63
    for array in read.arrays.values():
        assert 0 <= array.nbytes < 2**63
        np.empty((0, *array.shape), array.dtype)
    return True


STRANGE = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**40, 0.5, 1e308, math.inf, math.nan),
    *(
        "",
        "a",
        "..",
        "../x",
        "a/b",
        "\0",
        "\x1b[2J",
        "\ud800",
        "v",
        "float32",
        "object",
        "AAAAAAAAAAA=",
    ),
    *(
        [],
        [0],
        [-1],
        [2**63],
        [1] * 70,
        [[]],
        [{}],
        ["a"],
        {},
        {"": 0},
        {"a": 1},
        {"mpidist:float": 0},
    ),
]


def places(value, path=()):
    """Where the values of a document are."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from places(item, (*path, key))


def changed(body, random):
    """Change, remove, copy or add something somewhere."""
    path = random.choice(list(places(body))[1:])
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    other = body
    for key in random.choice(list(places(body))):
        other = other[key]
    change = random.randrange(5)
    if change == 0:
        del parent[path[-1]]
    elif change == 1 and isinstance(parent, dict):
        parent[random.choice([s for s in STRANGE if isinstance(s, str)])] = copy.deepcopy(other)
    elif change == 2 and type(parent[path[-1]]) is int:
        parent[path[-1]] += random.choice([-1, 1, 2**31, -(2**63)])
    elif change == 3:
        parent[path[-1]] = copy.deepcopy(other)
    else:
        parent[path[-1]] = copy.deepcopy(random.choice(STRANGE))


def test_any_json_is_a_valid_manifest_or_refused_as_corrupt():
    """Each with a right digest. More of them: ``MPIDIST_TEST_MANIFESTS=100000``."""
    number = int(os.environ.get("MPIDIST_TEST_MANIFESTS", "800"))
    valid = 0
    for seed in range(number):
        random = Random(seed)
        body = body_of(manifest().to_bytes())
        for _ in range(random.choice([1, 1, 2, 4])):
            changed(body, random)
        valid += check(signed(body))
    assert number // 50 < valid < number // 2
    for value in STRANGE:
        for data in (json.dumps(value).encode(), json.dumps({"digest": value}).encode()):
            assert not check(data)


def of_many(boxes, shape):
    """A manifest of an array with many boxes, each in a file of its own or all in one."""
    one = StoredFile("a.h5", 4 * math.prod(shape), {"x": StoredDataset(0, (math.prod(shape),))})
    stored = [StoredBox(box, 0, "x", 0, b"8 bytes.") for box in boxes]
    array = StoredArray(np.dtype("f4"), shape, tuple(stored))
    return manifest(files=(one,), arrays={"w": array})


MANY = {
    "rows": lambda: of_many([Box((n, 0), (1, 3)) for n in range(20_000)], (20_000, 3)),
    "columns": lambda: of_many([Box((0, n), (2, 1)) for n in range(20_000)], (2, 20_000)),
    "a grid": lambda: of_many(
        [Box((n % 140, n // 140), (1, 1)) for n in range(140**2)], (140, 140)
    ),
}


@pytest.mark.parametrize("way", MANY)
def test_many_boxes_are_read_soon(way):
    many = MANY[way]()
    data = many.to_bytes()
    before = time.process_time()
    assert parse_manifest(data, "here") == many
    assert time.process_time() - before < 2


def test_what_is_too_large_is_not_parsed(monkeypatch):
    monkeypatch.setattr(parsing, "MOST_BYTES", 100)
    with pytest.raises(
        CheckpointCorruptError, match=r"here has \d+ bytes, and a manifest at most 100"
    ):
        parse_manifest(manifest().to_bytes(), "here")


DEEP = {
    "of a value": '{"digest":"","format":"mpidist checkpoint","version":1,"values":',
    "of nothing": "",
}


@pytest.mark.parametrize("what", DEEP)
def test_any_depth_is_refused(what):
    for depth in (300, 900, 5_000, 100_000):
        for opening in ("[", '{"a":'):
            assert not check((DEEP[what] + depth * opening).encode())
            body = body_of(manifest().to_bytes())
            body["metadata"] = "deep"
            nested = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
            text = json.dumps(body).replace('"deep"', nested)
            digest = xxhash.xxh3_128_hexdigest(text.encode())
            check(f'{{"digest":"{digest}",{text[1:]}\n'.encode())


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_contradicts_itself(lie):
    """Whoever forges one can make the digest right, too."""
    with pytest.raises(CheckpointCorruptError, match="here contradicts itself"):
        parse_manifest(forged(LIES[lie]), "here")
