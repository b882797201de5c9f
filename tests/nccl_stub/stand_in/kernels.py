"""cupy.ElementwiseKernel of the stand-in: its C++ as a loop of the host, made by g++."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.nccl_stub.stand_in import operations, streams

__all__ = ["ElementwiseKernel", "NotImitated"]

_C_NAMES = {
    "bool": "bool",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float",
    "float64": "double",
}
_PRELUDE = (Path(__file__).parent / "kernel_prelude.hpp").read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Parameter:
    """One of a kernel's parameters; of a letter instead of a type, `dtype` is None."""

    name: str
    dtype: np.dtype[Any] | None
    letter: str
    raw: bool
    out: bool


def _parse(text: str, *, out: bool) -> list[_Parameter]:
    parameters = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        words = part.split()
        raw = words[0] == "raw"
        kind, name = words[-2:]
        if re.fullmatch("[A-Z]", kind):
            parameters.append(_Parameter(name, None, kind, raw, out))
        else:
            dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
            parameters.append(_Parameter(name, dtype, "", raw, out))
    return parameters


class NotImitated:
    """RawKernel, RawModule and ReductionKernel, which the stand-in has not."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("the stand-in has no kernels but ElementwiseKernel")


class ElementwiseKernel:
    """cupy.ElementwiseKernel."""

    def __init__(
        self,
        in_params: str,
        out_params: str,
        operation: str,
        name: str = "kernel",
        reduce_dims: bool = True,
        preamble: str = "",
        no_return: bool = False,
        return_tuple: bool = False,
        *,
        options: tuple[str, ...] = (),
        loop_prep: str = "",
        after_loop: str = "",
    ) -> None:
        self.in_params = _parse(in_params, out=False)
        self.out_params = _parse(out_params, out=True)
        self.nin, self.nout = len(self.in_params), len(self.out_params)
        self.nargs = self.nin + self.nout
        self.params = [*self.in_params, *self.out_params]
        self.operation, self.preamble, self.name = operation, preamble, name
        self.no_return, self.return_tuple = no_return, return_tuple
        self.loop_prep, self.after_loop = loop_prep, after_loop

    def __call__(
        self,
        *args: Any,
        size: int | None = None,
        block_size: int = 128,
        stream: streams.Stream | None = None,
    ) -> Any:
        if stream is not None:
            with stream:
                return self(*args, size=size)
        if len(args) not in (self.nin, self.nargs):
            raise TypeError(
                f"Wrong number of arguments for {self.name!r}. It must be either "
                f"{self.nin} or {self.nargs} (with outputs), but given {len(args)}."
            )
        plain = operations.to_plain(self.name, args)
        types = self._types(plain, args)
        shape = self._shape(plain, size)
        outs = self._outs(args[self.nin :], types, shape)
        count = size if size is not None else int(np.prod(shape, dtype=int))
        function = self._function(tuple(types))

        def loop(written: list[Any], *inputs: Any) -> None:
            values = [
                _contiguous(p, x, dtype, shape)
                for p, x, dtype in zip(self.params, [*inputs, *written], types, strict=True)
            ]
            function(
                ctypes.c_longlong(count),
                (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values)),
                (ctypes.c_longlong * len(values))(*(v.size for v in values)),
            )
            for into, made in zip(written, values[self.nin :], strict=True):
                np.copyto(into, made.reshape(into.shape))

        operations.change(self.name, outs, loop, args[: self.nin], {})
        if self.no_return:
            return None
        return tuple(outs) if self.return_tuple or self.nout != 1 else outs[0]

    def _types(self, plain: Any, args: Any) -> list[np.dtype[Any]]:
        """Return the dtype of each parameter: of its type, or its letter's from the arguments."""
        letters: dict[str, np.dtype[Any]] = {}
        for strong in (True, False):  # arrays decide; scalars only where no array does
            for p, x in zip(self.params, plain, strict=False):
                is_array = isinstance(x, np.ndarray)
                if (
                    p.dtype is None
                    and is_array == strong
                    and not (not strong and p.letter in letters)
                ):
                    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
                    if letters.setdefault(p.letter, dtype) != dtype:
                        raise TypeError(
                            f"Type is mismatched. {p.name} {dtype} {letters[p.letter]} {p.letter}"
                        )
        types = []
        for k, p in enumerate(self.params):
            if p.dtype is None and p.letter not in letters:
                raise TypeError(f"{self.name}: no argument says what {p.letter} is")
            types.append(letters[p.letter] if p.dtype is None else p.dtype)
            x = plain[k] if k < len(plain) else None
            if operations.is_device(args[k] if k < len(args) else None) and x.dtype != types[k]:
                raise TypeError(f"Type is mismatched. {p.name} {x.dtype} {types[k]}")
            if p.raw and k < len(plain) and not isinstance(x, np.ndarray):
                raise TypeError("raw arguments must be arrays")
        return types

    def _shape(self, plain: Any, size: int | None) -> tuple[int, ...]:
        shapes = [np.shape(x) for p, x in zip(self.params, plain, strict=False) if not p.raw]
        if size is not None:
            if any(shapes):
                raise ValueError(
                    "Specified 'size' can be used only if all of the ndarray are 'raw'."
                )
            return (size,)
        if not shapes:
            raise ValueError("Loop size is undecided.")
        return np.broadcast_shapes(*shapes)

    def _outs(self, given: Any, types: Any, shape: tuple[int, ...]) -> list[Any]:
        if not given:
            if any(p.raw for p in self.out_params):
                raise ValueError("Output array size is Undecided.")
            return [operations.empty(shape, t) for t in types[self.nin :]]
        for p, out in zip(self.out_params, given, strict=True):
            if not operations.is_device(out):
                raise TypeError("Output arguments type must be cupy.ndarray")
            if not p.raw and out.shape != shape:
                raise ValueError(f"Out shape is mismatched: {out.shape} instead of {shape}")
        return list(given)

    @functools.cached_property
    def _functions(self) -> dict[tuple[Any, ...], Any]:
        return {}

    def _function(self, types: tuple[np.dtype[Any], ...]) -> Any:
        if types not in self._functions:
            self._functions[types] = _compiled(self._source(types))
        return self._functions[types]

    def _source(self, types: tuple[np.dtype[Any], ...]) -> str:
        aliases, arrays, elements = {}, [], []
        for k, (p, dtype) in enumerate(zip(self.params, types, strict=True)):
            c_name = _C_NAMES[dtype.name]
            if p.letter:
                aliases[p.letter] = f"typedef {c_name} {p.letter};"
            const = "" if p.out else "const "
            if p.raw:
                arrays.append(f"raw_array<{const}{c_name}> {p.name}(pointers[{k}], sizes[{k}]);")
            else:
                arrays.append(f"{const}{c_name} *_of_{p.name} = ({const}{c_name} *)pointers[{k}];")
                elements.append(f"{const}{c_name} &{p.name} = _of_{p.name}[i];")
        types_defined, declared = "\n".join(aliases.values()), "\n  ".join(arrays)
        per_element = "\n    ".join(elements)
        return (
            f"{_PRELUDE}\n{types_defined}\n{self.preamble}\n"
            'extern "C" void run(long long n, void **pointers, const long long *sizes) {\n'
            "  const indexer _ind = {n};\n"
            f"  {declared}\n  {self.loop_prep};\n"
            "  for (ptrdiff_t i = 0; i < n; ++i) {\n"
            f"    {per_element}\n    {self.operation};\n  }}\n  {self.after_loop};\n}}\n"
        )


def _contiguous(p: _Parameter, x: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """Return the contiguous memory of an argument that the loop works on."""
    if p.raw or p.out:
        return np.ascontiguousarray(x)
    return np.ascontiguousarray(np.broadcast_to(np.asarray(x, dtype), shape))


def _compiled(source: str) -> Any:
    """Return the function of some C++, from a cache in the temporary directory if it is there."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NotImplementedError("the stand-in's ElementwiseKernel needs g++")
    cache = Path(tempfile.gettempdir()) / f"mpidist-stand-in-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / f"{hashlib.sha256(source.encode()).hexdigest()}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "kernel.so"
            command = [compiler, "-x", "c++", "-", "-std=c++17", "-O2", "-w", "-shared", "-fPIC"]
            done = subprocess.run(
                [*command, "-ffp-contract=off", "-o", str(made)],
                input=source,
                text=True,
                capture_output=True,
                check=False,
                timeout=60,
            )
            if done.returncode:
                raise RuntimeError(f"{done.stderr}\n{source}")
            made.replace(library)  # whoever else makes it makes the same
    function = ctypes.CDLL(str(library)).run
    function.restype = None
    return function
