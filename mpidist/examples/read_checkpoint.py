"""Read a checkpoint of mpidist without mpidist: python read_checkpoint.py runs/a/step-000100"""

import base64
import json
import sys
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import xxhash


def read_checkpoint(directory, with_h5py=False):
    """Return the manifest, and all arrays by name; bfloat16 as the uint16 that it is stored as."""
    data = (Path(directory) / "manifest.json").read_bytes()
    manifest = json.loads(data)
    if (manifest["format"], manifest["version"]) != ("mpidist checkpoint", 1):
        raise ValueError("not of this format, or of a later version")
    if manifest["digest"] != xxhash.xxh3_128_hexdigest(b"{" + data[45:-1]):
        raise ValueError("the manifest is damaged")
    arrays = {}
    for name, entry in manifest["arrays"].items():
        dtype = np.dtype("uint16" if entry["dtype"] == "bfloat16" else entry["dtype"])
        arrays[name] = np.empty(entry["shape"], dtype)
        for box in entry["boxes"]:
            if prod(box["sizes"]):  # an empty box has no bytes
                dataset = open_dataset(Path(directory), manifest, box, dtype, with_h5py)
                part = read_box(dataset, box)
                verify(part, base64.b64decode(box["digests"]))
                arrays[name][region(box["offsets"], box["sizes"])] = part
    return manifest, arrays


def open_dataset(directory, manifest, box, dtype, with_h5py):
    file = manifest["files"][box["file"]]
    if with_h5py:
        import h5py

        return h5py.File(directory / file["name"])[box["dataset"]]
    place = file["datasets"][box["dataset"]]
    shape, byte = tuple(place["shape"]), place["byte"]
    return np.memmap(directory / file["name"], dtype.newbyteorder("<"), "r", byte, shape)


def read_box(dataset, box):
    sizes, first = box["sizes"], box["first"]
    if len(sizes) == len(dataset.shape):  # a region of the dataset
        return np.asarray(dataset[region(np.unravel_index(first, dataset.shape), sizes)])
    return np.asarray(dataset[first : first + prod(sizes)]).reshape(sizes)  # side by side


def region(offsets, sizes):
    return tuple(slice(int(o), int(o) + n) for o, n in zip(offsets, sizes, strict=True))


def verify(part, digests):
    """Compare each chunk of a box with its digest."""
    chunk = chunk_sizes(part.shape, part.dtype.itemsize)
    corners = product(*(range(0, size, t) for size, t in zip(part.shape, chunk, strict=True)))
    found = b"".join(xxhash.xxh3_64_digest(part[region(c, chunk)].tobytes()) for c in corners)
    if found != digests:
        raise ValueError("a box is damaged")


def chunk_sizes(sizes, itemsize):
    """Return the sizes of the chunks of a box that is not empty."""
    nbytes = 65536
    while nbytes < 1048576 and 1024 * nbytes < prod(sizes) * itemsize:
        nbytes *= 2
    most, run = max(nbytes // itemsize, 1), max(4096 // itemsize, 1)
    if prod(sizes) <= most:
        return list(sizes)
    chunk, inner, cut = list(sizes), 1, len(sizes) - 1
    while inner * sizes[cut] <= run:
        inner, cut = inner * sizes[cut], cut - 1
    side = max(run // inner, 1)
    left = most // (inner * side)
    for dimension in range(cut - 1, -1, -1):
        chunk[dimension] = min(sizes[dimension], max(left, 1))
        left //= chunk[dimension]
    chunk[cut] = min(sizes[cut], side * max(left, 1))
    return chunk


if __name__ == "__main__":
    for name, array in read_checkpoint(sys.argv[1])[1].items():
        print(name, array.dtype, array.shape)
