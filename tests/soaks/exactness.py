"""Random all_reduces on a real job, each compared with numpy, with the other ranks, and a rerun.

    mpirun -n 4 python -m tests.soaks.exactness --count 1000

Every rank makes the arrays of all ranks from one seed and combines them with numpy in the order of
the ranks. Integers, minima and maxima, and on one node half types and sums of registered memory,
have to be the same bit for bit; other sums of p floats may differ by p eps times the sum of the
absolute values. All ranks must hold the same bits, and so must the same call when it is made again.
``MPIDIST_RANKS_PER_NODE=2`` makes 4 ranks two nodes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from zlib import crc32

import ml_dtypes
import numpy as np

import mpidist
from mpidist._types import MAX, MEAN, MIN, PROD, SUM, Array, DType, ReduceOp
from mpidist.arrays.namespaces import HALVES
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.usage import RankArgumentParser

__all__ = ["Case", "Findings", "compare_with_numpy", "main"]

_MOST_BYTES = 4 << 20

_ALWAYS_DIRECT = 1 << 20
"""From so many bytes on, registered memory is worked on where it lies on every machine."""

_BATCH = 6
"""So many calls at a time; the immediate ones among them are outstanding together."""

_NUMPY: Mapping[str, np.ufunc] = {
    "SUM": np.add,
    "MEAN": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One all_reduce, drawn alike on all ranks.

    Attributes
    ----------
    number : int
        Its place in the run; with the run's seed, the seed of its arrays.
    shape : tuple of int
        Of each rank's array.
    dtype : dtype
        Of each rank's array.
    op : ReduceOp
        One that has a meaning for it.
    registered, in_place, immediate : bool
        How it is called. A result that is not in place goes into a given array or a new one.
    offset : int
        Elements by which the array begins behind the beginning of its memory.
    """

    number: int
    shape: tuple[int, ...]
    dtype: DType
    op: ReduceOp
    registered: bool
    in_place: bool
    immediate: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of each rank's array."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def is_exact(self, group: ProcessGroup) -> bool:
        """Whether the order of the ranks, or no rounding at all, is promised."""
        if self.dtype.kind in "iub" or self.op in (MIN, MAX):
            return True
        direct = self.registered and self.in_place
        if self.dtype in HALVES:  # by nodes, the float32 sums of nodes are summed
            return group.num_nodes == 1 or not direct
        return direct and self.nbytes >= _ALWAYS_DIRECT and group.num_nodes == 1


@dataclass(frozen=True, slots=True)
class Findings:
    """What a run found.

    Attributes
    ----------
    exact : int
        Cases that had to equal numpy bit for bit, and did.
    rounded : int
        Cases that had to come near, and did.
    equal : int
        How many of those were bit for bit the same as well.
    worst : float
        The largest error of those, as a share of what is allowed.
    digest : int
        Of all results, to be compared with another run on the same layout.
    """

    exact: int = 0
    rounded: int = 0
    equal: int = 0
    worst: float = 0.0
    digest: int = 0


def draw_cases(seed: int, group: ProcessGroup) -> Iterator[Case]:
    """Yield cases without end, the same on all ranks."""
    rng = np.random.default_rng(seed)
    pairs = sorted(group.capabilities.reductions, key=lambda pair: (pair[1].name, pair[0].name))
    sums = [pair for pair in pairs if pair[0] in (SUM, MEAN) and pair[1].kind not in "biu"]
    number = 0
    while True:
        # Sums of numbers that are rounded are the hard ones, and a tenth of all pairs.
        among = sums if rng.random() < 0.4 else pairs
        op, dtype = among[rng.integers(len(among))]
        yield Case(
            number=number,
            shape=_draw_shape(rng, dtype.itemsize),
            dtype=dtype,
            op=op,
            registered=bool(rng.integers(2)),
            in_place=bool(rng.integers(3)),
            immediate=bool(rng.integers(2)),
            offset=int(rng.integers(0, 100)) * int(rng.integers(2)),
        )
        number += 1


def _draw_shape(rng: np.random.Generator, itemsize: int) -> tuple[int, ...]:
    """Return a shape, small ones as often as large ones, odd ones as often as even ones."""
    special: list[tuple[int, ...]] = [(), (0,), (1,), (3, 0), (2, 1, 3)]
    if rng.random() < 0.15:
        return special[rng.integers(len(special))]
    most = _MOST_BYTES // itemsize
    # A third is large: between, the paths of large arrays would hardly be met.
    low = most // 16 if rng.random() < 0.33 else 1
    count = int(np.exp(rng.uniform(np.log(low), np.log(most))))
    if rng.random() < 0.3:
        columns = int(rng.integers(1, 8))
        return (count // columns, columns)
    return (count,)


def contribution(case: Case, seed: int, rank: int) -> Array:
    """Return the array of one rank, which every rank can make."""
    rng = np.random.default_rng([seed, case.number, rank])
    dtype = case.dtype
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, case.shape)).astype(dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.asarray(rng.integers(limits.min, limits.max, case.shape, dtype, endpoint=True))
    values: Any = np.asarray(rng.standard_normal(case.shape))
    if dtype.kind == "c":
        values = values + 1j * rng.standard_normal(case.shape)
    if case.op is PROD:  # of the size of 1, so that nothing overflows
        values = 1 + values / 8
    if case.op in (MIN, MAX):
        values = np.where(rng.random(case.shape) < 0.02, np.nan, values)
    return np.asarray(values).astype(dtype)


def by_numpy(parts: Sequence[Array], op: ReduceOp) -> Array:
    """Combine in the order of the ranks; halves in float32, rounded once."""
    dtype = parts[0].dtype
    wide = np.dtype(np.float32) if dtype in HALVES else dtype
    total = parts[0].astype(wide)
    with np.errstate(over="ignore"):
        for part in parts[1:]:
            total = np.asarray(_NUMPY[op.name](total, part.astype(wide)))
    if op is MEAN:
        total = np.asarray(total / len(parts)).astype(wide)
    if op.name in ("LAND", "LOR", "LXOR"):
        total = total.astype(bool)
    return total.astype(dtype)


def share_of_bound(case: Case, got: Array, expected: Array, parts: Sequence[Array]) -> float:
    """Return the largest error as a share of p eps times the sum (or product) of the moduli."""
    if got.size == 0:
        return 0.0
    moduli = np.abs(np.stack(parts)).astype(np.float64)
    if case.op is PROD:
        size = moduli.prod(axis=0) * (4 if case.dtype.kind == "c" else 1)
    else:
        size = moduli.sum(axis=0) / (len(parts) if case.op is MEAN else 1)
    known: Any = ml_dtypes.finfo  # bfloat16, too
    bound = len(parts) * float(known(case.dtype).eps) * size
    wide = np.complex128 if case.dtype.kind == "c" else np.float64
    error = np.abs(got.astype(wide) - expected.astype(wide))
    return float(np.max(error / np.maximum(bound, np.finfo(np.float64).tiny)))


def _begin(case: Case, seed: int, group: ProcessGroup) -> Work[Array] | Array:
    """Make the call on fresh arrays; return its work, or its result."""
    count = case.offset + int(np.prod(case.shape))
    memory = group.empty(count, case.dtype) if case.registered else np.empty(count, case.dtype)
    x = memory[case.offset :].reshape(case.shape)
    x[...] = contribution(case, seed, group.rank)
    out = x if case.in_place else np.empty_like(x) if case.offset else None
    call: Any = mpidist.iall_reduce if case.immediate else mpidist.all_reduce
    begun: Work[Array] | Array = call(x, group, op=case.op, out=out)
    return begun


def _results(
    cases: Sequence[Case], seed: int, group: ProcessGroup, own: np.random.Generator
) -> dict[int, Array]:
    """Make some calls, the immediate ones outstanding together, waited for in an own order."""
    begun = [(case, _begin(case, seed, group)) for case in cases]
    results = {}
    for place in own.permutation(len(begun)):
        case, result = begun[place]
        results[case.number] = result.wait() if isinstance(result, Work) else result
    return results


def compare_with_numpy(group: ProcessGroup, *, count: int, seed: int) -> Findings:
    """Make random all_reduces twice, and compare them with numpy and with the other ranks.

    Parameters
    ----------
    group : ProcessGroup
        The ranks taking part.
    count : int
        How many; each is made twice.
    seed : int
        Of everything but the order in which each rank waits.

    Returns
    -------
    Findings
        The same on all ranks.

    Raises
    ------
    AssertionError
        If a result is not what it must be; names seed and case.

    Notes
    -----
    Collective over `group`; blocks.
    """
    own = np.random.default_rng([seed, group.rank])
    cases = islice(draw_cases(seed, group), count)
    findings, digests = Findings(), []
    # A group that has registered memory may take other paths than one that has none yet.
    group.empty(1)
    while batch := list(islice(cases, _BATCH)):
        first = _results(batch, seed, group, own)
        again = _results(batch, seed, group, own)
        for case in batch:
            got = first[case.number]
            where = f"seed {seed}, rank {group.rank} of {group.size}: {case}"
            if got.tobytes() != again[case.number].tobytes():
                raise AssertionError(f"{where}: a rerun gave other bits")
            findings = _judge(case, got, seed, group, findings, where)
            digests.append(crc32(got.tobytes()))
    _compare_ranks(digests, seed, group)
    return replace(findings, digest=crc32(np.array(digests, np.uint32).tobytes()))


def _judge(
    case: Case, got: Array, seed: int, group: ProcessGroup, findings: Findings, where: str
) -> Findings:
    """Compare one result with numpy's, and count it."""
    parts = [contribution(case, seed, rank) for rank in range(group.size)]
    expected = by_numpy(parts, case.op)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(f"{where}: got {got.dtype} {got.shape}")
    equal = got.tobytes() == expected.tobytes()
    if not equal and case.op in (MIN, MAX):  # there are several NaN and two zeros
        equal = bool(((got == expected) | ((got != got) & (expected != expected))).all())
    if case.is_exact(group):
        if not equal:
            raise AssertionError(f"{where}: expected {expected!r}\ngot {got!r}")
        return replace(findings, exact=findings.exact + 1)
    share = share_of_bound(case, got, expected, parts)
    if not share <= 1:
        raise AssertionError(f"{where}: {share:.3g} times what rounding may do")
    return replace(
        findings,
        rounded=findings.rounded + 1,
        equal=findings.equal + equal,
        worst=max(findings.worst, share),
    )


def _compare_ranks(digests: list[int], seed: int, group: ProcessGroup) -> None:
    """Raise if two ranks hold different bits."""
    for rank, others in enumerate(mpidist.all_gather_object(digests, group)):
        differ = [
            number
            for number, pair in enumerate(zip(digests, others, strict=True))
            if len(set(pair)) > 1
        ]
        if differ:
            raise AssertionError(
                f"seed {seed}: ranks {group.rank} and {rank} hold different results of the cases "
                f"{differ}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = RankArgumentParser(prog="python -m tests.soaks.exactness", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of shapes and values (default: 0)")
    options = parser.parse_args(arguments)
    with mpidist.init(timeout=120.0) as world:
        found = compare_with_numpy(world, count=options.count, seed=options.seed)
        if world.rank == 0:
            world.print(
                f"{options.count} all_reduces, seed {options.seed}, {world.num_nodes} node(s): "
                f"{found.exact} bit for bit as numpy in rank order; {found.rounded} within "
                f"{found.worst:.2f} of p eps sum|x|, {found.equal} of them bit for bit; ranks and "
                f"reruns agree; digest {found.digest:08x}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
