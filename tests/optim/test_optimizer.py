"""Optimizers against torch, where it is installed, and against the formulas in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mpidist._types import Array
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.nn import Linear, ReLU, Sequential
from mpidist.nn.parameter import Parameter
from mpidist.optim import SGD, Adam, AdamRule, AdamW, Optimizer, WarmupCosine
from mpidist.optim.optimizer import _BLOCK
from mpidist.parallel import clip_grad_norm

STEPS = 12
# More than one block, a 0-d one, an empty one, and a block that is not full.
SHAPES = {"w": (5, 3), "scale": (), "none": (0, 4), "long": (_BLOCK + 7,)}
SETTINGS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (SGD, {"lr": 0.1, "weight_decay": 0.01}),
    (Adam, {"lr": 0.01}),
    (Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
]
each_setting = pytest.mark.parametrize(
    ("cls", "options"), SETTINGS, ids=[f"{c.__name__}-{i}" for i, (c, _) in enumerate(SETTINGS)]
)


def make_parameters(seed: int = 0) -> dict[str, Parameter]:
    rng = np.random.default_rng(seed)
    return {name: Parameter(np.asarray(rng.normal(size=s))) for name, s in SHAPES.items()}


def gradients(steps: int = STEPS) -> Iterator[dict[str, Array]]:
    """Yield a gradient per parameter and step; "w" is unused in every third step."""
    rng = np.random.default_rng(1)
    for step in range(steps):
        grads = {name: np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
        if step % 3 == 2:
            del grads["w"]
        yield grads


def advance(optimizer: Optimizer, params: dict[str, Parameter], grads: dict[str, Array]) -> None:
    optimizer.zero_grad()
    for name, grad in grads.items():
        params[name].add_grad(grad)
    optimizer.step()


def assert_equal(params: dict[str, Parameter], expected: dict[str, Any]) -> None:
    for name, p in params.items():
        np.testing.assert_allclose(p.data, expected[name], rtol=1e-12, atol=1e-14, err_msg=name)


@each_setting
def test_equals_torch(cls: type[Optimizer], options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    params = make_parameters()
    theirs = {n: torch.nn.Parameter(torch.tensor(p.data.copy())) for n, p in params.items()}
    reference = getattr(torch.optim, cls.__name__)(list(theirs.values()), **options)
    optimizer = cls(params.items(), **options)
    for grads in gradients():
        advance(optimizer, params, grads)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name]) if name in grads else None
        reference.step()
        assert_equal(params, {name: p.detach().numpy() for name, p in theirs.items()})


def plain_sgd(o: dict[str, Any], lr: float, w: Array, s: dict[str, Any], g: Array) -> Any:
    g = g + o.get("weight_decay", 0.0) * w
    s["v"] = o.get("momentum", 0.0) * s.get("v", 0.0) + g
    return w - lr * (g + o["momentum"] * s["v"] if o.get("nesterov") else s["v"])


def plain_adam(o: dict[str, Any], lr: float, w: Array, s: dict[str, Any], g: Array) -> Any:
    b1, b2 = o.get("betas", (0.9, 0.999))
    g = g + o.get("weight_decay", 0.0) * w
    s["t"] = s.get("t", 0) + 1
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["s"] = b2 * s.get("s", 0.0) + (1 - b2) * g**2
    mean, square = s["m"] / (1 - b1 ** s["t"]), s["s"] / (1 - b2 ** s["t"])
    return w - lr * mean / (np.sqrt(square) + o.get("eps", 1e-8))


def plain_adamw(o: dict[str, Any], lr: float, w: Array, s: dict[str, Any], g: Array) -> Any:
    shrunk = w - lr * o.get("weight_decay", 1e-2) * w
    return plain_adam({**o, "weight_decay": 0.0}, lr, shrunk, s, g)


PLAIN: dict[type[Optimizer], Callable[..., Any]] = {
    SGD: plain_sgd,
    Adam: plain_adam,
    AdamW: plain_adamw,
}


@each_setting
def test_equals_plain_formulas_under_a_schedule(
    cls: type[Optimizer], options: dict[str, Any]
) -> None:
    params = make_parameters()
    expected = {name: p.data.copy() for name, p in params.items()}
    states: dict[str, dict[str, Any]] = {name: {} for name in params}
    rate = WarmupCosine(options["lr"], warmup_steps=3, total_steps=10, final=0.001)
    optimizer = cls(params.items(), **{**options, "lr": rate})
    for step, grads in enumerate(gradients()):
        assert optimizer.lr == rate(step)
        advance(optimizer, params, grads)
        for name, grad in grads.items():
            expected[name] = PLAIN[cls](options, rate(step), expected[name], states[name], grad)
        assert_equal(params, expected)
    assert optimizer.step_count == STEPS


def test_a_strided_parameter_is_updated_where_it_lies() -> None:
    storage = np.arange(12.0).reshape(3, 4)
    p = Parameter(storage.T)
    optimizer = Adam([("w", p)], lr=0.5)
    p.add_grad(np.ones((4, 3)))
    optimizer.step()
    np.testing.assert_allclose(storage, np.arange(12.0).reshape(3, 4) - 0.5, rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keeps_memory_and_dtype(dtype: type[np.floating[Any]]) -> None:
    p = Parameter(np.ones(3, dtype))
    data = p.data
    optimizer = AdamW([("w", p)], lr=0.1)
    p.add_grad(np.ones(3, dtype))
    optimizer.step()
    assert p.data is data
    assert data.dtype == dtype
    assert optimizer.state_dict()["w/mean"].dtype == dtype
    assert data[0] < 1.0


def test_a_parameter_without_gradient_keeps_value_and_state() -> None:
    params = make_parameters()
    before = params["w"].data.copy()
    optimizer = Adam(params.items(), lr=0.1, weight_decay=0.1)
    advance(optimizer, params, {"long": np.ones(SHAPES["long"])})
    state = optimizer.state_dict()
    np.testing.assert_array_equal(params["w"].data, before)
    assert (state["step"], state["w/updates"], state["long/updates"]) == (1, 0, 1)
    assert not state["w/mean"].any()


@each_setting
def test_resumes_bit_by_bit(cls: type[Optimizer], options: dict[str, Any]) -> None:
    params, history = make_parameters(), list(gradients())
    optimizer = cls(params.items(), **options)
    for grads in history[:5]:
        advance(optimizer, params, grads)
    saved = {k: v.copy() if hasattr(v, "copy") else v for k, v in optimizer.state_dict().items()}
    resumed = {name: Parameter(p.data.copy()) for name, p in params.items()}
    other = cls(resumed.items(), **options)
    other.load_state_dict(saved)
    for grads in history[5:]:
        advance(optimizer, params, grads)
        advance(other, resumed, grads)
    for name, p in params.items():
        np.testing.assert_array_equal(p.data, resumed[name].data)
    assert other.step_count == STEPS


def test_state_of_another_kind_or_shape_is_refused_and_changes_nothing() -> None:
    p = Parameter(np.zeros(3))
    optimizer = Adam([("w", p)])
    state = optimizer.state_dict()
    wrong_shape = {**state, "step": 7, "w/mean": np.zeros(4)}
    with pytest.raises(ValueError, match=r"'w/mean' has shape \(4,\), expected \(3,\)"):
        optimizer.load_state_dict(wrong_shape)
    with pytest.raises(ValueError, match="this is Adam, the state is of 'AdamW'"):
        optimizer.load_state_dict(AdamW([("w", p)]).state_dict())
    with pytest.raises(ValueError, match=r"missing .*w/mean.* not known here .*u/mean"):
        optimizer.load_state_dict(Adam([("u", p)]).state_dict())
    assert optimizer.step_count == 0


def test_state_of_another_dtype_is_refused_and_changes_nothing() -> None:
    p = Parameter(np.zeros(3, np.float32))
    optimizer = Adam([("w", p)])
    wide = Adam([("w", Parameter(np.zeros(3)))])
    wrong = {**wide.state_dict(), "step": 7}
    with pytest.raises(ValueError, match="'w/mean' has dtype float64, expected float32"):
        optimizer.load_state_dict(wrong)
    assert optimizer.step_count == 0
    # Counts may come back from a file as arrays without axes.
    optimizer.load_state_dict({**optimizer.state_dict(), "step": np.array(7)})
    assert optimizer.step_count == 7


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_adam_refuses_halves(cls: type[Adam | AdamW], dtype: Any) -> None:
    # An element without gradient would become NaN: eps is 0 in float16.
    params = [("a", Parameter(np.zeros(2))), ("w", Parameter(np.zeros(2, dtype)))]
    message = f"{cls.__name__}: parameter 'w' is {np.dtype(dtype)}.*float32"
    with pytest.raises(ValueError, match=message):
        cls(params)
    with pytest.raises(ValueError, match="'w'"):
        Optimizer(params, rule=AdamRule(), lr=0.1)


def test_adam_leaves_a_value_alone_whose_gradient_is_zero() -> None:
    p = Parameter(np.ones(2, np.float32))
    optimizer = Adam([("w", p)], lr=0.5)
    p.add_grad(np.array([0, 1], np.float32))
    optimizer.step()
    np.testing.assert_allclose(p.data, [1, 0.5], rtol=1e-6)


def test_bare_parameters_are_named() -> None:
    optimizer = SGD([Parameter(np.zeros(1)), Parameter(np.zeros(1))], lr=0.1)
    assert {"parameter0/updates", "parameter1/updates"} <= optimizer.state_dict().keys()


def test_parameters_that_come_twice_or_not_at_all_are_refused() -> None:
    p = Parameter(np.zeros(1))
    with pytest.raises(ValueError, match="'b' comes twice"):
        SGD([("a", p), ("b", p)], lr=0.1)
    with pytest.raises(ValueError, match="'a' comes twice"):
        SGD([("a", p), ("a", Parameter(np.zeros(1)))], lr=0.1)
    with pytest.raises(ValueError, match="no parameter"):
        SGD([], lr=0.1)


def model() -> Sequential:
    return Sequential(Linear(2, 3, rng=0), ReLU(), Linear(3, 1, rng=1))


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_a_model_is_trained_whole(make: Any) -> None:
    trained = model()
    names = [name for name, _ in trained.named_parameters()]
    for given in (trained, trained.named_parameters(), dict(trained.named_parameters())):
        state = make(given, lr=0.1).state_dict()
        assert [key.partition("/")[0] for key in state if key.endswith("/updates")] == names


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda m: m.parameters, "got parameters; call it"),
        (lambda m: m.layers[0].weight, "got one Parameter; put it into a list"),
        (lambda m: m.state_dict(), "got dict of ndarray"),
        (lambda m: m.layers, "got tuple of Linear"),
        (lambda m: [{"params": m.parameters()}], "got list of dict"),
        (lambda m: 3, "got int"),
    ],
)
def test_what_is_no_parameter_is_refused_with_what_to_write(given: Any, told: str) -> None:
    expected = "expected a model, model.parameters() or model.named_parameters(), "
    for call in (SGD, clip_grad_norm):
        with pytest.raises(TypeError) as raised:
            call(given(model()), 0.1) if call is clip_grad_norm else call(given(model()), lr=0.1)
        assert str(raised.value) == f"{call.__name__}: {expected}{told}"


def test_a_model_that_has_grown_is_refused_at_the_first_step() -> None:
    grown = model()
    optimizer = SGD(grown, lr=0.1)
    grown.head = Linear(1, 1, rng=2)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"SGD\.step: parameter 'head\.weight' has come to the"):
        optimizer.step()
    assert optimizer.step_count == 0
    exchanged = model()
    optimizer = SGD(exchanged, lr=0.1)
    exchanged.layers[0].weight = Parameter(np.ones((3, 2)))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has come to the model"):
        optimizer.step()


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "0.1", None])
def test_a_learning_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="SGD: expected a learning rate from 0 on, got"):
        SGD(model(), lr=rate)
    optimizer = SGD(model(), lr=lambda step: 0.1 if step == 0 else rate)
    optimizer.step()
    with pytest.raises(ValueError, match=r"SGD\.step 1: expected a learning rate from 0 on, got"):
        optimizer.step()
    assert optimizer.step_count == 1


def test_an_iterator_that_was_used_up_clips_nothing_silently() -> None:
    parameters = model().parameters()
    assert clip_grad_norm(parameters, 1.0) == 0.0
    with pytest.raises(ValueError, match="clip_grad_norm: got no parameter; an iterator can be"):
        clip_grad_norm(parameters, 1.0)
    assert clip_grad_norm([], 1.0) == 0.0


def test_a_changed_shape_is_refused() -> None:
    p = Parameter(np.zeros(3))
    optimizer = SGD([("w", p)], lr=0.1, momentum=0.9)
    p.data = np.zeros(4)
    p.attach(np.zeros(4))
    p.add_grad(np.zeros(4))
    with pytest.raises(ValueError, match=r"'w' has shape \(4,\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD(p, lr=0.1, momentum=1.0), "momentum"),
        (lambda p: SGD(p, lr=0.1, nesterov=True), "nesterov"),
        (lambda p: SGD(p, lr=0.1, weight_decay=-1.0), "weight_decay"),
        (lambda p: Adam(p, betas=(1.0, 0.9)), "beta1"),
        (lambda p: Adam(p, betas=(0.9, -0.1)), "beta2"),
        (lambda p: AdamW(p, eps=float("nan")), "eps"),
        (lambda p: AdamW(p, weight_decay=-0.1), "decay"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([("w", Parameter(np.zeros(1)))])
