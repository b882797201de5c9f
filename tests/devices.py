"""The module of device arrays for a test: the stand-in for cupy, or cupy itself where a GPU is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.nccl_stub.fixtures import in_place

__all__ = ["xp", "xp_with_nccl"]

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
        with in_place(nccl=nccl):
            yield importlib.import_module("cupy")
        return
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no GPU here")
    yield cupy
