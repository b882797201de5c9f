"""Files that are new, whatever stands under their names."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mpidist import _new_file
from mpidist._new_file import create, create_unique


def write(descriptor: int, text: str) -> None:
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    write(create(tmp_path / "new"), "text")
    assert (tmp_path / "new").read_text() == "text"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
def test_a_symbolic_link_is_not_followed(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_text("precious")
    link.symlink_to(target)
    with pytest.raises(FileExistsError):
        create(link)
    write(create(link, replace=True), "text")
    assert not link.is_symlink()
    assert link.read_text() == "text"
    assert target.exists() == there
    assert not there or target.read_text() == "precious"


def test_what_is_there_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    with pytest.raises(FileExistsError):
        create(path)
    assert path.read_text() == "first"
    write(create(path, replace=True), "second")
    assert path.read_text() == "second"


def test_equal_names_get_files_of_their_own(tmp_path: Path, monkeypatch) -> None:
    """As of two containers whose host name and process number are the same."""
    drawn = [b"same", b"same", b"next"]
    monkeypatch.setattr(_new_file.os, "urandom", lambda count: drawn.pop(0)[:count])
    paths = []
    for text in ("one", "two"):
        descriptor, path = create_unique(tmp_path, "report-host-7", ".json")
        write(descriptor, text)
        paths.append(Path(path))
    assert [path.read_text() for path in paths] == ["one", "two"]
    assert all(path.name.startswith("report-host-7-") for path in paths)
    assert all(path.suffix == ".json" for path in paths)
