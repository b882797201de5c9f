"""Compiles mpidist's kernels as CuPy would for a GPU, which is not needed: a program.

CuPy itself writes each kernel's code, adds its headers and options and calls NVRTC, NVIDIA's
compiler, and its assembler; only the loading of what comes out is left out, so nothing is said of
what a kernel calculates. Ends with status 0 if all went well, 1 with the compiler's words, and 3,
with the cure, where CuPy or NVRTC is missing.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tests.nccl_stub.kernel_calls import Call, Operand, calls, places

MISSING = 3
CURE = "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 (no GPU is needed)"


def main() -> int:
    """Compile all, and print what failed."""
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # take nothing from another run, and leave nothing
    try:
        from cupy._core import core
        from cupy_backends.cuda.libs import nvrtc

        version, supported = nvrtc.getVersion(), nvrtc.getSupportedArchs()
        core.assemble_cupy_compiler_options(())
    except (ImportError, RuntimeError) as error:
        print(f"no CuPy, or no CUDA compiler and headers: {CURE}: {error}")
        return MISSING
    called = calls()
    _without_a_driver()
    # Volta, or the oldest that this compiler knows, and Hopper.
    architectures = [str(min(arch for arch in supported if arch >= 70)), "90"]
    jobs = [(call, arch) for call in called for arch in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        failures = [text for text in threads.map(lambda job: _failure(*job), jobs) if text]
    if forgotten := sorted(places() - {call.place for call in called}):
        failures += ["tests/nccl_stub/kernel_calls.py does not call what is made here:", *forgotten]
    print(f"NVRTC {version}, sm_{architectures}: {len(jobs)} compilations", *failures, sep="\n")
    return bool(failures)


def _without_a_driver() -> None:
    """Let CuPy ask for no device and load no module."""
    from cupy.cuda import compiler, function

    class Unloaded(function.Module):  # type: ignore[misc]
        def load(self, cubin: bytes) -> None:
            self.cubin = cubin

    function.Module = Unloaded
    # The answer to this is remembered for each device, of which there may be none.
    of_arch = compiler._get_arch_for_options_for_nvrtc.__wrapped__
    compiler._get_arch_for_options_for_nvrtc = of_arch


def _failure(call: Call, arch: str) -> str:
    """Compile a kernel for a call; return what went wrong, or nothing."""
    import cupy
    from cupy._core import core

    raw = call.maker == "RawKernel"
    kernel = getattr(cupy, call.maker)(*call.made_of, **dict(call.keywords))
    try:
        code = kernel.code if raw else _code(kernel, call.operands)
        options = () if raw else kernel.kwargs.get("options", ())
        module = core.compile_with_cache(code, options, arch=arch, prepend_cupy_headers=not raw)
    except Exception as error:
        types = " ".join(str(operand.dtype or "scalar") for operand in call.operands)
        return f"{call.place}: {kernel.name} of {types} for sm_{arch}: {error}"
    if f"\0.text.{kernel.name}\0".encode() not in module.cubin:
        return f"{call.place}: no kernel named {kernel.name} in what was made for sm_{arch}"
    return ""


def _code(kernel: Any, operands: tuple[Operand, ...]) -> str:
    """Return the code that an ElementwiseKernel's call makes of what it is called with.

    These are the steps of `cupy.ElementwiseKernel.__call__`, which first asks for the device.
    """
    from cupy._core import _kernel

    ins, outs = operands[: kernel.nin], operands[kernel.nin :]
    in_types, out_types, letters = _kernel._decide_params_type(
        kernel.in_params, kernel.out_params, *(tuple(x.dtype for x in some) for some in (ins, outs))
    )
    both = list(zip(kernel.params, operands, in_types + out_types, strict=False))
    shapes = {x.shape for p, x, _ in both if not p.raw and not x.scalar}
    shape = np.broadcast_shapes(*shapes)
    flat = all(x.contiguous for p, x, _ in both if not p.raw) and len(shapes) == 1
    infos = []
    for p, x, dtype in both:
        if x.scalar:
            infos.append(_info("scalar", dtype, 0, contiguous=True))
        elif p.raw:
            infos.append(_info("array", dtype, len(x.shape), contiguous=x.contiguous))
        else:
            whole = flat or (x.contiguous and x.shape == shape)
            infos.append(_info("array", dtype, 1 if flat else len(shape), contiguous=whole))
    infos.append(_info("indexer", None, 1 if flat else len(shape), contiguous=True))
    return str(
        _kernel._get_elementwise_kernel_code(
            tuple(infos),
            letters,
            kernel.params,
            kernel.operation,
            kernel.name,
            kernel.preamble,
            **kernel.kwargs,
        )
    )


def _info(kind: str, dtype: Any, ndim: int, *, contiguous: bool) -> Any:
    import cupy
    from cupy._core import _carray, _kernel, _scalar

    number, of = {
        "array": (1, cupy.ndarray),
        "indexer": (2, _carray.Indexer),
        "scalar": (3, _scalar.CScalar),
    }[kind]
    return _kernel._ArgInfo(number, of, dtype, ndim, contiguous, True)  # indices of 32 bits


if __name__ == "__main__":
    sys.exit(main())
