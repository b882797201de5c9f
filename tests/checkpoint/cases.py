"""Random states, sharded at random, and what numpy says they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random
from typing import Any, TypeAlias
from unittest import mock

import h5py
import numpy as np

from mpidist import Box, ShardedArray, checkpoint
from mpidist._types import Array, DType
from mpidist.arrays.boxes import boxes_of_range
from mpidist.arrays.namespaces import BFLOAT16, DTYPES
from mpidist.checkpoint.format.manifest import ChunkGrid
from mpidist.group import ProcessGroup

KINDS = sorted(DTYPES, key=str)

WHOLE = "whole"
"""What a rank has of an array: all of it, as a plain array."""

Held: TypeAlias = "str | range | list[Box] | None"
"""WHOLE; a range of the flattened array; boxes, perhaps none; or the name is not in its state."""


def boxes_of(held: Held, shape: Sequence[int]) -> set[Box]:
    """The boxes that are not empty."""
    if isinstance(held, range):
        return set(boxes_of_range(shape, held.start, held.stop))
    if held == WHOLE:
        held = [Box.whole(shape)]
    return {box for box in held or [] if not box.empty}


# -- random sharding -------------------------------------------------------------------------------


def _some(random: Random, size: int) -> list[int]:
    """At least one of the ranks."""
    ranks = random.sample(range(size), size)
    return sorted(ranks[: random.randint(1, size)])


def _cuts(random: Random, length: int, parts: int) -> list[tuple[int, int]]:
    """Cut a length at random places, so that parts may be empty."""
    places = [0, *sorted(random.randint(0, length) for _ in range(parts - 1)), length]
    return [(a, b - a) for a, b in itertools.pairwise(places)]


def on_a_grid(random: Random, shape: Sequence[int], size: int) -> list[list[Box]]:
    """Cut any number of dimensions anywhere; each box is held by any ranks."""
    cuts = [_cuts(random, length, random.choice([1, 1, 2, 3])) for length in shape]
    held: list[list[Box]] = [[] for _ in range(size)]
    for parts in itertools.product(*cuts):
        box = Box(tuple(o for o, _ in parts), tuple(n for _, n in parts))
        for rank in _some(random, size) if random.random() < 0.3 else [random.randrange(size)]:
            held[rank].append(box)
    return held


def in_ranges(random: Random, shape: Sequence[int], size: int) -> list[range]:
    """Cut the flattened array anywhere; some ranks hold the same range."""
    parts = random.randint(1, size)
    ranges = _cuts(random, prod(shape), parts)
    ranges += [random.choice(ranges) for _ in range(size - parts)]
    random.shuffle(ranges)
    return [range(start, start + length) for start, length in ranges]


def some_sharding(random: Random, shape: Sequence[int], size: int) -> list[Held]:
    """What each rank has of an array, so that all have all of it."""
    way = random.choice(["whole", "grid", "grid", "range"])
    if way == "whole":
        there = _some(random, size)
        return [WHOLE if rank in there else None for rank in range(size)]
    if way == "range":
        return list(in_ranges(random, shape, size))
    held = on_a_grid(random, shape, size)
    # Who holds nothing may not even know the name; somebody does.
    return [
        boxes if boxes or not rank or random.random() < 0.5 else None
        for rank, boxes in enumerate(held)
    ]


# -- random states ---------------------------------------------------------------------------------


@dataclass
class Case:
    """Arrays, who holds what of them at the save, and who wants what of them."""

    arrays: dict[str, Array]
    saved: dict[str, list[Held]]
    wanted: dict[str, list[Held]]
    seed: int


def random_array(dtype: DType, shape: Sequence[int], seed: int) -> Array:
    """Any bits at all: not-a-numbers with a payload, too."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(prod(shape) * dtype.itemsize), dtype).reshape(shape).copy()


def some_case(random: Random, savers: int, loaders: int) -> Case:
    """Draw a case; from hypothesis, which makes it small if it fails, or from a seed."""
    case = Case({}, {}, {}, random.randint(0, 2**16))
    for number in range(random.randint(1, 5)):
        name = random.choice(["", "deep/", "deep/er/", "ünï code %b/"]) + f"x{number}"
        shape = [random.choice([1, 2, 3, 5, 8, 13, 0]) for _ in range(random.randint(0, 4))]
        dtype = random.choice(KINDS)
        case.arrays[name] = random_array(dtype, shape, case.seed + number)
        case.saved[name] = some_sharding(random, shape, savers)
        wanted = some_sharding(random, shape, loaders)
        if random.random() < 0.3:  # only a part of it
            wanted = [w[: len(w) // 2] if isinstance(w, (list, range)) else w for w in wanted]
        case.wanted[name] = wanted
    return case


def laid_out(rng: np.random.Generator, like: Array, dtype: DType) -> Array:
    """Return the same elements in memory of any order and spacing."""
    way = rng.integers(4)
    if way == 0:
        out = np.empty(like.shape, dtype, order="F")
    elif way == 1 and like.ndim:
        out = np.empty((*like.shape[:-1], 2 * like.shape[-1]), dtype)[..., ::2]
    elif way == 2 and like.ndim:
        out = np.empty(like.shape, dtype)[::-1]
    else:
        out = np.empty(like.shape, dtype)
    out[...] = like
    return out


def held_by(
    case: Case, held: Mapping[str, list[Held]], rank: int, *, zeros: bool
) -> dict[str, Any]:
    """Return the state of a rank: of the arrays' elements, or of zeros to be filled."""
    rng = np.random.default_rng(case.seed + rank)
    state: dict[str, Any] = {}
    for name, array in case.arrays.items():
        source = np.zeros_like(array) if zeros else array
        dtype = array.dtype
        if dtype != BFLOAT16 and rng.random() < 0.25:
            dtype = dtype.newbyteorder(">")
        mine = held[name][rank]
        if mine == WHOLE:
            state[name] = laid_out(rng, source, dtype)
        elif isinstance(mine, range):
            piece = laid_out(rng, source.reshape(-1)[mine.start : mine.stop], dtype)
            state[name] = ShardedArray.of_range(array.shape, mine.start, piece)
        elif mine is not None:
            pieces = {box: laid_out(rng, np.array(source[box.slices]), dtype) for box in mine}
            state[name] = ShardedArray(array.shape, dtype, pieces)
    return state


def bits(array: Array) -> tuple[Any, ...]:
    """What must be equal: dtype, shape, and every bit."""
    native = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="))
    return str(native.dtype), array.shape, native.tobytes()


def check_loaded(case: Case, state: Mapping[str, Any], rank: int) -> None:
    """Compare what a rank has loaded with slices of the original."""
    for name, array in case.arrays.items():
        mine = case.wanted[name][rank]
        if mine is None:
            assert name not in state
        elif mine == WHOLE:
            assert bits(state[name]) == bits(array), name
        else:
            assert state[name].pieces.keys() == boxes_of(mine, array.shape)
            for box, piece in state[name].pieces.items():
                assert bits(piece) == bits(np.array(array[box.slices])), (name, box)


def check_files(case: Case, path: Path) -> None:
    """Compare `load_full`, and the view in plain h5py, with the original."""
    full = checkpoint.load_full(path)
    assert {name: bits(array) for name, array in full.items()} == {
        name: bits(array) for name, array in case.arrays.items()
    }
    with h5py.File(path / "step-000001" / "view.h5") as file:
        for name, array in case.arrays.items():
            dataset = file[name]
            shown = dataset[()] if array.ndim else np.array(dataset[()], dataset.dtype)
            if "mpidist dtype" in dataset.attrs:
                assert dataset.attrs["mpidist dtype"] in ("bfloat16", b"bfloat16")
                assert shown.dtype == np.uint16
                shown = shown.view(BFLOAT16)
            assert bits(shown) == bits(array), name


def save_case(group: ProcessGroup, case: Case, path: Path) -> None:
    """Save this rank's part."""
    checkpoint.save(path, held_by(case, case.saved, group.rank, zeros=False), group, step=1)


def load_case(group: ProcessGroup, case: Case, path: Path) -> None:
    """Load this rank's part, and compare it."""
    state = held_by(case, case.wanted, group.rank, zeros=True)
    checkpoint.load(path, state, group)
    check_loaded(case, state, group.rank)


# -- other circumstances ---------------------------------------------------------------------------


@contextmanager
def small_sizes(chunk: int, run: int, own: int) -> Iterator[None]:
    """Cut small arrays as large ones are: chunks, runs, datasets of their own, blocks and reads.

    Parameters
    ----------
    chunk, run, own : int
        Bytes: most of a chunk, of a run (at most half a chunk), and from which on a box has a
        dataset of its own.
    """
    most = 4 * max(chunk, 16)
    patches = {
        "format.manifest": {"_CHUNK": chunk, "_RUN": run, "ALIGNMENT": own},
        "format.files": {"ALIGNMENT": own},
        "saving.plan": {"ALIGNMENT": own},
        "saving.writing": {"ALIGNMENT": own, "_BLOCK": 4 * own},
        "loading.reading": {"MAX_READ": most},
        "loading.load": {"MAX_READ": most, "BUFFER": 2 * most},
    }
    with ExitStack() as stack:
        stack.callback(ChunkGrid.of.cache_clear)
        for module, values in patches.items():
            stack.enter_context(mock.patch.multiple(f"mpidist.checkpoint.{module}", **values))
        ChunkGrid.of.cache_clear()
        yield
