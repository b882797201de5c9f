"""Which features of the activations each module gets: whether neighbours fit each other."""

from __future__ import annotations

from collections.abc import Mapping

from mpidist.arrays.shards import Part
from mpidist.nn.attention import CausalSelfAttention
from mpidist.nn.containers import Recompute, Residual, Sequential
from mpidist.nn.dropout import Dropout
from mpidist.nn.module import Module
from mpidist.parallel.tensor.cuts import Features
from mpidist.parallel.tensor.linear import ColumnLinear, RowLinear
from mpidist.parallel.tensor.vocabulary import VocabularyEmbedding

__all__ = ["CUT_LAYERS", "Flow"]

CUT_LAYERS = (ColumnLinear, RowLinear, VocabularyEmbedding)


class Flow:
    """Follow activations through a model, layer by layer, before anything of it is changed.

    What a container does with its layers is known of `Sequential`, `Residual` and `Recompute`. A
    module of another class with modules inside gets all features and returns all; what it does in
    between is its author's, and only the containers inside are looked at, each by itself.

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

    def through(self, name: str, module: Module, features: Features) -> Features:
        """Return which features a rank has after a module, if it has these before.

        Parameters
        ----------
        name : str
            Of the module.
        module : Module
            As it is now.
        features : Part or None
            Of its input.
        """
        layer = self._layers.get(id(module), module)
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
            if isinstance(module, Residual) and after != features:
                self.problems.append(
                    f"'{name}' adds its input, {_described(features)}, to its output, "
                    f"{_described(after)}"
                )
            return after
        if module.elementwise_blocks:
            if isinstance(module, Dropout):
                self._drop(name, module, features)
            return self._joined(name, module, features)
        self._expect(name, module, None, features)
        self._inside(name, module)
        return None

    def _joined(self, name: str, module: Module, features: Features) -> Features:
        """Return what is left of features of which equal blocks are joined."""
        blocks = module.elementwise_blocks
        if features is None or blocks == 1:
            return features
        width, ranges = features.shape[0] // blocks, features.ranges(0)
        first = ranges[: len(ranges) // blocks]
        if ranges != [(i * width + start, size) for i in range(blocks) for start, size in first]:
            self.problems.append(
                f"'{name}', a {type(module).__name__}, joins {blocks} blocks of features, which "
                f"are not cut alike: cut the layer before by Columns(blocks={blocks})"
            )
        return Part.of_ranges((width,), 0, first)

    def _inside(self, name: str, module: Module) -> None:
        """Look at the containers in a module of another class."""
        children = [
            (_join(name, child_name), child) for child_name, child in module.named_children()
        ]
        parts = [child_name for child_name, child in children if self._gives_part(child)]
        for child_name, child in children:
            if isinstance(child, (Sequential, Residual, Recompute)):
                self.through(child_name, child, self._takes(child))
            elif isinstance(child, Dropout) and child.p and parts:
                self.problems.append(
                    f"'{child_name}' draws for each feature of its input, and '{parts[0]}' beside "
                    f"it gives each rank a part of them; which it gets is not known of a "
                    f"{type(module).__name__}: put the two into a Sequential"
                )
            elif isinstance(child, CausalSelfAttention) or any(child.named_children()):
                self._inside(child_name, child)

    def _takes(self, module: Module) -> Features:
        """Return which features a container needs, by its first layer that says so."""
        for _, below in module.named_modules():
            layer = self._layers.get(id(below), below)
            if isinstance(layer, CUT_LAYERS):
                return layer.takes
            if (
                not isinstance(below, (Sequential, Residual, Recompute))
                and not below.elementwise_blocks
            ):
                return None
        return None

    def _gives_part(self, module: Module) -> bool:
        layer = self._layers.get(id(module), module)
        return isinstance(layer, CUT_LAYERS) and layer.gives is not None

    def _drop(self, name: str, dropout: Dropout, features: Features) -> None:
        if self.dropouts.setdefault(dropout, features) != features:
            self.problems.append(
                f"'{name}' is used twice, for different features of an activation: make two"
            )

    def _expect(self, name: str, module: Module, expected: Features, got: Features) -> None:
        if expected != got:
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
