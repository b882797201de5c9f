"""Fixtures that put the stand-in for cupy in place for a module's tests, and take it out again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.nccl_stub import stand_in as package

__all__ = ["stand_in", "stand_in_without_nccl"]


@pytest.fixture(scope="module")
def stand_in() -> Iterator[ModuleType]:
    """The package `tests.nccl_stub.stand_in`, installed with 4 devices and NCCL."""
    try:
        package.install()
    except package.NoStubError as error:
        if os.environ.get("MPIDIST_TEST_REQUIRE_NCCL_STUB") == "1":  # set by .ci/run
            raise
        pytest.skip(str(error))
    try:
        yield package
    finally:
        package.uninstall()


@pytest.fixture(scope="module")
def stand_in_without_nccl() -> Iterator[ModuleType]:
    """The same with no NCCL, which needs neither a compiler nor a wheel of CuPy."""
    package.install(nccl=False)
    try:
        yield package
    finally:
        package.uninstall()
