"""`FSDP`: fully sharded data parallelism, a model whose every part is split over the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from mpidist._formatting import columns, format_bytes
from mpidist._types import MEAN, Array, ReduceOp
from mpidist.backends.work import Work
from mpidist.errors import UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.mesh import DeviceMesh
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module
from mpidist.nn.parameter import Parameter
from mpidist.parallel.clip import clip_grad_norm
from mpidist.parallel.data.data_parallel import DataParallel
from mpidist.parallel.sharded.flat_parameters import Cut
from mpidist.parallel.sharded.memory import MemoryUse
from mpidist.parallel.sharded.options import FSDPOptions, ShardingStrategy
from mpidist.parallel.sharded.parameter_shards import HOST
from mpidist.parallel.sharded.precision import Precision, inner_pass, input_gradient
from mpidist.parallel.sharded.sharded_model import ShardedModel
from mpidist.parallel.sharded.state import ModelState
from mpidist.parallel.sharded.units import UNIT_BYTES, Units

__all__ = ["FSDP"]

T = TypeVar("T")


class FSDP(DataParallel):
    """Fully sharded data parallel: of parameters, gradients and state each rank has a slice.

    ::

        fsdp = FSDP(build_model(), group)            # the model as if it were alone
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=1e-3))
        for step, (x, target) in enumerate(batches_of_this_rank):
            mode = Mode(training=True, step=step, sample_offset=group.rank * len(x))
            y, ctx = fsdp.forward(x, mode)
            loss, dy = cross_entropy(y, target)
            optimizer.backward(ctx, dy)              # reduce-scatters while it runs
            clip_grad_norm(optimizer.shards(), 1.0, group=fsdp.group)
            optimizer.step()                         # all ranks have the new parameters

    With N ranks and P bytes of parameters a rank's share is P / N of parameters, P / N of
    gradients, and as much of each array of the optimizer's state; and two message buffers of one
    unit. The result is that of `DDP` and the same optimizer.

    Parameters
    ----------
    module : Module
        The model, built alike on every rank. Parameters and buffers are overwritten with rank 0's.
    group : ProcessGroup or DeviceMesh
        The ranks taking part. Groups of its own are made of them. Of a mesh of two dimensions the
        first one replicates and the second one shards: ``DeviceMesh.by_node(world)``, or
        ``mesh["replicate", "shard"]`` of a larger one; the ranks along the second share a node.
    strategy : ShardingStrategy, optional
        What is split. When omitted, HYBRID_SHARD with a mesh of two dimensions, else FULL_SHARD.
        HYBRID_SHARD over a group is that over ``DeviceMesh.by_node(group)``.
    units : int, sequence of str or callable, optional
        Which parameters travel together. An int: at most so many bytes, 32 MiB when omitted; the
        units are the largest subtrees of the model that hold no more, neighbours together if they
        fit, and a larger parameter is one by itself, with its bias. Names of modules, in which
        ``*`` stands for anything, or a function of a name and a module: these modules are units,
        and all other parameters are one more.
    op : ReduceOp, optional
        `MEAN` or `SUM` of the ranks' gradients; see `DDP`.
    cut : Cut, optional
        Where units may be cut into slices.
    precision : Precision, optional
        In which dtypes layers compute, gradients are reduced and forward returns; that in which the
        model was built, when omitted. Shards keep it in any case.
    prefetch : int, optional
        How many units are gathered ahead of the one that computes, where parameters are gathered.
        Each takes memory of the size of the largest unit, once per node where it can be shared.
    offload : str or path, optional
        Where else to keep what would take memory. ``"host"``, for a model on a device: this rank's
        slices, their gradients and the optimizer's state are in host memory, and are updated there.
        Anything else is a directory, for a model on the host: parameters stand in a file there,
        once per node, and so does each rank's state of the optimizer, both mapped into memory.

    Attributes
    ----------
    module : Module
        The model. Its parameters are read-only views; where they are gathered, ``data`` raises
        outside the passes that need it.
    group : ProcessGroup
        The FSDP's own, of the same ranks, by local rank and then by node.
    units : tuple of Unit
        What travels together, in the order of a forward pass.
    strategy : ShardingStrategy
        What is split.
    cut : Cut
        Where units are cut.
    precision : Precision
        The dtypes.
    offload : str or None
        Where else to keep what would take memory.
    parameter_shards : ParameterShards
        The slices of this rank.
    model_state : ModelState
        What a checkpoint holds of the model, as `state_dict` returns it.
    has_optimizer : bool
        Whether a `ShardedOptimizer` updates the slices; there is one at a time.

    Raises
    ------
    TypeError
        If `module` is no Module, `strategy`, `cut` or `precision` is none of theirs, `offload` is
        no path, or `units` cannot be understood.
    CollectiveMismatchError
        On every rank, naming a rank, if names, shapes, dtypes, units or arguments differ between
        ranks. Nothing has been changed then.
    InvalidWorldSizeError
        If the strategy is HYBRID_SHARD over a group, and its nodes have different numbers of ranks.
    UnsupportedOperationError
        If a parameter is no float or complex; if `op` is neither MEAN nor SUM; if some parameters
        lie on a device and some do not; if the ranks over which HYBRID_SHARD shards are on several
        nodes; if a mesh has more than two dimensions, or a strategy other than its number of them
        says.
    OSError
        On every rank, naming one, if a directory for `offload` does not exist, cannot be written,
        or has too little space.
    ValueError
        If a name in `units` matches no module, a parameter is read-only, or none is trainable.

    Notes
    -----
    Collective over `group`; blocks. Costs a broadcast of every parameter and buffer, the groups,
    and the collective allocation of the parameters' and the buffers' memory.

    On one node nothing is gathered: parameters stand in memory that all ranks of the node see
    ([Note: parameters once per node] in `mpidist.parallel.sharded.stores`), and forward
    communicates nothing. Over several nodes, on a device, or without memory to share, FULL_SHARD
    gathers each unit for forward and for backward ([Note: gathered units] in
    `mpidist.parallel.sharded.unit_store`); then all passes but `backward_weight` are collective and
    block, inside `no_sync` as well. That costs a rank two gathers of P, divided by the ranks of its
    node where these share memory, and an all-reduce of 16 bytes for each unit and pass.

    A step costs, per rank, a reduce-scatter of each unit, an all-reduce of a byte per parameter,
    and two barriers. With HYBRID_SHARD this is within a node, but for the bytes, and this rank's
    slices of gradients are all-reduced over the nodes.

    A backward adds to the gradients of earlier ones, until `step` or `zero_grad`; the sums are
    slices, too, so that accumulating needs no whole gradients. `no_sync` saves the messages, at the
    price of whole gradients on each rank.

    The bits of parameters are those of `DDP`, as long as messages are long enough for sums in the
    order of the ranks, which they are from 32 KiB on. Over several nodes sums have another order.

    References
    ----------
    Rajbhandari, Rasley, Ruwase, He (2020), ZeRO: Memory Optimizations Toward Training Trillion
    Parameter Models, sections 5.2 and 5.3. Zhao et al. (2023), PyTorch FSDP: Experiences on Scaling
    Fully Sharded Data Parallel, section 3.2.
    """

    splits_gradients = True

    def __init__(  # noqa: PLR0913 - all but two by name, with a default
        self,
        module: Module,
        group: ProcessGroup | DeviceMesh,
        *,
        strategy: ShardingStrategy | None = None,
        units: Units = UNIT_BYTES,
        op: ReduceOp = MEAN,
        cut: Cut = Cut.ROWS,
        precision: Precision = Precision(),  # noqa: B008 - frozen
        prefetch: int = 1,
        offload: str | os.PathLike[str] | None = None,
    ) -> None:
        what = type(self).__name__
        if not isinstance(module, Module):
            raise TypeError(f"{what}: expected {what}(model, group), got a {type(module).__name__}")
        mesh = group if isinstance(group, DeviceMesh) else None
        group = group.group if isinstance(group, DeviceMesh) else group
        check_group(group, what)
        if strategy is None:
            two = mesh is not None and mesh.ndim == 2
            strategy = ShardingStrategy.HYBRID_SHARD if two else ShardingStrategy.FULL_SHARD
        options = FSDPOptions(strategy, op, cut, units, precision, prefetch, offload, mesh)
        options = options.agreed(module, group)
        self.units = options.find_units(module, group)
        self.strategy = strategy
        self.cut = cut
        self.precision = precision
        self._sharded = ShardedModel(module, group, self.units, options, strategy=what)
        self.parameter_shards = self._sharded.shards
        self.offload = self.parameter_shards.offload
        self._gathers = self._sharded.gathers
        self._unit_gradients = self._sharded.gradients
        super().__init__(module, self._sharded.group, op=op, gradients=self._unit_gradients)
        self.model_state = ModelState(self, self.parameter_shards)
        self.casts = precision.parameters is not None or precision.output is not None
        self.has_optimizer = False
        self._passes = 0
        self._whole = False

    def __repr__(self) -> str:
        """Return the group, and a table of the units."""
        rows = [
            (
                format_bytes(unit.nbytes),
                str(unit.dtype),
                "" if unit.trainable else "frozen",
                unit.name,
            )
            for unit in self.units
        ]
        head = f"FSDP over {self.group!r}, {self.strategy.name}, {len(self.units)} units:"
        return "\n".join([head, *columns(("bytes", "dtype", "", "unit"), rows, left=2)])

    # -- a step --------------------------------------------------------------------------------

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Run the model forward on this rank's samples, as `DDP.forward`.

        Notes
        -----
        Local, and after an exception the model can be used at once. Where parameters are gathered
        it is collective over the group and blocks; a rank that raises then does so when the others
        have ended their pass, and all can run it again. Input and output are cast as `precision`
        says; in backward their gradients are.
        """
        with self._within_pass("forward"):
            y, ctx = super().forward(self.precision.cast_input(x), mode)
        return self.precision.cast_output(y), self.precision.context(ctx, x, y)

    def ibackward(self, ctx: Context, dy: Array) -> tuple[Array, Work[None]]:
        """Run backward, and return while gradients are under way, as `DDP.ibackward`."""
        dx, work = super().ibackward(*inner_pass(ctx, dy))
        return input_gradient(ctx, dx), work

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Run the first half of backward, as `DDP.backward_input`.

        Notes
        -----
        Where parameters are gathered, collective over the group; blocks.
        """
        with self._within_pass("backward_input"):
            dx, wctx = super().backward_input(*inner_pass(ctx, dy))
        return input_gradient(ctx, dx), wctx

    @contextmanager
    def no_sync(self, *, nodes: bool = False) -> Iterator[None]:
        """Add up gradients without messages; the first backward outside reduces them all.

        Parameters
        ----------
        nodes : bool, optional
            With HYBRID_SHARD: leave out only the sum over the nodes (the first dimension of the
            mesh). Backward reduces within each node, and adds up slices of P / N bytes per rank in
            place of whole gradients.

        Raises
        ------
        UnsupportedOperationError
            If `nodes` is set with another strategy, whose sums have no such stage.

        Notes
        -----
        Sends no gradient; see `DDP.no_sync`. Where parameters are gathered, passes inside are
        collective all the same. With `nodes` each backward inside is collective over the ranks of
        a node. Use it on all ranks alike.
        """
        if nodes and self.strategy is not ShardingStrategy.HYBRID_SHARD:
            raise UnsupportedOperationError(
                f"FSDP.no_sync on {self.group}: nodes=True leaves out the sum over nodes of "
                f"HYBRID_SHARD, and {self.strategy.name} has no such stage; use no_sync(), or no "
                "context, with which gradients are added up as slices"
            )
        with self._unit_gradients.without_replicas() if nodes else super().no_sync():
            yield

    def shards(self) -> list[Parameter]:
        """Return this rank's slices of the trainable parameters, with their reduced gradients.

        Returns
        -------
        list of Parameter
            One per parameter, in order, under the name of the whole one; some may be empty. Its
            `part` says which elements it has. ``grad`` is None where no rank had one. Only the
            step of a `ShardedOptimizer` may write ``data``: others are reading.

        Raises
        ------
        RuntimeError
            If a parameter has a gradient of this rank that was never reduced.

        Notes
        -----
        Waits for the gradients; else local. For `clip_grad_norm` and `GradScaler.unscale`.
        """
        self.wait()
        self._unit_gradients.check_reduced()
        return list(self.parameter_shards.shards.values())

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale all gradients down together, as `clip_grad_norm` of `shards` over the group."""
        return clip_grad_norm(self.shards(), max_norm, group=self.group)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters; touches no array.

        Notes
        -----
        Waits for gradients under way, so that a step may be left out; else local.
        """
        self.wait()
        self._unit_gradients.zero()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters readable, outside the passes of the model.

        Raises
        ------
        RuntimeError
            If it is entered within a pass.

        Notes
        -----
        For an evaluation by hand, or an export. No step is made inside. Where parameters are
        gathered it is collective over the group and blocks: they are gathered into new memory, P
        bytes once per node where it can be shared, and passes inside are local. Elsewhere they are
        readable at any time, and it does nothing.
        """
        if self._passes:
            raise RuntimeError(
                f"FSDP.whole on {self.group}: called within a pass of the model; enter it before "
                "forward, or after backward"
            )
        before, self._whole = self._whole, True
        try:
            with self._gathers.whole() if self._gathers else nullcontext():
                yield
        finally:
            self._whole = before

    def check_can_write(self, operation: str) -> None:
        """Raise RuntimeError, which names the operation, if parameters must not be written now."""
        if self._whole or self._passes:
            where = "inside FSDP.whole()" if self._whole else "within a pass of the model"
            raise RuntimeError(
                f"{operation} on {self.group}: called {where}, where parameters are read; leave it "
                "first"
            )

    def _run_backward(
        self, name: str, uses: Mapping[Parameter, int], run: Callable[[], T]
    ) -> tuple[T, Work[None]]:
        reduces = self._syncing and name == "backward"

        def gathered() -> T:  # only once nothing is wrong that would end the pass on this rank
            with self._within_pass(name, reduces=reduces):
                return run()

        if reduces:
            gathers = self._gathers is not None and not self._whole
            self._unit_gradients.wait_only_for(0 if gathers else None)
        return super()._run_backward(name, uses, gathered)

    @contextmanager
    def _within_pass(self, name: str, *, reduces: bool = False) -> Iterator[None]:
        """Count the passes under way, also where one raises, and gather what they need."""
        gathers = None if name == "backward_weight" else self._gathers
        gradients = self._unit_gradients if reduces else None
        self._passes += 1
        try:
            with gathers.within_pass(name, gradients) if gathers else nullcontext():
                yield
        finally:
            self._passes -= 1

    # -- states --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the model's state, as `ModelState.state_dict`."""
        return self.model_state.state_dict()

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise unless a state fits, and may be loaded now; see `DDP.check_state_dict`."""
        self.check_can_write("FSDP.load_state_dict")
        super().check_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy values into the model, each rank into its slices; `ModelState.load_state_dict`."""
        self.model_state.load_state_dict(state)

    def memory_use(self) -> MemoryUse:
        """Count what this rank holds; an equal share of parameters that are shared.

        Returns
        -------
        MemoryUse
            For `memory_ledger`, without an optimizer's state, which
            `ShardedOptimizer.memory_use` adds. With the padding of parameters to cache lines.

        Notes
        -----
        Local.
        """
        slots = self.parameter_shards.store.buffers_nbytes
        shards, gradients = self.parameter_shards, self._unit_gradients.shards_nbytes
        on_host = gradients if self.offload == HOST else 0
        return MemoryUse(
            parameters=shards.nbytes,
            gradients=gradients - on_host,
            optimizer_state=0,
            buffers=slots + self._unit_gradients.buffers_nbytes,
            peak_buffers=slots + self._unit_gradients.peak_buffers_nbytes,
            offloaded=shards.offloaded_nbytes + on_host,
        )

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is under way, and release the FSDP's group.

        The parameters stay as they are, readable unless they are gathered: copy those inside
        `whole` before. To write them again, give each memory of its own: ``parameter.data =
        parameter.data.copy()``.
        """
        self.zero_grad()
        self._sharded.close()
