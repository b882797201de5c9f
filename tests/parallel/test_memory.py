from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mpidist.nn import Linear, Sequential
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    MemoryLedger,
    MemoryUse,
    memory_ledger,
    memory_use,
    proportional_set_size,
)
from mpidist.parallel.sharded import memory
from mpidist.testing import run_ranks

MEBI = 1 << 20


def tied():
    first = Linear(8, 8, rng=0, bias=False, dtype=np.float64)
    second = Linear(8, 8, rng=0, bias=True, dtype=np.float64)
    second.weight = first.weight
    return Sequential(first, second)


def test_what_is_shared_counts_once():
    model = tied()
    use = memory_use(model, AdamW(model.named_parameters()))
    assert use == MemoryUse(parameters=8 * 72, gradients=0, optimizer_state=2 * 8 * 72)
    assert use.total == 3 * 8 * 72


def test_gradients_count_when_they_have_memory():
    model = tied()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    model.layers[1].bias.add_grad(np.ones(8))
    assert memory_use(model, optimizer).gradients == 64

    def body(group):
        mine = tied()
        with DDP(mine, group):
            return memory_use(mine, SGD(mine.named_parameters(), lr=0.1)).gradients

    assert run_ranks(2, body) == [8 * 72] * 2


@pytest.mark.parametrize("per_node", [None, 2])
def test_the_ledger_adds_up_the_ranks_of_a_node(per_node):
    def body(group):
        return memory_ledger(MemoryUse(1 + group.rank, 10, 100), group)

    nodes = {None: [(0, 1, 2)] * 3, 2: [(0, 1), (0, 1), (2,)]}[per_node]
    for rank, ledger in enumerate(run_ranks(3, body, ranks_per_node=per_node)):
        here = nodes[rank]
        assert ledger.rank == MemoryUse(1 + rank, 10, 100)
        assert ledger.node == MemoryUse(
            sum(1 + other for other in here), 10 * len(here), 100 * len(here)
        )


def test_where_the_kernel_does_not_tell_the_ledger_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_ROLLUP", tmp_path / "missing")
    assert proportional_set_size() is None
    for ledger in run_ranks(2, lambda group: memory_ledger(MemoryUse(1, 2, 3), group)):
        assert ledger.rank_pss is None
        assert ledger.node_pss is None
        assert str(ledger).splitlines()[-1].split() == [
            *("all", "data", "(PSS)", "not", "told", "not", "told")
        ]


def test_one_rank_that_does_not_tell_is_enough(monkeypatch):
    def body(group):
        monkeypatch.setattr(memory, "proportional_set_size", lambda: next(answers))
        return memory_ledger(MemoryUse(1, 2, 3), group).node_pss

    answers = iter([4096, None])
    assert run_ranks(2, body) == [None, None]


def test_what_the_kernel_says_is_read_in_bytes(monkeypatch, tmp_path):
    parts = "Pss_Dirty: 7 kB\nPss_Anon: 120 kB\nPss_File: 50 kB\nPss_Shmem: 30 kB\n"
    (tmp_path / "rollup").write_text(f"55d0-7ffd ---p 00:00 0 [rollup]\nPss: 200 kB\n{parts}")
    monkeypatch.setattr(memory, "_ROLLUP", tmp_path / "rollup")
    assert proportional_set_size() == (120 + 30) * 1024


def test_a_kernel_that_tells_the_sum_only_does_not_tell(monkeypatch, tmp_path):
    (tmp_path / "rollup").write_text("55d0-7ffd ---p 00:00 0 [rollup]\nPss: 200 kB\n")
    monkeypatch.setattr(memory, "_ROLLUP", tmp_path / "rollup")
    assert proportional_set_size() is None


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux 5.4 or later")
def test_a_page_counts_by_the_number_of_its_mappings():
    before = proportional_set_size()
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # data, not a program file
        file.truncate(16 * MEBI)
        with mmap.mmap(file.fileno(), 16 * MEBI) as first:
            np.frombuffer(first, np.uint8)[::4096] = 1
            assert proportional_set_size() - before == pytest.approx(16 * MEBI, abs=2 * MEBI)
            with mmap.mmap(file.fileno(), 16 * MEBI) as second:
                np.frombuffer(second, np.uint8)[::4096].sum()
                # Twice half of it.
                assert proportional_set_size() - before == pytest.approx(16 * MEBI, abs=2 * MEBI)


def test_the_ledger_prints_as_a_table():
    use = MemoryUse(MEBI, 2 * MEBI, 3 * MEBI, MEBI, 4 * MEBI)
    node = MemoryUse(4 * MEBI, 5 * MEBI, 6 * MEBI)
    lines = str(MemoryLedger(use, node, 30 * MEBI, 60 * MEBI)).splitlines()
    assert [line.split()[-2:] for line in lines[1:]] == [
        ["1.0", "4.0"],
        ["2.0", "5.0"],
        ["3.0", "6.0"],
        ["1.0", "0.0"],
        ["4.0", "0.0"],
        ["10.0", "15.0"],
        ["30.0", "60.0"],
    ]
