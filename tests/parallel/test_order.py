"""The order of a DDP's buckets is part of its state."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpidist.parallel import DDP
from mpidist.parallel.data import compression
from mpidist.testing import run_ranks
from tests.parallel.checks import TINY, TRAINING
from tests.parallel.sharded import kept
from tests.parallel.test_layout import Chain, layout, step

NAMES = ["a.w", "b.w", "c.w"]


def trained(group):
    """Return a state of a DDP after the first step, whose gradients came from `a` to `c`."""
    with DDP(Chain("abc", "cba"), group, sizes=TINY) as ddp:
        assert ddp.state_dict()["buckets/order"] is None
        step(ddp)
        ddp.module.a.w.data[...] = 2.0
        state = ddp.state_dict()
        assert state["a.w"] is ddp.module.a.w.data
        assert json.loads(json.dumps(state["buckets/order"])) == state["buckets/order"]
        return kept(state)


def test_the_first_step_after_loading_finds_the_buckets_as_they_were():
    def body(group):
        state = trained(group)
        assert state["buckets/order"] == NAMES
        # Alone it would lay its buckets out otherwise.
        with DDP(Chain("abc", "abc"), group, sizes=TINY) as ddp:
            ddp.load_state_dict(state)
            found = [layout(ddp)]
            step(ddp, group.rank + 1.0)
            grads = [float(p.grad) for p in ddp.module.parameters()]
            return [*found, layout(ddp)], ddp.order, float(ddp.module.a.w.data), grads

    # y = a * b * c * x with a = 2, and the mean of x is 1.5.
    assert run_ranks(2, body) == [([["a", "b", "c"]] * 2, tuple(NAMES), 2.0, [1.5, 3.0, 3.0])] * 2


def test_a_state_from_before_the_first_step_has_the_order_found_anew():
    def body(group):
        with DDP(Chain("abc", "cba"), group, sizes=TINY) as ddp:
            new = kept(ddp.state_dict())
            step(ddp)
            before = layout(ddp)
            ddp.load_state_dict(new)
            assert ddp.order is None
            assert [float(p.grad) for p in ddp.module.parameters()] == [1.0] * 3
            loaded = layout(ddp)
            step(ddp)
            return before, loaded, layout(ddp), ddp.order

    abc, cba = ["a", "b", "c"], ["c", "b", "a"]
    assert run_ranks(2, body) == [(abc, cba, abc, tuple(NAMES))] * 2


def test_a_modules_state_leaves_the_buckets_as_they_are():
    def body(group):
        with DDP(Chain("abc", "cba"), group, sizes=TINY) as ddp:
            step(ddp)
            ddp.load_state_dict({name: np.full((), 3.0) for name in NAMES})
            return layout(ddp), ddp.order, float(ddp.module.b.w.data)

    assert run_ranks(2, body) == [(["a", "b", "c"], tuple(NAMES), 3.0)] * 2


def test_beside_a_hook_the_order_is_neither_kept_nor_taken():
    def body(group):
        state = trained(group)
        with DDP(Chain("abc", "cba"), group, sizes=TINY, compression=compression.plain) as ddp:
            ddp.load_state_dict(state)
            step(ddp)
            return layout(ddp), ddp.state_dict()["buckets/order"], float(ddp.module.a.w.data)

    assert run_ranks(2, body) == [(["c", "b", "a", ""], None, 2.0)] * 2


@pytest.mark.parametrize("order", [[], NAMES[:2], [*NAMES, "d.w"], ["a.w"] * 3, "abc", 3, {}])
def test_an_order_of_other_names_is_refused_and_nothing_changes(order):
    def body(group):
        with DDP(Chain("abc", "cba"), group, sizes=TINY) as ddp:
            state = {name: np.zeros(()) for name in NAMES}
            with pytest.raises(ValueError, match="every parameter once"):
                ddp.load_state_dict({**state, "buckets/order": order})
            with pytest.raises(ValueError, match=r"c\.w: missing"):
                ddp.load_state_dict({**dict(list(state.items())[:2]), "buckets/order": NAMES})
            return ddp.order, [float(p.data) for p in ddp.module.parameters()]

    assert run_ranks(1, body) == [(None, [1.0] * 3)]


def test_not_while_gradients_are_under_way():
    def body(group):
        with DDP(Chain("abc", "cba"), group, sizes=TINY) as ddp:
            _, ctx = ddp.forward(np.ones((1, 1)), TRAINING)
            _, work = ddp.ibackward(ctx, np.ones((1, 1)))
            with pytest.raises(RuntimeError, match="still under way"):
                ddp.load_state_dict({name: np.zeros(()) for name in NAMES})
            work.wait()
            return [float(p.data) for p in ddp.module.parameters()]

    assert run_ranks(2, body) == [[1.0] * 3] * 2
