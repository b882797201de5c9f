"""Records, the metrics file, the picture and the bar."""

from __future__ import annotations

import errno
import gc
import io
import json
import math
import sys
from pathlib import Path

import pytest

from mpidist.errors import BackendUnavailableError
from mpidist.train import MetricsFile, ProgressBar, Record, plot_records, read_records

RECORDS = [
    Record("train", 10, 1.0, 2.0, 0.25, 1000.0, lr=0.1, grad_norm=3.0),
    Record("held-out", 10, 1.0, 1.5, 0.5, 5000.0),
    Record("train", 20, 2.0, 1.0, 0.75, 1000.0, lr=0.05, grad_norm=2.0),
    Record("held-out", 20, 2.0, 0.9, 0.8, 5000.0),
]


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for count, record in enumerate(RECORDS, start=1):
            file.write(record.as_json())
            assert path.read_text().count("\n") == count
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 10, 20, 20]
    assert (lines[0]["lr"], lines[0]["grad_norm"]) == (0.1, 3.0)
    assert "lr" not in lines[1]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": 2})
    expected = {"a": None, "b": None, "c": None, "d": 1.5, "e": 2}
    assert json.loads(path.read_text(), parse_constant=refuse) == expected


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"kind": "run", "steps": 20})
        for record in RECORDS:
            file.write(record.as_json())
    with path.open("a") as raw:
        raw.write('{"kind": "train", "st')  # cut off when the power failed
    assert read_records(path) == RECORDS
    with MetricsFile(path, after=10) as file:
        file.write({"kind": "resume", "step": 10})
        file.write(RECORDS[2].as_json())
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line.get("step")) for line in kept] == [
        ("run", None),
        ("train", 10),
        ("held-out", 10),
        ("resume", 10),
        ("train", 20),
    ]
    assert read_records(path) == RECORDS[:3]
    with MetricsFile(path):  # a run that begins anew
        pass
    assert path.read_text() == ""
    with MetricsFile(tmp_path / "new", after=10) as file:  # only the save was kept
        file.write(Record("train", 11, 1.0, math.nan, 0.0, 1.0).as_json())
    (record,) = read_records(tmp_path / "new")
    assert math.isnan(record.loss)


DAMAGE = {
    "cut off": b'{"kind": "train", "st\n',
    "zeros, as after a loss of power": b"\0" * 40 + b"\n",
    "no UTF-8": b'{"kind": "train", "note": "\xff"}\n',
    "no object": b"[1, 2]\n",
    "nested too deeply": b"[" * 20_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_costs_no_other(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = b'{"kind": "train", "step": null}\n{"note": "no kind"}\n'
    with MetricsFile(path) as file:
        file.write(RECORDS[0].as_json())
        file.write(RECORDS[1].as_json())
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage] + whole.replace(b"\n", b"\n" + DAMAGE[damage]) + odd)
    path.chmod(0o640)
    assert read_records(path) == RECORDS[:2]
    with MetricsFile(path, after=10) as file:
        file.write(RECORDS[2].as_json())
    assert read_records(path) == RECORDS[:3]
    assert path.read_bytes().startswith(whole + odd)
    assert path.stat().st_mode & 0o777 == 0o640
    assert f"{path}: dropped 3 damaged lines, the first of them line 1" in caplog.text


def test_going_on_writes_through_no_link(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    other.write_text("not ours")
    with MetricsFile(path) as file:
        file.write(RECORDS[0].as_json())
    (tmp_path / "metrics.jsonl.part").symlink_to(other)
    with MetricsFile(path, after=10):
        pass
    assert other.read_text() == "not ours"
    assert not path.is_symlink()
    assert read_records(path) == RECORDS[:1]


def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    with (
        MetricsFile(Path("/dev/full")) as file,
        pytest.raises(OSError, match="No space left") as no,
    ):
        file.write({"kind": "run"})
    assert no.value.filename == "/dev/full"


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    with MetricsFile(None) as file:
        file.write({"a": 1})
        file.close()
    assert not list(tmp_path.iterdir())


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_records(RECORDS, tmp_path / "a.svg", title="A title", baseline=("guessing", 2.3))
    plot_records(RECORDS[:1], tmp_path / "b.png", title="one record")
    picture = (tmp_path / "a.svg").read_text()
    for words in ("A title", "optimizer step", "nats", "training", "held out", "guessing"):
        assert f"<!-- {words}" in picture or words in picture
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bar_shows_steps_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    with ProgressBar(20, name="digits", show=True) as bar:
        for record in RECORDS:
            bar.show(record)
    shown = capsys.readouterr().err
    assert "digits: 100%" in shown
    assert "20/20" in shown
    assert "loss=1.000" in shown
    assert "held-out accuracy=80.0%" in shown


class Terminal(io.StringIO):
    """An error output that can be hung up."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # tqdm itself survives EIO only
        return super().write(text)


@pytest.mark.parametrize("lines", range(5))
def test_a_run_goes_on_when_its_bar_cannot_be_drawn(
    monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    terminal.gone = lines == 0
    with ProgressBar(20, name="digits", show=True) as bar:
        for count, record in enumerate(RECORDS, start=1):
            terminal.gone = terminal.gone or count == lines
            bar.show(record)
    terminal.gone = False
    gc.collect()  # a bar that is deleted would be drawn a last time
    assert "20/20" not in terminal.getvalue()


def test_hidden_bar_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(20, name="digits", show=False) as bar:
        bar.show(RECORDS[0])
    assert capsys.readouterr().err == ""


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailableError, match=r"matplotlib.*mpidist\[train\]"):
        plot_records(RECORDS, tmp_path / "x.png", title="x")
    with pytest.raises(BackendUnavailableError, match=r"tqdm.*mpidist\[train\]"):
        ProgressBar(1, name="x", show=True)
