"""`parallelize`: cut the layers of a model over the ranks, by a plan of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import is_device
from mpidist.arrays.shards import Part
from mpidist.errors import UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.mesh import DeviceMesh
from mpidist.nn.attention import CausalSelfAttention
from mpidist.nn.members import members, replace_members
from mpidist.nn.module import Module
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.broadcasts import broadcast_in_place
from mpidist.parallel.data.verify import describe, verify_same
from mpidist.parallel.tensor.attention import Heads
from mpidist.parallel.tensor.cuts import LayerCut, Split
from mpidist.parallel.tensor.flow import CUT_LAYERS, Flow
from mpidist.parallel.tensor.vocabulary import Vocabulary

__all__ = ["cut_table", "parallelize"]


def parallelize(
    module: Module, ranks: ProcessGroup | DeviceMesh, plan: Mapping[str, Split]
) -> Module:
    """Cut layers of a model over the ranks, in place: tensor parallelism.

    ::

        parallelize(
            model,
            mesh["tp"],
            {"*.attention": Heads(), "*.mlp.0": Columns(), "*.mlp.2": Rows()},
        )

    Parameters
    ----------
    module : Module
        The whole model, with the same layers on all ranks, on the host.
    ranks : ProcessGroup or DeviceMesh
        The ranks that work together on the same samples.
    plan : mapping of str to Split
        How layers are cut, by their names, in which ``*`` stands for any characters. What is not
        named stays whole.

    Returns
    -------
    Module
        `module` itself, or what stands for it if it is a layer that is cut.

    Raises
    ------
    ValueError
        Listing all that does not fit: a name that matches nothing, or what it matches cannot be cut
        so; a parameter that two layers share and cut differently, that is cut already, or whose
        gradient lies in the memory of a strategy; neighbours of which one gives what the other
        does not take. On every rank, with its own parts; nothing has been changed then.
    CollectiveMismatchError
        On every rank, naming a rank and a parameter or buffer, if plans, names, shapes or dtypes
        differ. Nothing has been changed then.
    UnsupportedOperationError
        If a parameter lies on a device.
    TypeError
        If `module` is no Module, or `plan` has something else than a `Split`.

    Notes
    -----
    Collective over the ranks; blocks. Costs one all-gather of 32 bytes per rank, and a broadcast of
    every whole parameter and buffer: all begin with rank 0's values.

    `Parameter` objects, names and layer indices stay what they are. Those that are cut keep their
    values' part in `data`, and all say in `part` what of the whole they are, so that states are
    parts of whole arrays (`ShardedArray`), and `clip_grad_norm` over the group counts what all have
    once. Do it before a `DDP` or an optimizer is made of the model.

    All ranks give the model the same samples, and the same `Mode`. Each then has the loss and, of
    what is whole, the gradients with the same bits. Random layers draw what one process would.
    """
    if not isinstance(module, Module):
        raise TypeError(
            "parallelize: expected parallelize(model, ranks, plan), got a "
            f"{type(module).__name__} first; cut the model inside a DDP before that is made"
        )
    group = ranks.group if isinstance(ranks, DeviceMesh) else ranks
    check_group(group, "parallelize")
    for pattern, split in plan.items():
        if not isinstance(split, Split):
            raise TypeError(f"parallelize: expected a Split for {pattern!r}, got {split!r}")
    cuts = _Cuts(module, group, plan)
    verify_same(cuts.description(), group, operation="parallelize")
    if cuts.problems:
        raise ValueError(
            f"parallelize on {group}: the plan does not fit the model; nothing was changed:\n  "
            + "\n  ".join(cuts.problems)
        )
    cuts.apply()
    if group.rank == 0:
        for warning in cuts.warnings:
            group.log.warning("parallelize on %s: %s", group, warning)
        group.log.info("parallelize on %s:\n%s", group, cut_table(module))
    return cuts.layers.get(id(module), module)


class _Cuts:
    """What a plan makes of a model, before anything of it is changed."""

    def __init__(self, module: Module, group: ProcessGroup, plan: Mapping[str, Split]) -> None:
        self._module = module
        self._group = group
        self._plan = plan
        self._named = dict(module.named_parameters())
        self.layers: dict[int, Module] = {}
        self._splits: dict[int, Split] = {}
        self.parts: dict[Parameter, Part] = {}
        self.warnings: list[str] = []
        self.problems = [text for name, p in self._named.items() for text in _not_ready(name, p)]
        # Of a wrapper and what it wraps, which have one name, the latter.
        self._modules = dict(module.named_modules())
        for name, split in self._matches():
            try:
                self._add(name, split, split.cut(self._modules[name], group))
            except ValueError as error:
                self.problems.append(f"'{name}': {split}: {error}")
        self._check_ties()
        self._check_attention()
        flow = Flow(self.layers)
        after = flow.through("", module, None)
        self.problems += flow.problems
        if isinstance(after, Part) and not any(
            isinstance(s, Vocabulary) for s in self._splits.values()
        ):
            self.problems.append(
                "the model returns a part of its outputs on each rank; cut its last layer by "
                "Columns(gather=True), or by Vocabulary(), whose loss is vocabulary_cross_entropy"
            )
        self._dropouts = flow.dropouts

    def description(self) -> tuple[tuple[str, str], ...]:
        """Return what has to be the same on all ranks."""
        return (
            *((f"the plan of {pattern!r}", repr(split)) for pattern, split in self._plan.items()),
            *((f"parameter '{n}'", f"{p.shape} {p.dtype}") for n, p in self._named.items()),
            *(describe("buffer", name, array) for name, array in self._module.named_buffers()),
            # Their texts name the rank's own parts.
            ("whether the plan fits", repr(not self.problems)),
        )

    def apply(self) -> None:
        """Give all ranks the values of rank 0, cut the parameters, and exchange the layers."""
        arrays = [parameter.data for parameter in self._named.values()]
        broadcast_in_place(
            [*arrays, *(array for _, array in self._module.named_buffers())], self._group
        )
        for parameter in self._named.values():
            if parameter in self.parts:
                parameter.cut(self.parts[parameter])
            else:
                whole = Box.whole(parameter.shape)
                parameter.part = Part(parameter.shape, ((whole, whole),), self._group.rank == 0)
        for dropout, features in self._dropouts.items():
            dropout.part = features
        for _, parent in tuple(self._module.named_modules()):
            replace_members(parent, self.layers)

    def _matches(self) -> Iterator[tuple[str, Split]]:
        """Yield the names that the plan matches; a problem where none is, or two differ."""
        chosen: dict[str, tuple[str, Split]] = {}
        for pattern, split in self._plan.items():
            names = [name for name in self._modules if fnmatchcase(name, pattern)]
            if not names:
                known = ", ".join(map(repr, self._modules))
                self.problems.append(f"{pattern!r} matches no module; there are {known}")
            for name in names:
                other, first = chosen.setdefault(name, (pattern, split))
                if first != split:
                    self.problems.append(
                        f"'{name}' is cut in two ways: {other!r}: {first}, and {pattern!r}: {split}"
                    )
        for name, (_, split) in chosen.items():
            yield name, split

    def _add(self, name: str, split: Split, cut: LayerCut) -> None:
        if not self.layers.keys().isdisjoint(cut.layers):
            raise ValueError("a module around it, or inside, is cut, too; cut one of them")
        self.layers.update(cut.layers)
        self._splits.update(dict.fromkeys(cut.layers, split))
        if cut.warning:
            self.warnings.append(f"'{name}': {cut.warning}")
        for parameter, part in cut.parts.items():
            if self.parts.setdefault(parameter, part) != part:
                raise ValueError(
                    f"parameter '{parameter.name}' is shared with a layer that is cut differently"
                )

    def _check_ties(self) -> None:
        """Refuse parameters that are cut in one layer and whole in another that shares them."""
        cut = {id(layer) for layer in self.layers.values()} | self.layers.keys()
        for name, module in self._modules.items():
            if id(module) in cut:
                continue
            for attribute, value in vars(module).items():
                for _, parameter in members(attribute, value, (Parameter, Module)):
                    if parameter in self.parts:
                        self.problems.append(
                            f"'{name}' shares parameter '{parameter.name}', which another layer "
                            "cuts; cut it in the same way"
                        )

    def _check_attention(self) -> None:
        """Refuse to cut the layers of an attention but by whole heads."""
        for name, module in self._modules.items():
            if isinstance(module, CausalSelfAttention):
                splits = [self._splits.get(id(layer)) for layer in (module.qkv, module.proj)]
                if any(split not in (None, Heads()) for split in splits):
                    self.problems.append(f"'{name}': cut an attention by Heads(), not its layers")


def _not_ready(name: str, parameter: Parameter) -> Iterator[str]:
    """Yield why a parameter cannot be cut now."""
    if is_device(parameter.like):
        raise UnsupportedOperationError(
            f"parallelize: parameter '{name}' lies on a device, where tensor parallelism is not "
            "supported; keep the model on the host"
        )
    if parameter.part is not None:
        yield f"parameter '{name}' is a part of a whole one already"
    elif parameter.is_attached or parameter.is_sealed or not parameter.data.flags.writeable:
        yield (
            f"parameter '{name}' belongs to a DDP, an FSDP or a ShardedOptimizer; make those of "
            "the cut model"
        )


def cut_table(module: Module) -> str:
    """Return what this rank has of each parameter of a model, and what its layers send.

    Parameters
    ----------
    module : Module
        After `parallelize`.

    Returns
    -------
    str
        One line per parameter: name, shape of the whole, shape here, bytes here, and what its layer
        sends for each pass over a batch.

    Notes
    -----
    Local.
    """
    sent: dict[Parameter, list[str]] = {}
    for _, layer in module.named_modules():
        if isinstance(layer, CUT_LAYERS):
            sent.setdefault(layer.weight, []).extend(layer.exchanges)
    rows = [("parameter", "whole", "here", "bytes", "sent")]
    for name, parameter in module.named_parameters():
        whole = parameter.shape if parameter.part is None else parameter.part.shape
        shapes = (str(whole), str(parameter.shape) if whole != parameter.shape else "all")
        rows.append((name, *shapes, f"{parameter.nbytes:,}", "; ".join(sent.get(parameter, []))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
