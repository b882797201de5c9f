"""What is in the source distribution and in the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mpidist

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; print(b.build_{}({!r}))"

pytestmark = pytest.mark.one_python


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a distribution with what is installed here, without a network."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD.format(kind, str(out))]
    printed = subprocess.run(
        command, cwd=source, capture_output=True, text=True, check=False, timeout=100
    )
    assert printed.returncode == 0, printed.stderr
    return out / printed.stdout.split()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    # Of a copy, since a build leaves files in its source, and takes up those of earlier ones.
    copy = tmp_path_factory.mktemp("copy") / "mpidist"
    unwanted = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "*.egg-info", "build", "_build")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    archive = build("sdist", copy, copy.parent)
    assert archive.name == f"mpidist-{mpidist.__version__}.tar.gz"
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.10.12, 3.11.4
    with tarfile.open(archive) as file:
        file.extractall(copy.parent / "unpacked", **safe)
    return copy.parent / "unpacked" / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_has_every_file_that_git_has(source: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = set(filter(None, listed.stdout.split("\0"))) - {".gitignore"}
    assert {name for name in names if not (source / name).is_file()} == set()


def test_the_wheel_has_the_package_and_nothing_else(source: Path, tmp_path: Path) -> None:
    wheel = build("wheel", source, tmp_path)
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(source).as_posix()
        for path in (source / "mpidist").rglob("*")
        if path.is_file()
    }
    assert names == package
    assert {"mpidist/py.typed", "mpidist/examples/00_first.py"} <= names
    # What tests the package itself, soaks for instance, stays in tests/.
    testing = {name.split("/")[2] for name in names if name.startswith("mpidist/testing/")}
    assert testing == {"__init__.py", "contract", "gradcheck.py", "ranks.py"}


def test_the_version_is_that_of_the_newest_release_in_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(\d[\d.]*)\] - (\S+)$", changes, re.MULTILINE)[0]
    assert version == mpidist.__version__
    assert f'date-released: "{date}"\n' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
