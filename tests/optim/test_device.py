"""Optimizers on a device: the host's numbers, one kernel per bucket, and the host does not wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mpidist.optim.fused
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import is_device, to_host
from mpidist.nn import Parameter
from mpidist.optim import SGD, Adam, AdamW, Optimizer
from mpidist.optim.fused import apply_rule

TIGHT = {np.float16: 4e-3, np.float32: 1e-6, np.float64: 1e-12}
SHAPES = {"a": (3, 5), "b": (7,), "c": (), "d": (0, 2), "e": (4, 4)}

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda params: Adam(params, lr=0.01, weight_decay=0.1),
    "adamw": lambda params: AdamW(params, lr=lambda step: 0.01 / (step + 1), betas=(0.8, 0.95)),
    "sgd": lambda params: SGD(params, lr=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
}


def make(dtype: Any, put: Callable[[Any], Any]) -> dict[str, Parameter]:
    rng = np.random.default_rng(0)
    return {
        name: Parameter(put(rng.normal(size=shape).astype(dtype)), name=name)
        for name, shape in SHAPES.items()
    }


def bucket(xp: ModuleType, params: Mapping[str, Parameter], dtype: Any) -> FlatBuffer:
    """Let the gradients live in one flat array, in another order than the parameters'."""
    shapes = {f"g {name}": params[name].shape for name in reversed(params)}
    length = FlatBuffer.length_of(shapes, alignment=16)
    flat = FlatBuffer(shapes, dtype, alignment=16, storage=xp.empty(length, dtype))
    for name, p in params.items():
        p.attach(flat.views[f"g {name}"], location=(flat, f"g {name}"))
    return flat


def add_gradients(params: Mapping[str, Parameter], step: int, *, without: str = "") -> None:
    rng = np.random.default_rng(step)
    for name, p in params.items():
        p.zero_grad()
        grad = rng.normal(size=p.shape).astype(p.dtype)
        if name != without:
            p.add_grad(mpidist.arrays.namespaces.like_device(p.data, grad))


def check_same(
    device: Mapping[str, Parameter], host: Mapping[str, Parameter], tolerance: float
) -> None:
    for name, p in host.items():
        assert is_device(device[name].data)
        got = to_host(device[name].data)
        np.testing.assert_allclose(got, p.data, tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind in OPTIMIZERS
        for dtype in TIGHT
        if dtype != np.float16 or not kind.startswith("adam")  # Adam takes no halves
    ],
)
@pytest.mark.parametrize("in_bucket", [True, False])
def test_steps_are_those_of_the_host(
    xp: ModuleType, kind: str, dtype: Any, in_bucket: bool
) -> None:
    host, device = make(dtype, np.asarray), make(dtype, xp.asarray)
    mine, reference = OPTIMIZERS[kind](device.values()), OPTIMIZERS[kind](host.values())
    for step in range(4):
        if in_bucket and step in (0, 2):  # the second time, the buckets are laid out anew
            bucket(xp, device, dtype)
        for params, optimizer in ((device, mine), (host, reference)):
            add_gradients(params, step, without="c" if step == 1 else "")
            optimizer.step()
    check_same(device, host, TIGHT[dtype])
    for key, value in reference.state_dict().items():
        got = mine.state_dict()[key]
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(to_host(got), value, TIGHT[dtype], TIGHT[dtype])
        else:
            assert got == value


def test_a_bucket_is_one_kernel(xp: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(rule: Any, w: Any, g: Any, state: Any, *, lr: float, t: int) -> None:
        calls.append(w.size)
        apply_rule(rule, w, g, state, lr=lr, t=t)

    monkeypatch.setattr(mpidist.optim.fused, "apply_rule", counting)
    params = make(np.float32, xp.asarray)
    flat = bucket(xp, params, np.float32)
    optimizer = AdamW(params.values())
    whole = flat.data.size - 1  # without the padding behind the last part, of 15
    for step, without, expected in ((0, "", [whole]), (1, "b", 2), (2, "", 3), (3, "c", 3)):
        add_gradients(params, step, without=without)
        calls.clear()
        optimizer.step()
        if isinstance(expected, list):
            assert calls == expected
        else:  # before and behind the one without; then that one has its own count of updates
            assert len(calls) == expected
    assert params["a"].data.base is params["e"].data.base


def test_a_parameter_given_new_memory_is_updated_there(xp: ModuleType) -> None:
    host, device = make(np.float64, np.asarray), make(np.float64, xp.asarray)
    bucket(xp, device, np.float64)
    mine, reference = SGD(device.values(), lr=0.1), SGD(host.values(), lr=0.1)
    for step in range(2):
        for params, optimizer in ((device, mine), (host, reference)):
            params["a"].data = params["a"].data * 2.0
            add_gradients(params, step)
            optimizer.step()
    check_same(device, host, 1e-12)


def test_a_rule_of_ones_own_runs_on_the_device(xp: ModuleType) -> None:
    class Sign:
        slots = ("seen",)

        def apply(self, w: Any, g: Any, state: Any, scratch: Any, *, lr: float, t: int) -> None:
            np.sign(g, out=scratch[0])
            scratch[0] *= lr * t
            w -= scratch[0]
            state["seen"] += 1

    host, device = make(np.float64, np.asarray), make(np.float64, xp.asarray)
    for params in (device, host):
        add_gradients(params, 0)
        optimizer = Optimizer(params.values(), rule=Sign(), lr=0.5)
        optimizer.step()
        optimizer.step()
    check_same(device, host, 1e-12)


def test_a_state_is_loaded_across(xp: ModuleType) -> None:
    host, device = make(np.float32, np.asarray), make(np.float32, xp.asarray)
    add_gradients(host, 0)
    there, here = AdamW(device.values()), AdamW(host.values())
    here.step()
    there.load_state_dict(here.state_dict())
    again = AdamW(make(np.float32, np.asarray).values())
    again.load_state_dict(there.state_dict())
    for key, value in here.state_dict().items():
        assert np.array_equal(again.state_dict()[key], value), key


def test_a_model_moved_too_late_is_refused(xp: ModuleType) -> None:
    p = Parameter(np.ones(3), name="w")
    optimizer = AdamW([p])
    p.move(xp.asarray)
    p.add_grad(xp.ones(3))
    with pytest.raises(ValueError, match="'w', its gradient and its state do not all lie"):
        optimizer.step()
