"""The README: its commands, its example, and that its table is true."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

import mpidist
import mpidist.nn
import mpidist.parallel
import mpidist.testing
from tests.docs.pages import EXAMPLES, README, ROOT, readme_part

NOT_BUILT = {
    "TCP backend": ["mpidist.backends.tcp"],
    "Gloo and UCC backends": ["mpidist.backends.gloo", "mpidist.backends.ucc"],
    "RPC": ["mpidist.rpc"],
    "PyTorch adapter": ["mpidist.adapters"],
}
"""What would be there if a system of the table were."""


def rows() -> dict[str, tuple[str, str]]:
    """Return state and notes of each system of the README's table."""
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- begin status -->\n")[1].split("<!-- end status -->")[0]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {system: (state, notes) for system, state, notes in cells}


def test_the_example_is_the_file() -> None:
    assert readme_part("example") == (EXAMPLES[0]).read_text()


def test_each_command_is_one_line() -> None:
    for name in ("train", "test"):
        assert readme_part(name).count("\n") == 1


@pytest.mark.parametrize("name", ["train", "test"])
def test_ci_finds_the_commands_where_it_looks(name: str) -> None:
    """.ci/run takes what is between the comments, without comments and fences."""
    lines = README.read_text(encoding="utf-8").splitlines()
    part = lines[lines.index(f"<!-- begin {name} -->") : lines.index(f"<!-- end {name} -->")]
    assert [line for line in part if not line.startswith(("<!--", "```"))] == [
        readme_part(name).strip()
    ]


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_says_built_or_not_built() -> None:
    assert {state for state, _ in rows().values()} == {"built", "not built"}
    assert {system for system, (state, _) in rows().items() if state == "not built"} == set(
        NOT_BUILT
    )


@pytest.mark.parametrize("system", NOT_BUILT)
def test_what_is_called_not_built_is_not_there(system: str) -> None:
    """Fails when somebody builds it: then the table, and this list, have to say so."""
    for name in NOT_BUILT[system]:
        module, _, attribute = name.partition(":")
        assert not (hasattr(mpidist, attribute) if attribute else find_spec(module)), name


def test_names_in_the_table_exist() -> None:
    homes = [mpidist, mpidist.nn, mpidist.parallel, mpidist.testing, mpidist.ProcessGroup]
    homes += [mpidist.parallel.DDP, mpidist.nn.Module]
    notes = " ".join(notes for state, notes in rows().values())
    names = [name for name in re.findall(r"`([\w.]+)`", notes) if not name.startswith("mpidist")]
    assert names
    assert [name for name in names if not any(hasattr(home, name) for home in homes)] == []
