"""What is known of a job: plain values, written as JSON by one process and read by another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpidist._fields import from_fields

FORMAT = 2
"""Counted up when a name of the JSON form goes or changes its meaning; not when one is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """The MPI library, after it has started.

    Attributes
    ----------
    name : str
        Name and version, as it calls itself.
    vendor : str
        Name, as mpi4py calls it.
    standard : str
        Version of the MPI standard.
    abi : str
        For which mpi4py was loaded; empty if it was compiled for this library.
    path : str
        The file; empty if it cannot be told.
    thread_level : str
        What it provides, such as ``MPI_THREAD_MULTIPLE``.
    cuda_aware : bool or None
        What it says of itself; None if it does not say.
    cuda_evidence : str
        How it says so.
    size : int
        Ranks that it sees.
    """

    name: str
    vendor: str
    standard: str
    abi: str
    path: str
    thread_level: str
    cuda_aware: bool | None
    cuda_evidence: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a launcher left in the environment of a rank.

    Attributes
    ----------
    launcher, variable : str
        Who started it, and which variable tells so; empty if nobody did.
    size : int or None
        Ranks that it promises; None if it does not say.
    managers : sequence of str
        By what a rank can find the others: ``PMI``, ``PMIx``.
    slurm_tasks : int or None
        Tasks of the Slurm step; None outside Slurm.
    tasks_per_node : int or None
        The most tasks of the Slurm step on one node.
    mpirun : str
        The one that belongs to this Python or its MPI library; empty if there is none.
    """

    launcher: str
    variable: str
    size: int | None
    managers: Sequence[str]
    slurm_tasks: int | None
    tasks_per_node: int | None
    mpirun: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Blas:
    """A library for linear algebra that numpy has loaded.

    Attributes
    ----------
    name : str
        Name, and version if it tells it.
    path : str
        The file; empty if none is recognised.
    threads : int or None
        With which a rank would run; None if it cannot be asked.
    """

    name: str
    path: str
    threads: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hdf5:
    """The HDF5 library that h5py stands on.

    Attributes
    ----------
    version : str
        Empty if h5py cannot be imported.
    parallel : bool
        Whether h5py was built with MPI. mpidist does not need it.
    problem : str
        Why it cannot be imported, or nothing.
    """

    version: str
    parallel: bool
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What one rank knows of itself.

    Attributes
    ----------
    rank, node : int
        Which rank this is, and the index of its node.
    pid : int
        The process that was asked; it is gone when the report is read.
    cores : sequence of int
        On which it may run.
    blas : Blas
        What numpy multiplies with.
    hdf5 : Hdf5
        What h5py stands on.
    cupy : Cupy
        What arrays on a GPU are made with.
    nccl : Nccl
        Which NCCL carries device arrays.
    device : int or None
        Which of the GPUs that it sees this rank takes: its number on the node, counted around;
        None if it sees none.
    gpu_fallback : bool
        Whether they may go by way of the host (``MPIDIST_ENABLE_GPU_FALLBACK``).
    python, executable : str
        Version, and the interpreter.
    package : str
        Where mpidist was imported from.
    versions : mapping of str to str
        Of the packages that are installed, mpidist too.
    launch : Launch
        What a launcher said.
    library : Library or None
        None if MPI could not be started.
    settings : mapping of str to str
        The variables of the environment that change what MPI, BLAS and mpidist do.
    clock : float
        Seconds since 1970, taken by all ranks after a barrier.
    """

    rank: int
    node: int
    pid: int
    cores: Sequence[int]
    blas: Blas
    hdf5: Hdf5
    cupy: Cupy
    nccl: Nccl
    device: int | None
    gpu_fallback: bool
    python: str
    executable: str
    package: str
    versions: Mapping[str, str]
    launch: Launch
    library: Library | None
    settings: Mapping[str, str]
    clock: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """The file system in which ranks of a node share memory.

    Attributes
    ----------
    path : str
        Directory, such as ``/dev/shm``.
    total, free : int
        Bytes; free is what is left while the ranks run.
    """

    path: str
    total: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A file of an MPI library, or of another that shares memory, in shared memory.

    Attributes
    ----------
    name : str
        Name of the file, without its directory.
    maker : str
        Who gives such names.
    nbytes : int
        Memory that it takes.
    owner : str
        Name of the user, or the number.
    age : float
        Seconds since it was last changed.
    used : bool or None
        Whether a live process has it; None if its owner's processes cannot be looked at.
    """

    name: str
    maker: str
    nbytes: int
    owner: str
    age: float
    used: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What the first rank of a node knows of it.

    Attributes
    ----------
    host : str
        Host name of the node.
    ranks : sequence of int
        Those that share its memory, as MPI sees it.
    system, machine, processor : str
        Kernel, kind of processor, and its model.
    cores : int
        As the kernel counts them, usable or not.
    memory : int
        Memory of the node, in bytes.
    direct : bool
        Whether the processor orders memory as the direct path needs.
    shared : SharedMemory or None
        None if there is none.
    gpus : sequence of Gpu
        All that the driver shows, whatever ``CUDA_VISIBLE_DEVICES`` says; empty without a driver.
    driver : str
        Version of the driver, or why it cannot be asked; empty if there is none.
    cuda : str
        Newest version of CUDA that the driver knows; empty if it does not say.
    leftovers : sequence of Leftover
        Files of MPI libraries in shared memory, those of this very job left out.
    """

    host: str
    ranks: Sequence[int]
    system: str
    machine: str
    processor: str
    cores: int
    memory: int
    direct: bool
    shared: SharedMemory | None
    gpus: Sequence[Gpu]
    driver: str
    cuda: str
    leftovers: Sequence[Leftover]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossoverFacts:
    """The sizes at which paths change, as `mpidist.init` would find them.

    Attributes
    ----------
    ranks : int
        Ranks of a node for which the sizes are.
    sizes : mapping of str to int
        Bytes; empty if they cannot be used, or are not known, since MPI could not be started.
    source : str
        Where they were found; empty if they are the package's own.
    problem : str
        Why what was found cannot be used, or nothing. With sizes, the user's file is left out;
        without, no job of several ranks starts.
    """

    ranks: int
    sizes: Mapping[str, int]
    source: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why MPI could not be asked.

    Attributes
    ----------
    kind : {"missing", "died", "late"}
        Not there, ended the process, or did not answer.
    reason : str
        What happened, in a few words.
    output : sequence of str
        The last lines that it wrote.
    """

    kind: str
    reason: str
    output: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """All that is known of a job.

    Attributes
    ----------
    ranks : sequence of RankFacts
        In order; one if MPI could not be started, or sees one.
    nodes : sequence of NodeFacts
        In the order of their first ranks.
    crossovers : CrossoverFacts
        Which path is taken from which size on.
    failure : Failure or None
        None if MPI was started.
    """

    ranks: Sequence[RankFacts]
    nodes: Sequence[NodeFacts]
    crossovers: CrossoverFacts
    failure: Failure | None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], failure: Failure | None) -> JobFacts:
        """Make it of what `dataclasses.asdict` gave, read from JSON."""
        return replace(from_fields(cls, fields), failure=failure)

    @property
    def first(self) -> RankFacts:
        """The rank that reports."""
        return self.ranks[0]

    def on(self, node: NodeFacts) -> Sequence[RankFacts]:
        """Return the ranks of a node."""
        return [self.ranks[rank] for rank in node.ranks]

    def usable(self, node: NodeFacts) -> int:
        """Return on how many cores the ranks of a node may run, all of them together."""
        return len({core for rank in self.on(node) for core in rank.cores})


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
