"""Which features of the activations each module gets: whether neighbours fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from mpidist.arrays.shards import Part
from mpidist.nn.containers import Recompute, Residual, Sequential
from mpidist.nn.dropout import Dropout
from mpidist.nn.layers import Embedding, Linear
from mpidist.nn.module import Module
from mpidist.parallel.tensor.cuts import Features
from mpidist.parallel.tensor.linear import ColumnLinear, RowLinear
from mpidist.parallel.tensor.vocabulary import VocabularyEmbedding

__all__ = ["CUT_LAYERS", "Flow"]

CUT_LAYERS = (ColumnLinear, RowLinear, VocabularyEmbedding)
_CONTAINERS = (Sequential, Residual, Recompute)


@dataclass(frozen=True, slots=True)
class UnknownFeatures:
    """Of an activation in a class of which it is not known what it does between its modules.

    Parameters
    ----------
    layer : str
        A module there that gives or takes a part of the features.
    owner : str
        The class.
    """

    layer: str
    owner: str


_Features: TypeAlias = Features | UnknownFeatures


class Flow:
    """Follow activations through a model, layer by layer, before anything of it is changed.

    What a container does with its layers is known of `Sequential`, `Residual` and `Recompute`. A
    module of another class with modules inside gets all features and returns all; what it does in
    between is its author's, and each of its modules is looked at by itself. Where some of them give
    or take a part of the features, those of another are known only by a layer that fixes them.

    Parameters
    ----------
    layers : mapping of int to Module
        The cut layers, by the identity of the modules in whose places they will be.

    Attributes
    ----------
    problems : list of str
        Where neighbours do not fit.
    dropouts : dict of Dropout to Features
        What each has as its input.
    """

    def __init__(self, layers: Mapping[int, Module]) -> None:
        self._layers = layers
        self.problems: list[str] = []
        self.dropouts: dict[Dropout, Features] = {}

    def through(self, name: str, module: Module, features: _Features) -> _Features:
        """Return which features a rank has after a module, if it has these before.

        Parameters
        ----------
        name : str
            Of the module.
        module : Module
            As it is now.
        features : Part, None or UnknownFeatures
            Of its input.
        """
        layer = self._layer(module)
        if isinstance(layer, CUT_LAYERS):
            self._expect(name, layer, layer.takes, features)
            return layer.gives
        if isinstance(module, Sequential):
            for child_name, child in module.named_children():
                features = self.through(_join(name, child_name), child, features)
            return features
        if isinstance(module, (Residual, Recompute)):
            ((child_name, child),) = module.named_children()
            after = self.through(_join(name, child_name), child, features)
            if isinstance(module, Residual):
                self._add(name, features, after)
            return after
        if module.elementwise_blocks:
            if isinstance(module, Dropout):
                self._drop(name, module, features)
            return self._joined(name, module, features)
        self._expect(name, module, None, features)
        return self._inside(name, module, features)

    def _joined(self, name: str, module: Module, features: _Features) -> _Features:
        """Return what is left of features of which equal blocks are joined."""
        blocks = module.elementwise_blocks
        if not isinstance(features, Part) or blocks == 1:
            return features
        width, ranges = features.shape[0] // blocks, features.ranges(0)
        first = ranges[: len(ranges) // blocks]
        if ranges != [(i * width + start, size) for i in range(blocks) for start, size in first]:
            self.problems.append(
                f"'{name}', a {type(module).__name__}, joins {blocks} blocks of features, which "
                f"are not cut alike: cut the layer before by Columns(blocks={blocks})"
            )
        return Part.of_ranges((width,), 0, first)

    def _inside(self, name: str, module: Module, features: _Features) -> _Features:
        """Look at each module in one of another class; return what the latter gives."""
        children = {_join(name, child): below for child, below in module.named_children()}
        parts = [child for child, below in children.items() if any(self._ends(below))]
        unknown = features if isinstance(features, UnknownFeatures) else None
        between = UnknownFeatures(parts[0], type(module).__name__) if parts else unknown
        for child, below in children.items():
            self.through(child, below, self._takes(below, between))
        if self._ends(module)[1]:
            return between
        # Their outputs do not depend on what a module of another class may have in between.
        fixed = any(isinstance(below, (Linear, Embedding)) for _, below in module.named_modules())
        return None if fixed else unknown

    def _takes(self, module: Module, unknown: UnknownFeatures | None) -> _Features:
        """Return which features a module needs, if its first layers say so."""
        for layer in self._steps(module):
            if isinstance(layer, CUT_LAYERS):
                return layer.takes
            if layer.elementwise_blocks != 1:
                return unknown
        return unknown

    def _ends(self, module: Module) -> tuple[bool, bool]:
        """Return whether a module needs a part of the features, and whether it gives one."""
        ends = [self._ends_of(step) for step in self._steps(module) if not step.elementwise_blocks]
        return (ends[0][0], ends[-1][1]) if ends else (False, False)

    def _ends_of(self, layer: Module) -> tuple[bool, bool]:
        if isinstance(layer, CUT_LAYERS):
            return layer.takes is not None, layer.gives is not None
        below = [self._ends(child) for _, child in layer.named_children()]
        takes, gives = any(ends[0] for ends in below), any(ends[1] for ends in below)
        # What gives a part to another layer inside keeps it inside.
        return takes and not gives, gives and not takes

    def _steps(self, module: Module) -> Iterator[Module]:
        """Yield the layers that run one after the other, as they will be."""
        if isinstance(module, _CONTAINERS):
            for _, child in module.named_children():
                yield from self._steps(child)
        else:
            yield self._layer(module)

    def _layer(self, module: Module) -> Module:
        return self._layers.get(id(module), module)

    def _drop(self, name: str, dropout: Dropout, features: _Features) -> None:
        if isinstance(features, UnknownFeatures):
            if dropout.p:
                self.problems.append(
                    f"'{name}' draws for each feature of its input, and which a rank has is not "
                    f"known: '{features.layer}' gives or takes a part of them, in a way of a "
                    f"{features.owner}; put the Dropout into a Sequential, behind the Linear, cut "
                    "or not, whose output it gets"
                )
        elif self.dropouts.setdefault(dropout, features) != features:
            self.problems.append(
                f"'{name}' is used twice, for different features of an activation: make two"
            )

    def _add(self, name: str, features: _Features, after: _Features) -> None:
        if isinstance(features, UnknownFeatures) or isinstance(after, UnknownFeatures):
            return
        if features != after:
            self.problems.append(
                f"'{name}' adds its input, {_described(features)}, to its output, "
                f"{_described(after)}"
            )

    def _expect(self, name: str, module: Module, expected: Features, got: _Features) -> None:
        if not isinstance(got, UnknownFeatures) and expected != got:
            self.problems.append(
                f"'{name}', a {type(module).__name__}, gets {_described(got)} and needs "
                f"{_described(expected)}"
            )


def _described(features: Features) -> str:
    if features is None:
        return "whole activations"
    ranges = (f"{start}..{start + size - 1}" for start, size in features.ranges(0) if size)
    return f"this rank's part ({', '.join(ranges) or 'none'}) of {features.shape[0]} features"


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name and child else name or child
