"""The protocol: names, ties, uses, labels, state."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import types
from typing import Any

import numpy as np
import pytest

from mpidist.nn import (
    GELU,
    BatchNorm2d,
    Context,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    Mode,
    Module,
    Parameter,
    Recompute,
    ReLU,
    Residual,
    Sequential,
    count_uses,
)
from mpidist.testing.gradcheck import check_gradients, check_halves, gradients

TRAIN = Mode(training=True)


class TiedModel(Module):
    """Embedding and output share one table; the hidden layer is used twice."""

    def __init__(self) -> None:
        self.embed = Embedding(5, 4, rng=0, std=1.0, dtype=np.float64)
        self.hidden = Linear(4, 4, rng=1, dtype=np.float64)
        self.head = Linear(4, 5, rng=2, bias=False, dtype=np.float64)
        self.head.weight = self.embed.weight
        self._chain = Sequential(self.embed, self.hidden, ReLU(), self.hidden, self.head)

    def forward(self, x: np.ndarray, mode: Mode) -> tuple[np.ndarray, Context]:
        return self._chain.forward(x, mode)

    def backward(self, ctx: Context, dy: np.ndarray) -> np.ndarray:
        return self._chain.backward(ctx, dy)

    def backward_input(self, ctx: Context, dy: np.ndarray) -> tuple[np.ndarray, Any]:
        return self._chain.backward_input(ctx, dy)

    def backward_weight(self, wctx: Any) -> None:
        self._chain.backward_weight(wctx)


class Switch(Module):
    """Runs one of several branches."""

    def __init__(self, *branches: Module) -> None:
        self.branches = list(branches)
        self.chosen = 0

    def forward(self, x: np.ndarray, mode: Mode) -> tuple[np.ndarray, Context]:
        y, ctx = self.branches[self.chosen].forward(x, mode)
        return y, Context((self.chosen, ctx), ctx.uses)

    def backward_input(self, ctx: Context, dy: np.ndarray) -> tuple[np.ndarray, Any]:
        chosen, inner = ctx.saved
        dx, wctx = self.branches[chosen].backward_input(inner, dy)
        return dx, (chosen, wctx)

    def backward_weight(self, wctx: Any) -> None:
        chosen, inner = wctx
        self.branches[chosen].backward_weight(inner)


def _image_model(seed: int = 0) -> Sequential:
    rng = np.random.default_rng(seed)
    return Sequential(
        Conv2d(1, 2, 3, rng=rng),
        Residual(BatchNorm2d(2)),
        Flatten(),
        Recompute(Linear(8, 3, rng=rng)),
    )


def test_names_follow_the_tree_in_order_of_definition():
    model = _image_model()
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.inner.weight",
        "1.inner.bias",
        "3.weight",
        "3.bias",
    ]
    assert [name for name, _ in model.named_buffers()] == [
        "1.inner.running_mean",
        "1.inner.running_var",
    ]
    assert [name for name, _ in model.named_modules()][:4] == ["", "0", "1", "1.inner"]
    assert all(p.name == name for name, p in model.named_parameters())
    assert list(model.parameters()) == [p for _, p in model.named_parameters()]


def test_modules_in_lists_are_found_by_number():
    model = Switch(Linear(2, 2, rng=0), ReLU(), Linear(2, 2, rng=1, bias=False))
    assert [name for name, _ in model.named_parameters()] == [
        "branches.0.weight",
        "branches.0.bias",
        "branches.2.weight",
    ]


class Heads(Module):
    """Runs the head that it is told, and scales by what a list in a dict holds."""

    def __init__(self, heads: dict[Any, Module], scale: np.ndarray | None = None) -> None:
        self.heads = heads
        self.factors = {"all": [Parameter(np.ones(2) if scale is None else scale)]}
        self.chosen = next(iter(heads))

    def forward(self, x: np.ndarray, mode: Mode) -> tuple[np.ndarray, Context]:
        y, ctx = self.heads[self.chosen].forward(x, mode)
        factor = self.factors["all"][0]
        return y * factor.data, Context((y, ctx), count_uses(ctx, factor))

    def backward_input(self, ctx: Context, dy: np.ndarray) -> tuple[np.ndarray, Any]:
        y, inner = ctx.saved
        dx, wctx = self.heads[self.chosen].backward_input(inner, dy * self.factors["all"][0].data)
        return dx, (wctx, y, dy)

    def backward_weight(self, wctx: Any) -> None:
        inner, y, dy = wctx
        self.heads[self.chosen].backward_weight(inner)
        self.factors["all"][0].add_grad((y * dy).sum(axis=0))


def test_what_dicts_and_lists_hold_is_found_and_trained():
    heads = {"left": Linear(3, 2, rng=0, dtype=np.float64), 7: Dropout(0.5), "more": ReLU()}
    model = Heads(heads)
    assert [name for name, _ in model.named_modules()] == [
        "",
        "heads.left",
        "heads.7",
        "heads.more",
    ]
    names = ["factors.all.0", "heads.left.weight", "heads.left.bias"]
    assert [name for name, _ in model.named_parameters()] == names
    assert [p.name for p in model.parameters()] == names
    assert list(model.state_dict()) == names
    assert heads[7].layer_index == 1
    check_gradients(model, np.random.default_rng(0).normal(size=(2, 3)))


class Holder(ReLU):
    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


def linear() -> Linear:
    return Linear(2, 2, rng=0)


@pytest.mark.parametrize(
    ("held", "count"),
    [
        ([linear()], 2),
        ((ReLU(), [linear(), (linear(),)]), 4),
        ({"a": linear(), "b": {"c": [Parameter(np.ones(1))]}}, 3),
        (collections.deque([linear()]), 2),
        (types.MappingProxyType({"a": linear()}), 2),
        (collections.OrderedDict(a=linear()), 2),
        ([Parameter(np.ones(1)), Parameter(np.ones(1))], 2),
        ({"words": 1, "here": "text", (1, 2): 3}, 0),
        ({1, 2}, 0),
    ],
)
def test_containers_of_all_kinds(held: Any, count: int):
    model = Holder(held=held)
    assert len(list(model.parameters())) == count
    later = ReLU()
    later.held = held  # assigned after construction
    assert len(list(later.parameters())) == count


def test_a_list_that_holds_itself_is_walked_once():
    held: list[Any] = [linear()]
    held.append(held)
    assert len(list(Holder(held=held).parameters())) == 2


@pytest.mark.parametrize(
    ("held", "error", "told"),
    [
        ({linear()}, TypeError, "'held' holds a Linear in a set, .* would not be trained"),
        (frozenset([Parameter(np.ones(1))]), TypeError, "a Parameter in a set"),
        ([{"a": {ReLU()}}], TypeError, "a ReLU in a set"),
        ({linear(): 0.5}, TypeError, "a Linear in the keys of a dict"),
        (np.array([linear(), None], object), TypeError, "a Linear in an array"),
        ({(1, 2): linear()}, TypeError, r"the key \(1, 2\), of tuple.* use str or int"),
        ({"a.b": linear()}, ValueError, "the key 'a.b'"),
        ({"a/b": [linear()]}, ValueError, "the key 'a/b'"),
        ({"": linear()}, ValueError, "the key ''"),
        ({1: linear(), "1": linear()}, ValueError, "the key '1'"),
    ],
)
def test_what_has_no_name_is_refused_when_the_module_is_built(
    held: Any, error: type[Exception], told: str
):
    with pytest.raises(error, match=told):
        Holder(held=held)
    later = ReLU()
    later.held = held
    with pytest.raises(error, match=told):  # by a DDP or an optimizer
        list(later.named_parameters())


def test_a_set_may_hold_what_has_a_name_elsewhere():
    layer = linear()
    model = Holder(layer=layer, frozen={layer, layer.bias}, rates={layer.weight: 0.1})
    assert [name for name, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]


def test_a_subclass_of_a_sequence_may_hold_more():
    class Model(Sequential):
        def __init__(self) -> None:
            super().__init__(linear(), ReLU())
            self.head = linear()

    names = ["0.weight", "0.bias", "head.weight", "head.bias"]
    assert [name for name, _ in Model().named_parameters()] == names
    with pytest.raises(TypeError, match=r"layer 0 is a list, .* Sequential\(\*layers\)"):
        Sequential([linear(), ReLU()])


def test_a_module_shows_its_tree():
    model = _image_model()
    assert repr(model) == (
        "Sequential: 51 elements in 6 parameters, float32\n"
        "  0: Conv2d, 20; weight (2, 1, 3, 3), bias (2,)\n"
        "  1: Residual, 4\n"
        "    inner: BatchNorm2d, 4; weight (2,), bias (2,), buffer running_mean (2,), "
        "buffer running_var (2,)\n"
        "  2: Flatten\n"
        "  3: Recompute, 27\n"
        "    Linear, 27; weight (3, 8), bias (3,)"
    )
    tied = repr(TiedModel())
    assert tied.startswith("TiedModel: 40 elements in 3 parameters, float64\n")
    assert "  head: Linear, 20; weight = embed.weight\n" in tied
    assert "    1: Linear, the same as hidden\n" in tied
    assert repr(Heads({"x": ReLU()})) == (
        "Heads: 2 elements in 1 parameter, float64; factors.all.0 (2,)\n  heads.x: ReLU"
    )
    assert repr(object.__new__(Linear)) == "Linear: 0 elements in 0 parameters"  # half built


def test_calling_a_module_says_what_to_write():
    with pytest.raises(TypeError, match=r"y, ctx = model\.forward\(x, Mode\(.* EVAL\) to use it"):
        Flatten()(np.ones((1, 2)))


@pytest.mark.parametrize(
    ("name", "hint"), [("eval", "; here it is forward(x, EVAL): "), ("train", "Mode("), ("foo", "")]
)
def test_methods_of_other_packages_are_translated(name: str, hint: str):
    with pytest.raises(AttributeError) as raised:
        getattr(linear(), name)
    told = f"'Linear' object has no attribute '{name}'"
    assert str(raised.value).startswith(told)
    assert hint in str(raised.value)
    assert raised.value.name == name
    assert hint or str(raised.value) == told
    assert not hasattr(copy.deepcopy(linear()), name)


@pytest.mark.parametrize("layer", [linear(), ReLU(), GELU(), LayerNorm(2)])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2), (2,), (6,)])
def test_a_gradient_of_another_shape_is_refused(layer: Module, shape: tuple[int, ...]):
    _, ctx = layer.forward(np.ones((3, 2), np.float32), TRAIN)
    with pytest.raises(ValueError, match=r"backward: expected dy of the output's shape, \(3, 2\)"):
        layer.backward(ctx, np.ones(shape, np.float32))


def test_a_tied_parameter_is_listed_once_and_counted_per_use():
    model = TiedModel()
    names = [name for name, _ in model.named_parameters()]
    assert names == ["embed.weight", "hidden.weight", "hidden.bias"]
    _, ctx = model.forward(np.array([[0, 4]]), TRAIN)
    assert {p.name: n for p, n in ctx.uses.items()} == {
        "embed.weight": 2,
        "hidden.weight": 2,
        "hidden.bias": 2,
    }


def test_gradients_of_tied_layers_add_up():
    ids = np.array([[0, 3, 3], [1, 0, 4]])
    check_gradients(TiedModel(), ids)
    check_halves(TiedModel(), [ids, ids[:1]])


def test_uses_leave_out_the_branch_that_was_not_taken():
    model = Switch(Linear(3, 2, rng=0, dtype=np.float64), Linear(3, 2, rng=1, dtype=np.float64))
    x = np.random.default_rng(0).normal(size=(2, 3))
    for chosen in (0, 1):
        model.chosen = chosen
        _, ctx = model.forward(x, TRAIN)
        assert set(ctx.uses) == set(model.branches[chosen].parameters())
        assert set(ctx.uses.values()) == {1}
        check_gradients(model, x)
        assert all(p.grad is None for p in model.branches[1 - chosen].parameters())


def test_count_uses_adds_parameters_and_contexts():
    p, q = Parameter(np.zeros(1)), Parameter(np.zeros(1))
    assert count_uses(p, None, Context(None, {p: 2, q: 1}), Context(None)) == {p: 3, q: 1}


def test_a_backward_pass_beyond_the_announced_one_raises():
    model = Sequential(Linear(2, 2, rng=0), ReLU())
    y, ctx = model.forward(np.ones((1, 2), dtype=np.float32), TRAIN)
    ready = []
    for p, uses in ctx.uses.items():
        p.expect(uses, lambda q: ready.append(q.name))
    model.backward(ctx, np.ones_like(y))
    assert ready == ["0.weight", "0.bias"]
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        model.backward(ctx, np.ones_like(y))


def test_gradients_become_ready_from_the_last_layer_to_the_first():
    model = Sequential(Linear(2, 2, rng=0), Residual(Linear(2, 2, rng=1)), Linear(2, 2, rng=2))
    y, ctx = model.forward(np.ones((1, 2), dtype=np.float32), TRAIN)
    ready = []
    for p, uses in ctx.uses.items():
        p.expect(uses, lambda q: ready.append(q.name))
    model.backward(ctx, np.ones_like(y))
    assert [name.split(".")[0] for name in ready] == ["2", "2", "1", "1", "0", "0"]


def test_zero_grad_forgets_all_gradients():
    model = _image_model()
    gradients(model, np.ones((2, 1, 4, 4), dtype=np.float32))
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_layer_indices_number_the_leaves_of_the_whole_model():
    inner = Sequential(Dropout(0.1), Dropout(0.1))
    assert [layer.layer_index for layer in inner.layers] == [0, 1]
    Sequential(ReLU(), Residual(inner), Recompute(Dropout(0.1)))
    assert [layer.layer_index for layer in inner.layers] == [1, 2]


def test_a_part_of_a_model_can_be_labelled_as_in_the_whole():
    whole = Sequential(Linear(2, 2, rng=0), Dropout(0.5), Linear(2, 2, rng=1), Dropout(0.5))
    part = Sequential(*whole.layers[2:])
    assert part.layers[1].layer_index == 1
    part.relabel(prefix="stage", first_layer=2)
    assert part.layers[1].layer_index == 3
    assert part.layers[0].weight.name == "stage.0.weight"


def test_labelling_waits_for_the_outermost_constructor_and_keeps_signatures():
    class Late(Sequential):
        def __init__(self, size: int) -> None:
            super().__init__(ReLU())
            self.extra = Linear(size, size, rng=0)

        def named_children(self):
            yield "extra", self.extra

    assert Late(2).extra.weight.name == "extra.weight"
    assert list(inspect.signature(Late).parameters) == ["size"]


@dataclasses.dataclass(eq=False)
class Two(Module):
    """Runs two layers; its constructor is not in the class body."""

    first: Module
    second: Module

    def forward(self, x: np.ndarray, mode: Mode) -> tuple[np.ndarray, Context]:
        return Sequential.forward(self, x, mode)

    def backward_input(self, ctx: Context, dy: np.ndarray) -> tuple[np.ndarray, Any]:
        return Sequential.backward_input(self, ctx, dy)

    def backward_weight(self, wctx: Any) -> None:
        Sequential.backward_weight(self, wctx)

    @property
    def layers(self) -> tuple[Module, ...]:
        return self.first, self.second


def test_a_dataclass_is_labelled_too():
    model = Two(Dropout(0.5), Two(Linear(3, 3, rng=0), Dropout(0.5)))
    assert [model.first.layer_index, model.second.second.layer_index] == [0, 2]
    assert [p.name for p in model.parameters()] == ["second.first.weight", "second.first.bias"]
    assert list(inspect.signature(Two).parameters) == ["first", "second"]
    x = np.ones((2, 60))
    once, _ = Two(Dropout(0.5), ReLU()).forward(x, TRAIN)
    twice, _ = Two(Dropout(0.5), Dropout(0.5)).forward(x, TRAIN)
    assert ((once == 0) != (twice == 0)).any()  # with equal masks the second would add no zero


def test_a_constructor_that_is_replaced_later_labels_too(monkeypatch):
    class Net(Sequential):
        def __init__(self) -> None:
            super().__init__(Dropout(0.1), Dropout(0.1))

    init = Net.__init__

    def later(self) -> None:
        init(self)

    monkeypatch.setattr(Net, "__init__", later)
    assert [layer.layer_index for layer in Net().layers] == [0, 1]


def test_a_dataclass_is_labelled_after_what_a_class_that_is_no_module_adds():
    class Adds:
        def __post_init__(self) -> None:
            self.last = Linear(1, 1, rng=0)

    @dataclasses.dataclass(eq=False)
    class Mixed(Adds, Two):
        pass

    names = [p.name for p in Mixed(ReLU(), Linear(1, 1, rng=0)).parameters()]
    assert names == ["second.weight", "second.bias", "last.weight", "last.bias"]


def test_a_constructor_may_call_itself_copy_the_module_and_exchange_its_attributes():
    class Net(Sequential):
        def __init__(self, depth: int) -> None:
            if depth:
                self.__init__(depth - 1)  # type: ignore[misc]
                self.unfinished = copy.copy(self)
            else:
                super().__init__(Linear(1, 1, rng=0))
                self.__dict__ = dict(vars(self))

    net = Net(1)
    assert vars(net.unfinished).keys() < vars(net).keys()
    names = [p.name for p in net.layers[0].parameters()]
    assert names == ["0.weight", "0.bias"]


def test_a_frozen_dataclass_may_be_a_layer():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Frozen(ReLU):
        slope: float = 0.0

    assert Sequential(ReLU(), Frozen()).layers[1].layer_index == 1


def test_random_layers_added_to_a_built_model_must_be_labelled():
    model = Switch(Linear(2, 2, rng=0))
    model.branches += [Dropout(0.5), Dropout(0.5)]
    for use in (model.parameters, model.named_parameters, model.state_dict, model.zero_grad):
        with pytest.raises(RuntimeError, match=r"'branches\.1' and 'branches\.2'.*relabel\(\)"):
            use()
    model.relabel()
    assert len(list(model.parameters())) == 2
    assert [layer.layer_index for layer in model.branches] == [0, 1, 2]


def test_a_part_built_into_another_module_is_numbered_anew_and_that_is_noticed():
    whole = Sequential(Dropout(0.5), ReLU(), Dropout(0.5))
    Sequential(whole.layers[2])
    assert whole.layers[2].layer_index == 0
    with pytest.raises(RuntimeError, match="'0' and '2' have the same layer_index, 0"):
        whole.named_parameters()
    whole.relabel()
    assert [layer.layer_index for layer in whole.layers] == [0, 1, 2]


def test_a_constructor_may_list_what_it_has_so_far():
    class Counting(Sequential):
        def __init__(self) -> None:
            super().__init__(Dropout(0.1), Linear(2, 2, rng=0), Dropout(0.1))
            self.size = sum(p.size for p in self.parameters())

    assert Counting().size == 6


def test_a_copied_model_is_equal_and_independent():
    model = _image_model()
    twin = copy.deepcopy(model)
    assert [p.name for p in twin.parameters()] == [p.name for p in model.parameters()]
    next(twin.parameters()).data[...] = 0
    assert next(model.parameters()).data.any()


def test_state_goes_from_one_model_to_another_in_place():
    source, target = _image_model(0), _image_model(1)
    x = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)
    source.forward(x, TRAIN)
    arrays = target.state_dict()
    target.load_state_dict({name: a.copy() for name, a in source.state_dict().items()})
    assert list(arrays) == list(source.state_dict())
    for name, array in source.state_dict().items():
        np.testing.assert_array_equal(arrays[name], array)
        assert target.state_dict()[name] is arrays[name]
    assert next(target.parameters()).data is arrays["0.weight"]


def test_a_state_that_does_not_fit_is_refused_whole():
    model = _image_model()
    before = {name: a.copy() for name, a in model.state_dict().items()}
    state = {name: np.full_like(a, 9) for name, a in before.items()}
    del state["0.bias"]
    state["extra"] = np.zeros(1)
    state["0.weight"] = state["0.weight"][:1]
    state["1.inner.running_var"] = state["1.inner.running_var"].astype(np.float64)
    with pytest.raises(ValueError, match="nothing was changed") as caught:
        model.load_state_dict(state)
    text = str(caught.value)
    assert "0.bias: missing" in text
    assert "extra: not in this model" in text
    assert "0.weight: expected (2, 1, 3, 3) float32, got (1, 1, 3, 3) float32" in text
    assert "1.inner.running_var: expected (2,) float32, got (2,) float64" in text
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_modes_are_values():
    mode = Mode(training=True, seed=1, step=2, sample_offset=3)
    assert mode.shifted(4) == Mode(training=True, seed=1, step=2, sample_offset=7)
    assert mode.replayed() == Mode(True, 1, 2, 3, replay=True)
    assert mode.shifted(4).shifted(-4) == mode
