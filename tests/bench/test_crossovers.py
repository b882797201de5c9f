"""What measured times say about the sizes at which paths change."""

from __future__ import annotations

from mpidist.backends.crossovers import NEVER, Crossovers
from mpidist.bench.crossovers import find
from mpidist.bench.report import Row
from mpidist.bench.times import Times

SIZES = (1024, 2048, 4096, 8192)


def rows(**times):
    return [
        Row(
            operation="all_reduce",
            series=path.replace("_", " "),
            nbytes=nbytes,
            times=Times.of([seconds * 1e-6]),
            bus_factor=1.0,
        )
        for path, measured in times.items()
        for nbytes, seconds in zip(SIZES, measured, strict=False)
    ]


def test_each_path_is_taken_where_it_is_not_slower():
    found = find(
        rows(
            with_arrival=[5, 6, 11, 9],
            in_place=[9, 9, 9, 9],
            by_scratch=[14, 12, 12, 12],
            by_library=[7, 8, 10, 13],
        )
    )
    assert found == Crossovers(small=2048, registered=4096, scratch=8192)


def test_a_path_that_loses_at_the_largest_size_is_never_taken():
    found = find(
        rows(
            with_arrival=[9, 9, 9, 9],
            in_place=[5, 5, 5, 20],
            by_scratch=[5, 5, 5, 20],
            by_library=[7, 8, 10, 13],
        )
    )
    assert found == Crossovers(small=0, registered=NEVER, scratch=NEVER)


def test_two_per_cent_are_no_difference():
    found = find(
        rows(
            with_arrival=[10.1, 10.1, 10.1, 10.1],
            in_place=[10.1, 10.1, 10.1, 10.1],
            by_scratch=[10.1, 10.1, 10.1, 10.1],
            by_library=[10, 10, 10, 10],
        )
    )
    assert found == Crossovers(small=8192, registered=1024, scratch=1024)
