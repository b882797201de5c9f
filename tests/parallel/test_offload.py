"""Parameters and the optimizer's state of an FSDP in a file."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpidist.errors import CollectiveMismatchError, UnsupportedOperationError
from mpidist.nn import Linear, Mode
from mpidist.parallel import (
    FSDP,
    MemoryUse,
    Precision,
    ShardedOptimizer,
    ShardingStrategy,
    memory_ledger,
)
from mpidist.parallel.sharded import mapped_files
from mpidist.testing import run_ranks
from tests.parallel.fsdp import CASES, FACTORY, train
from tests.parallel.sharded import assert_same

SINGLE = np.dtype(np.float32)


def on_ranks(size, body, *args, per_node=None):
    return run_ranks(size, body, *args, node_memory=True, ranks_per_node=per_node)


@pytest.mark.parametrize("strategy", ShardingStrategy)
def test_the_bits_are_those_without_and_no_file_stays(strategy, tmp_path):
    trained = partial(train, case=CASES["tied"], kind=strategy)
    per_node = 2 if strategy is ShardingStrategy.HYBRID_SHARD else None
    expected = on_ranks(4, trained, per_node=per_node)
    got = on_ranks(4, partial(trained, offload=tmp_path), per_node=per_node)
    for mine, theirs in zip(got, expected, strict=True):
        assert_same(mine, theirs)
    assert list(tmp_path.iterdir()) == []


def test_parameters_and_state_are_in_files_of_the_directory(tmp_path, monkeypatch):
    made = []
    create = mapped_files.create_unique

    def recorded(directory, *name):
        descriptor, path = create(directory, *name)
        made.append((path, os.dup(descriptor)))
        return descriptor, path

    monkeypatch.setattr(mapped_files, "create_unique", recorded)

    def body(group):
        model = Linear(64, 64, rng=0, bias=False)
        fsdp = FSDP(model, group, offload=str(tmp_path), precision=Precision("float16"))
        optimizer = ShardedOptimizer(fsdp, optimizer=FACTORY)
        y, ctx = fsdp.forward(np.ones((1, 64), SINGLE), Mode(training=True))
        optimizer.backward(ctx, y)
        optimizer.step()
        use = optimizer.memory_use()
        assert "offloaded" in str(memory_ledger(use, group))
        with pytest.raises(ValueError, match="read-only"):
            model.weight.data[...] = 0
        state = optimizer.state_dict()
        (mean,) = state["weight/mean"].pieces.values()
        return use, model.weight.data.tobytes(), mean.tobytes()

    ranks = on_ranks(2, body)
    n, own = 64 * 64, 64 * 64 // 2
    # Masters and gradients are in memory, as is what the reduction brings in halves.
    use = MemoryUse(4 * own, 4 * own, 0, 2 * n, 2 * n + 2 * own, offloaded=2 * own + 2 * 4 * own)
    assert [found for found, *_ in ranks] == [use] * 2
    assert len(made) == 3  # the node's, and one of each rank
    contents = []
    for path, descriptor in made:
        assert Path(path).parent == tmp_path
        assert os.fstat(descriptor).st_nlink == 0
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as memory:
            contents.append(memory[:])
        os.close(descriptor)
    assert ranks[0][1] == ranks[1][1] == contents[0]
    for _, _, mean in ranks:
        assert any(mean in found for found in contents[1:])


# -- refused ---------------------------------------------------------------------------------------


def full(directory):
    return os.statvfs_result((4096, 4096, 100, 10, 1, 9, 9, 9, 0, 255))


def fills_up(descriptor, start, nbytes):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "where", "patch", "match"),
    [
        (FileNotFoundError, "none", None, r"none': rank 0 cannot keep 16 KiB.*No such file or dir"),
        (NotADirectoryError, "file", None, "rank 0 cannot keep 16 KiB in a file there: Not a dire"),
        (OSError, ".", ("statvfs", full), "No space left on device, 4 KiB free; give a directory"),
        (OSError, ".", ("posix_fallocate", fills_up), "No space left on device; give a directory"),
    ],
    ids=["missing", "a file", "full", "filled meanwhile"],
)
def test_where_it_cannot_be_all_ranks_are_told(error, where, patch, match, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    if patch is not None:
        monkeypatch.setattr(mapped_files.os, *patch)

    def body(group):
        model = Linear(64, 64, rng=0, bias=False)
        with pytest.raises(error, match=match):
            FSDP(model, group, offload=tmp_path / where)
        model.weight.data[...] = 0  # nothing has been changed

    on_ranks(2, body)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("strategy", [ShardingStrategy.HYBRID_SHARD, ShardingStrategy.NO_SHARD])
def test_a_disk_that_is_full_on_one_node_is_told_to_all_ranks(strategy, tmp_path, monkeypatch):
    calls, reserve = itertools.count(), os.posix_fallocate

    def fills_up_once(descriptor, start, nbytes):
        (fills_up if next(calls) == 0 else reserve)(descriptor, start, nbytes)

    monkeypatch.setattr(mapped_files.os, "posix_fallocate", fills_up_once)

    def body(group):
        model = Linear(64, 64, rng=0, bias=False)
        with pytest.raises(OSError, match=r"cannot keep 16 KiB .*No space left on device"):
            FSDP(model, group, strategy=strategy, offload=tmp_path)
        FSDP(model, group, strategy=strategy, offload=tmp_path).close()

    on_ranks(4, body, per_node=2)


def test_an_optimizer_may_be_made_when_there_is_room_for_its_state(tmp_path):
    def body(group):
        fsdp = FSDP(Linear(64, 64, rng=0, bias=False), group, offload=tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mapped_files.os, "posix_fallocate", fills_up)
            with pytest.raises(OSError, match=r"cannot keep 32 KiB .*No space left on device"):
                ShardedOptimizer(fsdp, optimizer=FACTORY)
        ShardedOptimizer(fsdp, optimizer=FACTORY).close()

    on_ranks(1, body)


def test_a_path_named_host_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def body(group):
        with pytest.raises(FileNotFoundError, match=r"offload='\./host'"):
            FSDP(Linear(64, 64, rng=0), group, offload=Path("host"))

    on_ranks(1, body)


@pytest.mark.parametrize("link", [False, True])
def test_a_file_that_somebody_has_replaced_is_not_opened(link, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 20_000)
    create = mapped_files.create_unique

    def replaced(directory, *name):
        descriptor, path = create(directory, *name)
        Path(path).unlink()
        Path(path).symlink_to(secret) if link else Path(path).write_bytes(b"y" * 20_000)
        return descriptor, path

    monkeypatch.setattr(mapped_files, "create_unique", replaced)

    def body(group):
        with pytest.raises(OSError, match=r"rank 1 cannot keep 16 KiB .*(replaced|symbolic)"):
            FSDP(Linear(64, 64, rng=0, bias=False), group, offload=tmp_path)

    on_ranks(2, body)
    assert secret.read_bytes() == b"x" * 20_000


def test_what_does_not_help_is_refused():
    def body(group):
        with pytest.raises(UnsupportedOperationError, match="is for a model on a device, and this"):
            FSDP(Linear(4, 3, rng=0), group, offload="host")
        with pytest.raises(TypeError, match="offload must be 'host' or the path of a directory"):
            FSDP(Linear(4, 3, rng=0), group, offload=True)
        with pytest.raises(CollectiveMismatchError, match="argument 'offload' is /b on rank 1"):
            FSDP(Linear(4, 3, rng=0), group, offload="/b" if group.rank else "/a")

    on_ranks(2, body)


def test_what_no_node_has_whole_is_not_offloaded(tmp_path):
    def body(group):
        with pytest.raises(UnsupportedOperationError, match="over 2 nodes none has all of them"):
            FSDP(Linear(4, 3, rng=0), group, offload=tmp_path)

    on_ranks(2, body, per_node=1)
