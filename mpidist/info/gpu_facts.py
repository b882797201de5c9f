"""What is known of GPUs, and of the libraries by way of which arrays lie on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Cupy", "Gpu", "Nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, as the driver's management library knows it.

    Attributes
    ----------
    name : str
        Its model; ``unknown`` if it does not answer.
    memory : int
        Bytes; 0 if it does not answer.
    bus_id : str
        Its place, such as ``00000000:1B:00.0``; empty if it does not answer.
    """

    name: str
    memory: int
    bus_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cupy:
    """The CuPy of a rank, and the GPUs that it sees.

    Attributes
    ----------
    version : str
        Empty if it is not installed, or cannot be imported.
    runtime : str
        Version of the CUDA runtime that it uses; empty if it does not say.
    visible : sequence of str
        Places of the GPUs in their order, as ``CUDA_VISIBLE_DEVICES`` leaves them.
    problem : str
        Why no array can lie on a GPU, or nothing.
    """

    version: str
    runtime: str
    visible: Sequence[str]
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Nccl:
    """The NCCL of a rank: the one that CuPy loads, or would load.

    Attributes
    ----------
    version, file : str
        Empty if there is none.
    built : str
        With which version CuPy was built; empty if CuPy does not say.
    problem : str
        Why it cannot carry device arrays here, or nothing.
    """

    version: str
    file: str
    built: str
    problem: str
