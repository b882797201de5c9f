"""Saves in which a call of the system fails: every one of them, one at a time; and real ones.

All errors in all ways: ``python -m tests.soaks.checkpoints.failures``.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpidist import checkpoint
from mpidist.checkpoint import directory
from mpidist.checkpoint.saving import save as saving
from mpidist.errors import CheckpointError
from mpidist.testing import run_ranks
from tests.soaks.checkpoints import failures
from tests.soaks.checkpoints.calls import Call, intercepted
from tests.soaks.checkpoints.failures import Fault, Scenario
from tests.soaks.checkpoints.states import Contents, Cut

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
MANIFEST = "step-000002/manifest.json"


@pytest.mark.one_python
@pytest.mark.parametrize(
    "scenario",
    [Scenario(2, False, True), pytest.param(Scenario(2, True, False), marks=pytest.mark.full)],
    ids=str,
)
def test_every_call_fails_once(scenario):
    found = list(failures.soak(scenario, thorough=False))
    assert [f"{fault}: {verdict}" for fault, verdict in found if verdict.startswith("WRONG")] == []
    touched = {fault.call.name for fault, _ in found}
    assert {"hdf5.create_file", "hdf5.create_view", "os.mkdir", "os.open"} <= touched
    assert {"os.pwrite", "os.fsync", "os.replace", "os.close"} <= touched
    assert {fault.call.rank for fault, _ in found} == {0, 1}
    # Only what was half written, and then the other half, may go unseen, and hints.
    saved = {fault for fault, verdict in found if verdict == "saved all the same"}
    hints = {fault for fault in saved if fault.call.name == "os.posix_fadvise"}
    assert {fault.kind for fault in saved - hints} <= {"half", "after"}
    assert hints


def attempt(directory: Path, fault: Fault) -> str:
    scenario = Scenario(2, beside=False, over=False)
    failures.prepare(directory, scenario)
    outcome = failures.attempt(scenario, fault, directory)
    failures.verdict_of(fault, outcome)
    return str(outcome.told)


@pytest.mark.parametrize("error", failures.ERRORS)
def test_a_manifest_that_cannot_be_looked_for_is_not_overwritten(error, tmp_path):
    told = attempt(tmp_path, Fault(Call(0, "os.stat", MANIFEST), 0, "instead", error))
    assert told.startswith("CheckpointError: save of")
    assert f"rank 0 cannot make it: {type(OSError(error, '')).__name__}" in told


def test_a_disk_that_fails_for_good_after_the_manifest_got_its_name(tmp_path):
    told = attempt(tmp_path, Fault(Call(0, "os.fsync", "step-000002"), 1, "on", failures.ERRORS[0]))
    assert "Its manifest could not be taken away again" in told


def test_a_manifest_that_stays_keeps_its_files(tmp_path, monkeypatch):
    """The disk takes no change of the manifest, once it is there, and all others."""
    rename_synced, unlink = directory.rename_synced, os.unlink

    def no_sync(part, path):
        rename_synced(part, path)
        part.mkdir()  # so that the manifest cannot have this name again
        raise OSError(5, "Input/output error")

    def no_unlink(path, **options):
        if "manifest.json" in str(path):
            raise OSError(5, "Input/output error")
        unlink(path, **options)

    def save(group):
        state = Contents("large", 0).state(1, group.rank, Cut(group.size, 0))
        with pytest.raises(CheckpointError, match="it may be there, and complete"):
            checkpoint.save(tmp_path, state, group, step=1)

    monkeypatch.setattr(directory, "rename_synced", no_sync)
    monkeypatch.setattr(os, "unlink", no_unlink)
    old = getattr(pathlib, "_NormalAccessor", None)
    if old is not None:  # Python 3.10's has kept the function for itself
        monkeypatch.setattr(old, "unlink", staticmethod(no_unlink))
    run_ranks(2, save)
    assert checkpoint.verify(tmp_path) == []


def test_calls_are_those_of_the_rank_whose_thread_makes_them(tmp_path):
    calls = []

    def note(call, perform, args):
        calls.append(call)
        return perform()

    def save(group):
        state = Contents("large", 0).state(1, group.rank, Cut(group.size, 0))
        checkpoint.save_async(tmp_path, state, group, step=1).wait()

    with intercepted(tmp_path, note):
        run_ranks(3, save)
    for rank in range(3):
        for name in ("hdf5.create_file", "os.pwrite", "os.fsync", "os.replace"):
            assert Call(rank, name, f"step-000001/rank-{rank:05d}.h5.tmp") in calls
    assert Call(0, "os.replace", "step-000001/manifest.json.tmp") in calls


def test_an_error_that_is_taken_for_success_is_found(tmp_path, monkeypatch):
    original = saving.commit

    def careless(directory, manifest):
        with contextlib.suppress(OSError):
            original(directory, manifest)

    monkeypatch.setattr(saving, "commit", careless)
    fault = Fault(Call(0, "os.fsync", MANIFEST + ".tmp"), 0, "instead", failures.ERRORS[0])
    with pytest.raises(AssertionError, match="the newest step differ"):
        attempt(tmp_path, fault)


def test_an_error_without_its_reason_is_found(tmp_path, monkeypatch):
    original = saving.write_file

    def silent(*args):
        try:
            return original(*args)
        except OSError:
            raise OSError("something") from None

    monkeypatch.setattr(saving, "write_file", silent)
    call = Call(1, "os.fsync", "step-000002/rank-00001.h5.tmp")
    with pytest.raises(AssertionError, match=r"does not say who and why: .*something"):
        attempt(tmp_path, Fault(call, 0, "instead", failures.ERRORS[0]))


REAL = """
import os, sys
from pathlib import Path

import h5py

from mpidist import checkpoint
from mpidist.errors import CheckpointError
from mpidist.testing import run_ranks
from tests.soaks.checkpoints.states import Contents, Cut

what, path = sys.argv[1], Path(sys.argv[2])
contents = Contents("large", 1)


def save(group, step):
    try:
        state = contents.state(step, group.rank, Cut(group.size, step))
        checkpoint.save(path, state, group, step=step)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"


def check(steps):
    assert [found.step for found in checkpoint.list(path)] == steps
    for step in steps:
        contents.check(step, checkpoint.load_full(path, step=step))
    assert not list(path.rglob("*.tmp"))


def told(step):
    words = set(run_ranks(3, save, step))
    assert len(words) == 1
    return words.pop()


if what == "full disk":
    step = 1
    while (words := told(step)) is None:
        step += 1
        assert step < 9
    check(list(range(1, step)))
    checkpoint.prune(path, keep=1)
    assert told(step) is None
    check([step - 1, step])
else:
    assert told(1) is None
    if os.getuid():
        path.chmod(0o555)
    else:
        os.seteuid(65534)  # of all threads; root may write everywhere
    words = told(2)
    check([1])
print(words)
"""


def real(what: str, directory: Path, *prefix: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", REAL, what, directory],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_full_disk(tmp_path):
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare (util-linux), so that no test can mount a small disk")
    mount = f'mount -t tmpfs -o size=12m tmpfs "{tmp_path}" && exec "$@"'
    for flags in ("-m", "-rm"):
        prefix = [unshare, flags, "sh", "-c", mount, "sh"]
        if not subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            break
    else:
        pytest.skip("the kernel lets nobody mount a disk of one's own here")
    words = real("full disk", tmp_path, *prefix)
    assert "No space left on device" in words
    assert "rank " in words


def test_a_directory_without_permission(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if (mode := parent.stat().st_mode) & 0o011 != 0o011:
            parent.chmod(mode | 0o011)
    words = real("no permission", directory)
    directory.chmod(0o755)
    assert "rank 0 cannot make it: PermissionError" in words


def test_a_path_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")

    def save(group):
        with pytest.raises(
            CheckpointError, match=r"rank 0 cannot make it: .*Error.*file"
        ) as caught:
            checkpoint.save(path, {"x": 1}, group, step=1)
        return str(caught.value)

    assert len(set(run_ranks(3, save))) == 1
    assert path.read_text() == "mine"
    assert checkpoint.list(path) == []
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.load_full(path)
