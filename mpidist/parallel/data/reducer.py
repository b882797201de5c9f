"""`GradientReducer`: anyone's gradients, averaged over the ranks while more are being computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from mpidist._arguments import seconds
from mpidist._closing import Closing
from mpidist._types import MEAN, SUM, Array, ReduceOp
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import REDUCTIONS, is_device
from mpidist.errors import UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.parallel.data.bucket import BucketSizes
from mpidist.parallel.data.compression import Compression, Hook
from mpidist.parallel.data.layout import Layout
from mpidist.parallel.data.verify import Description, describe, verify_same

__all__ = ["GradientReducer"]


class GradientReducer(Closing):
    """Reduce named gradients over a group, many at a time, while others are being computed.

    Per step and rank, for any program that has gradients as arrays::

        np.matmul(x.T, dy, out=reducer.grads["weight"])   # write it where it will be sent from
        reducer.ready("weight")                           # complete; may start communicating
        ...
        reducer.wait()                                    # now reducer.grads hold the means

    Parameters
    ----------
    named_arrays : mapping of str to Array
        The arrays whose gradients are reduced, in the order in which forward uses them, the same
        on all ranks. Only names, shapes, dtypes and the kind of device are looked at.
    group : ProcessGroup
        The ranks taking part. The reducer makes and uses a duplicate of it, so that its messages
        never meet the caller's.
    op : ReduceOp, optional
        `MEAN` or `SUM`.
    compression : Compression or Hook, optional
        How gradients travel; as they are when omitted.
    sizes : BucketSizes, optional
        How many gradients travel together.
    also_verify : mapping of str to Array, optional
        Arrays that are not reduced, but whose names, shapes and dtypes must agree too.

    Attributes
    ----------
    grads : dict of str to Array
        One array per name, of its shape and dtype, to write the gradient into: views of flat
        buckets. They stay the same arrays, unless you call `relayout`.
    group : ProcessGroup
        The duplicate.
    op : ReduceOp
        As given.

    Raises
    ------
    CollectiveMismatchError
        On every rank, naming a rank and an array, if names, shapes, dtypes, their order, `op`,
        `compression` or `sizes` differ between ranks.
    UnsupportedOperationError
        On every rank, if `op` is neither MEAN nor SUM, or a dtype is neither float nor complex.

    Notes
    -----
    Collective over `group`; blocks. Costs one exchange of 32 bytes per rank, the duplicate, and
    the collective allocation of the buckets' memory (`ProcessGroup.empty`).

    [Note: order of buckets] Collectives match by the order in which they start, so every rank must
    start its buckets in the same order, whatever order its gradients come in. A bucket that is
    complete therefore waits until all buckets before it have started. Buckets are laid out in
    reverse order of the names, which is the order in which backward completes them if it goes the
    other way than forward. `relayout` takes the order in which they really came.

    References
    ----------
    Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training,
    section 3.2.
    """

    def __init__(
        self,
        named_arrays: Mapping[str, Array],
        group: ProcessGroup,
        *,
        op: ReduceOp = MEAN,
        compression: Compression | Hook | None = None,
        sizes: BucketSizes = BucketSizes(),  # noqa: B008 - frozen
        also_verify: Mapping[str, Array] | None = None,
    ) -> None:
        check_group(group, type(self).__name__)
        description = (
            *(describe("parameter", name, array) for name, array in named_arrays.items()),
            *(describe("buffer", name, array) for name, array in (also_verify or {}).items()),
            *_settings(op, compression, sizes),
        )
        # First together: what only one rank refuses would leave the others waiting for it.
        verify_same(description, group, operation="GradientReducer")
        _check(named_arrays, op)
        self.op = op
        self.group = group.duplicate(f"{group.name}/gradients")
        self._layout = Layout(named_arrays, self.group, compression=compression, sizes=sizes)
        self._names = frozenset(named_arrays)
        self._arrived: list[str] = []
        self._skipped: set[str] = set()
        self._launched = 0
        self._landed = 0
        assigned = self._layout.assign(named_arrays, list(named_arrays)[::-1])
        self._lay_out(named_arrays, assigned)

    def _lay_out(self, like: Mapping[str, Array], assigned: list[list[str]]) -> None:
        self._assigned = assigned
        self._buckets = self._layout.buckets(like, assigned)
        self._home = {name: bucket for bucket in self._buckets for name in bucket.grads}
        self.grads = {name: self._home[name].grads[name] for name in like}

    def ready(self, name: str) -> None:
        """Say that this rank's gradient `name` is complete in `grads[name]`.

        Parameters
        ----------
        name : str
            Whose it is. From now until `wait` returns, the array belongs to the reducer.

        Raises
        ------
        ValueError
            If there is no such name.
        RuntimeError
            If it is complete already.
        DistributedError
            If the reduction of an earlier bucket has failed.

        Notes
        -----
        Does not block. Starts every bucket whose turn it is ([Note: order of buckets]), and lets
        those under way make progress.
        """
        bucket = self._home.get(name)
        if bucket is None:
            known = ", ".join(list(self.grads)[:8])
            raise ValueError(f"GradientReducer: no gradient is named '{name}'; known: {known}")
        bucket.arrive(name)
        self._arrived.append(name)
        if not bucket.missing:
            self._launch_complete()
        self.progress()

    def progress(self) -> None:
        """Let the buckets under way make progress.

        `ready` does it, too. A computation that goes on for long without a gradient calls this
        now and then.

        Raises
        ------
        DistributedError
            If the reduction of a bucket has failed.

        Notes
        -----
        Local; does not block. Costs nothing while no bucket is under way.
        """
        # They end in the order in which they began, and asking one drives all.
        while self._landed < self._launched and self._buckets[self._landed].done():
            self._landed += 1

    def skip(self, name: str) -> None:
        """Say that this rank has no gradient `name` in this step; it counts as zeros.

        Parameters
        ----------
        name : str
            Whose gradient is missing. What stands in `grads[name]` is overwritten.

        Raises
        ------
        ValueError, RuntimeError, DistributedError
            As `ready`.
        """
        if name in self._home and name in self._home[name].missing:
            self.grads[name][...] = 0
            self._skipped.add(name)
        self.ready(name)

    def done(self) -> bool:
        """Whether every gradient has been reduced, so that `wait` will not block.

        Makes progress. Before every name is ready or skipped, it is False.
        """
        self.progress()
        return self._landed == len(self._buckets)

    def wait(self, timeout: float | None = None) -> frozenset[str]:
        """Wait until `grads` hold the reduction over all ranks, and begin the next step.

        Parameters
        ----------
        timeout : float, optional
            Seconds; the group's timeout when omitted.

        Returns
        -------
        frozenset of str
            The names that at least one rank had a gradient of; the same on all ranks. The
            gradients of others are zeros.

        Raises
        ------
        RuntimeError
            If some names are neither ready nor skipped, naming them; nothing has changed then.
        CollectiveTimeoutError
            If another rank's gradients did not come in time.

        Notes
        -----
        Collective over the group; blocks. Together with `ready`, each step costs one all-reduce
        per bucket; the last one also carries one number per name. Gradients on a device do not
        make the host wait, only the current stream; those numbers go over the host, in an
        all-reduce of their own.
        """
        self.check_complete("GradientReducer.wait")
        if timeout is not None:
            timeout = seconds(timeout, "GradientReducer.wait: timeout", least=0.0)
        deadline = None if timeout is None else time.monotonic() + timeout
        for bucket in self._buckets:
            bucket.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        used = self._used()
        for bucket in self._buckets:
            bucket.reset()
        self._arrived.clear()
        self._skipped.clear()
        self._launched = self._landed = 0
        return used

    def arrivals(self) -> list[str]:
        """Return the names in the order in which they became ready since the last `wait`.

        Returns
        -------
        list of str
            Every name once: those that were ready, in that order; then those that were skipped or
            have not come, in the reverse order of the names.
        """
        ready = [name for name in self._arrived if name not in self._skipped]
        came = set(ready)
        return ready + [name for name in reversed(self.grads) if name not in came]

    def relayout(self, order: Sequence[str]) -> None:
        """Lay the buckets out anew, in the order in which gradients are going to come.

        Parameters
        ----------
        order : sequence of str
            Every name once, the same order on all ranks: rank 0's `arrivals`, broadcast.

        Raises
        ------
        ValueError
            If `order` is another set of names.
        RuntimeError
            If some gradients have come since the last `wait`; nothing has changed then.

        Notes
        -----
        Local. `grads` are other arrays afterwards, with the values of those before. They lie in
        the same memory, so that the arrays before must not be used any more. Costs two copies of
        all gradients, and the memory of one in between; nothing if every bucket would hold the
        same gradients.
        """
        if len(order) != len(self._names) or set(order) != self._names:
            raise ValueError(f"GradientReducer.relayout: expected every name once, got {order}")
        if self._arrived:
            raise RuntimeError(
                f"GradientReducer.relayout on {self.group}: {len(self._arrived)} gradients have "
                "come already; wait() for all first"
            )
        assigned = self._layout.assign(self.grads, order)
        if [set(names) for names in assigned] == [set(names) for names in self._assigned]:
            return
        before = {name: grad.copy() for name, grad in self.grads.items()}
        self._lay_out(before, assigned)
        for name, grad in before.items():
            self.grads[name][...] = grad

    def place_of(self, name: str) -> tuple[FlatBuffer, str]:
        """Return the flat array that a gradient is a part of now, and the part's name."""
        return self._home[name].flat, name

    def check_complete(self, operation: str) -> None:
        """Raise an error that names what has not come, if anything has not.

        Parameters
        ----------
        operation : str
            Who asks; named in the error.

        Raises
        ------
        RuntimeError
            If some names are neither ready nor skipped.
        """
        missing = [name for name, bucket in self._home.items() if name in bucket.missing]
        if missing:
            raise RuntimeError(
                f"{operation} on {self.group}: {len(missing)} of {len(self.grads)} gradients have "
                f"not come: {', '.join(missing[:8])}; each must be complete once, or be skipped, "
                "before waiting (in a module: ctx.uses announces what backward adds)"
            )

    def close(self) -> None:
        """Release the reducer's duplicate of the group. `grads` stay valid."""
        self.group.close()

    def _launch_complete(self) -> None:
        """Start the buckets that are complete, in order; see [Note: order of buckets]."""
        while self._launched < len(self._buckets):
            bucket = self._buckets[self._launched]
            if bucket.missing:
                return
            self._launched += 1
            if self._launched == len(self._buckets):
                # All buckets before it are complete, so all names are known.
                bucket.flags[...] = 1
                if self._skipped:
                    bucket.flags[...] = [name not in self._skipped for name in self.grads]
            bucket.launch(self.group, self.op)

    def _used(self) -> frozenset[str]:
        """Return the names whose flag some rank has set."""
        if not self._buckets:
            return self._names
        flags = self._buckets[-1].flags != 0
        if flags.all():
            return self._names
        return frozenset(name for name, flag in zip(self.grads, flags, strict=True) if flag)


def _settings(
    op: ReduceOp, compression: Compression | Hook | None, sizes: BucketSizes
) -> Description:
    named = compression.name if isinstance(compression, Compression) else None
    return (
        ("argument 'op'", op.name if isinstance(op, ReduceOp) else repr(op)),
        ("argument 'compression'", named or ("a hook" if callable(compression) else "None")),
        ("argument 'sizes'", f"({sizes.first}, {sizes.rest}) bytes"),
    )


def _check(arrays: Mapping[str, Array], op: ReduceOp) -> None:
    if op not in (MEAN, SUM):
        raise UnsupportedOperationError(
            f"GradientReducer: op must be MEAN or SUM, got {op}; gradients are averaged or summed"
        )
    for name, array in arrays.items():
        if (MEAN, array.dtype) not in REDUCTIONS:
            raise UnsupportedOperationError(
                f"GradientReducer: '{name}' has dtype {array.dtype}; gradients are float or complex"
            )
        if array.dtype.kind == "c" and is_device(array):
            raise UnsupportedOperationError(
                f"GradientReducer: '{name}' is complex and lies on a device, where gradients are "
                "float; reduce it by all_reduce, or on the host"
            )
