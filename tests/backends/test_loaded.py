from __future__ import annotations

import pytest

from mpidist.backends.loaded import loaded_libraries, mpi_library


def test_libraries_that_are_loaded_are_found() -> None:
    assert any("/libc." in file or "/libc-" in file for file in loaded_libraries())


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["/lib/libc.so.6", "/a/libmpi.so.12"], "/a/libmpi.so.12"),
        (["/a/libmpi_cxx.so.40", "/a/libmpi_mpifh.so.40", "/a/libmpi.so.40"], "/a/libmpi.so.40"),
        (["/cray/libmpi_gnu_123.so.12"], "/cray/libmpi_gnu_123.so.12"),
        (["/a/libmpi_abi.so.1"], "/a/libmpi_abi.so.1"),
        (["/a/libmpifort.so.12"], ""),
    ],
)
def test_the_mpi_library_is_known_by_its_name(files: list[str], found: str) -> None:
    assert mpi_library(files) == found
