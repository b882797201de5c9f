"""What goes wrong says what it is, and names the parameter."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.nn import Sequential
from mpidist.parallel import DDP
from mpidist.testing import Faults, run_ranks
from tests.parallel.checks import TRAINING, Scale


def test_a_backward_before_the_last_one_was_waited_for_is_refused():
    def body(group):
        scale = Scale()
        with DDP(scale, group) as ddp:
            _, ctx = ddp.forward(np.ones(1), TRAINING)
            _, work = ddp.ibackward(ctx, np.ones(1))
            with pytest.raises(RuntimeError, match="still under way; wait"):
                ddp.ibackward(ctx, np.ones(1))
            with pytest.raises(RuntimeError, match="parameter 'w'"):
                scale.w.add_grad(np.ones(()))
            with pytest.raises(RuntimeError, match="parameter 'w'"):
                scale.w.first_grad()
            work.wait()
            scale.w.add_grad(np.ones(()))
        return float(scale.w.grad)

    assert run_ranks(2, body) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("announced", "made", "text"),
    [(2, 3, "parameter 'w' has received all"), (2, 1, "gradients have not come: w;")],
)
def test_other_contributions_than_announced_are_an_error_and_final(announced, made, text):
    def body(group):
        scale = Scale(announced, made)
        ddp = DDP(scale, group)
        _, ctx = ddp.forward(np.ones(1), TRAINING)
        with pytest.raises(RuntimeError, match=text):
            ddp.backward(ctx, np.ones(1))
        with pytest.raises(RuntimeError, match="an earlier backward failed half way"):
            ddp.backward(ctx, np.ones(1))
        scale.w.add_grad(np.ones(()))  # the model itself is free again

    run_ranks(2, body)


def test_a_parameter_from_elsewhere_is_named():
    def body(group):
        model = Sequential(Scale())
        ddp = DDP(model, group)
        model.layers = (Scale(), *model.layers)
        model.relabel()
        _, ctx = ddp.forward(np.ones(1), TRAINING)
        with pytest.raises(RuntimeError, match=r"'0\.w' was used, but was not part"):
            ddp.backward(ctx, np.ones(1))

    run_ranks(2, body)


def test_a_second_ddp_over_the_same_model_is_noticed():
    def body(group):
        scale = Scale()
        first = DDP(scale, group)
        _, ctx = first.forward(np.ones(1), TRAINING)
        first.backward(ctx, np.ones(1))
        with DDP(scale, group) as second:
            with pytest.raises(RuntimeError, match="'w' does not live in this DDP's bucket"):
                first.backward(ctx, np.ones(1))
            scale.zero_grad()
            second.backward(ctx, np.ones(1))
        return float(scale.w.grad)

    assert run_ranks(2, body) == [1.0, 1.0]


def test_a_model_without_parameters_can_be_wrapped():
    def body(group):
        with DDP(Sequential(), group) as ddp:
            y, ctx = ddp.forward(np.ones(2), TRAINING)
            return ddp.backward(ctx, y).tolist()

    assert run_ranks(2, body) == [[1.0, 1.0]] * 2


def test_closing_waits_for_what_is_under_way():
    def body(group):
        scale = Scale()
        with DDP(scale, group) as ddp:
            _, ctx = ddp.forward(np.full(1, float(group.rank)), TRAINING)
            ddp.ibackward(ctx, np.ones(1))
        return float(scale.w.grad)

    assert run_ranks(3, body, faults=Faults(delay=1e-3)) == [1.0] * 3
