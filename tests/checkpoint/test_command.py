"""``python -m mpidist checkpoint``: what it prints, does and refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mpidist import checkpoint, cli
from mpidist.checkpoint.tools.command import progress_bar
from tests.checkpoint.made import METADATA, VALUES, arrays, save

ROOT = Path(__file__).parents[2]
ACTIONS = ["list", "show", "verify", "diff", "reshard", "prune", "export", "import"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete ones, with a partial one between them and one behind."""
    path = tmp_path_factory.mktemp("runs")
    state = arrays() | VALUES
    save(path, state, ranks=4, step=100, sharded=("moments",), metadata=METADATA)
    state["model/weight"][3, 4] += 1
    save(path, state, ranks=2, step=200, metadata=METADATA)
    (path / "step-000150").mkdir()
    (path / "step-000300").mkdir()
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object, code: int = 0) -> str:
        """Return what goes to standard output, or to standard error where it is to fail."""
        assert cli.main(["checkpoint", *map(str, words)]) == code
        told = capsys.readouterr()
        assert not (told.err and told.out)
        return told.err or told.out

    return run


@pytest.mark.parametrize("words", [[], *([action] for action in ACTIONS)])
def test_there_is_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["checkpoint", *words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ACTIONS) if not words else "--json" in shown


def test_list_fails_where_there_is_none(tmp_path: Path, run: Any) -> None:
    assert run("list", tmp_path, code=1) == f"there is no complete checkpoint in {tmp_path}\n"
    assert json.loads(run("list", tmp_path, "--json", code=1)) == []
    (tmp_path / "step-000003").mkdir()
    *table, last = run("list", tmp_path, code=1).splitlines()
    assert table[-1].split() == ["3", "partial"]
    assert last == f"there is no complete checkpoint in {tmp_path}"
    assert f"there is no directory {tmp_path}/none" in run("list", tmp_path / "none", code=2)


def test_nothing_in_a_checkpoint_controls_the_terminal(tmp_path: Path, run: Any) -> None:
    clear = "\x1b[2J\x9b2J\u202e\r\n"
    for directory, value in (("a", 1), ("b", 2)):
        metadata, values = {f"key{clear}": clear * value}, {"v": {f"key{clear}": value}}
        state: Any = {"w": np.arange(3.0), **values}
        save(tmp_path / directory, state, metadata=metadata)
    broken = (tmp_path / "b").rename(tmp_path / f"name{clear}")
    told = [
        run("show", broken),
        run("diff", tmp_path / "a", broken, code=1),
        run("list", broken),
        run("list", tmp_path / f"none{clear}", code=2),
    ]
    (broken / "step-000005" / "manifest.json").write_bytes(b"{}")
    told += [run("list", broken), run("show", broken, code=1), run("verify", broken, code=1)]
    for text in told:
        assert not set("\x1b\x9b\u202e\r") & set(text), text
    assert "key\\x1b[2J\\x9b2J\\u202e\\r\\n" in told[1]


def test_list_tells_what_is_complete_and_what_is_not(saved: Path, run: Any) -> None:
    rows = [line.split() for line in run("list", saved).splitlines()]
    assert rows[0] == ["step", "saved", "ranks", "arrays", "size", "state"]
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        ("100", "complete"),
        ("150", "partial"),
        ("200", "complete"),
        ("300", "partial"),
    ]
    assert rows[1][3:8] == ["UTC", "4", "7", "1.46", "MiB"]
    told = json.loads(run("list", saved, "--json"))
    assert [row["step"] for row in told] == [100, 150, 200, 300]
    nbytes = sum(array.nbytes for array in arrays().values())
    assert (told[0]["ranks"], told[0]["arrays"], told[0]["bytes"]) == (4, 7, nbytes)


def test_show_tells_all_but_the_elements(saved: Path, run: Any) -> None:
    told = run("show", saved, "--step", 100, "--boxes")
    assert f"{saved}/step-000100: step 100, saved 20" in told
    assert 'metadata {"name": "a run", "rates": [0.1, Infinity]}' in told
    assert "order/seed = [1, 2, null]" in told
    lines = [line.split() for line in told.splitlines()]
    assert ["14", "B", "1", "model/bias", "bfloat16", "[7]"] in lines
    assert ["moments", "[2:4,", "0:40,", "0:50]", "rank-00001.h5", "packed/float64", "0"] in lines
    fields = json.loads(run("show", saved / "step-000100", "--json"))
    assert fields["values"] == VALUES
    assert fields["metadata"]["rates"] == [0.1, {"mpidist:float": "inf"}]
    assert fields["arrays"]["moments"]["shape"] == [6, 40, 50]
    assert [box["offsets"][0] for box in fields["arrays"]["moments"]["boxes"]] == [0, 2, 4, 5]


def test_verify_finds_what_is_wrong(tmp_path: Path, run: Any) -> None:
    found = save(tmp_path, {"array": np.arange(1000.0)})
    assert run("verify", tmp_path) == f"{found.directory} is whole: 1 array, 7.81 KiB\n"
    (found.directory / "rank-00000.h5").unlink()
    assert "rank-00000.h5 is missing" in run("verify", tmp_path, code=1)
    told = json.loads(run("verify", tmp_path, "--json", code=1))
    assert told["whole"] is False
    assert [error["kind"] for error in told["errors"]] == ["CheckpointMissingShardError"]


def test_diff_tells_differences(saved: Path, run: Any) -> None:
    told = run("diff", saved / "step-000100", saved, code=1)
    assert told.splitlines()[-1] == "array  model/weight  1 of 359100 elements, by at most 1"
    (each,) = json.loads(run("diff", saved, saved / "step-000100", "--json", code=1))["differences"]
    assert (each["name"], each["elements"], each["largest"]) == ("model/weight", 1, 1.0)
    assert "the same: 7 arrays, 1.46 MiB" in run("diff", saved, saved, "--step", 100)


def test_reshard_writes_another(saved: Path, tmp_path: Path, run: Any) -> None:
    told = run("reshard", saved, tmp_path, "--ranks", 3, "--step", 100)
    assert told == f"{tmp_path}/step-000100: 3 ranks, 7 arrays, 1.46 MiB\n"
    assert checkpoint.latest(tmp_path).world_size == 3
    assert "the same" in run("diff", saved / "step-000100", tmp_path)
    told = run("reshard", saved, tmp_path, "--ranks", 3, "--step", 100, code=2)
    assert "never overwritten" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_export_and_import(saved: Path, tmp_path: Path, run: Any, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    assert f"{file}: step 100, 1.46 MiB" in run("export", saved, file, "--step", 100)
    read = safetensors.numpy.load_file if suffix == "safetensors" else np.load
    np.testing.assert_array_equal(read(file)["model/weight"], arrays()["model/weight"])
    assert json.loads(run("import", file, tmp_path, "--json"))["ranks"] == 1
    assert "the same" in run("diff", saved / "step-000100", tmp_path)
    assert json.loads(run("import", file, tmp_path, "--step", 7, "--json"))["step"] == 7


def test_prune_removes_or_only_says_so(tmp_path: Path, run: Any) -> None:
    for step in (1, 2, 3):
        save(tmp_path, {"step": step}, step=step)
    (tmp_path / "step-000004").mkdir()
    old = time.time() - 100
    os.utime(tmp_path / "step-000004", (old, old))
    told = run("prune", tmp_path, "--keep", 2, "--dry-run")
    assert told == f"would remove {tmp_path}/step-000001\n"
    assert len(checkpoint.list(tmp_path)) == 3
    told = run("prune", tmp_path, "--keep", 2, "--stale", 50)
    assert told == f"removed {tmp_path}/step-000001\nremoved {tmp_path}/step-000004\n"
    assert [found.step for found in checkpoint.list(tmp_path)] == [2, 3]
    told = json.loads(run("prune", tmp_path, "--keep", 2, "--json"))
    assert told == {"dry_run": False, "removed": [], "damaged": []}
    (tmp_path / "step-000003" / "rank-00000.h5").unlink()
    told = run("prune", tmp_path, "--keep", 1)
    assert told.startswith(f"nothing to remove\ndoes not count: {tmp_path}/step-000003/rank-0")
    told = json.loads(run("prune", tmp_path, "--keep", 1, "--json"))
    assert told["damaged"] == [f"{tmp_path}/step-000003"]


def test_damage_is_one_line(tmp_path: Path, run: Any) -> None:
    found = save(tmp_path, {"array": np.arange(3)})
    path = found.directory / "manifest.json"
    path.write_text(path.read_text().replace('"world_size":1', '"world_size":2'))
    for words in (["show", tmp_path], ["verify", tmp_path], ["diff", tmp_path, tmp_path]):
        told = run(*words, code=1)
        assert "manifest.json is damaged, or was edited" in told
        assert told.count("\n") == 1
    rows = run("list", tmp_path).splitlines()
    assert rows[1].split() == ["5", "damaged"]
    assert "was edited" in rows[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "nowhere"], "checkpoint list: there is no directory /"),
        (["show", "nowhere"], "no complete checkpoint of any step in"),
        (["show", "runs", "--step", "7"], "no complete checkpoint of step 7 in"),
        (["show", "runs/step-000100", "--step", "7"], "leave out --step 7"),
        (["verify", "runs/step-000150"], "no complete checkpoint of step 150"),
        (["export", "runs", "a.pt"], "known are .safetensors and .npz"),
        (["import", "a.npz", "new"], "a.npz cannot be read: FileNotFoundError"),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    saved: Path, run: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(saved.parent)
    words = [word.replace("runs", saved.name) for word in words]
    answer = run(*words, code=2)
    assert told.replace("runs", saved.name) in answer
    assert answer.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show", "runs", "--step", "x"], "'x' is neither a step nor 'latest'"),
        (["reshard", "runs", "new"], "required: --ranks"),
        (["prune", "runs", "--keep", "-1"], "expected a whole number of at least 1"),
        (["reshard", "runs", "new", "--ranks", "0"], "of at least 1, got '0'"),
        ([], "required: action"),
    ],
)
def test_what_is_no_command_line_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["checkpoint", *words])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", ["bar", "not wanted", "no terminal", "no tqdm"])
def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    told = io.StringIO() if shown == "no terminal" else Terminal()
    monkeypatch.setattr(sys, "stderr", told)
    if shown == "no tqdm":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar(2 << 20, "verify", show=shown != "not wanted") as progress:
        progress(1 << 20)
        progress(1 << 20)
    assert ("verify: 100%" in told.getvalue()) == (shown == "bar")
    assert bool(told.getvalue()) == (shown == "bar")


def test_it_runs_as_a_program_without_mpi(saved: Path) -> None:
    code = (
        "import sys; sys.modules['mpi4py'] = None; from mpidist.cli import main; "
        "code = main(['checkpoint', *sys.argv[1:]]); "
        "assert 'h5py' not in sys.modules and 'safetensors' not in sys.modules; sys.exit(code)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, "list", str(saved)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "complete" in answer.stdout
