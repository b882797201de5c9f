"""What is put around the passes of a module."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.nn import Dropout, Linear, Mode, ReLU, Residual, Sequential
from mpidist.nn.surround import BACKWARD_PASSES, PASSES, after_passes, surround

TRAIN = Mode(training=True)


def _model():
    return Sequential(Linear(3, 3, rng=0), Residual(Linear(3, 3, rng=1)), ReLU())


def _recorder(events, tag=""):
    def around(name, run):
        events.append(f"{tag}>{name}")
        result = run()
        events.append(f"{tag}<{name}")
        return result

    return around


@pytest.mark.parametrize("which", [0, 1])  # one makes its backward of the halves, one overrides it
def test_each_pass_is_surrounded_once(which):
    model, events = _model(), []
    layer = model.layers[which]
    x = np.ones((2, 3), np.float32)
    names = [name for name, _ in model.named_parameters()]
    with surround(layer, _recorder(events)):
        y, ctx = model.forward(x, TRAIN)
        model.backward(ctx, y)
        assert events == [">forward", "<forward", ">backward", "<backward"]
        events.clear()
        _, wctx = model.backward_input(ctx, y)
        model.backward_weight(wctx)
        assert events == [
            ">backward_input",
            "<backward_input",
            ">backward_weight",
            "<backward_weight",
        ]
        assert [name for name, _ in model.named_parameters()] == names
        assert "around" not in repr(model)
    events.clear()
    model.backward(model.forward(x, TRAIN)[1], y)
    assert events == []
    assert not {"forward", "backward"} & vars(layer).keys()


def test_passes_take_arguments_by_name():
    model, events = _model(), []
    x = np.ones((2, 3), np.float32)
    with surround(model, _recorder(events)), surround(model.layers[0], _recorder(events)):
        y, ctx = model.forward(x=x, mode=TRAIN)
        dx, wctx = model.backward_input(ctx=ctx, dy=y)
        model.backward_weight(wctx=wctx)
        assert np.array_equal(model.layers[0].backward(ctx=ctx.saved[0], dy=y), y @ _weight(model))
    assert dx.shape == x.shape
    assert events.count(">backward") == events.count("<backward") == 1


def _weight(model):
    return model.layers[0].weight.data


def test_several_surround_one_module_the_last_one_outermost():
    layer, events = ReLU(), []
    x = np.ones((1, 2), np.float32)
    with surround(layer, _recorder(events, "a")):
        with surround(layer, _recorder(events, "b"), ["forward"]):
            layer.forward(x, TRAIN)
        assert events == ["b>forward", "a>forward", "a<forward", "b<forward"]
        layer.forward(x, TRAIN)
        assert events[4:] == ["a>forward", "a<forward"]


def test_results_can_be_exchanged_and_errors_end_it():
    layer = ReLU()
    x = np.ones((1, 2), np.float32)
    with surround(layer, lambda _, run: (run()[0] * 2, None)):
        assert layer.forward(x, TRAIN)[0].tolist() == [[2, 2]]

    def fail(*_):
        raise KeyError

    with pytest.raises(KeyError), surround(layer, fail):
        layer.forward(x, TRAIN)
    assert layer.forward(x, TRAIN)[0].tolist() == [[1, 1]]


def test_after_passes_calls_at_halves_and_at_overridden_passes():
    model, calls = Sequential(Residual(Dropout(0.0)), ReLU()), []
    x = np.ones((1, 2), np.float32)
    for passes, before in ((BACKWARD_PASSES, 0), (PASSES, 2)):
        calls.clear()
        with after_passes(model.layers, lambda: calls.append(1), passes):
            y, ctx = model.forward(x, TRAIN)
            assert len(calls) == before
            model.backward(ctx, y)
            assert len(calls) == before + 2
            _, wctx = model.backward_input(ctx, y)
            assert len(calls) == before + 4
            model.backward_weight(wctx)
            assert len(calls) == before + 6
