"""`GradientReducer`: anyone's gradients, averaged over the ranks while more are being computed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from mpidist._closing import Closing
from mpidist._types import MEAN, SUM, Array, ReduceOp
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import REDUCTIONS, is_device
from mpidist.backends.work import Deadline
from mpidist.errors import UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.buckets import (
    BucketMemory,
    BucketSizes,
    assign_buckets,
)
from mpidist.parallel.data.compression import Compression, Hook, exchange_for
from mpidist.parallel.data.verify import Description, describe, verify_same

__all__ = ["GradientReducer", "ParameterGradients", "check_known"]


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
        never match the caller's.
    op : ReduceOp, optional
        `MEAN` or `SUM` of the ranks' gradients.
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
        The duplicate of the given group, over which messages go.
    op : ReduceOp
        How the ranks' gradients are joined: `MEAN` or `SUM`.

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
    start its buckets in the same order, whatever the order of its gradients. A bucket that is
    complete therefore waits until all buckets before it have started. Buckets are laid out in
    reverse order of the names, which is the order in which backward completes them if it goes the
    other way than forward. `relayout` sets the order in which they really arrived.

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
        self._compression = compression
        self._sizes = sizes
        # A hook may make anything of numbers.
        self._memory = BucketMemory(named_arrays, self.group, own_flags=callable(compression))
        self._names = frozenset(named_arrays)
        self._arrived: list[str] = []
        self._skipped: set[str] = set()
        self._launched = 0
        self._landed = 0
        self._lay_out(named_arrays, assign_buckets(named_arrays, sizes))

    def _lay_out(self, like: Mapping[str, Array], assigned: list[list[str]]) -> None:
        self._assigned = assigned
        self._buckets = self._memory.buckets(like, assigned)
        for bucket in self._buckets:
            # Flags that travel alone are summed as they are, whatever happens to gradients.
            compression = self._compression if bucket.grads else None
            bucket.exchange = exchange_for(compression, bucket, self.group, self.op)
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.grads}
        self.grads = {name: self._bucket_of[name].grads[name] for name in like}

    def ready(self, name: str) -> None:
        """Say that this rank's gradient `name` is complete in `grads[name]`.

        Parameters
        ----------
        name : str
            Name of the gradient. From now until `wait` returns, the array belongs to the reducer.

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
        bucket = self._bucket_of.get(name)
        if bucket is None:
            known = ", ".join(list(self.grads)[:8])
            raise ValueError(f"GradientReducer: no gradient is named '{name}'; known: {known}")
        if name not in bucket.missing:
            raise RuntimeError(
                f"the gradient of '{name}' is complete already and its bucket may be in "
                "communication; wait() before the next round"
            )
        bucket.missing.remove(name)
        self._arrived.append(name)
        if not bucket.missing:
            self._launch_complete()
        # MPI moves messages only while it is called, and backward calls nothing else of it.
        self.progress()

    def progress(self) -> None:
        """Let the buckets under way make progress.

        `ready` does it, too. Call it now and then in a computation that takes long without
        a gradient.

        Raises
        ------
        DistributedError
            If the reduction of a bucket has failed.

        Notes
        -----
        Local; does not block. Costs nothing while no bucket is under way.
        """
        # They end in the order in which they began, and asking one drives all.
        while self._landed < self._launched:
            work = self._buckets[self._landed].work
            if work is None or not work.done():
                return
            self._landed += 1

    def skip(self, name: str) -> None:
        """Say that this rank has no gradient `name` in this step; it counts as zeros.

        Parameters
        ----------
        name : str
            Name of the gradient. `grads[name]` is overwritten with zeros.

        Raises
        ------
        ValueError, RuntimeError, DistributedError
            As `ready`.
        """
        if name in self._bucket_of and name in self._bucket_of[name].missing:
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
            If another rank's gradients did not arrive in time.

        Notes
        -----
        Collective over the group; blocks. Together with `ready`, each step costs one all-reduce
        per bucket; the last one also carries one number per name. Gradients on a device do not
        make the host wait, only the current stream; those numbers go over the host, in an
        all-reduce of their own.
        """
        self.check_complete("GradientReducer.wait")
        deadline = Deadline(timeout, "GradientReducer.wait: timeout")
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait(deadline.left)
        used = self._used()
        for bucket in self._buckets:
            bucket.work, bucket.missing = None, set(bucket.grads)
        # Ready for the next step: all gradients are missing again.
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
            are still missing, in the reverse order of the names.
        """
        ready = [name for name in self._arrived if name not in self._skipped]
        known = set(ready)
        return ready + [name for name in reversed(self.grads) if name not in known]

    def relayout(self, order: Sequence[str]) -> None:
        """Lay the buckets out anew, in the order in which gradients will arrive.

        Parameters
        ----------
        order : sequence of str
            Every name once, the same order on all ranks: rank 0's `arrivals`, broadcast.

        Raises
        ------
        ValueError
            If `order` is another set of names.
        RuntimeError
            If some gradients have arrived since the last `wait`; nothing has changed then.

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
        assigned = assign_buckets({name: self.grads[name] for name in reversed(order)}, self._sizes)
        if [set(names) for names in assigned] == [set(names) for names in self._assigned]:
            return
        # The new layout lies in the same memory, so the values have to be kept meanwhile.
        before = {name: grad.copy() for name, grad in self.grads.items()}
        self._lay_out(before, assigned)
        for name, grad in before.items():
            self.grads[name][...] = grad

    def location_of(self, name: str) -> tuple[FlatBuffer, str]:
        """Return the flat array that a gradient is a part of now, and the part's name."""
        return self._bucket_of[name].flat, name

    def check_complete(self, operation: str) -> None:
        """Raise an error that names the gradients that are missing, if any are.

        Parameters
        ----------
        operation : str
            The caller; named in the error.

        Raises
        ------
        RuntimeError
            If some names are neither ready nor skipped.
        """
        missing = [name for name, bucket in self._bucket_of.items() if name in bucket.missing]
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
            assert bucket.exchange is not None, "it has been laid out"
            bucket.work = bucket.exchange()

    def _used(self) -> frozenset[str]:
        """Return the names whose flag some rank has set."""
        if not self._buckets:
            return self._names
        flags = self._buckets[-1].flags != 0
        if flags.all():
            return self._names
        return frozenset(name for name, flag in zip(self.grads, flags, strict=True) if flag)


class ParameterGradients:
    """Lets parameters write their gradients into a reducer's buckets, step by step.

    Parameters
    ----------
    named : mapping of str to Parameter
        The parameters; from now on their gradients live in `reducer.grads`.
    reducer : GradientReducer
        Of the same names, shapes and dtypes.

    Attributes
    ----------
    names : tuple of str
        Of the parameters, in order.
    """

    def __init__(self, named: Mapping[str, Parameter], reducer: GradientReducer) -> None:
        self.names = tuple(named)
        self._names = {parameter: name for name, parameter in named.items()}
        self._reducer = reducer
        self._reduced = False  # the gradients, unless zeroed since, are those of all ranks
        self._attach()

    def expect(self, uses: Mapping[Parameter, int]) -> None:
        """Let every parameter count its contributions; those that expect none are complete."""
        idle = []
        for parameter in self._names:
            count = uses.get(parameter, 0)
            parameter.expect(count, self._on_ready)
            if not count:
                idle.append(parameter)
        # Only now, since a complete bucket starts at once, and all must be counting by then.
        for parameter in idle:
            # It may hold what earlier micro-batches gave it.
            none = parameter.unreduced_grad() is None
            (self._reducer.skip if none else self._reducer.ready)(self._names[parameter])

    def accumulate(self) -> None:
        """Let the backward that follows add to the gradients of this rank."""
        self._reduced = False

    def progress(self) -> None:
        """Let the buckets under way make progress."""
        self._reducer.progress()

    def done(self) -> bool:
        """Whether `wait` will not block."""
        return self._reducer.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for all buckets, and give the parameters that some rank used the reduction."""
        self._take_over(self._reducer.wait(timeout))
        self._reduced = True

    def arrivals(self) -> list[str]:
        """Return the names in the order in which the gradients came, as the reducer does."""
        return self._reducer.arrivals()

    def _on_ready(self, parameter: Parameter) -> None:
        self._reducer.ready(self._names[parameter])

    def release(self) -> None:
        """End the counting; any number of contributions is allowed again."""
        for parameter in self._names:
            parameter.release()

    def _take_over(self, used: frozenset[str]) -> None:
        for parameter, name in self._names.items():
            parameter.release()
            # Some other rank used it: the reduction is this rank's first contribution.
            if parameter.unreduced_grad() is None and name in used:
                parameter.add_grad(self._reducer.grads[name])

    def relayout(self, order: Sequence[str]) -> None:
        """Let gradients lie in this order from now on, those present too."""
        present = [parameter for parameter in self._names if parameter.grad is not None]
        for parameter in present:
            # `attach` would copy from memory where something else lies by then.
            parameter.zero_grad()
        self._reducer.relayout(order)
        self._attach()
        for parameter in present:
            parameter.add_grad(self._reducer.grads[self._names[parameter]])

    def _attach(self) -> None:
        for parameter, name in self._names.items():
            parameter.attach(self._reducer.grads[name], location=self._reducer.location_of(name))

    # -- misuse --------------------------------------------------------------------------------

    def check(self, uses: Mapping[Parameter, int]) -> None:
        """Raise what would go wrong in a backward pass, before it begins.

        Raises
        ------
        RuntimeError
            If a sum over the ranks has not been zeroed, and so would be summed again; if a
            parameter is not ours; if something else has called `Parameter.attach`.
        """
        # A mean of equal gradients is the same again; a sum would count them once per rank.
        if self._reduced and self._reducer.op is not MEAN:
            self._check_zeroed()
        self._check_owned(uses)

    def check_complete(self, operation: str) -> None:
        """Raise an error that names the gradients that are missing, if any are."""
        self._reducer.check_complete(operation)

    def _check_zeroed(self) -> None:
        for parameter, name in self._names.items():
            if parameter.grad is not None:
                raise RuntimeError(
                    f"DDP on {self._reducer.group}: parameter '{name}' still holds the sum over "
                    "all ranks that an earlier backward gave, and op=SUM would count it once per "
                    "rank; zero_grad() before the first backward of a step, and all but its last "
                    "one inside no_sync()"
                )

    def _check_owned(self, uses: Mapping[Parameter, int]) -> None:
        check_known(uses, self._names, "DDP", self._reducer.group)
        grads = self._reducer.grads
        for parameter, name in self._names.items():
            if parameter.grad_memory is not grads[name]:
                raise RuntimeError(
                    f"DDP on {self._reducer.group}: the gradient of parameter '{name}' does not "
                    "live in this DDP's bucket any more; something else has called attach(), "
                    "perhaps a second DDP over the same module, or the model was moved by to()"
                )


def check_known(
    uses: Mapping[Parameter, int], known: Container[Parameter], strategy: str, group: ProcessGroup
) -> None:
    """Raise RuntimeError if a parameter is used that came to the module later."""
    for parameter in uses:
        if parameter not in known:
            raise RuntimeError(
                f"{strategy} on {group}: parameter '{parameter.name}' was used, but was not part "
                f"of the module, or was frozen, when {strategy} was made; change the module first, "
                "then wrap it"
            )


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
