"""The pages for contributors: what they name exists."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.docs.pages import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"])
def test_every_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_mark_is_explained(request: pytest.FixtureRequest) -> None:
    registered = {line.split(":")[0].split("(")[0] for line in request.config.getini("markers")}
    explained = set(re.findall(r"^\| `(\w+)[`(]", CONTRIBUTING, re.MULTILINE))
    ours = {"any_mpi", "cupy", "full", "gpu", "hosts", "mpirun", "one_python", "ranks", "slurm"}
    assert explained == ours
    assert ours <= registered


def test_every_path_of_a_command_exists() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", CONTRIBUTING, re.DOTALL)
    inline = re.findall(r"`((?:pytest|\.ci/run)[^`]*)`", CONTRIBUTING)
    words = [word for text in blocks + inline for word in shlex.split(text, comments=True)]
    paths = [word for word in words if word.startswith(("tests/", ".ci/", "mpidist/"))]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_stage_that_is_named_is_one_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    stages = re.findall(r"^(\w+)\(\) \{", ci, re.MULTILINE)
    named = re.findall(r"`\.ci/run ([\w ]+)`", CONTRIBUTING + ARCHITECTURE)
    assert named
    assert {word for text in named for word in text.split()} <= {*stages, "fast", "full"}


def test_every_file_that_is_named_exists() -> None:
    text = CONTRIBUTING + ARCHITECTURE
    spans = set(re.findall(r"`([\w./]+(?:\.py|\.json|\.cfg|\.rst|/))`", text))
    homes = (ROOT, ROOT / "mpidist", ROOT / "tests" / "structure")
    assert [span for span in spans if not any((home / span).exists() for home in homes)] == []


def test_the_map_has_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "mpidist").glob("*/__init__.py")}
    assert {name for name in packages if f"`{name}/`" not in ARCHITECTURE} == set()
