"""Optimizers: which parameters, how many steps, what state; the arithmetic is in rules.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import HALVES, array_namespace, is_device, like_device
from mpidist.arrays.shards import check_held, copy_in
from mpidist.nn.names import with_present_names
from mpidist.nn.parameter import HasParameters, Parameter, Parameters, named_list
from mpidist.observe.regions import region
from mpidist.optim.fused import FusedUpdates
from mpidist.optim.rules import AdamRule, SGDRule, UpdateRule
from mpidist.optim.schedule import Schedule

# Elements that are updated at once: a parameter, its gradient and its state of this length stay in
# a core's cache over the dozen passes of a rule, and the scratch stays small.
_BLOCK = 1 << 15


class Optimizer:
    """Apply an update rule to parameters, in place.

    Parameters
    ----------
    params : Module, DDP, or iterable of Parameter or of (str, Parameter)
        What to update: all parameters of a model, or these; those that are not trainable are left
        out. The names are the keys of `state_dict`; a bare parameter gives its own.
    rule : UpdateRule
        The arithmetic of one update.
    lr : float or Schedule
        Learning rate, or a function from the number of steps already made to it.

    Raises
    ------
    TypeError
        If `params` is something else.
    ValueError
        If there is no parameter, a name or a parameter appears twice, `lr` is negative or not
        finite, or `rule` is an `AdamRule` and a parameter is float16 or bfloat16; if it
        `needs_whole`, and a parameter is a part.

    Notes
    -----
    Purely local. A parameter whose gradient is None is skipped: it keeps its value, its state and
    its own count of updates. Ranks that start with equal parameters, and hold equal gradients in
    each step, stay equal bit by bit.

    Parameters on a device, all or some, are updated by one kernel per bucket of a `DDP`, or one per
    parameter where gradients lie in no bucket. The first step moves those of a bucket, and their
    state, into flat memory: `Parameter.data` is another array from then on.
    """

    needs_whole: ClassVar[bool] = False
    """Whether an update needs all elements of a parameter, as those of matrices do (Muon, Shampoo).
    Not with an `UpdateRule`, which has a block at a time."""

    def __init__(
        self,
        params: Parameters,
        *,
        rule: UpdateRule,
        lr: float | Schedule,
    ) -> None:
        self._params = _by_name(params, type(self).__name__)
        self._model = params if isinstance(params, HasParameters) else None
        if isinstance(rule, AdamRule):
            _refuse_halves(type(self).__name__, self._params)
        if self.needs_whole:
            _refuse_parts(type(self).__name__, self._params)
        self._rule = rule
        self._lr = lr if callable(lr) else _checked_rate(type(self).__name__, lr)
        self._steps = 0
        self._updates = dict.fromkeys(self._params, 0)
        self._state: dict[str, dict[str, Array]] = {
            name: {slot: array_namespace(p.data).zeros_like(p.data) for slot in rule.slots}
            for name, p in self._params.items()
        }
        self._fused = FusedUpdates(rule, self._params, self._state)

    def __repr__(self) -> str:
        """Return the kind, the rule and the learning rate of the next step."""
        rule = type(self._rule).__name__
        if is_dataclass(self._rule):
            values = {f.name: getattr(self._rule, f.name) for f in fields(self._rule)}
            # The repr of other values may hold an address, which differs between processes.
            plain = {k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))}
            rule += f"({', '.join(f'{name}={value!r}' for name, value in plain.items())})"
        return f"{type(self).__name__} of {len(self._params)} parameters, {rule}, lr={self.lr!r}"

    @property
    def step_count(self) -> int:
        """Number of steps made so far."""
        return self._steps

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr(self._steps) if callable(self._lr) else self._lr

    def parameters(self) -> dict[str, Parameter]:
        """Return the parameters that it updates, under the names that its state has."""
        return dict(self._params)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters; touches no array."""
        for p in self._params.values():
            p.zero_grad()

    def step(self) -> None:
        """Update every parameter that has a gradient.

        Raises
        ------
        ValueError
            At the first step, if the optimizer was made of a model that has other parameters now.
            If a gradient or a parameter has lost the shape that the state was made for, or lies
            elsewhere.

        Notes
        -----
        Local. Temporaries: two blocks of 32,768 elements on the host, whatever the sizes of the
        parameters; none on a device, where it does not block the host either.
        """
        if self._model is not None:
            self._check_complete(self._model)
            self._model = None
        with region("optimizer"):
            self._update()
        self._steps += 1

    def _check_complete(self, model: HasParameters) -> None:
        """Refuse a model that has been given other parameters since; once, as it takes time."""
        own = set(map(id, self._params.values()))
        for name, parameter in model.named_parameters():
            if parameter.trainable and id(parameter) not in own:
                raise ValueError(
                    f"{type(self).__name__}.step: parameter {name!r} has come to the model after "
                    "the optimizer was made, and would not be trained; make the optimizer last"
                )

    def _update(self) -> None:
        lr = _checked_rate(f"{type(self).__name__}.step {self._steps}", self.lr)
        on_device: dict[str, tuple[Array, int]] = {}
        for name, p in self._params.items():
            grad = p.grad  # once: it checks that no reduction is under way
            if grad is None:
                continue
            data, state = p.data, self._state[name]
            there = self._check(name, data, grad, state)
            t = self._updates[name] = self._updates[name] + 1
            if there:
                on_device[name] = grad, t
                continue
            for (w, g, *slots), scratch in _blocks(data, grad, *state.values()):
                self._rule.apply(w, g, dict(zip(state, slots, strict=True)), scratch, lr=lr, t=t)
        self._fused.update(on_device, lr)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, as one flat mapping.

        Returns
        -------
        dict of str to (str, int, Array or ShardedArray)
            ``"kind"``, ``"step"`` and, per parameter, ``"<name>/updates"`` and one
            ``"<name>/<slot>"`` per state array, a part of the whole where the parameter is one.
            Arrays are the living ones, not copies. The learning rate and the rule's numbers are not
            part of it: the program sets them.
        """
        state: dict[str, Any] = {"kind": type(self).__name__, "step": self._steps}
        for name, slots in self._state.items():
            state[f"{name}/updates"] = self._updates[name]
            part = self._params[name].part
            for slot, array in slots.items():
                state[f"{name}/{slot}"] = array if part is None else part.sharded(array)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` gave; arrays are copied in.

        Parameters
        ----------
        state : mapping
            As returned by `state_dict` of an optimizer of the same class, names, shapes and dtypes.

        Raises
        ------
        ValueError
            If class, names, shapes or dtypes differ; nothing has been changed then.
        """
        own = self.state_dict()
        state = with_present_names(state, own)
        check_same_state(own, state)
        check_held("load_state_dict", own, state)
        self._steps = int(state["step"])
        for name, slots in self._state.items():
            self._updates[name] = int(state[f"{name}/updates"])
            for slot, array in slots.items():
                if self._params[name].part is None:
                    array[...] = like_device(array, state[f"{name}/{slot}"])
        copy_in(own, state)

    def state_arrays(self) -> list[Array]:
        """Return the arrays of the state, the living ones, in the order of `move_state`."""
        return [array for slots in self._state.values() for array in slots.values()]

    def move_state(self, to: Callable[[Array], Array]) -> None:
        """Replace each array of the state by what a function makes of it.

        Parameters
        ----------
        to : callable
            From an array to one of the same shape, dtype and values, in other memory.

        Notes
        -----
        Local. For strategies that keep the state elsewhere.
        """
        for slots in self._state.values():
            slots.update({slot: to(array) for slot, array in slots.items()})

    def _check(self, name: str, data: Array, grad: Array, state: Mapping[str, Array]) -> bool:
        """Return whether a parameter is on a device; ValueError unless all of it fits together."""
        operation = f"{type(self).__name__}.step"
        if grad.shape != data.shape or any(s.shape != data.shape for s in state.values()):
            shapes = {slot: array.shape for slot, array in state.items()}
            raise ValueError(
                f"{operation}: parameter {name!r} has shape {data.shape}, its gradient "
                f"{grad.shape}, its state {shapes}; make the optimizer after the model has its "
                "final shapes"
            )
        there = is_device(data)
        if is_device(grad) is not there or (there and not all(map(is_device, state.values()))):
            raise ValueError(
                f"{operation}: parameter {name!r}, its gradient and its state do not all lie on "
                "the host or all on a device; call Module.to before the optimizer and the DDP are "
                "made"
            )
        return there


class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Parameters
    ----------
    params : Module, DDP, or iterable of Parameter or of (str, Parameter)
        What to update: all trainable parameters of a model, or of these.
    lr : float or Schedule
        Learning rate, or a function from the number of steps made to it.
    momentum : float, optional
        Share of the velocity that is kept per step, in [0, 1).
    nesterov : bool, optional
        Look one step of momentum ahead.
    weight_decay : float, optional
        Added to the gradient as `weight_decay * w`.

    Raises
    ------
    ValueError
        If a number is out of its range, or a name or a parameter appears twice.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton (2013), On the importance of initialization and momentum in
    deep learning, section 2.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float | Schedule,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, rule=SGDRule(momentum, nesterov, weight_decay), lr=lr)


class Adam(Optimizer):
    """Adam; weight decay, if any, is added to the gradient.

    Parameters
    ----------
    params : Module, DDP, or iterable of Parameter or of (str, Parameter)
        What to update: all trainable parameters of a model, or of these.
    lr : float or Schedule, optional
        Learning rate, or a function from the number of steps made to it.
    betas : (float, float), optional
        Decay of the running means of the gradient and of its square, in [0, 1).
    eps : float, optional
        Added to the root of the mean square.
    weight_decay : float, optional
        Added to the gradient as `weight_decay * w`.

    Raises
    ------
    ValueError
        If a number is out of its range, a name or a parameter appears twice, or a parameter is
        float16 or bfloat16: keep it in float32.

    References
    ----------
    Kingma, Ba (2015), Adam: a method for stochastic optimization, algorithm 1.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, rule=AdamRule(*betas, eps, l2=weight_decay), lr=lr)


class AdamW(Optimizer):
    """Adam with weight decay taken off the parameter directly.

    Parameters
    ----------
    params : Module, DDP, or iterable of Parameter or of (str, Parameter)
        What to update: all trainable parameters of a model, or of these.
    lr : float or Schedule, optional
        Learning rate, or a function from the number of steps made to it.
    betas : (float, float), optional
        Decay of the running means of the gradient and of its square, in [0, 1).
    eps : float, optional
        Added to the root of the mean square.
    weight_decay : float, optional
        The share `lr * weight_decay` of each value is removed per step.

    Raises
    ------
    ValueError
        If a number is out of its range, a name or a parameter appears twice, or a parameter is
        float16 or bfloat16: keep it in float32.

    References
    ----------
    Loshchilov, Hutter (2019), Decoupled weight decay regularization, algorithm 2.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, rule=AdamRule(*betas, eps, decay=weight_decay), lr=lr)


def _by_name(params: Parameters, optimizer: str) -> dict[str, Parameter]:
    named: dict[str, Parameter] = {}
    seen: set[int] = set()
    for position, (given, p) in enumerate(named_list(params, optimizer)):
        if not p.trainable:
            continue
        name = given or f"parameter{position}"
        if name in named or id(p) in seen:
            raise ValueError(
                f"Optimizer: parameter {name!r} comes twice; give each one once and with its own "
                "name, as model.named_parameters() does"
            )
        named[name] = p
        seen.add(id(p))
    if not named:
        raise ValueError("Optimizer: got no parameter; an iterator can be used only once")
    return named


def _checked_rate(caller: str, lr: Any) -> float:
    try:
        right = 0 <= lr < math.inf
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{caller}: expected a learning rate from 0 on, got {lr!r}")
    return float(lr)


def _refuse_parts(optimizer: str, params: Mapping[str, Parameter]) -> None:
    """Raise if a parameter has some elements of a whole one, but neither all nor none."""
    for name, p in params.items():
        if p.part is not None and p.size not in (0, math.prod(p.part.shape)):
            raise ValueError(
                f"{optimizer} needs whole parameters, and {name!r} is a part, {p.shape}, of one of "
                f"shape {p.part.shape}; make the model FSDP(model, group, cut=Cut.PARAMETERS), or "
                "leave it out of the plan of parallelize"
            )


def _refuse_halves(optimizer: str, params: Mapping[str, Parameter]) -> None:
    for name, p in params.items():
        if p.dtype in HALVES:
            # The usual eps of 1e-8 is 0 in float16, and the mean square of a gradient below 2e-4
            # too: 0 / 0. In bfloat16 most steps are less than half a unit of the last place.
            raise ValueError(
                f"{optimizer}: parameter {name!r} is {p.dtype}, which is too coarse for running "
                "means of squares; keep the parameters in float32 and cast for the forward pass"
            )


def _blocks(*arrays: Array) -> Iterator[tuple[tuple[Array, ...], Array]]:
    """Cut host arrays of one shape into (their blocks, scratch of shape (2, *block))."""
    first = arrays[0]
    if not all(a.flags.c_contiguous for a in arrays):
        # A strided array has no flat view to cut.
        yield arrays, np.empty((2, *first.shape), first.dtype)
        return
    flat = [a.reshape(-1) for a in arrays]
    scratch = np.empty((2, min(first.size, _BLOCK)), first.dtype)
    for start in range(0, first.size, _BLOCK):
        block = tuple(a[start : start + _BLOCK] for a in flat)
        yield block, scratch[:, : block[0].size]


def check_same_state(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state has the kind, names, shapes and dtypes of this one."""
    if theirs.get("kind") != own["kind"]:
        raise ValueError(
            f"load_state_dict: this is {own['kind']}, the state is of {theirs.get('kind')!r}"
        )
    if own.keys() != theirs.keys():
        missing = sorted(own.keys() - theirs.keys())
        unknown = sorted(theirs.keys() - own.keys())
        raise ValueError(f"load_state_dict: missing {missing[:5]}, not known here {unknown[:5]}")
    for key, value in own.items():
        shape = getattr(value, "shape", ())
        got = getattr(theirs[key], "shape", ())
        if got != shape:
            raise ValueError(f"load_state_dict: {key!r} has shape {got}, expected {shape}")
        dtype, got = getattr(value, "dtype", None), getattr(theirs[key], "dtype", None)
        if dtype is not None and got != dtype:  # a count may have become an array on its way
            raise ValueError(
                f"load_state_dict: {key!r} has dtype {got}, expected {dtype}; cast the state if "
                "losing precision is meant"
            )
