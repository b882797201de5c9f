"""What surrounds NCCL: who gets it, on which devices, and how NaN and refusals travel."""

from __future__ import annotations

import re
import sys
import threading
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpidist import all_reduce, init, sendrecv
from mpidist._types import MAX, MEAN, MIN, PROD, SUM
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.backends.device import hybrid
from mpidist.backends.device.hybrid import carry_devices, use_device, why_not
from mpidist.backends.device.nccl import NcclBackend
from mpidist.backends.device.nccl.backend import check_devices
from mpidist.backends.device.nccl.dtypes import REDUCTIONS, from_keys, needs_keys, to_keys
from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.backends.simulated.network import Network
from mpidist.errors import (
    BackendUnavailableError,
    LaunchError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup
from mpidist.job.start import _first_reason
from mpidist.testing import run_ranks
from tests.nccl_stub.fixtures import stand_in_without_nccl

__all__ = ["stand_in_without_nccl"]

FLOATS = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7, 300.0, -300.0]


@pytest.fixture
def cupy(stand_in_without_nccl: ModuleType) -> Any:
    import cupy

    return cupy


# -- NaN wins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [MIN, MAX])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_have_the_order_of_floats_and_nan_wins(cupy: Any, dtype: Any, op: Any) -> None:
    a = np.repeat(np.array(SPECIAL, dtype), len(SPECIAL))
    b = np.tile(np.array(SPECIAL, dtype), len(SPECIAL))
    assert needs_keys(dtype, op)
    keys = [to_keys(cupy.asarray(x), op) for x in (a, b)]
    # As NCCL combines integers.
    chosen = (cupy.minimum if op is MIN else cupy.maximum)(*keys)
    out = cupy.empty(a.shape, dtype)
    from_keys(chosen, out)
    with np.errstate(invalid="ignore"):
        expected = (np.minimum if op is MIN else np.maximum)(a, b)
    np.testing.assert_array_equal(out.get().astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_lead_back_to_the_same_floats(cupy: Any, dtype: Any) -> None:
    finite = np.array([x for x in SPECIAL if not np.isnan(x)], dtype)
    out = cupy.empty(finite.shape, dtype)
    from_keys(to_keys(cupy.asarray(finite), MAX), out)
    assert out.get().tobytes() == finite.tobytes()


def test_integers_and_sums_need_no_keys() -> None:
    assert not needs_keys(np.dtype(np.int32), MAX)
    assert not needs_keys(np.dtype(np.float32), SUM)


def test_what_is_offered() -> None:
    assert (MEAN, BFLOAT16) in REDUCTIONS
    assert (SUM, np.dtype(np.complex64)) in REDUCTIONS
    assert (PROD, np.dtype(np.complex64)) not in REDUCTIONS
    assert (MEAN, np.dtype(np.int32)) not in REDUCTIONS
    assert not [pair for pair in REDUCTIONS if pair[1].itemsize == 2 and pair[1].kind in "iu"]


# -- which device ------------------------------------------------------------------------------


@pytest.mark.parametrize(("local_rank", "device"), [(0, 0), (3, 3), (5, 1)])
def test_local_rank_chooses_the_device(cupy: Any, local_rank: int, device: int) -> None:
    cupy.cuda.Device(0).use()
    assert use_device(local_rank) == device
    assert cupy.cuda.Device().id == device


def test_a_device_that_the_program_chose_is_kept(cupy: Any) -> None:
    cupy.cuda.Device(2).use()
    try:
        assert use_device(1) == 2
        assert cupy.cuda.Device().id == 2
    finally:
        cupy.cuda.Device(0).use()


def fact(node: int, bus: str, *, nccl: int = 22803, shared: bool = False) -> dict[str, Any]:
    return {"node": node, "device": 0, "bus": bus, "nccl": nccl, "shared": shared}


def test_ranks_with_a_device_each_are_connected() -> None:
    check_devices([fact(0, "a"), fact(0, "b"), fact(1, "a")])


@pytest.mark.parametrize(("nccl", "shared"), [(22803, False), (22803, True), (23003, False)])
def test_two_ranks_on_one_device_are_refused(nccl: int, shared: bool) -> None:
    facts = [fact(0, bus, nccl=nccl, shared=shared) for bus in "aba"]
    with pytest.raises(LaunchError, match=r"ranks 0 and 2 both use GPU a.*MULTI_RANK_GPU_ENABLE=1"):
        check_devices(facts)


def test_newer_releases_let_ranks_share_a_device_if_all_say_so() -> None:
    facts = [fact(0, "a", nccl=23003, shared=True), fact(0, "a", nccl=23003, shared=True)]
    check_devices(facts)
    with pytest.raises(LaunchError):
        check_devices([facts[0], fact(0, "a", nccl=23003)])


def test_all_ranks_hear_what_one_lacks() -> None:
    facts = [fact(0, "a"), {"lacks": "CuPy finds no NCCL"}, {"lacks": "the driver is old"}]
    with pytest.raises(BackendUnavailableError, match=r"^NCCL: on rank 1, CuPy finds no NCCL$"):
        check_devices(facts)


def test_different_releases_are_refused() -> None:
    with pytest.raises(BackendUnavailableError, match=r"rank 0 22803, rank 1 23003"):
        check_devices([fact(0, "a"), fact(0, "b", nccl=23003)])


# -- who carries what --------------------------------------------------------------------------


def test_all_ranks_hear_of_the_first_that_has_no_nccl() -> None:
    def case(world: ProcessGroup) -> tuple[str | None, bool]:
        return _first_reason(world, "there is none" if world.rank in (1, 2) else None)

    assert set(run_ranks(4, case)) == {("on rank 1, there is none", False)}


@pytest.mark.parametrize(
    ("ranks", "staged", "words"),
    [([0, 1, 2], True, ""), ([], False, ""), ([1], False, "; and .* on some ranks only")],
)
def test_all_ranks_have_to_allow_the_way_by_the_host(
    ranks: list[int], staged: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"rank-{rank}" for rank in ranks}
    monkeypatch.setattr(hybrid, "may_stage", lambda: threading.current_thread().name in names)

    def case(world: ProcessGroup) -> tuple[str | None, bool]:
        threading.current_thread().name = f"rank-{world.rank}"
        return _first_reason(world, "there is none" if world.rank == 1 else None)

    for reason, allowed in run_ranks(3, case):
        assert re.fullmatch(f"on rank 1, there is none{words}", str(reason))
        assert allowed is staged


def test_cupy_is_imported_only_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ImportError("no import was asked for")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr("mpidist.backends.device.hybrid.why_no_gpu", lambda: None)
    monkeypatch.setattr("mpidist.backends.device.hybrid.device_module", refuse)
    assert why_not(asked=False) is None
    assert "no import was asked for" in str(why_not(asked=True))


def test_no_reason_where_all_have_it() -> None:
    assert set(run_ranks(3, lambda world: _first_reason(world, None))) == {(None, False)}


def test_a_group_without_nccl_says_why_it_refuses(cupy: Any) -> None:
    def case(world: ProcessGroup) -> None:
        carry_devices(world.transport, "on rank 0, the moon is full", fallback=False)
        child = world.duplicate("child")
        for group in (world, child):
            assert group.device_capabilities is None
            for call in (
                lambda group=group: all_reduce(cupy.zeros(3), group),
                lambda group=group: sendrecv(cupy.zeros(3), group, dst=1 - group.rank, src=0),
            ):
                with pytest.raises(UnsupportedOperationError) as caught:
                    call()
                for word in ("device array", "the moon is full", "MPIDIST_ENABLE_GPU_FALLBACK=1"):
                    assert word in str(caught.value)
        # Refused before anything moved: the groups go on.
        assert all_reduce(np.ones(1), child) == world.size

    run_ranks(2, case)


def test_hybrid_without_nccl_is_an_error(stand_in_without_nccl: ModuleType) -> None:
    with pytest.raises(BackendUnavailableError, match=r"init\('hybrid'\): .*libnccl\.so\.2"):
        init("hybrid")


def test_the_default_goes_on_without_nccl(stand_in_without_nccl: ModuleType) -> None:
    with init() as world:
        assert world.backend == "simulated"
        assert all_reduce(np.ones(2), world).tolist() == [1, 1]


def test_what_a_stream_still_reads_is_held_until_it_has() -> None:
    class Lent:
        """Something whose end can be seen."""

    class OneStream(NcclBackend):
        reached = False

        def fence(self) -> Any:
            return lambda: self.reached

    transport = OneStream(SimulatedBackend(Network(1), 0))
    lent, later = Lent(), Lent()
    seen = weakref.ref(lent)
    transport.keep(lent)
    del lent
    transport.keep(later)
    assert seen() is not None
    transport.reached = True
    transport.keep(later)
    assert seen() is None
