"""Fixtures that put the stand-in for cupy in place for a module's tests, and take it out again."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

__all__ = ["in_place", "needs_cupy", "stand_in", "stand_in_without_nccl"]

REQUIRED = os.environ.get("MPIDIST_TEST_REQUIRE_NCCL_STUB") == "1"  # set by .ci/run

NO_CUPY = "no CuPy: pip install cupy-cuda12x (it needs no GPU)"

needs_cupy = pytest.mark.skipif(
    importlib.util.find_spec("cupy_backends") is None and not REQUIRED, reason=NO_CUPY
)
"""Skips tests on ranks before any rank is started."""


@contextmanager
def in_place(*, nccl: bool) -> Iterator[ModuleType]:
    """Install the package `tests.nccl_stub.stand_in` with 4 devices, or skip the test."""
    from tests.nccl_stub import stand_in as package

    try:
        package.install(nccl=nccl)
    except package.NoStubError as error:
        if REQUIRED:
            raise
        pytest.skip(str(error))
    try:
        yield package
    finally:
        _close_what_is_open()
        package.uninstall()


def _close_what_is_open() -> None:
    """Let go of the groups that tests have left open: their watchdog would look for CuPy."""
    module = sys.modules.get("mpidist.backends.device.nccl.link")
    if module is None:
        return
    watchdog = module.watchdog()
    thread = watchdog._thread
    for each in tuple(watchdog._watched):
        each.close()
    if thread is not None:
        thread.join(5)


@pytest.fixture(scope="module")
def stand_in() -> Iterator[ModuleType]:
    """The package `tests.nccl_stub.stand_in`, installed with 4 devices and NCCL."""
    with in_place(nccl=True) as installed:
        yield installed


@pytest.fixture(scope="module")
def stand_in_without_nccl() -> Iterator[ModuleType]:
    """The same with no NCCL, which needs no wheel of CuPy, and a compiler only for kernels."""
    with in_place(nccl=False) as installed:
        yield installed
