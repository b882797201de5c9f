"""The door between a model's parameters and the reducer: who is expected, and whose is what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpidist.nn.module import Module
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.reducer import GradientReducer

__all__ = ["ParameterGradients", "layers_without_parameters"]


class ParameterGradients:
    """Lets parameters write their gradients into a reducer's buckets, step by step.

    Parameters
    ----------
    named : mapping of str to Parameter
        The parameters; from now on their gradients live in `reducer.grads`.
    reducer : GradientReducer
        Of the same names, shapes and dtypes.
    """

    def __init__(self, named: Mapping[str, Parameter], reducer: GradientReducer) -> None:
        self._names = {parameter: name for name, parameter in named.items()}
        self._reducer = reducer
        self._attach()

    def expect(self, uses: Mapping[Parameter, int]) -> None:
        """Let every parameter count its contributions; those that expect none are complete."""
        idle = []
        for parameter in self._names:
            count = uses.get(parameter, 0)
            parameter.expect(count, self._on_ready)
            if not count:
                idle.append(parameter)
        for parameter in idle:
            # It may hold what earlier micro-batches gave it.
            none = parameter.unreduced_grad() is None
            (self._reducer.skip if none else self._reducer.ready)(self._names[parameter])

    def _on_ready(self, parameter: Parameter) -> None:
        self._reducer.ready(self._names[parameter])

    def release(self) -> None:
        """End the counting; contributions may come freely again."""
        for parameter in self._names:
            parameter.release()

    def take_over(self, used: frozenset[str]) -> None:
        """Give the parameters that some rank used what has been reduced."""
        for parameter, name in self._names.items():
            parameter.release()
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
            parameter.attach(self._reducer.grads[name], place=self._reducer.place_of(name))

    # -- misuse --------------------------------------------------------------------------------

    def check_zeroed(self) -> None:
        """Refuse to sum again what is a sum already: it would count once per rank.

        Raises
        ------
        RuntimeError
            If a parameter holds a gradient.
        """
        for parameter, name in self._names.items():
            if parameter.grad is not None:
                raise RuntimeError(
                    f"DDP on {self._reducer.group}: parameter '{name}' still holds the sum over "
                    "all ranks that an earlier backward gave, and op=SUM would count it once per "
                    "rank; zero_grad() before the first backward of a step, and all but its last "
                    "one inside no_sync()"
                )

    def check_owned(self, uses: Mapping[Parameter, int]) -> None:
        """Check that all parameters are ours, and that their gradients live in the buckets.

        Raises
        ------
        RuntimeError
            If one is not, or if something else has called `Parameter.attach`.
        """
        for parameter in uses:
            if parameter not in self._names:
                raise RuntimeError(
                    f"DDP on {self._reducer.group}: parameter '{parameter.name}' was used, but was "
                    "not part of the module when DDP was made; change the module first, then wrap "
                    "it"
                )
        grads = self._reducer.grads
        for parameter, name in self._names.items():
            if parameter.buffer is not grads[name]:
                raise RuntimeError(
                    f"DDP on {self._reducer.group}: the gradient of parameter '{name}' does not "
                    "live in this DDP's bucket any more; something else has called attach(), "
                    "perhaps a second DDP over the same module, or the model was moved by to()"
                )


def layers_without_parameters(module: Module) -> list[Module]:
    """Return the layers that pass through backward without a gradient to tell of it."""
    return [
        layer
        for _, layer in module.named_modules()
        if type(layer).backward is Module.backward
        and not any(isinstance(value, Parameter) for value in vars(layer).values())
    ]
