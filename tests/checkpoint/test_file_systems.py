"""File systems that refuse what others do, names that are no text, links that somebody has put."""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidist import checkpoint, cli
from mpidist.checkpoint.format import files
from mpidist.checkpoint.tools.exporting import export_to
from mpidist.errors import CheckpointError
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from tests._ranks.launcher import clean_environment
from tests.checkpoint.made import arrays, save
from tests.soaks.checkpoints import failures
from tests.soaks.checkpoints.calls import Call, intercepted
from tests.soaks.checkpoints.failures import Fault, Scenario

ROOT = Path(__file__).parents[2]
STEP = "step-000002"


def attempt(directory: Path, call: Call, error: int, *, on: bool = False) -> str | None:
    """Save while a call fails, and return what the ranks are told."""
    scenario = Scenario(2, beside=False, over=False)
    failures.prepare(directory, scenario)
    fault = Fault(call, 0, "on" if on else "instead", error)
    outcome = failures.attempt(scenario, fault, directory)
    assert outcome.fired
    return outcome.told


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    files._reported.clear()
    caplog.set_level(logging.WARNING, "mpidist")
    yield caplog
    files._reported.clear()


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("place", [STEP, "."])
def test_directories_that_cannot_be_synced_are_told_once(
    tmp_path: Path, warned: pytest.LogCaptureFixture, place: str, error: int
) -> None:
    assert attempt(tmp_path, Call(0, "os.fsync", place), error) is None
    told = [r.getMessage() for r in warned.records if "does not sync directories" in r.getMessage()]
    assert len(told) == 1
    assert str(tmp_path) in told[0]
    assert os.strerror(error) in told[0]
    for _ in range(2):
        files.sync_directory(tmp_path)


def test_the_warning_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    for step in (1, 2):
        save(tmp_path / "new", {"x": np.arange(4)}, ranks=3, step=step)
    export_to(tmp_path / "file.npz", checkpoint.latest(tmp_path / "new"))  # type: ignore[arg-type]
    checkpoint.prune(tmp_path / "new", keep=1)
    assert len(warned.records) == 1


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_directories_that_are_lost_fail_the_save(tmp_path: Path, error: int) -> None:
    told = attempt(tmp_path, Call(0, "os.fsync", STEP), error)
    assert f"[Errno {error}] {os.strerror(error)}: '{tmp_path / STEP}'" in str(told)


def test_hints_may_be_refused(tmp_path: Path) -> None:
    call = Call(1, "os.posix_fadvise", f"{STEP}/rank-00001.h5.tmp")
    assert attempt(tmp_path, call, errno.EINVAL) is None


# -- a full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["os.pwrite", "os.fsync"])
@pytest.mark.parametrize("file", ["rank-00001.h5.tmp", "manifest.json.tmp"])
def test_a_full_disk_is_one_line_with_file_and_size(tmp_path: Path, name: str, file: str) -> None:
    rank = 1 if file.startswith("rank-00001") else 0
    told = str(attempt(tmp_path, Call(rank, name, f"{STEP}/{file}"), errno.ENOSPC))
    assert "\n" not in told
    if (file, name) == ("manifest.json.tmp", "os.pwrite"):  # when the directory is made
        assert f"rank 0 cannot make it: OSError: [Errno 28] {os.strerror(28)}: '" in told
    else:
        words = rf"rank {rank} failed: OSError: \[Errno 28\] No space left on device for a file of "
        with pytest.raises(CheckpointError, match=words + rf"[\d,]+ bytes: '.*/{STEP}/{file}'"):
            raise CheckpointError(told)
    assert f"{STEP}/{file}'" in told


@pytest.mark.parametrize("most", [16, 4000])
def test_what_hdf5_says_of_a_full_disk_is_one_line(tmp_path: Path, most: int) -> None:
    """A limit on the size of files is as good as a small disk, and needs no privileges."""
    path = tmp_path / "file.h5"
    datasets = [(f"{n:0100}", (4,), np.dtype(np.float32)) for n in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            files.create_file(path, datasets, {"id": "an id"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"[Errno {errno.EFBIG}] File too large: '{path}'"
    path.unlink()
    assert len(files.create_file(path, datasets, {"id": "an id"})) == 40


# -- locks -----------------------------------------------------------------------------------------

WITHOUT_LOCKS = """
import ctypes, errno, fcntl, os, platform, struct, sys
from pathlib import Path

import numpy as np

number, refused = {"x86_64": 73, "aarch64": 32}[platform.machine()], int(sys.argv[2])


def instruction(code, value, yes=0, no=0):
    return struct.pack("HBBI", code, yes, no, value)


# seccomp: flock fails with this number, and everything else is done.
program = b"".join([
    instruction(0x20, 0),  # load the number of the call
    instruction(0x15, number, 0, 1),  # if it is not flock, skip one
    instruction(0x06, 0x00050000 | refused),
    instruction(0x06, 0x7FFF0000),
])
memory = ctypes.create_string_buffer(program)
libc = ctypes.CDLL(None, use_errno=True)
filters = struct.pack("HL", len(program) // 8, ctypes.addressof(memory))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(filters), 0, 0):
    sys.exit(f"no seccomp: {os.strerror(ctypes.get_errno())}")

path = Path(sys.argv[1])
path.mkdir(exist_ok=True)
with open(path / "probe", "w") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        assert error.errno == refused
    else:
        sys.exit("flock is not refused")

from mpidist import checkpoint
from tests.checkpoint.made import arrays, save

save(path / "run", arrays(), ranks=2)
assert checkpoint.verify(path / "run") == []
assert checkpoint.load_full(path / "run")["count"] == 3
checkpoint.reshard(path / "run", path / "new", 3)
assert checkpoint.verify(path / "new") == []
"""


def test_no_file_is_locked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LOCKS, tmp_path, str(errno.ENOLCK)],
        env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    if "no seccomp" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


def test_a_file_that_somebody_has_locked_is_read(tmp_path: Path) -> None:
    """As a lock that a dead host still holds; EAGAIN."""
    import fcntl

    save(tmp_path, arrays(), ranks=2)
    with (
        (tmp_path / "step-000005" / "view.h5").open("rb") as view,
        (tmp_path / "step-000005" / "rank-00001.h5").open("rb") as file,
    ):
        for locked in (view, file):
            fcntl.flock(locked, fcntl.LOCK_EX)
        assert checkpoint.verify(tmp_path) == []


# -- names -----------------------------------------------------------------------------------------

NAMES = """
import os, sys
from pathlib import Path

from mpidist import checkpoint, cli
from mpidist.errors import CheckpointError
from mpidist.testing import run_ranks
from mpidist.train import Checkpoints
from tests.checkpoint.made import arrays

path = Path(os.fsdecode(bytes.fromhex(sys.argv[1])))


def body(group):
    for _ in range(2):  # planned anew, and as before
        for step in (1, 2):
            state = {**arrays(), "\\u00e9": arrays()["half"]}
            checkpoint.save(path / "run", state, group, step=step)
        assert checkpoint.load(path / "run", state, group).step == 2
        try:
            checkpoint.save(path / "run", state, group, step=2)
        except CheckpointError as error:
            assert "never overwritten" in str(error)
        kept = Checkpoints(path / "run", group)
        assert kept.newest() == 2
        kept.discard()
    checkpoint.save(path / "run", state, group, step=3)


run_ranks(2, body)
assert checkpoint.verify(path / "run") == []
checkpoint.reshard(path / "run", path / "new", 3)
for words in (
    ["list", path / "new"],
    ["show", path / "new"],
    ["show", path / "new", "--json"],
    ["verify", path / "new"],
    ["export", path / "new", path / "a.npz"],
    ["import", path / "a.npz", path / "imported"],
    ["diff", path / "imported", path / "new"],
    ["prune", path / "new", "--keep", "1"],
):
    code = cli.main(["checkpoint", *map(str, words)])
    assert code == 0, (words, code)
assert cli.main(["checkpoint", "show", str(path / "nowhere")]) == 2
"""

ENVIRONMENTS = {
    "UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"},  # as of en_US
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("locale", ENVIRONMENTS)
def test_names_may_be_any_bytes(tmp_path: Path, locale: str) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9 \xc3\xa9"
    done = subprocess.run(
        [sys.executable, "-c", NAMES, path.hex()],
        env={**clean_environment(), "PYTHONPATH": str(ROOT), **ENVIRONMENTS[locale]},
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr.decode(errors="backslashreplace")
    assert path in done.stdout  # the bytes that the name has, as ls writes them


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank-00000.h5.tmp", "rank-00001.h5.tmp", "view.h5"])
def test_a_link_in_a_new_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run = tmp_path / "run"

    def plant(call: Call, perform: Any, args: tuple[Any, ...]) -> Any:
        done = perform()
        if call.name == "os.mkdir" and call.file == "step-000001":
            (run / call.file / name).symlink_to(precious)
        return done

    def body(group: ProcessGroup) -> str:
        with pytest.raises(CheckpointError, match="File exists") as caught:
            checkpoint.save(run, arrays(), group, step=1)
        return str(caught.value)

    with intercepted(run, plant):
        assert name in run_ranks(2, body)[0]
    assert precious.read_text() == "mine"
    assert not (run / "step-000001").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_stands_beside_an_export_is_left_alone(tmp_path: Path, suffix: str) -> None:
    state = arrays()
    found = save(tmp_path / "run", {"model/weight": state["model/weight"]})
    precious, path = tmp_path / "precious", tmp_path / f"file{suffix}"
    precious.write_text("mine")
    (tmp_path / f"file{suffix}.tmp").symlink_to(precious)
    export_to(path, found)
    assert precious.read_text() == "mine"
    path.unlink()
    path.symlink_to(tmp_path / "nothing yet")
    with pytest.raises(CheckpointError, match="is there already"):
        export_to(path, found)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tmp") == [f"file{suffix}.tmp"]
    assert not (tmp_path / "nothing yet").exists()


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        found = save(tmp_path / "run", {"x": np.arange(3)}, ranks=2)
        export_to(tmp_path / "a.npz", found)
    finally:
        os.umask(mask)
    made = [*found.directory.iterdir(), tmp_path / "a.npz"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o640}
    assert len(made) == 5


def test_json_of_a_name_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    save(path, {"x": np.arange(3)})
    assert cli.main(["checkpoint", "list", str(path), "--json"]) == 0
    assert "\\udcff" in capsys.readouterr().out
