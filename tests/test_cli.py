"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpidist
from mpidist import cli
from mpidist.bench import command
from mpidist.bench.report import Report
from tests._ranks.launcher import clean_environment

ROOT = Path(__file__).parents[1]

QUICK = ["--sizes", "4", "64K", "--repeats", "2"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"]])
def test_help_names_what_there_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in command.BENCHMARKS if words[0] == "bench" else cli.COMMANDS:
        assert name in shown


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and all of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                yield from parsers(choice)


def test_no_help_shows_the_backticks_of_docstrings() -> None:
    every = list(parsers(cli.make_parser()))
    assert len(every) > 20
    assert [parser.prog for parser in every if "`" in parser.format_help()] == []


def test_only_the_command_that_is_asked_for_is_loaded() -> None:
    body = "import sys; from mpidist import cli; cli.main(['example']); print(*sys.modules)"
    loaded = run(sys.executable, "-c", body).stdout.splitlines()[-1].split()
    assert "mpidist.example" in loaded
    assert not {"numpy", "h5py", "mpidist.bench", "mpidist.checkpoint"} & set(loaded)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"mpidist {mpidist.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", mpidist.__version__)


def test_the_console_script_is_the_command_line() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^\[project\.scripts\]\nmpidist = "([\w.]+):(\w+)"$', project, re.MULTILINE)
    assert found is not None
    assert getattr(importlib.import_module(found[1]), found[2]) is cli.main
    assert 'version = { attr = "mpidist._version.__version__" }' in project


AS_A_RANK = """
import os, sys, time
from pathlib import Path
from mpidist.usage import RankArgumentParser
parser = RankArgumentParser(prog="job", description="What `this` does.")
parser.add_argument("--steps", type=int)
here = Path(sys.argv.pop(1))
(here / f"rank-{os.environ['PMI_RANK']}").touch()  # ranks of a busy machine start apart
deadline = time.monotonic() + 20
while len(list(here.glob("rank-*"))) < int(os.environ["PMI_SIZE"]) and time.monotonic() < deadline:
    time.sleep(0.01)
parser.parse_args(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("words", "code", "counts"),
    [
        (3 * [["--steps", "x"]], 2, {"usage: job": 1, "error: argument --steps: invalid int": 1}),
        # One of them differs: its message is its own.
        (
            [*2 * [["--steps", "x"]], ["--stepz", "1"]],
            2,
            {"invalid int": 1, "arguments: --stepz": 1},
        ),
        (3 * [["--help"]], 0, {"What this does.": 1}),
    ],
)
def test_ranks_report_the_same_usage_error_once(
    words: list[list[str]], code: int, counts: dict[str, int], tmp_path: Path
) -> None:
    with (tmp_path / "output").open("w") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", AS_A_RANK, str(tmp_path), *each],
                env=clean_environment()
                | {"PYTHONPATH": str(ROOT), "PMI_SIZE": str(len(words)), "PMI_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, each in enumerate(words)
        ]
        assert [rank.wait(timeout=30) for rank in ranks] == [code] * len(words)
    text = (tmp_path / "output").read_text()
    assert {told: text.count(told) for told in counts} == counts, text


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_every_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", name, "--help"])
    assert ended.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required: command"),
        (["bench"], "required: benchmark"),
        (["bench", "all_reduce", "--sizes", "big"], "'big' is no size"),
        (["bench", "all_reduce", "--repeats", "0"], "expected a number above 0"),
    ],
)
def test_what_is_no_command_line_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_one_rank_is_told_how_to_start_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "all_reduce"]) == 2
    assert "mpirun -n 2 python -m mpidist bench all_reduce" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none" / "report.json"
    assert cli.main(["bench", "import", "--json", str(path)]) == 2
    assert f"cannot write {path}" in capsys.readouterr().err


def no_start() -> None:
    raise AssertionError("MPI has been started")


def test_all_that_is_missing_is_told_before_mpi_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "init", no_start)
    words = ["bench", "all_reduce", "--plot", str(tmp_path / "p.png")]
    words += ["--json", str(tmp_path / "none" / "r.json")]
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "bench all_reduce: --plot needs matplotlib" in told
    assert "pip install 'mpidist[bench]'" in told
    assert f"bench all_reduce: cannot write {tmp_path / 'none'}" in told


def test_a_peer_that_is_missing_is_told_before_mpi_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(command, "init", no_start)
    for words in (["all_reduce"], ["ddp"], ["checkpoint"]):
        with pytest.raises(AssertionError, match="MPI has been started"):
            cli.main(["bench", *words])
        assert f"bench {words[0]}: torch is not installed" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="MPI has been started"):
        cli.main(["bench", "all_reduce", "--no-gloo"])
    assert capsys.readouterr().err == ""


def test_a_picture_of_no_known_kind_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "import", "--plot", str(tmp_path / "picture.jason")]) == 2
    assert "expected a name that ends with ." in capsys.readouterr().err


def test_import_is_measured_without_ranks(tmp_path: Path) -> None:
    words = ["bench", "import", "--repeats", "2", "--json", str(tmp_path / "import.json")]
    answer = run(sys.executable, "-m", "mpidist", *words)
    assert answer.returncode == 0, answer.stderr
    assert f"$ python -m mpidist {' '.join(words)}" in answer.stdout
    report = Report.load(tmp_path / "import.json")
    assert [row.series for row in report.rows] == ["mpidist", "all names", "numpy"]


@pytest.mark.mpirun
@pytest.mark.timeout(70)
def test_a_job_prints_writes_and_draws_once(mpirun: list[str], tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "picture.png")]
    words = ["bench", "all_reduce", "--no-gloo", *QUICK, *files]
    answer = run(*mpirun, "-n", "2", sys.executable, "-m", "mpidist", *words)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("mpidist bench all_reduce\n") == 1
    report = Report.load(tmp_path / "report.json")
    assert " ".join(report.command) == f"mpirun -n 2 python -m mpidist {' '.join(words)}"
    assert {row.nbytes for row in report.rows} == {4, 65536}
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpirun
@pytest.mark.timeout(70)
def test_a_refusal_is_told_once(mpirun: list[str]) -> None:
    answer = run(*mpirun, "-n", "2", sys.executable, "-m", "mpidist", "bench", "import")
    assert answer.returncode != 0
    assert answer.stderr.count("bench import: expected one rank") == 1


def test_examples_are_listed_shown_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (ROOT / "mpidist" / "examples" / "00_first.py").read_text(encoding="utf-8")
    assert cli.main(["example"]) == 0
    assert "00_first.py  " in capsys.readouterr().out
    assert cli.main(["example", "00"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["example", "--copy", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "00_first.py").read_text(encoding="utf-8") == first
    assert len(list((tmp_path / "new").iterdir())) == len(capsys.readouterr().out.splitlines())


def test_examples_overwrite_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "00_first.py").write_text("mine")
    assert cli.main(["example", "00", "--copy", str(tmp_path)]) == 2
    assert (tmp_path / "00_first.py").read_text() == "mine"
    assert "File exists" in capsys.readouterr().err


def test_an_unknown_example_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["example", "99"]) == 2
    assert "'99' is none of 00_first.py, " in capsys.readouterr().err
