"""What is saved under one mesh is loaded under another, by any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist import DeviceMesh, DTensor, Partial, Replicate, Shard, ShardedArray, checkpoint
from mpidist.errors import CheckpointIncompatibleError, UnsupportedOperationError
from mpidist.mesh import box_at
from mpidist.testing import run_ranks

WHOLE = {
    "weight": np.arange(35.0).reshape(7, 5),
    "bias": np.arange(5, dtype=np.float32),
    "scale": np.array(3.0),
    "empty": np.zeros((0, 2), np.int8),
}

MESHES = {
    "one": (1, {"all": 1}, [Replicate()]),
    "rows of two": (2, {"all": 2}, [Shard(0)]),
    "columns of three": (3, {"all": 3}, [Shard(1)]),
    "rows twice": (4, {"dp": 2, "tp": 2}, [Shard(0), Shard(0)]),
    "replicas": (4, {"dp": 2, "tp": 2}, [Replicate(), Shard(0)]),
    "both": (4, {"a": 2, "b": 1, "c": 2}, [Shard(1), Replicate(), Shard(0)]),
}


def placements_of(placements, ndim):
    return [
        one if not isinstance(one, Shard) or one.dim < ndim else Replicate() for one in placements
    ]


def save(group, sizes, placements, path):
    mesh = DeviceMesh(group, **sizes)
    arrays = {
        name: DTensor.distribute(x, mesh, placements_of(placements, x.ndim), root=None)
        for name, x in WHOLE.items()
    }
    checkpoint.save(path, {"arrays": arrays, "list": [arrays["bias"]]}, group, step=0)


def load(group, sizes, placements, path):
    mesh = DeviceMesh(group, **sizes)
    arrays = {
        name: DTensor.empty(x.shape, mesh, placements_of(placements, x.ndim), dtype=x.dtype)
        for name, x in WHOLE.items()
    }
    checkpoint.load(path, {"arrays": arrays, "list": [arrays["bias"]]}, group)
    for name, x in WHOLE.items():
        box = box_at(x.shape, mesh.sizes, arrays[name].placements, mesh.coordinate)
        np.testing.assert_array_equal(arrays[name].local, x[box.slices])
        np.testing.assert_array_equal(arrays[name].full(), x)


@pytest.mark.parametrize("saver", MESHES)
def test_what_one_mesh_saves_every_other_loads(saver, tmp_path):
    size, sizes, placements = MESHES[saver]
    run_ranks(size, save, sizes, placements, tmp_path)
    for size, sizes, placements in MESHES.values():
        run_ranks(size, load, sizes, placements, tmp_path)
    whole = checkpoint.load_full(tmp_path)
    for name, x in WHOLE.items():
        np.testing.assert_array_equal(whole[f"arrays/{name}"], x)


def test_objects_may_have_such_arrays(tmp_path):
    class Model:
        def __init__(self, mesh, placements):
            self.weight = DTensor.distribute(WHOLE["weight"], mesh, placements, root=None)

        def state_dict(self):
            return {"weight": self.weight}

        def load_state_dict(self, state):
            assert isinstance(state["weight"], ShardedArray)
            (self.weight.local[...],) = state["weight"].pieces.values()

    def body(group):
        mesh = DeviceMesh(group, all=2)
        checkpoint.save(tmp_path, {"model": Model(mesh, [Shard(0)])}, group, step=0)
        other = Model(mesh, [Shard(1)])
        expected = other.weight.local.copy()
        other.weight.local[...] = 0
        checkpoint.load(tmp_path, {"model": other}, group)
        np.testing.assert_array_equal(other.weight.local, expected)

    run_ranks(2, body)


def test_partial_arrays_and_other_shapes_are_refused_by_name(tmp_path):
    def body(group):
        mesh = DeviceMesh(group, all=2)
        x = DTensor(np.ones(3), mesh, [Partial()])
        with pytest.raises(UnsupportedOperationError, match=r"checkpoint: 'sum': .* is partial"):
            checkpoint.save(tmp_path, {"sum": x}, group, step=0)
        y = x.redistribute([Shard(0)])
        checkpoint.save(tmp_path, {"sum": y}, group, step=0)
        with pytest.raises(UnsupportedOperationError, match=r"checkpoint: 'sum': .* is partial"):
            checkpoint.load(tmp_path, {"sum": x}, group)
        with pytest.raises(CheckpointIncompatibleError, match=r"sum: expected float64\[4\]"):
            checkpoint.load(
                tmp_path, {"sum": DTensor.empty((4,), mesh, [Shard(0)], dtype="f8")}, group
            )

    run_ranks(2, body)
