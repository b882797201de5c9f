"""The ranks of the tests of the stand-in for libnccl."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from tests.nccl_stub import build
from tests.nccl_stub.team import Team


def skip(reason: str) -> None:
    """Skip a test, but fail it where CI says that the stand-in has to be there."""
    if os.environ.get("MPIDIST_TEST_REQUIRE_NCCL_STUB") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def nccl_extension() -> None:
    """CuPy's wheel, of which the ranks import no more than its NCCL extension."""
    if importlib.util.find_spec("cupy_backends") is None:
        skip("no CuPy: pip install cupy-cuda12x (it needs no GPU)")


@pytest.fixture(scope="package")
def team() -> Iterator[Team]:
    """Four processes, each to be a rank of one job after the other."""
    if reason := build.missing():
        skip(reason)
    build.build()
    made = Team(4)
    try:
        yield made
    finally:
        made.close()
