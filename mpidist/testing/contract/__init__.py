"""The cases that every transport has to pass, as one class to subclass.

Expected values come from plain numpy, on inputs that every rank draws for all ranks from seeds;
never from a second path through mpidist. Sums of floats may be off by p eps sum(abs(x)); all else
is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from mpidist.group import ProcessGroup
from mpidist.testing.contract import (
    _collectives,
    _errors,
    _groups,
    _immediate,
    _lists,
    _mixed,
    _point_to_point,
    _streams,
)
from mpidist.testing.contract._memory import HOST, DevicePlace, HostPlace, Place
from mpidist.testing.contract._verbs import VERBS

__all__ = ["BackendContract", "DeviceContract", "DevicePlace", "HostPlace", "Place", "Run"]

Run: TypeAlias = Callable[[Callable[[ProcessGroup], None]], object]
"""Calls a function on every rank with the rank's group of all ranks."""


def _test(case: Callable[[ProcessGroup, Any], None]) -> Callable[[Any, Run], None]:
    """Make a test method of a case, for any place of arrays or for a device."""

    def method(contract: BackendContract, run: Run) -> None:
        run(lambda group: case(group, contract.place))

    method.__doc__ = case.__doc__
    return method


class BackendContract:
    """What is asked of a transport, one method per promise; for pytest, by subclassing.

    A subclass gives a fixture `run`, which calls a function of one argument, the group of all
    ranks, on every rank. Where the process is itself a rank, it calls it once.

    Attributes
    ----------
    place : Place
        Where the arrays lie: in the host's memory, unless a subclass gives a `DevicePlace`.

    Notes
    -----
    Cases use only what the group's capabilities offer, and check that the rest is refused. The
    cases of deadlines break groups of their own, so that their processes must not wait for these
    at their end.

    Examples
    --------
    ::

        class TestMyTransport(BackendContract):
            @pytest.fixture
            def run(self):
                return lambda case: run_my_ranks(4, case)
    """

    place: Place = HOST

    # -- collectives ---------------------------------------------------------------------------

    test_barrier = _test(_collectives.barriers)
    test_every_dtype_moves = _test(_collectives.every_dtype_moves)
    test_every_reduce = _test(partial(_collectives.every_reduction, VERBS["reduce"]))
    test_every_all_reduce = _test(partial(_collectives.every_reduction, VERBS["all_reduce"]))
    test_every_reduce_scatter = _test(
        partial(_collectives.every_reduction, VERBS["reduce_scatter"])
    )
    test_long_reductions = _test(_collectives.long_reductions)
    test_error_state = _test(_collectives.error_state)
    test_shapes = _test(_collectives.shapes)
    test_layouts = _test(_collectives.layouts)
    test_out = _test(_collectives.landings)
    test_in_place = _test(_collectives.results_in_place)
    test_parts_in_place = _test(_collectives.parts_in_place)
    test_all_rows_on_one_rank = _test(_collectives.all_rows_on_one_rank)
    test_subclasses = _test(_collectives.subclasses)
    test_every_root = _test(_collectives.roots)
    test_uneven_counts = _test(_collectives.uneven)
    test_not_a_number = _test(_collectives.not_a_number)
    test_halves_round_once = _test(_collectives.halves_round_once)
    test_same_bits = _test(_collectives.bits)
    test_coalesced = _test(_lists.coalesced)
    test_coalesced_in_place = _test(_lists.coalesced_in_place)
    test_objects = _test(_lists.objects)
    test_objects_without_pickle = _test(_lists.objects_without_pickle)
    test_objects_not_restored = _test(_lists.objects_that_cannot_be_restored)
    test_objects_and_arrays = _test(_lists.objects_and_arrays)

    # -- point to point ------------------------------------------------------------------------

    test_rings = _test(_point_to_point.rings)
    test_receive_into_arrays = _test(_point_to_point.into_arrays)
    test_order_and_tags = _test(_point_to_point.in_order)
    test_any_source = _test(_point_to_point.any_source)
    test_nothing_left_behind = _test(_point_to_point.nothing_left_behind)
    test_messages_of_subclasses = _test(_point_to_point.matrices)
    test_batches = _test(_point_to_point.batches)
    test_messages_of_objects = _test(_point_to_point.messages_of_objects)
    test_messages_of_either_kind = _test(_point_to_point.objects_and_arrays)
    test_messages_not_restored = _test(_point_to_point.objects_that_cannot_be_restored)
    test_receive_first = _test(_point_to_point.receive_first)
    test_flood = _test(_point_to_point.many_in_a_row)

    # -- immediate operations ------------------------------------------------------------------

    test_waited_in_any_order = _test(_immediate.waited_in_any_order)
    test_polled_at_random = _test(_immediate.polled_at_random)
    test_waited_twice = _test(_immediate.waited_twice)
    test_dropped = _test(_immediate.dropped)
    test_immediate = _test(_immediate.immediate)
    test_progress_is_enough = _test(_immediate.progress_is_enough)

    # -- groups --------------------------------------------------------------------------------

    test_split = _test(_groups.splits)
    test_new_group = _test(_groups.new_groups)
    test_overlapping_groups = _test(_groups.overlapping_groups)
    test_nested_groups = _test(_groups.nested_groups)
    test_duplicate = _test(_groups.duplicates)
    test_nodes = _test(_groups.nodes)
    test_close = _test(_groups.closing)

    # -- mistakes and failures -----------------------------------------------------------------

    test_bad_members = _test(_groups.bad_members)
    test_mistakes = _test(_errors.mistakes)
    test_deadlines = _test(_errors.deadlines)


class DeviceContract(BackendContract):
    """What is asked of a group that carries device arrays beside host arrays.

    All of `BackendContract` on arrays of the device, and besides that both kinds at once, and the
    order between the transport and the caller's streams.

    Attributes
    ----------
    place : DevicePlace
        Where the arrays lie; a subclass gives it.
    """

    place: DevicePlace

    # -- host and device arrays at once --------------------------------------------------------

    test_interleaved = _test(_mixed.interleaved)
    test_both_in_one_call = _test(_mixed.both_in_one_call)
    test_mixed_lists = _test(_mixed.mixed_lists)
    test_mixed_messages = _test(_mixed.mixed_messages)
    test_mixed_groups = _test(_mixed.mixed_groups)

    # -- order of streams ----------------------------------------------------------------------

    test_behind_a_slow_kernel = _test(_streams.behind_a_slow_kernel)
    test_messages_behind_a_slow_kernel = _test(_streams.messages_behind_a_slow_kernel)
    test_consumers = _test(_streams.consumers)
    test_late_consumers = _test(_streams.late_consumers)
    test_other_streams = _test(_streams.other_streams)
    test_freed_memory = _test(_streams.freed_memory)
    test_temporaries = _test(_streams.temporaries)
    test_two_groups = _test(_streams.two_groups)
    test_synchronized = _test(_streams.synchronized)
    test_a_stream_of_its_own = _test(_streams.a_stream_of_its_own)
    test_the_host_goes_on = _test(_streams.the_host_goes_on)
