"""`LayerCosts`: what each layer of a model takes, measured in one process, to plan a pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from mpidist._types import Array
from mpidist.nn.containers import Sequential
from mpidist.nn.losses import cross_entropy
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context
from mpidist.nn.skips import Skips
from mpidist.parallel.pipeline.run import Loss
from mpidist.parallel.pipeline.stages import check_model
from mpidist.parallel.pipeline.timeline import Costs

__all__ = ["LayerCosts"]

_TIMES = 3
"""How often each pass is timed, after a first one that is not."""


@dataclass(frozen=True)
class LayerCosts:
    """What each layer of a model takes, by layer.

    Attributes
    ----------
    samples : int
        Of the micro-batch that was measured.
    costs : Costs
        Seconds of the passes, as of `Pipeline.costs`; a `Pipeline` takes them as ``cut=``.
    parameters : tuple of int
        Bytes of the parameters.
    contexts : tuple of int
        Bytes of the arrays that a forward pass keeps for its backward pass. One that two layers
        keep is counted for both.
    outputs : tuple of int
        Bytes of what a forward pass gives to the next layer.
    """

    samples: int
    costs: Costs
    parameters: tuple[int, ...]
    contexts: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def measure(
        cls, model: Sequential, x: Array, target: Array, mode: Mode, loss: Loss = cross_entropy
    ) -> LayerCosts:
        """Run a micro-batch through a model, layer by layer, and measure.

        Parameters
        ----------
        model : Sequential
            The whole model, in this process. Its parameters, gradients and buffers stay as they
            are.
        x, target : Array, shape (samples, ...)
            One micro-batch.
        mode : Mode
            As in training.
        loss : callable, optional
            As of a `Pipeline`.

        Returns
        -------
        LayerCosts
            Times are medians of three passes after a first one.

        Raises
        ------
        TypeError, UnsupportedOperationError
            If a `Pipeline` cannot have the model.

        Notes
        -----
        Local; needs no other rank.
        """
        check_model(model, "LayerCosts")
        layers = [model.part(i, i + 1) for i in range(len(model.layers))]
        times: list[list[list[float]]] = [[[] for _ in layers] for _ in range(3)]
        outputs: list[int] = []
        contexts: list[int] = []
        with ExitStack() as stack:
            for parameter in model.parameters():
                parameter.divert(lambda _: None)
                stack.callback(parameter.divert, None)
            for _ in range(1 + _TIMES):
                skips: Skips = {}
                y, kept = x, []
                for layer, taken in zip(layers, times[0], strict=True):
                    began = perf_counter()
                    y, ctx = layer.forward(y, mode.replayed(), skips)
                    taken.append(perf_counter() - began)
                    kept.append(ctx)
                    outputs.append(y.nbytes)
                    contexts.append(_nbytes(ctx.saved))
                _, dy = loss(y, target, denominator=float(max(target.size, 1)))
                del y
                for i in reversed(range(len(layers))):
                    began = perf_counter()
                    dy, wctx = layers[i].backward_input(kept.pop(), dy, skips)
                    middle = perf_counter()
                    layers[i].backward_weight(wctx)
                    times[1][i].append(middle - began)
                    times[2][i].append(perf_counter() - middle)
        medians = (tuple(median(taken[1:]) for taken in of_pass) for of_pass in times)
        return cls(
            len(x),
            Costs(*medians),
            tuple(sum(p.data.nbytes for p in layer.parameters()) for layer in layers),
            tuple(contexts[: len(layers)]),
            tuple(outputs[: len(layers)]),
        )

    def save(self, path: str | Path) -> None:
        """Write all of it as JSON, for ``python -m mpidist plan --pipeline``."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LayerCosts:
        """Return what `save` has written, perhaps edited.

        Raises
        ------
        ValueError
            If something is missing, or there are different numbers of layers.
        """
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        try:
            costs = Costs(**{name: tuple(values) for name, values in given["costs"].items()})
            sizes = [tuple(given[name]) for name in ("parameters", "contexts", "outputs")]
            samples = given["samples"]
        except (TypeError, KeyError) as error:
            raise ValueError(f"expected what LayerCosts.save writes: {error!r}") from error
        lengths = [*map(len, (*vars(costs).values(), *sizes))]
        if len(set(lengths)) > 1 or not all(lengths):
            raise ValueError(f"expected the same number of layers, at least 1, got {lengths}")
        return cls(samples, costs, *sizes)


def _nbytes(saved: object) -> int:
    """Return the bytes of the arrays that a context keeps, each counted once."""
    return sum({id(_owner(array)): array.nbytes for array in _arrays(saved)}.values())


def _owner(array: Array) -> object:
    return array if array.base is None else array.base


def _arrays(saved: object) -> Iterator[Array]:
    if isinstance(saved, np.ndarray):
        yield saved
    elif isinstance(saved, Mapping):
        yield from _arrays(list(saved.values()))
    elif isinstance(saved, (list, tuple)):
        for part in saved:
            yield from _arrays(part)
    elif isinstance(saved, Context):
        yield from _arrays(saved.saved)
