"""Spoilt checkpoints; two thousand by ``python -m tests.soaks.checkpoints.corruption``."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mpidist import checkpoint
from mpidist.checkpoint.directory import step_directory
from mpidist.checkpoint.format.manifest import MANIFEST
from mpidist.checkpoint.loading import reading
from mpidist.errors import CheckpointCorruptError
from mpidist.testing import run_ranks
from tests.soaks.checkpoints import corruption
from tests.soaks.checkpoints.corruption import Case
from tests.soaks.checkpoints.damage import DAMAGES, Damage
from tests.soaks.checkpoints.states import KINDS, Contents, Cut

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corruption")


@pytest.fixture(scope="module")
def sources(directory) -> Path:
    return directory / "sources"


@pytest.mark.one_python
def test_what_is_spoilt_is_detected_or_harmless(directory, full):
    cases = 400 if full else 40
    found = list(corruption.soak(directory, cases=cases, seed=1, verify_every=20))
    assert [f"{case}: {verdict.wrong}" for case, verdict in found if verdict.wrong] == []
    results = {(verdict.full, verdict.ranks) for _, verdict in found}
    assert {("detected", "detected"), ("harmless", "harmless")} <= results


def test_cases_are_of_all_kinds():
    drawn = [Case.draw(f"0 {number}") for number in range(1000)]
    assert {case.damage for case in drawn} == set(DAMAGES)
    assert {(case.kind, case.size) for case in drawn} == {
        (k, n) for k in KINDS for n in (1, 2, 3, 4)
    }
    assert {case.cut.size for case in drawn} == {1, 2, 3, 4}


def case_of(damage: str, **changes) -> Case:
    case = Case.draw("0 0")
    return replace(case, kind="few", size=2, damage=damage, cut=Cut(1, 5), **changes)


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_each_kind_of_damage_changes_something(damage, sources, tmp_path):
    place = corruption.copy(case_of(damage), sources, tmp_path)
    before = {path.name: path.read_bytes() for path in place.directory.iterdir()}
    touched = DAMAGES[damage].spoil(place, random.Random(4))
    after = {p.name: p.read_bytes() if p.is_file() else None for p in place.directory.iterdir()}
    assert {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    assert touched


def test_a_wrong_array_is_found(sources, tmp_path, monkeypatch):
    """As a reader would give it that compares no digests."""
    monkeypatch.setattr(reading.Files, "_check", lambda *args: None)
    found = [
        corruption.judge(
            case_of("pages zeroed or overwritten", seed=str(n)),
            sources,
            tmp_path / str(n),
            verify=False,
        )
        for n in range(8)
    ]
    assert any("not what was saved: weight" in text for verdict in found for text in verdict.wrong)


def test_another_exception_is_found(sources, tmp_path, monkeypatch):
    def spoil(place, rng):
        monkeypatch.setattr(reading, "check_file", lambda *args: {}["x"])
        return {"manifest.json"}

    monkeypatch.setitem(corruption.DAMAGES, "odd", Damage(spoil))
    verdict = corruption.judge(case_of("odd", seed="0"), sources, tmp_path / "copy", verify=False)
    assert verdict.full.startswith("WRONG class: KeyError")
    assert verdict.ranks.startswith("WRONG")


def load_on_ranks(path: Path, contents: Contents, step: int) -> str:
    def load(group):
        with pytest.raises(CheckpointCorruptError) as caught:
            checkpoint.load(path, contents.empty(group.rank, Cut(2, 0)), group, step=step)
        return str(caught.value)

    told = set(run_ranks(2, load))
    assert len(told) == 1
    return told.pop()


@pytest.mark.parametrize("kind", ["few", "values"])
def test_a_checkpoint_in_the_directory_of_another_step_does_not_load(kind, sources, tmp_path):
    shutil.copytree(
        step_directory(corruption.source(sources, kind, 2, 1), 1), step_directory(tmp_path, 2)
    )
    words = r"manifest\.json is of step 1: step-000002 holds the checkpoint of step 1"
    with pytest.raises(CheckpointCorruptError, match=words):
        checkpoint.load_full(tmp_path)
    assert "is of step 1" in load_on_ranks(tmp_path, Contents(kind, 1), 2)


@pytest.mark.parametrize("kind", ["few", "values"])
def test_a_manifest_of_another_run_does_not_load(kind, sources, tmp_path):
    """Also where there is no array whose digests could tell."""
    shutil.copytree(corruption.source(sources, kind, 2, 1), tmp_path / "run")
    manifest = step_directory(tmp_path / "run", 2) / MANIFEST
    shutil.copyfile(step_directory(corruption.source(sources, kind, 2, 2), 2) / MANIFEST, manifest)
    with pytest.raises(CheckpointCorruptError, match=r"rank-00000\.h5 is not of the save"):
        checkpoint.load_full(tmp_path / "run", names=["epoch"])
    assert "rank-00000.h5 is not of the save" in load_on_ranks(
        tmp_path / "run", Contents(kind, 1), 2
    )
