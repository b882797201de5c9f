"""The state of a sharded optimizer: of this rank, and whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidist.collectives import all_gather
from mpidist.nn.parameter import Parameter
from mpidist.optim import Optimizer
from mpidist.optim.optimizer import check_same_state

if TYPE_CHECKING:
    from mpidist.parallel.zero import ShardedOptimizer

__all__ = [
    "check_names",
    "full_state_dict",
    "load_full_state_dict",
    "load_merged_state",
    "merged_state",
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
        loaded there, and by `load_full_state_dict` on any number of ranks.

    Notes
    -----
    Collective over the optimizer's group; blocks. One all_gather per array of state. Every rank
    must have memory for all of it: to write it to files, each rank writes its own `state_dict`.
    """
    group = optimizer.group
    shapes = {name: parameter.shape for name, parameter in optimizer.module.named_parameters()}
    boxes = [optimizer.boxes(rank) for rank in range(group.size)]
    state = optimizer.state_dict()
    for key in _array_keys(state):
        name = key.rpartition("/")[0]
        whole = all_gather(state[key], group, counts=[theirs[name].count for theirs in boxes])
        state[key] = whole.reshape(shapes[name])
    return state


def load_full_state_dict(optimizer: ShardedOptimizer, state: Mapping[str, Any]) -> None:
    """Go on from a whole optimizer's state; each rank copies its part.

    Parameters
    ----------
    optimizer : ShardedOptimizer
        Whose state is replaced.
    state : mapping
        As `full_state_dict`, or `Optimizer.state_dict` of the same optimizer unsharded, returns
        it. The same on all ranks.

    Raises
    ------
    ValueError
        If kind, names, shapes or dtypes differ; nothing has been changed then.

    Notes
    -----
    Local; to be called on all ranks.
    """
    shapes = {name: parameter.shape for name, parameter in optimizer.module.named_parameters()}
    boxes, mine = optimizer.boxes(), dict(state)
    for key in _array_keys(optimizer.state_dict()):
        name = key.rpartition("/")[0]
        if key not in state:
            continue  # refused below, with all other differences of names
        array = np.asarray(state[key])
        if array.shape != shapes[name]:
            raise ValueError(
                f"load_full_state_dict: {key!r} has shape {array.shape}, expected {shapes[name]}"
            )
        mine[key] = array.reshape(-1)[boxes[name].slices]
    optimizer.load_state_dict(mine)


def _array_keys(state: Mapping[str, Any]) -> list[str]:
    return [key for key, value in state.items() if isinstance(value, np.ndarray)]


def merged_state(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return the state of several optimizers of different parameters as one."""
    kinds = "+".join(type(optimizer).__name__ for optimizer in optimizers)
    state: dict[str, Any] = {"kind": kinds, "step": optimizers[0].step_count}
    for optimizer in optimizers:
        state.update({k: v for k, v in optimizer.state_dict().items() if k not in state})
    return state


def load_merged_state(optimizers: Sequence[Optimizer], state: Mapping[str, Any]) -> None:
    """Give several optimizers their parts of what `merged_state` returned."""
    check_same_state(merged_state(optimizers), state)
    for optimizer in optimizers:
        mine = {key: state[key] for key in optimizer.state_dict()}
        optimizer.load_state_dict(mine | {"kind": type(optimizer).__name__})


def check_names(optimizers: Sequence[Optimizer], shards: Mapping[str, Parameter]) -> None:
    """Refuse optimizers of other parameters than they were given, or of one twice."""
    seen: set[str] = set()
    for optimizer in optimizers:
        names = {k.rpartition("/")[0] for k in optimizer.state_dict() if k.endswith("/updates")}
        wrong = sorted(names - shards.keys()) or sorted(names & seen)
        if wrong:
            raise ValueError(
                f"ShardedOptimizer: the factory made an optimizer of {wrong[:5]}; each of the "
                "parameters that it is given may be used once, under its name"
            )
        seen |= names
    if not seen:
        raise ValueError("ShardedOptimizer: the factory made no optimizer")
