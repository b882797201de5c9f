"""The pages for contributors: what they name exists."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from mpidist import collectives
from mpidist.errors import CollectiveMismatchError
from mpidist.testing import run_ranks
from mpidist.testing.contract import _verbs
from mpidist.testing.contract._memory import HOST
from mpidist.testing.contract._verbs import Trial, attempt_later, call
from tests.docs.pages import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")

FUTURE = "from __future__ import annotations"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"])
def test_every_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_mark_is_explained(request: pytest.FixtureRequest) -> None:
    registered = {line.split(":")[0].split("(")[0] for line in request.config.getini("markers")}
    explained = set(re.findall(r"^\| `(\w+)[`(]", CONTRIBUTING, re.MULTILINE))
    ours = {"alone", "any_mpi", "cupy", "full", "gpu", "hosts", "mpirun", "one_python", "ranks"}
    ours |= {"slurm"}
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
    spans = set(re.findall(r"`((?!\S*NAME)[\w./]+(?:\.py|\.json|\.cfg|\.rst|/))`", text))
    homes = (ROOT, ROOT / "mpidist", ROOT / "tests" / "structure")
    assert [span for span in spans if not any((home / span).exists() for home in homes)] == []


def test_every_function_is_in_the_file_that_is_named_for_it() -> None:
    rows = re.findall(r"^\| .*\? \| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    assert len(rows) > 10
    for span in re.findall(r"`([\w/]+\.py)`: ([^;|\n]*)", "\n".join(rows)):
        tree = ast.parse((ROOT / "mpidist" / span[0]).read_text(encoding="utf-8"))
        made = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert set(re.findall(r"`(\w+)\(\)`", span[1])) <= made, span


def test_the_map_has_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "mpidist").glob("*/__init__.py")}
    assert {name for name in packages if f"`{name}/`" not in ARCHITECTURE} == set()


def test_the_verb_of_the_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the page is run in the modules that it is said to belong to."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n( *# mpidist/.*?)```", CONTRIBUTING, re.DOTALL):
        code = dedent(block)
        file = code.splitlines()[0].removeprefix("# ").removesuffix(".py")
        module = importlib.import_module(file.replace("/", "."))
        scope = {**vars(module), **names}
        # Not under the name of the file: coverage would look for these lines there.
        exec(compile(f"{FUTURE}\n{code}", "CONTRIBUTING.md", "exec", dont_inherit=True), scope)
        made = {node.name for node in ast.parse(code).body if hasattr(node, "name")}
        names |= {name: scope[name] for name in made}
        for name in made:
            monkeypatch.setattr(module, name, names[name], raising=False)

    for name in ("shift", "ishift"):
        monkeypatch.setattr(collectives, name, names[name], raising=False)
    (row,) = re.findall(r"```python\n( *Verb\(.*?)```", CONTRIBUTING, re.DOTALL)
    trial = Trial(eval(dedent(row), dict(vars(_verbs))))

    def passed(group: Any) -> list[int]:
        call(trial, group, HOST)()
        attempt_later(trial, group, HOST)
        x = np.full((2, 3), group.rank)
        with pytest.raises(CollectiveMismatchError, match="shift int64"):
            names["shift"](x[: 1 + (group.rank == 1)], group)
        return [
            int(names["shift"](x, group)[0, 0]),
            int(names["ishift"](x, group, out=x).wait()[0, 0]),
        ]

    assert run_ranks(3, passed) == [[2, 2], [0, 0], [1, 1]]
