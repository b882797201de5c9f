"""What a trace says of the transfers of an FSDP's units."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.group import ProcessGroup
from mpidist.nn import Linear, Mode, Sequential
from mpidist.parallel import FSDP, ShardingStrategy
from mpidist.testing import run_ranks
from mpidist.tracing.summary import load, summarise

NAP = 0.1


@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD])
def test_what_is_waited_for_is_exposed(tmp_path: Path, strategy: ShardingStrategy) -> None:
    def body(group: ProcessGroup) -> None:
        model = Sequential(*(Linear(64, 64, rng=i, bias=False) for i in range(3)))
        fsdp = FSDP(model, group, units=["*"], strategy=strategy)
        # Another node's rank is late: rank 0 waits for the sum of the nodes, if there are several.
        late = group.rank == group.size - 1
        with mpidist.trace(tmp_path / "trace.json", group):
            for step in range(2):
                with mpidist.region("step"):
                    time.sleep(NAP * late)
                    y, ctx = fsdp.forward(np.ones((1, 64), np.float32), Mode(True, step=step))
                    fsdp.backward(ctx, y)
            fsdp.backward(*fsdp.forward(np.ones((1, 64), np.float32), Mode(True))[::-1])

    hybrid = strategy is ShardingStrategy.HYBRID_SHARD
    run_ranks(4, body, node_memory=True, ranks_per_node=2 if hybrid else None)
    found = {
        transfer.name: transfer for transfer in summarise(load(tmp_path / "trace.json")).transfers
    }
    stages = ["reduce", "sum over replicas"][: 1 + hybrid]
    assert list(found) == [f"unit {i}: {stage}" for i in range(3) for stage in stages]
    for transfer in found.values():
        assert transfer.count == 4 * 2  # ranks and steps; not the passes after them
        assert 0 <= transfer.exposed <= transfer.seconds
        assert transfer.hidden == pytest.approx(transfer.seconds - transfer.exposed)
    # The first unit of backward has a buffer of its own, and the third one waits for it.
    waited = sum(transfer.exposed for transfer in found.values())
    assert waited > 0.8 * (2 if hybrid else 3) * 2 * NAP


def test_gathers_of_units_are_transfers_too(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> None:
        model = Sequential(*(Linear(64, 64, rng=i, bias=False) for i in range(3)))
        fsdp = FSDP(model, group, units=["*"])
        with mpidist.trace(tmp_path / "trace.json", group), mpidist.region("step"):
            y, ctx = fsdp.forward(np.ones((1, 64), np.float32), Mode(True))
            fsdp.backward(ctx, y)

    run_ranks(2, body, node_memory=True, ranks_per_node=1)
    found = {t.name: t.count for t in summarise(load(tmp_path / "trace.json")).transfers}
    # Two ranks; units 1 and 2 are still in their slots when backward begins.
    gathers = {f"unit {unit}: gather": 2 * (2 if unit == 0 else 1) for unit in range(3)}
    assert found == gathers | {f"unit {unit}: reduce": 2 for unit in range(3)}
