"""What goes wrong says what it is, and names the parameter."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.nn import Sequential
from mpidist.optim import SGD
from mpidist.parallel import DDP
from mpidist.testing import Faults, run_ranks
from tests.parallel.checks import TRAINING, Scale
from tests.parallel.training import Routed


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


def test_a_step_before_the_gradients_were_waited_for_is_refused():
    def body(group):
        # The second one expects no contribution here, but may get one from another rank.
        used, unused = Scale(), Scale()
        model = Sequential(used, Routed(unused, np.inf if group.rank else 0.0))
        opt = SGD(model.named_parameters(), lr=1.0)
        with DDP(model, group) as ddp:
            _, ctx = ddp.forward(np.full((1, 1), group.rank + 1.0), TRAINING)
            _, work = ddp.ibackward(ctx, np.ones((1, 1)))
            for refused in (opt.step, opt.zero_grad, model.zero_grad, unused.w.zero_grad):
                with pytest.raises(RuntimeError, match=r"parameter '.*\.w' .* wait for it"):
                    refused()
            assert (used.w.data, unused.w.data, opt.step_count) == (1.0, 1.0, 0)
            work.wait()
            opt.step()
        return float(used.w.data), float(unused.w.data)

    # Rank 0 doubles its input: the gradients are (2 + 2) / 2 and (1 + 0) / 2.
    assert run_ranks(2, body, faults=Faults(delay=1e-3)) == [(-1.0, 0.5)] * 2


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
