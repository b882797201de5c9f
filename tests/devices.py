"""The module of device arrays for a test: the stand-in for cupy, or cupy itself where a GPU is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.nccl_stub import stand_in

__all__ = ["xp"]


@pytest.fixture(scope="module", params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Give cupy, or what stands in for it while this module's tests run."""
    if request.param == "gpu":
        cupy = pytest.importorskip("cupy", reason="cupy is not installed")
        if not cupy.cuda.is_available():
            pytest.skip("no GPU here")
        yield cupy
        return
    stand_in.install(1, nccl=False)
    try:
        yield importlib.import_module("cupy")
    finally:
        stand_in.uninstall()
