"""The state of a sharded optimizer: of this rank, and whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import ShardedArray
from mpidist.collectives import all_gather
from mpidist.nn.parameter import Parameter
from mpidist.optim import Optimizer

if TYPE_CHECKING:
    from mpidist.parallel.sharded.zero import ShardedOptimizer

__all__ = [
    "check_held",
    "check_names",
    "copy_in",
    "full_state_dict",
    "load_numbers",
    "merged_state",
    "parameter_of",
]


def full_state_dict(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """Gather a sharded optimizer's whole state on every rank.

    Parameters
    ----------
    optimizer : ShardedOptimizer
        Whose state.

    Returns
    -------
    dict of str to (str, int or Array)
        What `Optimizer.state_dict` of the same optimizer unsharded returns; new arrays. It can be
        loaded there, and by `ShardedOptimizer.load_state_dict` on any number of ranks.

    Notes
    -----
    Collective over the optimizer's group; blocks. An all_gather of the lengths of the slices, and
    one per array of state. Every rank must have memory for all of it: to write it to files, each
    rank writes its own `state_dict`.
    """
    shapes = {name: parameter.shape for name, parameter in optimizer.module.named_parameters()}
    state = merged_state(optimizer.optimizers)
    keys = [key for key, value in state.items() if isinstance(value, np.ndarray)]
    lengths = all_gather(np.array([state[key].size for key in keys], np.int64), optimizer.group)
    for key, counts in zip(keys, lengths.reshape(optimizer.group.size, -1).T.tolist(), strict=True):
        whole = all_gather(state[key], optimizer.group, counts=counts)
        state[key] = whole.reshape(shapes[parameter_of(key)])
    return state


def parameter_of(key: str) -> str:
    """Return the name of the parameter that an array of state belongs to."""
    return key.rpartition("/")[0]


def check_held(what: str, mine: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise unless a state of the same shapes has all that this rank holds.

    Parameters
    ----------
    what : str
        Who asks; named in the error.
    mine, state : mapping
        What this rank holds, and where it is to come from: whole arrays, or ShardedArrays of any
        pieces.

    Raises
    ------
    ValueError
        Listing what is not there.
    """
    lacking = [
        f"{key}: {box}"
        for key, target in mine.items()
        if isinstance(target, ShardedArray)
        for box in target.pieces
        if sum(common.count for common, _ in _common(box, state[key])) < box.count
    ]
    if lacking:
        raise ValueError(
            f"{what}: the state does not hold all that this rank does; give whole arrays, or "
            "ShardedArrays with at least these parts; nothing was changed:\n  "
            + "\n  ".join(lacking[:5])
        )


def copy_in(mine: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Copy what this rank holds, in ShardedArrays, out of a state that `check_held` accepted."""
    for key, target in mine.items():
        if isinstance(target, ShardedArray):
            for box, piece in target.pieces.items():
                for common, values in _common(box, state[key]):
                    piece[common.relative_to(box).slices] = values


def _common(box: Box, source: ShardedArray | Array) -> list[tuple[Box, Array]]:
    """Return where a box meets a source, and the values there."""
    if not isinstance(source, ShardedArray):
        return [(box, source[box.slices])]
    found = []
    for other, piece in source.pieces.items():
        common = box.intersect(other)
        if common is not None:
            found.append((common, piece[common.relative_to(other).slices]))
    return found


def merged_state(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return the state of several optimizers of different parameters as one."""
    kinds = "+".join(type(optimizer).__name__ for optimizer in optimizers)
    state: dict[str, Any] = {"kind": kinds, "step": optimizers[0].step_count}
    for optimizer in optimizers:
        state.update({k: v for k, v in optimizer.state_dict().items() if k not in state})
    return state


def load_numbers(optimizers: Sequence[Optimizer], state: Mapping[str, Any]) -> None:
    """Give several optimizers the numbers of what `merged_state` returned; arrays stay."""
    for optimizer in optimizers:
        mine = optimizer.state_dict()
        numbers = {k: state[k] for k, value in mine.items() if not isinstance(value, np.ndarray)}
        optimizer.load_state_dict(mine | numbers | {"kind": type(optimizer).__name__})


def check_names(optimizers: Sequence[Optimizer], shards: Mapping[str, Parameter]) -> None:
    """Refuse optimizers of other parameters than they were given, or of one twice."""
    seen: set[str] = set()
    for optimizer in optimizers:
        names = {parameter_of(k) for k in optimizer.state_dict() if k.endswith("/updates")}
        wrong = sorted(names - shards.keys()) or sorted(names & seen)
        if wrong:
            raise ValueError(
                f"ShardedOptimizer: the factory made an optimizer of {wrong[:5]}; each of the "
                "parameters that it is given may be used once, under its name"
            )
        seen |= names
    if not seen:
        raise ValueError("ShardedOptimizer: the factory made no optimizer")
