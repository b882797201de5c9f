"""`UnitGradients`: gradients of units on their way from the layers to the shards.

[Note: two message buffers] Units have their gradients in two buffers in turn, by their place in the
order in which backward completes them: one can be filled while the other one travels. A layer
writes into the buffer of its unit as soon as the unit two places before has been reduced; this is
waited for. If that one has not even been sent, because layers do not go in the order of the units,
a gradient is kept in memory of its own, and copied when its unit's turn comes. So are gradients of
tied parameters, which are begun by the first layer and completed by the last, and those inside
`no_sync`, of which many are added. Which buffer a unit has depends on the order alone, which is the
same on all ranks, whatever layers a rank passes over: of those it sends zeros.

[Note: waits in backward] Where parameters are gathered, a rank in backward may wait for others to
agree on a gather, and these for its gradients. So nobody waits for a reduction there that some rank
may not have started: how many all ranks have started they tell each other whenever they agree. What
cannot be sent or have a buffer for now is so later, at the end of the pass at the latest; a
gradient is in memory of its own meanwhile. If all ranks go through the units in one order, this
does not happen: when they agree on a unit, the gradients of those before are on their way.

[Note: replicas] Where several groups of ranks hold the same slices, a unit is reduced in two
stages: reduce-scattered in each group, then this rank's slice is reduced over its replicas, the
ranks that hold the same one, in pieces, so that one is added while the next one travels. The buffer
is free after the first stage. A rank waits for a second stage only when it has started those of all
units, so no order of waits can be a circle. Inside `no_sync(nodes=True)` there is no second stage:
what the first one brings is added up, and added to the next reduction that has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpidist._types import MAX, Array, ReduceOp
from mpidist.arrays.boxes import round_up
from mpidist.arrays.namespaces import array_namespace, is_device, like_device
from mpidist.backends.work import Deadline, Work
from mpidist.collectives import iall_reduce, ireduce_scatter
from mpidist.group import ProcessGroup
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.buckets import ALIGNMENT_BYTES
from mpidist.parallel.data.reducer import check_known
from mpidist.parallel.gradient_kernels import cast
from mpidist.parallel.sharded.parameter_shards import ParameterShards
from mpidist.parallel.sharded.precision import Precision
from mpidist.parallel.sharded.transfers import traced

__all__ = ["UnitGradients"]

_PIECE_NBYTES = 2 << 20
"""Most bytes of a slice that are reduced over the replicas at a time."""


class UnitGradients:
    """Reduces the gradients of units into the shards of their parameters.

    Parameters
    ----------
    named : mapping of str to Parameter
        The trainable parameters of the model.
    parameters : ParameterShards
        Their flat arrays, and the shards that receive the reduction.
    group : ProcessGroup
        All ranks.
    replicas : ProcessGroup or None
        The ranks that hold the same slices as this one, of several groups over which `parameters`
        are cut; None where there is only one.
    op : ReduceOp
        `MEAN` or `SUM` of the ranks' gradients.
    precision : Precision
        In which dtype they are added and reduced; the slices have that of the shards.
    strategy : str
        The class that it is for; named in errors.

    Notes
    -----
    Collective over `group`; blocks.
    """

    def __init__(
        self,
        named: Mapping[str, Parameter],
        parameters: ParameterShards,
        group: ProcessGroup,
        *,
        replicas: ProcessGroup | None,
        op: ReduceOp,
        precision: Precision,
        strategy: str,
    ) -> None:
        self.names = tuple(named)
        self._named = named
        self._names = {parameter: name for name, parameter in named.items()}
        self._shards = parameters.shards
        self._group = group
        self._strategy = strategy
        self._units = [
            _UnitGradient(number, parameters, named, replicas, op, precision)
            for number, flat in enumerate(parameters.store.flats)
            if named.keys() & flat.layout.spans.keys()
        ]
        self._unit_of = {name: unit for unit in self._units for name in unit.parameters}
        nbytes = max(1, *(unit.nbytes for unit in self._units))
        shape = (min(len(self._units), 2), round_up(nbytes, ALIGNMENT_BYTES))
        device = "gpu" if is_device(parameters.store.flats[0].own) else "cpu"
        # In the group that reduces it: for another one it would be ordinary memory.
        over = parameters.group if replicas is None or parameters.group.size > 1 else replicas
        self._memory: Array = over.empty(shape, np.uint8, device=device)
        self._buffers = [self._memory[i] for i in range(len(self._memory))]
        self._index = {name: i for i, name in enumerate(self.names)}
        self._used = np.zeros(len(named), np.uint8)
        self._used_before = np.zeros_like(self._used)  # in passes without the replicas
        self._cut_over = parameters.group
        self._has_replicas = replicas is not None
        self._skipping = self._skips = False  # the replicas: from now on, and in this pass
        self._used_work: Work[Any] | None = None
        self._counting = False
        self._arrived: list[str] = []
        self._sent = self._received = self._finished = 0
        self._sent_by_all: int | None = None
        self._own_nbytes = self._own_peak = 0  # of what is neither in a buffer nor in a shard
        self.relayout(self.names[::-1])
        for parameter in named.values():
            parameter.attach_later(self._memory_for)

    # -- backward ------------------------------------------------------------------------------

    def check(self, uses: Mapping[Parameter, int]) -> None:
        """Raise what would go wrong in a backward pass, before it begins.

        Raises
        ------
        RuntimeError
            If a parameter is not ours, or frozen; if something else has called
            `Parameter.attach`.
        """
        check_known(uses, self._names, self._strategy, self._group)
        for parameter, name in self._names.items():
            if not parameter.is_attached_to(self._memory_for):
                raise RuntimeError(
                    f"{self._strategy} on {self._group}: the gradient of parameter '{name}' is not "
                    f"this {self._strategy}'s any more; something else has called attach(), "
                    "perhaps a DDP or a second FSDP over the same module"
                )
            if not parameter.trainable:
                raise RuntimeError(
                    f"{self._strategy} on {self._group}: parameter '{name}' has been frozen since "
                    f"the {self._strategy} was made; freeze it first, then make the "
                    f"{self._strategy} and its optimizer"
                )

    def accumulate(self) -> None:
        """Let the backward that follows add to the gradients of this rank."""
        for parameter in self._names:
            parameter.release()

    def expect(self, uses: Mapping[Parameter, int]) -> None:
        """Count contributions from now on; units that expect none are sent in their turn."""
        self._counting, self._skips = True, self._skipping and self._has_replicas
        self._arrived, self._sent, self._received, self._finished = [], 0, 0, 0
        for unit in self._units:
            unit.missing = set(unit.parameters)
        idle = []
        for parameter in self._names:
            count = uses.get(parameter, 0)
            parameter.release()
            parameter.expect(count, self._on_ready)
            if not count:
                idle.append(parameter)
        for parameter in idle:  # only now, since a complete unit is sent at once
            self._unit_of[self._names[parameter]].missing.discard(self._names[parameter])
        self._send_complete()

    @contextmanager
    def without_replicas(self) -> Iterator[None]:
        """Let backward passes that begin inside reduce without the replicas."""
        before, self._skipping = self._skipping, True
        try:
            yield
        finally:
            self._skipping = before

    @property
    def sent(self) -> int:
        """How many units this rank has started to reduce in this pass."""
        return self._sent

    def wait_only_for(self, sent_by_all: int | None) -> None:
        """Do not wait for the reduction of other units than the first that all ranks have started.

        Parameters
        ----------
        sent_by_all : int or None
            Their number; None: it may be waited for all. See [Note: waits in backward].
        """
        self._sent_by_all = sent_by_all
        if self._counting:
            self.progress()
            self._send_complete()

    def _has_buffer(self, unit: _UnitGradient) -> bool:
        """Whether a unit can have its message buffer without a risk in waiting for it."""
        last = unit.index - len(self._buffers)
        if last < self._received or self._sent_by_all is None or last < self._sent_by_all:
            return True
        self.progress()
        return last < self._received

    def _memory_for(self, parameter: Parameter) -> Array:
        """Return the part of its unit's message buffer, or new memory while that is another's."""
        name = self._names[parameter]
        unit = self._unit_of[name]
        is_next = self._counting and unit.index < self._sent + len(self._buffers)
        if not is_next or not self._has_buffer(unit):
            own: Array = array_namespace(self._memory).empty(parameter.shape, unit.dtype)
            self._count(own.nbytes)
            return own
        self._receive(unit.index - len(self._buffers))
        return unit.views[name]

    def _on_ready(self, parameter: Parameter) -> None:
        name = self._names[parameter]
        self._unit_of[name].missing.remove(name)
        self._arrived.append(name)
        self._send_complete()
        # MPI moves messages only while it is called, and backward calls nothing else of it.
        self.progress()

    def _send_complete(self) -> None:
        """Start the reduction of complete units, in order; see [Note: order of buckets]."""
        while self._sent < len(self._plan) and not self._plan[self._sent].missing:
            unit = self._plan[self._sent]
            if not self._has_buffer(unit):
                return
            self._receive(unit.index - len(self._buffers))
            before = unit.result_nbytes
            for name, (used, copied) in unit.send(with_replicas=not self._skips).items():
                self._used[self._index[name]] = used
                self._count(-copied)
            self._count(unit.result_nbytes - before)
            self._sent += 1
            if self._sent == len(self._plan):
                over = self._cut_over if self._skips else self._group
                np.maximum(self._used, self._used_before, out=self._used)
                self._used_work = iall_reduce(self._used, over, op=MAX, out=self._used)

    def _receive(self, last: int, timeout: float | None = None) -> None:
        """Wait until the buffers of the first units, up to this one, are free."""
        while self._received <= last:
            unit = self._plan[self._received]
            before = unit.result_nbytes
            unit.receive(timeout)
            self._count(unit.result_nbytes - before)
            self._received += 1

    def _finish(self, timeout: float | None = None) -> None:
        """Wait until the slices of the unit that is next are reduced over all ranks."""
        unit = self._plan[self._finished]
        before = unit.result_nbytes
        unit.finish(timeout)
        self._count(unit.result_nbytes - before)
        self._finished += 1

    def _count(self, nbytes: int) -> None:
        self._own_nbytes += nbytes
        self._own_peak = max(self._own_peak, self._own_nbytes)

    def progress(self) -> None:
        """Let the units under way make progress."""
        while self._received < self._sent and self._plan[self._received].received():
            self._receive(self._received)
        while self._finished < self._received and self._plan[self._finished].done():
            self._finish()

    def check_complete(self, operation: str) -> None:
        """Raise an error that names the gradients that are missing, if any are."""
        missing = [name for unit in self._units for name in unit.parameters if name in unit.missing]
        if missing:
            raise RuntimeError(
                f"{operation} on {self._group}: {len(missing)} of {len(self.names)} gradients have "
                f"not come: {', '.join(missing[:8])}; a module's ctx.uses must announce what its "
                "backward adds"
            )

    def done(self) -> bool:
        """Whether `wait` will not block."""
        self.progress()
        used = self._used_work
        return self._finished == len(self._plan) and (used is None or used.done())

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the reduction; the shards have gradients afterwards, the parameters do not."""
        deadline = Deadline(timeout)
        for index in range(self._received, self._sent):
            self._receive(index, deadline.left)
        while self._finished < self._sent:
            self._finish(deadline.left)
        if self._used_work is not None:
            self._used_work.wait(deadline.left)
            self._used_work = None
        self._counting = False
        reason = (
            f"has been reduced, and is spread over the ranks of {self._group} until step() or "
            "zero_grad(); read it in shards(), and update parameters by a ShardedOptimizer"
        )
        self._used_before[...] = self._used if self._skips else 0
        for parameter, used in zip(self._names, self._used, strict=True):
            parameter.close(reason)
            takes = used and not self._skips
            memory = self._shards[self._names[parameter]].first_grad() if takes else None
            if memory is not None:  # the reduction has been written there
                self._shards[self._names[parameter]].add_grad(memory)

    def release(self) -> None:
        """End the counting, after an error."""
        self._counting = False
        for parameter in self._names:
            parameter.release()

    # -- the order -----------------------------------------------------------------------------

    def arrivals(self) -> list[str]:
        """Return the names in the order in which the gradients came; then those that did not."""
        known = set(self._arrived)
        return self._arrived + [name for name in reversed(self.names) if name not in known]

    def relayout(self, order: Sequence[str]) -> None:
        """Send units in the order in which they are complete if gradients come in this order."""
        index_of = {name: i for i, name in enumerate(order)}
        self._plan = sorted(self._units, key=lambda u: max(map(index_of.__getitem__, u.parameters)))
        for index, unit in enumerate(self._plan):
            unit.use(index, self._buffers[index % len(self._buffers)])

    # -- between two steps ---------------------------------------------------------------------

    def zero(self) -> None:
        """Forget all gradients."""
        self._used_before[...] = 0
        for unit in self._units:
            unit.reduced_before, unit.unsummed = False, None
        for parameter in self._names:
            parameter.release()
            parameter.detach()
        self._own_nbytes = 0
        for shard in self._shards.values():
            shard.zero_grad()

    def check_reduced(self) -> None:
        """Raise RuntimeError if there are gradients of this rank that no backward has reduced."""
        for parameter, name in self._names.items():
            if parameter.unreduced_grad() is not None:
                raise RuntimeError(
                    f"{self._strategy} on {self._group}: parameter '{name}' holds a gradient of "
                    "this rank alone; run the last backward of a step by the strategy's "
                    "backward(ctx, dy), outside no_sync(), which reduces it"
                )
        if any(unit.unsummed is not None for unit in self._units):
            raise RuntimeError(
                f"{self._strategy} on {self._group}: the last backward was inside "
                "no_sync(nodes=True), so gradients are summed within each node alone; run the last "
                "backward of a step outside, or forget them (zero_grad)"
            )

    @property
    def shards_nbytes(self) -> int:
        """Bytes of the reduced slices."""
        return sum(unit.reduced.nbytes for unit in self._units)

    @property
    def buffers_nbytes(self) -> int:
        """Bytes of the message buffers, and of gradients and results in memory of their own."""
        return int(self._memory.nbytes) + self._own_nbytes

    @property
    def peak_buffers_nbytes(self) -> int:
        """The most that `buffers_nbytes` has been."""
        return int(self._memory.nbytes) + self._own_peak


class _UnitGradient:
    """The gradient of one unit: its part of a message buffer, and this rank's reduced slice.

    Attributes
    ----------
    number : int
        Its place in `FSDP.units`.
    index : int
        Its place in the order of the units.
    views : dict of str to Array
        The gradients of its parameters in the message buffer.
    missing : set of str
        Names of the parameters whose gradients are to come.
    dtype : dtype
        In which gradients are added and reduced.
    reduced : Array, shape of this rank's slice
        Where the shards have their gradients, of the dtype of the shards.
    reduced_before : bool
        Whether there are some of an earlier backward in `reduced`, to which others are added.
    unsummed : Array or None, shape of this rank's slice
        What passes without the replicas have left, to be reduced over them with the next one.
    """

    def __init__(
        self,
        number: int,
        parameters: ParameterShards,
        named: Mapping[str, Parameter],
        replicas: ProcessGroup | None,
        op: ReduceOp,
        precision: Precision,
    ) -> None:
        flat, own = parameters.store.flats[number], parameters.own[number]
        self.number = number
        self.dtype = precision.reduced(own.dtype)
        self.parameters = {name: named[name] for name in flat.layout.spans}
        self._flat = flat
        self._cut_over = parameters.group
        self._replicas = replicas
        self._op = op
        self.index = 0
        self.views: dict[str, Array] = {}
        self.missing: set[str] = set()
        self.reduced: Array = array_namespace(own).empty_like(own)
        self.reduced_before = False
        self.unsummed: Array | None = None
        self._with_replicas = replicas is not None
        for name in self.parameters:
            parameters.shards[name].attach(flat.within(name, self.reduced))
        self._data = flat.own[:0]
        self._result: Array | None = None  # where the reduction under way arrives
        self._work: Work[Any] | None = None  # that leaves the buffer free
        self._sum: Work[Any] | None = None  # over the replicas, after it

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients of all its parameters in a message buffer."""
        return self._flat.layout.length * self.dtype.itemsize

    def use(self, index: int, memory: Array) -> None:
        """Have this place in the order, and this message buffer, from now on."""
        self.index, self._data = index, memory[: self.nbytes].view(self.dtype)
        self.views = self._flat.layout.buffer(self._data).views

    def send(self, *, with_replicas: bool) -> dict[str, tuple[bool, int]]:
        """Start the reduction; return which parameters this rank has used, and what was copied."""
        self._with_replicas = with_replicas or self._replicas is None
        sent = {}
        for name, parameter in self.parameters.items():
            grad, view = parameter.unreduced_grad(), self.views[name]
            if grad is not view:
                view[...] = 0 if grad is None else grad
            copied = 0 if parameter.grad_memory is view else parameter.grad_nbytes
            sent[name] = (grad is not None, copied)
            parameter.detach()  # it is closed until the next backward
        at_once = self._with_replicas and self.unsummed is None
        if self._replicas is not None and self._cut_over.size == 1 and at_once:
            self._result = self._data
            work = iall_reduce(self._data, self._replicas, op=self._op, out=self._data)
        else:
            new = self.reduced_before or not at_once or self.reduced.dtype != self.dtype
            new = new or is_device(self._data) is not is_device(self.reduced)
            empty = array_namespace(self._data).empty
            self._result = empty(self.reduced.shape, self.dtype) if new else self.reduced
            work = ireduce_scatter(
                self._data, self._cut_over, op=self._op, out=self._result, counts=self._flat.counts
            )
        self._work = traced(f"unit {self.number}: reduce", work)
        return sent

    @property
    def result_nbytes(self) -> int:
        """Bytes of a result under way that is added to an earlier one, and of `unsummed`."""
        kept = 0 if self.unsummed is None else int(self.unsummed.nbytes)
        if self._result is None or self._result is self.reduced or self._result is self._data:
            return kept
        return kept + int(self._result.nbytes)

    def received(self) -> bool:
        """Whether `receive` will not block."""
        return self._work is None or self._work.done()

    def receive(self, timeout: float | None = None) -> None:
        """Wait until the message buffer is free, and start the sum over the replicas, if any."""
        assert self._work is not None, "it has been sent"
        self._work.wait(timeout)
        self._work = None
        result = self._result
        if self._replicas is None or result is None or result is self._data:
            self._take()
            return
        if self.unsummed is not None:
            with np.errstate(all="ignore"):
                result += self.unsummed
            self.unsummed = None
        if not self._with_replicas:
            self.unsummed, self._result = result, None
        else:
            step = _PIECE_NBYTES // result.itemsize
            pieces = [result[start : start + step] for start in range(0, result.size, step)]
            sums = [iall_reduce(p, self._replicas, op=self._op, out=p) for p in pieces]
            self._sum = traced(f"unit {self.number}: sum over replicas", Work.all(sums))

    def done(self) -> bool:
        """Whether `finish` will not block."""
        return self._sum is None or self._sum.done()

    def finish(self, timeout: float | None = None) -> None:
        """Wait until `reduced` has this rank's slice of the reduction over all ranks."""
        if self._sum is not None:
            self._sum.wait(timeout)
            self._sum = None
            self._take()

    def _take(self) -> None:
        """Have in `reduced` what has arrived."""
        result = self._result
        assert result is not None, "it has been sent"
        if self.reduced_before:
            with np.errstate(all="ignore"):  # infinities are for GradScaler to find
                self.reduced += like_device(self.reduced, result)
        elif result is not self.reduced:
            cast(result, self.reduced)
        self.reduced_before = True
        self._result = None
