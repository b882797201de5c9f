"""Cases of mistakes: every bad argument raises on all ranks before the first byte moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mpidist import collectives as c
from mpidist import point_to_point as p
from mpidist._types import BAND, LXOR, MEAN, MIN, Array
from mpidist.errors import (
    CollectiveTimeoutError,
    DistributedError,
    GroupBrokenError,
    InvalidRankError,
    SelfSendError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup
from mpidist.testing.contract._memory import Place, with_peers
from mpidist.testing.contract._values import check_that, expect, expect_error

X = np.ones((6, 2))
LIST: Any = [1.0, 2.0]
DEADLINE = 0.12


Put = Callable[[Array], Array]


class Mistake(NamedTuple):
    """A bad call, the error that it must raise, and a word of its message.

    The call takes the group, and what brings a host array to the place of the case.
    """

    error: type[DistributedError]
    word: str
    call: Callable[[ProcessGroup, Put], Any]


def _locked(shape: tuple[int, ...]) -> Array:
    x = np.zeros(shape)
    x.flags.writeable = False
    return x


def _rows(group: ProcessGroup) -> Array:
    return np.ones((3 * group.size, 2))


def _bad(group: ProcessGroup, *numbers: int) -> list[int]:
    """Return counts of one per rank, changed at the end by `numbers`."""
    return [1] * (group.size - 1) + list(numbers)


_unsupported = partial(Mistake, UnsupportedOperationError)
_wrong_rank = partial(Mistake, InvalidRankError)
_wrong_size = partial(Mistake, SizeMismatchError)

MISTAKES: dict[str, Mistake] = {
    # not an array, or one of a dtype that nobody carries
    "list": _unsupported("list", lambda g, _: c.all_reduce(LIST, g)),
    "list sent": _unsupported("list", lambda g, _: p.send(LIST, g, dst=(g.rank + 1) % g.size)),
    "objects": _unsupported("object", lambda g, _: c.broadcast(np.array([None]), g)),
    "text": _unsupported("<U", lambda g, _: c.all_gather(np.array(["a"]), g)),
    "dates": _unsupported("datetime", lambda g, _: c.gather(np.zeros(1, "M8[s]"), g)),
    "long double": _unsupported("float128", lambda g, _: c.all_reduce(X.astype(np.longdouble), g)),
    "records": _unsupported("dtype", lambda g, _: c.all_to_all(np.zeros(g.size, "i4,f4"), g)),
    "list in a list": _unsupported(
        "arrays[1]", lambda g, at: c.all_reduce_coalesced([at(X), LIST], g)
    ),
    "masked": _unsupported("filled", lambda g, _: c.all_reduce(np.ma.masked_array(X), g)),
    # an operation that the dtype does not have
    "mean of int": _unsupported("MEAN", lambda g, at: c.all_reduce(at(X.astype(int)), g, op=MEAN)),
    "least complex": _unsupported("MIN", lambda g, at: c.reduce(at(X.astype(complex)), g, op=MIN)),
    "bits of float": _unsupported("BAND", lambda g, at: c.reduce_scatter(at(_rows(g)), g, op=BAND)),
    "logic of float": _unsupported(
        "LXOR", lambda g, at: c.all_reduce_coalesced([at(X)], g, op=LXOR)
    ),
    "mean of floats and integers": _unsupported(
        "int", lambda g, at: c.all_reduce_coalesced([at(X), at(X.astype(int))], g, op=MEAN)
    ),
    "op by name": _unsupported(
        "sum",
        lambda g, at: c.all_reduce(at(X), g, op="sum"),  # type: ignore[arg-type]
    ),
    # roots and peers
    "root too large": _wrong_rank("root", lambda g, at: c.broadcast(at(X), g, root=g.size)),
    "root negative": _wrong_rank("root", lambda g, at: c.reduce(at(X), g, root=-1)),
    "root of gather": _wrong_rank("root", lambda g, at: c.gather(at(X), g, root=g.size)),
    "root of scatter": _wrong_rank("root", lambda g, at: c.scatter(at(X), g, root=-3)),
    "root by name": _wrong_rank(
        "'0'",
        lambda g, at: c.broadcast(at(X), g, root="0"),  # type: ignore[arg-type]
    ),
    "root a float": _wrong_rank(
        "0.0",
        lambda g, at: c.reduce(at(X), g, root=0.0),  # type: ignore[arg-type]
    ),
    "root a boolean": _wrong_rank("True", lambda g, at: c.broadcast(at(X), g, root=g.size > 0)),
    "source a float": _wrong_rank(
        "-1.0",
        lambda g, _: p.recv(g, src=-1.0),  # type: ignore[arg-type]
    ),
    "peer a boolean": _wrong_rank("dst", lambda g, at: p.send(at(X), g, dst=g.rank != 1)),
    "root of objects": _wrong_rank("root", lambda g, _: c.broadcast_object(1, g, root=g.size)),
    "root of list": _wrong_rank(
        "root", lambda g, at: c.broadcast_coalesced([at(X)], g, root=g.size)
    ),
    "to myself": Mistake(SelfSendError, "dst", lambda g, at: p.send(at(X), g, dst=g.rank)),
    "from myself": Mistake(SelfSendError, "src", lambda g, _: p.recv(g, src=g.rank)),
    "to nobody": _wrong_rank("dst", lambda g, at: p.isend(at(X), g, dst=g.size)),
    "from nobody": _wrong_rank("src", lambda g, _: p.irecv(g, src=-7)),
    "batch to myself": Mistake(
        SelfSendError,
        "dst",
        lambda g, at: p.exchange(g, sends=[p.Send(at(X), g.rank)], receives=[]),
    ),
    # shapes
    "out shape": _wrong_size("out", lambda g, at: c.all_reduce(at(X), g, out=at(X[:3].copy()))),
    "out dtype": _wrong_size(
        "float32", lambda g, at: c.broadcast(at(X), g, out=at(np.empty((6, 2), np.float32)))
    ),
    "out of gather": _wrong_size(
        "out", lambda g, at: c.all_gather(at(X), g, out=at(np.empty((6 * g.size + 1, 2))))
    ),
    "out of scatter": _wrong_size(
        "out", lambda g, at: c.scatter(at(_rows(g)), g, out=at(np.empty((2, 2))))
    ),
    "outs": _wrong_size("outs", lambda g, at: c.all_gather_coalesced([at(X)], g, outs=[])),
    "out locked": _unsupported("read-only", lambda g, _: c.all_reduce(X, g, out=_locked((6, 2)))),
    "outs locked": _unsupported(
        "outs[1] is read-only",
        lambda g, _: c.all_reduce_coalesced([X, X], g, outs=[X.copy(), _locked((6, 2))]),
    ),
    "outs locked, broadcast": _unsupported(
        "outs[0] is read-only", lambda g, _: c.broadcast_coalesced([X], g, outs=[_locked((6, 2))])
    ),
    "outs shape": _wrong_size(
        "outs[0]",
        lambda g, at: c.reduce_scatter_coalesced([at(_rows(g))], g, outs=[at(np.empty((4, 2)))]),
    ),
    "outs of lists": _unsupported(
        "outs[0]", lambda g, at: c.all_reduce_coalesced([at(X)], g, outs=[LIST])
    ),
    "outs of a scalar": _unsupported(
        "read-only", lambda g, _: c.all_reduce_coalesced([np.ones(())], g, outs=[np.float64(1)])
    ),
    "0-d cut": _wrong_size("0-d", lambda g, at: c.reduce_scatter(at(np.ones(())), g)),
    "0-d scattered": _wrong_size("0-d", lambda g, at: c.scatter(at(np.ones(())), g)),
    "nothing to scatter": _wrong_size("root", lambda g, _: c.scatter(None, g)),
    # counts
    "too few counts": _wrong_size(
        "counts", lambda g, at: c.all_gather(at(X), g, counts=[6] * (g.size - 1))
    ),
    "negative count": _wrong_size(
        "counts", lambda g, at: c.scatter(at(_rows(g)), g, counts=_bad(g, -1))
    ),
    "not my count": _wrong_size(
        "counts", lambda g, at: c.all_gather(at(X), g, counts=[5] * g.size)
    ),
    "not my count, gather": _wrong_size(
        "counts", lambda g, at: c.gather(at(X), g, counts=[7] * g.size)
    ),
    "counts of floats": _wrong_size(
        "6.5",
        lambda g, at: c.all_gather(at(X), g, counts=[6.5] * g.size),  # type: ignore[list-item]
    ),
    "counts of booleans": _wrong_size(
        "True", lambda g, at: c.scatter(at(_rows(g)), g, counts=[True] * g.size)
    ),
    "one count": _wrong_size(
        "counts",
        lambda g, at: c.scatter(at(_rows(g)), g, counts=3),  # type: ignore[arg-type]
    ),
    "wrong sum": _wrong_size(
        "counts", lambda g, at: c.reduce_scatter(at(_rows(g)), g, counts=_bad(g, 99))
    ),
    "wrong sum, all_to_all": _wrong_size(
        "counts",
        lambda g, at: c.all_to_all(at(_rows(g)), g, counts=_bad(g, 99), recv_counts=_bad(g, 99)),
    ),
    "half of the counts": _wrong_size(
        "recv_counts", lambda g, at: c.all_to_all(at(_rows(g)), g, counts=[3] * g.size)
    ),
    "number of objects": _wrong_size(
        "object per rank", lambda g, _: c.scatter_object([1] * (g.size + 1), g)
    ),
    # tags
    "tag negative": _unsupported(
        "tag", lambda g, at: p.send(at(X), g, dst=(g.rank + 1) % g.size, tag=-1)
    ),
    "tag a float": _unsupported(
        "1.5",
        lambda g, _: p.recv(g, src=(g.rank + 1) % g.size, tag=1.5),  # type: ignore[arg-type]
    ),
    "tag a boolean": _unsupported(
        "True", lambda g, _: p.recv(g, src=(g.rank + 1) % g.size, tag=g.size > 0)
    ),
    "tag too large": _unsupported(
        "tag", lambda g, _: p.recv(g, src=(g.rank + 1) % g.size, tag=g.capabilities.max_tag + 1)
    ),
    "recv locked": _unsupported(
        "read-only", lambda g, _: p.recv(g, src=(g.rank + 1) % g.size, out=_locked((2,)))
    ),
}

PEERS = {
    "list sent",
    "recv locked",
    "tag a boolean",
    "tag a float",
    "tag negative",
    "tag too large",
}
"""Mistakes of messages to others, which a single rank cannot make."""

INDIVISIBLE: dict[str, Callable[[Array, ProcessGroup], Any]] = {
    "scatter": c.scatter,
    "reduce_scatter": c.reduce_scatter,
    "all_to_all": c.all_to_all,
    "reduce_scatter_coalesced": lambda x, g: c.reduce_scatter_coalesced([x], g),
}


def mistakes(group: ProcessGroup, device: Place) -> None:
    """Each mistake raises its error on all ranks, says where, and leaves the group usable."""
    who = f"rank {group.rank} of {group.size}"
    for name, mistake in MISTAKES.items():
        if group.size > 1 or name not in PEERS:
            error = expect_error(
                mistake.error, partial(mistake.call, group, device.put), name, mistake.word, who
            )
            check_that(isinstance(error, ValueError), f"{name}: {error!r} is no ValueError")
    for name, call in INDIVISIBLE.items() if group.size > 1 else ():
        x = device.put(np.ones(group.size + 1))
        expect_error(SizeMismatchError, partial(call, x, group), name, name, "multiple", who)
    check_that(not group.operations.outstanding, "a mistake has left something under way")
    after = device.take(c.all_reduce(device.put(np.ones(2)), group))
    expect(after, np.full(2, float(group.size)), "after the mistakes")


def _refuses(group: ProcessGroup, name: str, device: Place) -> None:
    """Check that a broken group refuses every verb at once."""
    x = device.put(X)
    began = time.monotonic()
    calls: dict[str, Callable[[], Any]] = {
        "barrier": lambda: c.barrier(group),
        "iall_reduce": lambda: c.iall_reduce(x, group),
        "all_gather_object": lambda: c.all_gather_object(1, group),
        "isend": lambda: p.isend(x, group, dst=(group.rank + 1) % group.size),
        "irecv": lambda: p.irecv(group, src=(group.rank + 1) % group.size),
        "split": lambda: group.split(0),
        "progress": group.progress,
    }
    for verb, call in calls.items():
        expect_error(GroupBrokenError, call, f"{verb} after a deadline", name)
    group.close()
    took = time.monotonic() - began
    check_that(took < 1, f"a broken group took {took:.2f} s to refuse {len(calls)} calls")


@with_peers
def deadlines(group: ProcessGroup, device: Place) -> None:
    """Leave one rank out: the others raise, their group is broken, other groups are not."""
    absent = group.size - 1
    x, rows, out = (device.put(array) for array in (np.ones(3000), _rows(group), np.ones(3)))
    waits: dict[str, Callable[[ProcessGroup], Any]] = {
        "barrier": c.barrier,
        "all_reduce": lambda late: c.iall_reduce(x, late).synchronize(),
        "iall_gather": lambda late: c.iall_gather(x, late).synchronize(),
        "reduce_scatter": lambda late: c.ireduce_scatter(rows, late).synchronize(DEADLINE / 2),
        "recv": lambda late: p.irecv(late, src=absent, out=out).synchronize(),
        "split": lambda late: late.split(0),
    }
    if device.on_host:
        waits["all_reduce"] = lambda late: c.all_reduce(x, late)
        waits["recv"] = lambda late: p.recv(late, src=absent)
    for verb, wait in waits.items():
        late = group.duplicate(f"late {verb}")
        device.ready(late)
        late.timeout = DEADLINE
        if group.rank != absent:
            began = time.monotonic()
            error = expect_error(
                CollectiveTimeoutError,
                partial(wait, late),
                verb,
                verb,
                late.name,
            )
            took = time.monotonic() - began
            check_that(took < DEADLINE + 2, f"{verb}: the deadline took {took:.2f} s")
            check_that(isinstance(error, TimeoutError), "a missed deadline is no TimeoutError")
            _refuses(late, late.name, device)
        c.barrier(group)
