"""Fixtures that import the modules of jobs/, or start jobs/train.py and leave no process behind."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests._ranks.launcher import MARK, clean_environment, default_dispositions, end_job
from tests.jobs.running import ROOT, SCRIPT, Run, Start


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules in jobs/, imported as train.py imports them: from the script's own folder."""
    names = [path.stem for path in SCRIPT.parent.glob("*.py")]
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the job; `launcher` is mpirun with its arguments, or nothing."""
    started: list[subprocess.Popen[bytes]] = []

    def start_job(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (tmp_path / "output").open("w") as output, default_dispositions():
            process = subprocess.Popen(
                [*launcher, sys.executable, str(SCRIPT), *arguments],
                cwd=tmp_path,
                env=clean_environment() | {"PYTHONPATH": path, MARK: str(tmp_path)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start_job
    for process in started:
        end_job(process, tmp_path)


@pytest.fixture
def run(start: Start, tmp_path: Path) -> Run:
    """Run the job to its end; return code and output."""

    def run_job(*arguments: str, launcher: tuple[str, ...] = ()) -> Any:
        process = start(*arguments, launcher=launcher)
        code = process.wait(timeout=100)
        text = (tmp_path / "output").read_text()
        return subprocess.CompletedProcess(arguments, code, text)

    return run_job
