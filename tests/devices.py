"""The module of device arrays for a test: the stand-in for cupy, or cupy itself where a GPU is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

# The rest is imported where a test uses devices: most runs of a few tests do not.
if TYPE_CHECKING:
    from mpidist.testing.contract import DevicePlace

__all__ = ["place", "shared_device", "xp", "xp_with_nccl"]

BOTH = ["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=BOTH)
def xp(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Give cupy, or what stands in for it while this module's tests run."""
    yield from _cupy(on_gpu=request.param == "gpu", nccl=False)


@pytest.fixture(scope="module", params=BOTH)
def xp_with_nccl(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Give the same with NCCL, or with the stub that stands in for it."""
    yield from _cupy(on_gpu=request.param == "gpu", nccl=True)


def _cupy(*, on_gpu: bool, nccl: bool) -> Iterator[ModuleType]:
    if not on_gpu:
        from tests.nccl_stub.fixtures import in_place

        with in_place(nccl=nccl):
            yield importlib.import_module("cupy")
        return
    from mpidist.backends.availability import why_no_gpu, why_no_nccl

    if reason := why_no_nccl() if nccl else why_no_gpu():
        pytest.skip(_no_gpu(reason))
    yield importlib.import_module("cupy")


def _no_gpu(reason: str) -> str:
    return f"no GPU to test on: {reason.partition(':')[0]}"  # its cure is for users


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what uses CuPy's binding of NCCL: ``-m cupy`` is what needs the wheel."""
    if {"nccl_extension", "stand_in", "xp_with_nccl"} & set(getattr(item, "fixturenames", ())):
        item.add_marker("cupy")


_REASON = pytest.StashKey[str | None]()
"""Why there is no GPU; asked for before anything stands in for CuPy."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look for a GPU, if a test that was selected needs one."""
    if any(item.get_closest_marker("gpu") is not None for item in session.items):
        from mpidist.backends.availability import why_no_gpu

        session.config.stash[_REASON] = why_no_gpu()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs GPUs, before any rank is started for it."""
    reason = item.config.stash.get(_REASON, None)
    if reason is not None and item.get_closest_marker("gpu") is not None:
        raise pytest.skip.Exception(_no_gpu(reason), _use_item_location=True)


@pytest.fixture
def place(xp_with_nccl: ModuleType, request: pytest.FixtureRequest) -> DevicePlace:
    """The place of device arrays, over NCCL or its stub."""
    from mpidist.testing.contract import DevicePlace
    from tests.nccl_stub.place import StandInPlace

    on_gpu = request.node.get_closest_marker("gpu") is not None
    return DevicePlace(xp_with_nccl) if on_gpu else StandInPlace(xp_with_nccl)


_SHARED_SINCE = 23003
"""The NCCL that lets ranks share a GPU."""


@pytest.fixture
def shared_device(place: DevicePlace, monkeypatch: pytest.MonkeyPatch) -> DevicePlace:
    """The same, where NCCL lets several ranks use one device."""
    nccl: Any = importlib.import_module("cupy.cuda.nccl")
    if nccl.get_version() < _SHARED_SINCE:
        pytest.skip(
            f"NCCL {nccl.get_version()} is too old: from {_SHARED_SINCE} on ranks share a GPU"
        )
    # As NCCL's documentation has it: each rank takes channels of its own on the device.
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("NCCL_MAX_CTAS", "2")
    return place
