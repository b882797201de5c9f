"""A run that is stopped, saved and loaded elsewhere ends as one that was never stopped."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpidist import checkpoint, nn
from mpidist._types import SUM, Array
from mpidist.collectives import barrier
from mpidist.data import ArrayDataset
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointMissingShardError,
    CheckpointNotFoundError,
)
from mpidist.group import ProcessGroup
from mpidist.optim import SGD, AdamW, Optimizer
from mpidist.parallel import DDP, BucketSizes, ShardedOptimizer
from mpidist.testing import run_ranks
from mpidist.train import (
    Checkpoints,
    Plan,
    Record,
    Run,
    StopSignal,
    check_space,
    make_sampler,
    train,
)
from tests.jobs.running import read_arrays

CLASSES = 3
SHAPE = (3, 1, 2)
WIDTH = 6
# Five batches per epoch, the last one of 1 sample: some ranks have none.
PLAN = Plan(steps=12, batch_size=8, seed=3, log_every=4, evaluate_every=6)
# Several buckets, which the first backward lays out anew.
SMALL = BucketSizes(first=200, rest=400)


def data(samples: int, *, seed: int) -> ArrayDataset:
    inputs = np.random.default_rng(seed).normal(size=(samples, *SHAPE)).astype(np.float32)
    return ArrayDataset(inputs, inputs[:, :, 0, 0].argmax(-1))


def module(seed: int, width: int = 16) -> nn.Module:
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.BatchNorm2d(SHAPE[0]),
        nn.Flatten(),
        nn.Linear(WIDTH, width, rng=rng),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(width, width, rng=rng),
        nn.ReLU(),
        nn.Linear(width, CLASSES, rng=rng),
    )


def job(
    group: ProcessGroup,
    directory: Path,
    *,
    plan: Plan = PLAN,
    sharded: bool = False,
    stop_after: int | None = None,
    load: bool = False,
    **changed: Any,
) -> tuple[list[Record], dict[str, Array]]:
    """Run as jobs/train.py does; the last rank asks for a stop in the step after `stop_after`."""
    samples: int = changed.get("samples", 33)
    model_of = changed.get("model", module)
    build = changed.get("optimizer", partial(AdamW, lr=0.05))
    train_set, held_out = data(samples, seed=0), data(9, seed=1)
    stop, kept = StopSignal(), Checkpoints(directory, group, keep=2)
    # Another seed after a stop: all that matters comes out of the file.
    with DDP(model_of(1 if load else 0), group, op=SUM, sizes=SMALL) as model:
        optimizer: Optimizer | ShardedOptimizer
        if sharded:
            optimizer = ShardedOptimizer(model, group, optimizer=build)
        else:
            optimizer = build(list(model.module.named_parameters()))
        if load:
            assert kept.newest() is not None
            kept.load(Run(model, optimizer, make_sampler(train_set, plan, group)))
        records = []
        for record in train(
            model, optimizer, train_set, held_out, plan, group, checkpoints=kept, stop=stop
        ):
            records.append(record)
            if record.step == stop_after and group.rank == group.size - 1:
                stop.request()
        state = {name: array.copy() for name, array in model.module.state_dict().items()}
    return records, state


def same_bits(mine: dict[str, Array], theirs: dict[str, Array]) -> None:
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_stopped_and_resumed_has_the_bits_of_never_stopped(
    tmp_path: Path, size: int, sharded: bool
) -> None:
    whole = run_ranks(size, lambda g: job(g, tmp_path / "a", sharded=sharded))
    parts = run_ranks(size, lambda g: job(g, tmp_path / "b", sharded=sharded, stop_after=4))
    assert [record.step for record in parts[0][0]] == [4, 5]  # one before the save
    ends = run_ranks(size, lambda g: job(g, tmp_path / "b", sharded=sharded, load=True))
    kept = [(record.kind, record.step) for record in ends[0][0]]
    assert kept == [("held-out", 6), ("train", 8), ("train", 12), ("held-out", 12)]
    for (_, mine), (_, theirs) in zip(ends, whole, strict=True):
        same_bits(mine, theirs)
    assert ends[0][0][-1].loss == whole[0][0][-1].loss
    # The saves at the end hold the same, the optimizer's state included.
    same_bits(*(read_arrays(tmp_path / name) for name in ("a", "b")))


def test_the_first_step_finds_the_buckets_as_they_were(tmp_path: Path) -> None:
    """From three ranks on, the order of a sum may depend on an element's place in its bucket."""

    def places(model: DDP) -> list[int]:
        buffers = [p.grad_memory for p in model.module.parameters() if p.grad_memory is not None]
        first = min(buffer.ctypes.data for buffer in buffers)
        return [buffer.ctypes.data - first for buffer in buffers]

    def body(group: ProcessGroup) -> tuple[list[int], list[int], list[int]]:
        samples, kept = data(33, seed=0), Checkpoints(tmp_path, group)
        with DDP(module(0), group, op=SUM, sizes=SMALL) as model:
            new = places(model)
            optimizer = AdamW(model.module.named_parameters())
            plan = Plan(steps=1, batch_size=8)
            for _ in train(model, optimizer, samples, samples, plan, group, checkpoints=kept):
                pass
            trained = places(model)
        with DDP(module(0), group, op=SUM, sizes=SMALL) as model:
            optimizer = AdamW(model.module.named_parameters())
            kept.load(Run(model, optimizer, make_sampler(samples, plan, group)))
            return new, trained, places(model)

    for new, trained, loaded in run_ranks(2, body):
        assert loaded == trained
        assert loaded != new


@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("sharded", [False, True])
def test_on_real_ranks_too(world: ProcessGroup, tmp_path_factory: Any, sharded: bool) -> None:
    from mpidist.collectives import broadcast_object

    directory = broadcast_object(tmp_path_factory.mktemp("saves"), world)
    _, whole = job(world, directory / "a", sharded=sharded)
    job(world, directory / "b", sharded=sharded, stop_after=4)
    _, resumed = job(world, directory / "b", sharded=sharded, load=True)
    same_bits(resumed, whole)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 4)])
def test_any_number_of_ranks_goes_on_sharded_or_not(
    tmp_path: Path, before: int, after: int
) -> None:
    def plain(seed: int) -> nn.Module:  # batch statistics are each rank's own
        rng = np.random.default_rng(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(WIDTH, 8, rng=rng),
            nn.Dropout(0.3),
            nn.Linear(8, CLASSES, rng=rng),
        )

    ((records, whole),) = run_ranks(1, lambda g: job(g, tmp_path / "a", model=plain))
    run_ranks(before, lambda g: job(g, tmp_path, model=plain, sharded=True, stop_after=4))
    ends = run_ranks(after, lambda g: job(g, tmp_path, model=plain, load=True))
    for resumed, state in ends:
        assert resumed[-1].loss == pytest.approx(records[-1].loss, rel=1e-4)
        for name, array in state.items():
            np.testing.assert_allclose(array, whole[name], rtol=1e-3, atol=1e-5)


def test_saves_come_when_the_plan_says(tmp_path: Path) -> None:
    plan = Plan(steps=11, batch_size=8, log_every=100, checkpoint_every=3)

    def body(group: ProcessGroup) -> list[tuple[str, int, int | None]]:
        seen = []
        with DDP(module(0), group, op=SUM) as model:
            optimizer = AdamW(model.module.named_parameters())
            kept, samples = Checkpoints(tmp_path, group, keep=2), data(33, seed=0)
            for record in train(model, optimizer, samples, samples, plan, group, checkpoints=kept):
                kept.wait()
                seen.append((record.kind, record.step, kept.newest()))
            barrier(group)  # rank 0 has removed what is too old
            left = sorted(path.name for path in tmp_path.iterdir())
            assert left == ["step-000009", "step-000011"]
            barrier(group)
            kept.discard()
            kept.discard()
            assert kept.newest() is None
        return seen

    expected = [
        *(("train", 3, None), ("train", 6, 3), ("train", 9, 6)),
        *(("train", 11, 9), ("held-out", 11, 9)),
    ]
    assert run_ranks(2, body) == [expected] * 2


def test_a_run_that_is_done_has_nothing_left_to_do(tmp_path: Path) -> None:
    run_ranks(2, lambda g: job(g, tmp_path))
    assert all(records == [] for records, _ in run_ranks(2, lambda g: job(g, tmp_path, load=True)))


def test_a_directory_that_cannot_be_seen_raises_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unseen(path: Path) -> None:
        raise CheckpointError(f"{path} cannot be read: Input/output error")

    def asking(group: ProcessGroup) -> None:
        with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
            Checkpoints(tmp_path, group).newest()

    monkeypatch.setattr("mpidist.checkpoint.latest", unseen)
    run_ranks(2, asking, timeout=10.0)


def test_a_failure_beside_the_training_raises_at_the_same_place_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def asking(group: ProcessGroup) -> None:
        with DDP(module(0), group, op=SUM) as model:
            optimizer = AdamW(model.module.named_parameters())
            run = Run(model, optimizer, make_sampler(data(33, seed=0), PLAN, group))
            kept = Checkpoints(tmp_path, group)
            kept.save(run)
            saving = kept._saving
            assert saving is not None
            while not saving.failed:
                kept.progress()
            with pytest.raises(CheckpointError, match="No space left"):
                kept.save(run)
            kept.wait()  # it has been told

    monkeypatch.setattr("mpidist.checkpoint.saving.save.write_file", full)
    run_ranks(2, asking, timeout=10.0)


def test_bad_saves_raise_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    def failing(group: ProcessGroup) -> CheckpointError:
        with pytest.raises(CheckpointError) as caught:
            job(group, tmp_path, load=True)
        return caught.value

    def load_nothing(group: ProcessGroup) -> None:
        with DDP(module(0), group, op=SUM) as model:
            run = Run(
                model,
                AdamW(model.module.named_parameters()),
                make_sampler(data(33, seed=0), PLAN, group),
            )
            with pytest.raises(
                CheckpointNotFoundError, match=r"no complete checkpoint of any step in .*nowhere"
            ):
                Checkpoints(tmp_path / "nowhere", group).load(run)

    run_ranks(3, load_nothing)
    run_ranks(1, lambda g: job(g, tmp_path, stop_after=4))
    file = tmp_path / "step-000005/rank-00000.h5"
    file.write_bytes(file.read_bytes()[:-1000])
    for error in run_ranks(3, failing):
        assert type(error) is CheckpointCorruptError
        assert "rank-00000.h5 has " in str(error)


def trained(
    group: ProcessGroup, directory: Path, steps: int, going_on: dict[str, Any] | None = None
) -> int:
    """Train so many steps, from where a checkpoint is if that is said; return where it began."""
    plan = Plan(steps=steps, batch_size=8, seed=3, checkpoint_every=2)
    samples = data(33, seed=0)
    with DDP(module(0), group, op=SUM) as model:
        optimizer = AdamW(model.module.named_parameters())
        kept = Checkpoints(directory, group)
        run, begin = Run(model, optimizer, make_sampler(samples, plan, group)), 0
        if going_on is not None:
            begin = kept.load(run, **going_on).step
            assert optimizer.step_count == begin
        for _ in train(model, optimizer, samples, samples, plan, group, checkpoints=kept):
            pass
        assert kept.whole() == [found.step for found in checkpoint.list(directory)]
        barrier(group)
    return begin


def test_going_back_sets_later_steps_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(2, lambda g: trained(g, tmp_path, 6))
    assert run_ranks(2, lambda g: trained(g, tmp_path, 6, {"step": 2})) == [2, 2]
    names = sorted(path.name for path in tmp_path.iterdir())
    aside = ["step-000004.aside-1", "step-000006.aside-1"]
    assert names == ["step-000002", "step-000004", aside[0], "step-000006", aside[1]]
    (told,) = [r.getMessage() for r in caplog.records if "GOING BACK" in r.getMessage()]
    assert f"GOING BACK to step 2 of {tmp_path}; later steps are set aside as {aside[0]}," in told
    assert run_ranks(2, lambda g: trained(g, tmp_path, 6, {"step": 4})) == [4, 4]
    assert (tmp_path / "step-000006.aside-2").exists()


@pytest.mark.parametrize("kind", ["cut off", "flipped", "manifest"])
def test_the_newest_whole_one_is_found_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    run_ranks(2, lambda g: trained(g, tmp_path, 6))
    newest = tmp_path / "step-000006"
    file = newest / ("manifest.json" if kind == "manifest" else "rank-00001.h5")
    content = bytearray(file.read_bytes())
    if kind == "flipped":
        place = checkpoint.latest(tmp_path)
        assert place is not None
        dataset = place.manifest.files[1].datasets["packed/float32"]
        content[dataset.byte + 1] ^= 16
    file.write_bytes(content if kind == "flipped" else content[:-1])

    def refused(group: ProcessGroup) -> str:
        with pytest.raises(CheckpointCorruptError) as caught:
            trained(group, tmp_path, 6, {})
        return str(caught.value)

    assert len(set(run_ranks(2, refused))) == 1
    assert newest.exists()
    assert run_ranks(3, lambda g: trained(g, tmp_path, 6, {"fall_back": True})) == [4] * 3
    (told,) = [r.getMessage() for r in caplog.records if "GOING BACK" in r.getMessage()]
    assert "\n" not in told
    assert f"GOING BACK to step 4 of {tmp_path} because the newest one is damaged (" in told
    assert file.name in told
    assert (tmp_path / "step-000006.aside-1" / file.name).exists()
    assert checkpoint.verify(tmp_path, step=6) == []


def test_damage_of_all_is_that_of_the_newest(tmp_path: Path) -> None:
    run_ranks(2, lambda g: trained(g, tmp_path, 4))
    for path in tmp_path.glob("step-*/rank-00000.h5"):
        path.unlink()

    def refused(group: ProcessGroup) -> None:
        with pytest.raises(CheckpointMissingShardError, match="step-000004"):
            trained(group, tmp_path, 6, {"fall_back": True})

    run_ranks(2, refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]


def test_damage_that_does_not_count_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(steps=8, batch_size=8, checkpoint_every=1)

    def body(group: ProcessGroup) -> None:
        samples = data(33, seed=0)
        with DDP(module(0), group, op=SUM) as model:
            optimizer = AdamW(model.module.named_parameters())
            kept = Checkpoints(tmp_path, group, keep=2)
            for record in train(model, optimizer, samples, samples, plan, group, checkpoints=kept):
                kept.wait()
                if record.step == 3 and group.rank == 0:
                    (tmp_path / "step-000002" / "rank-00000.h5").unlink()

    run_ranks(2, body)
    told = [r.getMessage() for r in caplog.records if "not counted" in r.getMessage()]
    assert len(told) == 1
    assert "step-000002" in told[0]
    assert [found.step for found in checkpoint.list(tmp_path)] == [7, 8]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": partial(module, width=17)}, "model/2.weight: expected"),
        ({"optimizer": partial(SGD, lr=0.1)}, "saved, but 'optimizer' has no such part"),
        ({"samples": 40}, "num_samples is 40 here and 33"),
        ({"plan": Plan(steps=12, batch_size=8, seed=4)}, "seed is 4 here and 3"),
        ({"plan": Plan(steps=12, batch_size=9, seed=3)}, "batch_size is 9 here and 8"),
    ],
)
def test_another_run_is_refused_on_all_ranks(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    def failing(group: ProcessGroup) -> str:
        with pytest.raises(CheckpointIncompatibleError, match=r"load of .*step-000005") as caught:
            job(group, tmp_path, load=True, **changed)
        return str(caught.value)

    run_ranks(1, lambda g: job(g, tmp_path, stop_after=4))
    assert all(said in error for error in run_ranks(2, failing))


def test_a_save_that_fails_raises_on_all_ranks_and_keeps_the_one_before(tmp_path: Path) -> None:
    run_ranks(2, lambda g: job(g, tmp_path, stop_after=4))
    before = read_arrays(tmp_path)
    (tmp_path / "step-000012").write_text("in the way")

    def failing(group: ProcessGroup) -> str:
        with pytest.raises(CheckpointError, match=r"save of .*step-000012") as caught:
            job(group, tmp_path, load=True)
        return str(caught.value)

    assert len(set(run_ranks(2, failing))) == 1
    same_bits(read_arrays(tmp_path), before)


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("sharded", [False, True])
def test_the_space_that_a_run_needs_is_known_before(tmp_path: Path, *, sharded: bool) -> None:
    def body(group: ProcessGroup) -> tuple[list[int], int]:
        kept = Checkpoints(tmp_path, group, keep=2)
        with DDP(module(0, width=300), group, op=SUM) as model:
            optimizer: Optimizer | ShardedOptimizer
            if sharded:
                optimizer = ShardedOptimizer(model, group, optimizer=AdamW)
            else:
                optimizer = AdamW(model.module.named_parameters())
            run = Run(model, optimizer, make_sampler(data(33, seed=0), PLAN, group))
            one = kept.space(run, saves=1)
            before = [kept.space(run, saves=n) // one for n in (0, 1, 3, 4, 5)]
            kept.save(run)
            kept.wait()
            barrier(group)
            after = [kept.space(run, saves=n) // one for n in (0, 1, 2, 3)]
            anew = [kept.space(run, saves=n, anew=True) // one for n in (1, 2, 9)]
            barrier(group)
        return [*before, *after, *anew], one

    for multiples, one in run_ranks(2, body):
        # Two stay, and one more while it is written; the third list is without the one there.
        assert multiples == [0, 1, 3, 3, 3, 0, 1, 2, 2, 0, 1, 2]
        assert 0.5 * one < bytes_of(tmp_path) <= one


@pytest.mark.parametrize(
    ("where", "free", "told"),
    [
        ("file", 10**12, "it is a file; 3 MiB needed"),
        ("file/below", 10**12, "Not a directory; 3 MiB needed"),
        ("/sys/nothing", 10**12, "3 MiB needed"),  # the same for root
        ("a/b", (3 << 20) - 1, "No space left on device, 3 MiB free; 3 MiB needed"),
    ],
)
def test_output_that_cannot_be_written_is_refused_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, free: int, told: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    def body(group: ProcessGroup) -> str:
        with pytest.raises(OSError, match=told) as raised:
            check_space({tmp_path / where: 3 << 20}, group)
        return str(raised.value.filename)

    assert run_ranks(3, body) == [str(tmp_path / where)] * 3


def test_two_directories_of_one_file_system_share_its_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))

    def body(group: ProcessGroup) -> None:
        check_space({tmp_path / "a": 60, tmp_path / "b": 40}, group)
        with pytest.raises(OSError, match="100 B free; 101 B needed"):
            check_space({tmp_path / "a": 60, tmp_path / "b": 41}, group)

    run_ranks(2, body)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]
