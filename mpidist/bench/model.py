"""What an all_reduce costs, as a few numbers that are fitted to measured times.

A message costs a latency and its bytes a bandwidth (Hockney). Inside a node the direct path is two
meetings and 2 n bytes of memory traffic of each rank: a time that does not depend on n, bytes that
find their arrays in the caches, and, from some size on, bytes that do not. Over nodes every rank
all-reduces its slice with its counterparts, by the algorithm that `mpidist.backends.algorithms`
takes, while the ranks of a node share the network's bandwidth.

References
----------
Hockney (1994), The communication challenge for MPP: Intel Paragon and Meiko CS-2, section 2.
Thakur, Rabenseifner, Gropp (2005), Optimization of Collective Communication Operations in MPICH,
sections 3 (the cost model) and 4.5 (all_reduce).
Patarasuk, Yuan (2009), Bandwidth optimal all-reduce algorithms for clusters of workstations,
section 3 (the ring).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import log2
from typing import Protocol

import numpy as np

from mpidist._types import Array
from mpidist.backends.algorithms import SHORT

_RECORD = 96
"""Bytes by which the nodes compare what their ranks call, before anything is written."""


BACKWARD = 2 / 3
"""The share of a step's computation that is its backward pass: two products of three."""


@dataclass(frozen=True, slots=True, order=True)
class JobLayout:
    """How many nodes, and how many ranks on each."""

    nodes: int
    ranks: int

    def __str__(self) -> str:
        """Return it as tables show it."""
        return f"{self.nodes} x {self.ranks}"


@dataclass(frozen=True, slots=True)
class Point:
    """A measured time: bytes of each rank's array, and the median seconds of the slowest rank."""

    nbytes: int
    seconds: float


class Fit(Protocol):
    """Something that predicts a time in seconds from a size."""

    def time(self, nbytes: float) -> float:
        """Return the time."""
        ...


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a fit is off, as shares of the measured times: 0.1 is ten per cent.

    The median and the largest of the absolute values over `count` points; NaN where there are none.
    """

    median: float
    worst: float
    count: int

    @classmethod
    def of(cls, fit: Fit, points: Sequence[Point]) -> Errors:
        """Compare a fit with measured points."""
        return cls.among(_off(fit, points))

    @classmethod
    def among(cls, errors: Sequence[float]) -> Errors:
        """Summarise relative errors."""
        if not errors:
            return cls(float("nan"), float("nan"), 0)
        return cls(float(np.median(np.abs(errors))), float(np.max(np.abs(errors))), len(errors))


@dataclass(frozen=True, slots=True)
class NetworkModel:
    """Messages between nodes.

    A message without bytes takes `latency` seconds. `bandwidth` is that of a node in one direction,
    in bytes per second, for all its ranks together.
    """

    latency: float
    bandwidth: float

    @classmethod
    def fit(cls, points: Sequence[Point]) -> NetworkModel:
        """Fit to the times of single messages of at least two sizes."""
        columns = np.array([[1.0, point.nbytes] for point in points])
        latency, per_byte = _least_squares(columns, points)
        return cls(latency, 1 / per_byte if per_byte else float("inf"))

    def time(self, nbytes: float) -> float:
        """Return the seconds that one message takes."""
        return self.latency + nbytes / self.bandwidth

    def all_reduce(self, nbytes: float, nodes: int, *, sharing: int, combine: float) -> float:
        """Return the seconds of an all_reduce among one rank of every node, as mpidist does it.

        That is recursive doubling up to 2 KiB, the ring above. `sharing` such operations go on at
        the same time and share a node's bandwidth; `combine` is the seconds per byte of combining
        two arrays.
        """
        if nodes == 1:
            return 0.0
        per_byte = sharing / self.bandwidth
        if nbytes <= SHORT:
            folding = 0 if nodes & (nodes - 1) == 0 else 1
            rounds = int(log2(nodes))
            exchange = self.latency + nbytes * per_byte
            return (rounds + 2 * folding) * exchange + (rounds + folding) * nbytes * combine
        share = (nodes - 1) / nodes * nbytes
        return 2 * (nodes - 1) * self.latency + 2 * share * per_byte + share * combine


@dataclass(frozen=True, slots=True)
class NodeFit:
    """An all_reduce by so many ranks of one node.

    `meetings` are the seconds of all that does not depend on the size: two meetings and the call
    itself. `near` and `far` are seconds per byte of the array up to the knee, and beyond it. `knee`
    is the number of bytes from which on the arrays do not stay in the caches; infinite if none was
    found.
    """

    ranks: int
    meetings: float
    near: float
    far: float
    knee: float

    @classmethod
    def fit(cls, ranks: int, points: Sequence[Point]) -> NodeFit:
        """Fit to times of at least two sizes; the knee is the measured size that fits best."""
        sizes = np.array([point.nbytes for point in points], float)
        fits: list[tuple[float, NodeFit]] = []
        for knee in [*np.unique(sizes)[1:-1], float("inf")]:
            beyond = np.maximum(sizes - knee, 0)
            columns = np.stack([np.ones_like(sizes), sizes, beyond], axis=1)
            fixed, slope, more = _least_squares(columns, points)
            fit = cls(ranks, fixed, slope, slope + more, float(knee))
            fits.append((sum(off**2 for off in _off(fit, points)), fit))
        return min(fits, key=lambda pair: pair[0])[1]

    def time(self, nbytes: float) -> float:
        """Return seconds."""
        beyond = max(nbytes - self.knee, 0.0)
        return self.meetings + self.near * (nbytes - beyond) + self.far * beyond

    def combining(self, nbytes: float) -> float:
        """Return the seconds per byte of adding one array of this size to another.

        An all_reduce makes each rank read and write 2 n bytes; an addition of n bytes is 3 n.
        """
        return 1.5 * (self.near if nbytes <= self.knee else self.far)

    def scaled(self, ranks: int) -> NodeFit:
        """Return what is assumed of more ranks than were measured.

        The memory gives no more bytes per second, so that p ranks with p times the bytes take p
        times as long; a meeting looks at p places; and the caches hold p arrays no longer.
        """
        factor = ranks / self.ranks
        return replace(
            self,
            ranks=ranks,
            meetings=self.meetings * factor,
            near=self.near * factor,
            far=self.far * factor,
            knee=self.knee / factor,
        )


@dataclass(frozen=True, slots=True)
class NodeModel:
    """All fits of one kind of node, at least one, in the order of their ranks."""

    fits: tuple[NodeFit, ...]

    def time(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of an all_reduce on one node.

        Between two measured numbers of ranks the times are interpolated; fewer ranks than were
        measured are taken to be no faster than the fewest; for more, see `NodeFit.scaled`.
        """
        if ranks == 1:
            return 0.0
        times = [fit.time(nbytes) for fit in self.fits]
        if ranks > self.fits[-1].ranks:
            return self.fits[-1].scaled(ranks).time(nbytes)
        return float(np.interp(ranks, [fit.ranks for fit in self.fits], times))

    def combining(self, nbytes: float) -> float:
        """Return the seconds per byte of adding arrays, by the fit of the most ranks."""
        return self.fits[-1].combining(nbytes)


@dataclass(frozen=True, slots=True)
class CostModel:
    """What an all_reduce costs inside a node and, with a network, on several nodes."""

    node: NodeModel
    network: NetworkModel | None = None

    def all_reduce(self, nbytes: float, *, ranks: int, nodes: int = 1) -> float:
        """Return the seconds of an all_reduce of registered arrays, with `ranks` on each node."""
        inside = self.node.time(nbytes, ranks)
        return inside + self.across(nbytes, ranks=ranks, nodes=nodes)

    def across(self, nbytes: float, *, ranks: int, nodes: int) -> float:
        """Return the part of it that is spent between nodes."""
        if nodes == 1:
            return 0.0
        if self.network is None:
            raise ValueError(f"a model of {nodes} nodes needs a network; there is none")
        combine = self.node.combining(nbytes)
        agree = self.network.all_reduce(_RECORD, nodes, sharing=ranks, combine=0.0)
        slices = self.network.all_reduce(nbytes / ranks, nodes, sharing=ranks, combine=combine)
        return agree + slices


def leave_one_out(fit: Callable[[Sequence[Point]], Fit], points: Sequence[Point]) -> Errors:
    """Predict each size but the first and the last from a fit without it.

    The points are in the order of their sizes; fewer than four give no errors.
    """
    if len(points) < 4:
        return Errors.among([])
    return Errors.among(
        [
            off
            for i in range(1, len(points) - 1)
            for off in _off(fit([*points[:i], *points[i + 1 :]]), points[i : i + 1])
        ]
    )


def _off(fit: Fit, points: Sequence[Point]) -> list[float]:
    return [fit.time(point.nbytes) / point.seconds - 1 for point in points]


def _least_squares(columns: Array, points: Sequence[Point]) -> list[float]:
    """Return the coefficients, none of them negative, with the least relative errors.

    There are two or three, so that each choice of those that are not 0 can be tried.
    """
    weighted = columns / np.array([[point.seconds] for point in points])
    ones, count = np.ones(len(points)), columns.shape[1]
    best = np.zeros(count)
    least = float("inf")
    for size in range(1, count + 1):
        for chosen in map(list, combinations(range(count), size)):
            scale = np.abs(weighted[:, chosen]).max(axis=0)
            if not (scale > 0).all():
                continue
            solution = np.linalg.lstsq(weighted[:, chosen] / scale, ones, rcond=None)[0] / scale
            left = float(np.square(weighted[:, chosen] @ solution - 1).sum())
            if (solution >= 0).all() and left < least:
                least, best = left, np.zeros(count)
                best[chosen] = solution
    return [float(value) for value in best]
