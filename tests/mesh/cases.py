"""Redistributions, drawn or chosen, and what numpy says of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

import mpidist
from mpidist import (
    BXOR,
    LAND,
    MAX,
    MEAN,
    PROD,
    SUM,
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
)
from mpidist.arrays.namespaces import BFLOAT16, to_host, ufunc_of
from mpidist.collectives import all_gather_object
from mpidist.errors import CollectiveTimeoutError
from mpidist.group import ProcessGroup

MESHES = [(4,), (2, 2), (1, 4), (2, 1, 2)]
OPS = [SUM, MEAN, MAX, PROD, BXOR, LAND]
FLOATS = [np.float32, np.float64, np.float16, BFLOAT16, np.complex64]
INTEGERS = [np.int32, np.uint8, np.bool_]


@dataclass(frozen=True)
class Case:
    """From one placement to another.

    Attributes
    ----------
    sizes, shape
        Of the mesh and the array.
    source, target
        Placements.
    dtype
        Of the array, whose values are small whole numbers: sums are exact.
    to : tuple of int or None
        Sizes of another mesh, if it moves to one; its ranks are in reverse order if `turned`.
    seed : int
        Of the values.
    """

    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    source: tuple[Any, ...]
    target: tuple[Any, ...]
    dtype: Any = np.float64
    to: tuple[int, ...] | None = None
    turned: bool = False
    seed: int = 0

    def mesh(self, group):
        return DeviceMesh(group, **{f"d{axis}": size for axis, size in enumerate(self.sizes)})

    def other(self, group, mesh):
        if self.turned:
            return mesh[mesh.names[::-1]]
        if self.to is None:
            return None
        return DeviceMesh(group, **{f"e{axis}": size for axis, size in enumerate(self.to)})


def hand_cut(x, sizes, placements, coordinate):
    """Cut with numpy's own array_split, dimension by dimension."""
    for size, placement, number in zip(sizes, placements, coordinate, strict=True):
        if isinstance(placement, Shard):
            x = np.array_split(x, size, axis=placement.dim)[number]
    return x


def op_of(placements):
    return next((one.op for one in placements if isinstance(one, Partial)), None)


def combined(parts, op):
    """Combine in order, halves in float32 and rounded once."""
    dtype = parts[0].dtype
    wide = np.float32 if dtype in (np.float16, BFLOAT16) else dtype
    total = parts[0].astype(wide)
    for part in parts[1:]:
        total = ufunc_of(op)(total, part.astype(wide))
    if op is MEAN:
        total = total / len(parts)
    return (total != 0 if op is LAND else np.asarray(total)).astype(dtype)


def summands(case):
    """Return what each coordinate along the partial dimensions adds, by these coordinates."""
    sizes = [
        size if isinstance(one, Partial) else 1
        for size, one in zip(case.sizes, case.source, strict=True)
    ]
    rng = np.random.default_rng(case.seed)
    most = 3 if op_of(case.source) is PROD else 8
    return {
        index: rng.integers(0, most, case.shape).astype(case.dtype)
        for index in product(*map(range, sizes))
    }


def lying(case, coordinate, parts):
    """Return the part of one rank."""
    index = tuple(
        i if isinstance(one, Partial) else 0 for i, one in zip(coordinate, case.source, strict=True)
    )
    return hand_cut(parts[index], case.sizes, case.source, coordinate)


def check_case(group, case, xp=np, immediate=False):
    """Redistribute, gather what all ranks have then, and compare it with numpy's."""
    mesh = case.mesh(group)
    parts = summands(case)
    op = op_of(case.source)
    expected = combined(list(parts.values()), op) if op else next(iter(parts.values()))
    local = lying(case, mesh.coordinate, parts)
    x = DTensor(xp.asarray(local), mesh, case.source)
    assert x.shape == case.shape, case
    other = case.other(group, mesh)
    made = x.iredistribute if immediate else x.redistribute
    y = made(case.target, mesh=other)
    y = y.wait() if immediate else y
    assert type(y.local) is type(x.local)
    assert (y.shape, y.placements) == (x.shape, case.target)
    # A case in point: what was given is as it was.
    np.testing.assert_array_equal(to_host(x.local), local)
    assert not xp.may_share_memory(y.local, x.local)
    check_parts(group, y, expected, case)
    if other is not None:
        other.close()
    mesh.close()


def check_parts(group, y, expected, case):
    """Compare the parts of all ranks with what numpy cuts of the array."""
    to = y.mesh
    own = (to.coordinate, to_host(y.local))
    op = op_of(y.placements)
    lines = {}
    for coordinate, array in sorted(all_gather_object(own, group), key=lambda pair: pair[0]):
        assert array.dtype == expected.dtype
        line = tuple(
            0 if isinstance(one, Partial) else i
            for i, one in zip(coordinate, y.placements, strict=True)
        )
        lines.setdefault(line, []).append(array)
    for line, arrays in lines.items():
        total = combined(arrays, op) if op else arrays[0]
        wanted = hand_cut(expected, to.sizes, y.placements, line)
        if op is LAND:
            wanted = wanted.astype(bool).astype(wanted.dtype)
        np.testing.assert_array_equal(total, wanted, err_msg=str(case))


def placements_of(random, ndim, mesh_ndim, op):
    kinds = [Replicate(), *([Partial(op)] if op else []), *(Shard(d) for d in range(ndim))]
    return tuple(random.choice(kinds) for _ in range(mesh_ndim))


def some_case(random):
    """Draw a case; from hypothesis, which makes it small if it fails."""
    sizes = random.choice(MESHES)
    shape = tuple(random.randint(0, 6) for _ in range(random.randint(0, 3)))
    ops = [random.choice([None, *OPS]) for _ in range(2)]
    whole_numbers = {BXOR, LAND} & set(ops)
    dtype = random.choice(INTEGERS if whole_numbers else FLOATS)
    if MAX in ops and dtype == np.complex64:
        dtype = np.float32
    if MEAN in ops and whole_numbers:
        ops = [None if op is MEAN else op for op in ops]
    turned = random.random() < 0.2
    to = random.choice(MESHES) if not turned and random.random() < 0.3 else None
    return Case(
        sizes,
        shape,
        placements_of(random, len(shape), len(sizes), ops[0]),
        placements_of(random, len(shape), len(to or sizes), ops[1]),
        dtype,
        to,
        turned,
        random.randint(0, 1000),
    )


S, R, P = Shard, Replicate(), Partial(SUM)

CHOSEN = [
    Case((4,), (5, 3), (S(0),), (S(1),)),
    Case((4,), (2, 3), (P,), (S(0),)),
    Case((4,), (7,), (P,), (R,), np.float32),
    Case((4,), (), (P,), (R,)),
    Case((2, 2), (5, 3), (S(0), S(0)), (S(1), R)),
    Case((2, 2), (5,), (S(0), S(0)), (S(0), S(0)), turned=True),
    Case((2, 2), (5, 3), (P, S(0)), (S(0), P), np.float16),
    Case((2, 2), (4, 4), (P, P), (S(1), S(0)), np.int32),
    Case((2, 2), (6, 2), (P, S(1)), (P, S(0))),
    Case((2, 2), (0, 3), (S(0), R), (R, S(1))),
    Case((2, 2), (5, 3), (R, R), (Partial(MAX), S(0))),
    Case((2, 2), (3, 2), (Partial(MEAN), R), (R, Partial(PROD)), np.float32),
    Case((2, 1, 2), (5, 4), (S(1), P, S(0)), (R, S(0), S(1)), BFLOAT16),
    Case((1, 4), (1, 7), (S(0), S(1)), (S(1), R), np.bool_),
    Case((2, 2), (5, 3), (S(0), P), (S(0),), to=(4,)),
]
"""One for each thing that can be different."""


def check_deadlines(world: ProcessGroup) -> None:
    """Check that what rank 0 alone calls ends at the deadline of the call, not of the group."""
    calls = [
        lambda x, mesh: DTensor.distribute(x, mesh, [Shard(0)], timeout=0.2),
        lambda x, mesh: DTensor(x, mesh, [Partial()]).redistribute([Shard(0)], timeout=0.2),
        lambda x, mesh: DTensor(x, mesh, [Partial()]).iredistribute([Shard(0)], timeout=0.2).wait(),
        lambda x, mesh: DTensor(x, mesh, [Partial()]).full(timeout=0.2),
    ]
    for number, call in enumerate(calls):
        with world.duplicate("late") as group, DeviceMesh(group, all=-1) as mesh:
            x = np.arange(8.0)
            if group.rank == 0:
                late = r"not complete after 0\.2 s.*; the call's own timeout sets the deadline"
                with pytest.raises(CollectiveTimeoutError, match=late):
                    call(x, mesh)
            elif number:
                DTensor(x, mesh, [Partial()])
            mpidist.barrier(world)
