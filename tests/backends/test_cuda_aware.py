"""Whether MPI gets device arrays: only where it was asked for and the library can take them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mpidist.backends.device import cuda_aware
from mpidist.errors import BackendUnavailableError


def library(
    monkeypatch: pytest.MonkeyPatch, *, query: int | None = None, kinds: str | None = None
) -> Any:
    """Return an mpi4py.MPI whose library answers like this, and let its file be opened."""
    functions = {} if query is None else {"MPIX_Query_cuda_support": lambda: query}
    monkeypatch.setattr(cuda_aware.ctypes, "CDLL", lambda path: SimpleNamespace(**functions))
    monkeypatch.setattr(cuda_aware, "loaded_libraries", lambda: ["/a/libmpi.so.12"])
    info = {} if kinds is None else {"mpi_memory_alloc_kinds": kinds}
    return SimpleNamespace(COMM_WORLD=SimpleNamespace(Get_info=lambda: info))


@pytest.mark.parametrize(
    ("query", "kinds", "expected"),
    [
        (1, None, (True, "MPIX_Query_cuda_support")),
        (0, "mpi,system", (False, "MPIX_Query_cuda_support; memory kinds mpi,system")),
        (None, "mpi,system,cuda:device", (True, "memory kinds mpi,system,cuda:device")),
        (None, "mpi,system", (False, "memory kinds mpi,system")),
        (None, None, (None, "")),
    ],
)
def test_the_library_is_asked(
    query: int | None, kinds: str | None, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda_aware.ask_mpi(library(monkeypatch, query=query, kinds=kinds), "/a/l") == expected


@pytest.mark.parametrize(
    ("asked", "query", "wanted"), [(None, 1, False), ("0", 1, False), ("1", 1, True)]
)
def test_it_gets_device_arrays_only_if_asked_for(
    asked: str | None, query: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPIDIST_CUDA_AWARE_MPI", raising=False)
    if asked is not None:
        monkeypatch.setenv("MPIDIST_CUDA_AWARE_MPI", asked)
    assert cuda_aware.is_wanted(library(monkeypatch, query=query)) is wanted


@pytest.mark.parametrize(
    ("query", "said"),
    [(0, r"it says no \(MPIX_Query_cuda_support\)"), (None, "it does not say that it is")],
)
def test_asked_for_and_not_there(
    query: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIDIST_CUDA_AWARE_MPI", "1")
    mpi = library(monkeypatch, query=query)
    with pytest.raises(BackendUnavailableError, match=f"{said}.* unset the variable"):
        cuda_aware.is_wanted(mpi)
