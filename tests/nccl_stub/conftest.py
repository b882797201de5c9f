"""The ranks of the tests of the stand-in for libnccl."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.nccl_stub import build
from tests.nccl_stub.team import Team


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Four processes, each to be a rank of one job after the other."""
    if reason := build.missing():
        if os.environ.get("MPIDIST_TEST_REQUIRE_NCCL_STUB") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    build.build()
    made = Team(4)
    try:
        yield made
    finally:
        made.close()
