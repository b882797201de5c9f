"""The curves of each strategy in docs/concepts/fsdp.rst: what is shown, and how it is made."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT
from tests.docs.test_examples import run

STRATEGIES = DOCS / "strategies"
CURVES = re.compile(
    r"^([a-z_ ]+?) {2,}([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +(\S+) +([\d,]+)$", re.MULTILINE
)


def read_table(directory: Path) -> dict[str, list[float]]:
    """Return three losses, that of held-out samples, the difference, and KiB of each run."""
    found = CURVES.findall((directory / "curves.txt").read_text(encoding="utf-8"))
    return {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in found}


def check_curves(directory: Path) -> dict[str, list[float]]:
    table = read_table(directory)
    options = (ROOT / "jobs/train_options.py").read_text(encoding="utf-8")
    (choices,) = re.findall(r"choices=\((\"ddp\".*)\)", options)
    assert {f'"{name}"' for name in table} - {'"one rank"'} == set(choices.split(", "))
    for *losses, apart, held in table.values():
        assert losses == pytest.approx(table["ddp"][:4], rel=1e-5)
        assert apart < 1e-6
        assert held <= 1.3 * table["ddp"][-1]
    assert table["zero"][-2] == 0  # whole gradients have the bits of DDP
    assert table["full_shard"][-1] < table["hybrid_shard"][-1] < table["ddp"][-1]
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    return table


def test_the_page_shows_one_curve_for_all_strategies() -> None:
    check_curves(STRATEGIES)
    page = (DOCS / "concepts/fsdp.rst").read_text(encoding="utf-8")
    assert ".. literalinclude:: ../strategies/curves.txt" in page
    assert ".. image:: ../strategies/curves.png" in page


@pytest.mark.full
@pytest.mark.any_mpi
@pytest.mark.mpirun
def test_the_command_makes_them(tmp_path: Path, mpirun: list[str]) -> None:
    launch = f"--launch={' '.join(mpirun[1:])}"
    command = [sys.executable, STRATEGIES / "compare.py", "--task", "digits", "--steps", "12"]
    run([*command, launch, "--out", tmp_path], tmp_path)
    assert check_curves(tmp_path)["ddp"][3] < 2.3
