"""The report of ``python -m mpidist info`` as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from mpidist._formatting import format_bytes, format_count
from mpidist.backends.crossovers import NEVER
from mpidist.info.checks import Problem, by_value, rank_names
from mpidist.info.facts import Hdf5, JobFacts, Launch, Leftover, Library, NodeFacts, RankFacts

_WIDTH = 100
_LABEL = 14

_FEW = 8
"""Nodes that are named; the JSON has all."""

Rows = Iterator[tuple[str, str]]


def render_facts(job: JobFacts, problems: Sequence[Problem], *, date: str) -> str:
    """Return the report: when it was made, the facts of all ranks and nodes, and what is wrong."""
    lines = [f"mpidist {job.first.versions['mpidist']}, {_size(job)}, {date}", ""]
    lines += _section("MPI", _mpi(job))
    for nodes in _alike(job):
        lines += _section(_title(nodes), _node(job, nodes))
    lines += _section("Device arrays", _device_arrays(job.ranks))
    lines += _section("Software", _software(job.ranks))
    lines += _section("Settings", _settings(job.ranks))
    lines += _section("Wrong", _wrong(problems))
    return "\n".join(lines)


def _size(job: JobFacts) -> str:
    started = job.first.launch.size
    if len(job.ranks) == 1 and started is not None and started > 1:
        return f"{started} processes that do not see each other; this is the first"
    return f"{format_count(len(job.ranks), 'rank')} on {format_count(len(job.nodes), 'node')}"


def _section(title: str, rows: Rows) -> Iterator[str]:
    yield title
    for label, text in rows:
        start = f"  {label:<{_LABEL}}" if label else "  "
        yield from textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    yield ""


def _of_ranks(ranks: Iterable[RankFacts], describe: Callable[[RankFacts], str]) -> str:
    return by_value([describe(rank) for rank in ranks])


def _of_libraries(job: JobFacts, describe: Callable[[Library], str]) -> str:
    return _of_ranks(job.ranks, lambda rank: describe(rank.library) if rank.library else "none")


def _mpi(job: JobFacts) -> Rows:
    launch = job.first.launch
    if job.failure is None:
        yield "library", _of_libraries(job, _library)
        yield "file", _of_libraries(job, lambda library: library.path or "unknown")
        yield "mpi4py", _of_ranks(job.ranks, _mpi4py)
        yield "CUDA-aware", _of_libraries(job, _cuda_aware)
    else:
        yield "library", f"not started: {job.failure.reason}"
        yield "mpi4py", job.first.versions.get("mpi4py", "not installed")
        for line in job.failure.output:
            yield "it wrote", line
    yield "launcher", _launcher(launch)
    yield "mpirun", launch.mpirun or "none beside this Python"
    yield "crossovers", _crossovers(job)


def _library(library: Library) -> str:
    return f"{library.name}, MPI {library.standard}, {library.thread_level}"


def _mpi4py(rank: RankFacts) -> str:
    version = rank.versions.get("mpi4py", "version unknown")
    abi = rank.library.abi if rank.library else ""
    return f"{version}, {f'ABI {abi}' if abi else 'compiled for this library'}"


def _cuda_aware(library: Library) -> str:
    if library.cuda_aware is None:
        return "unknown: the library does not say"
    return f"{'yes' if library.cuda_aware else 'no'}, it says ({library.cuda_evidence})"


def _launcher(launch: Launch) -> str:
    if not launch.variable:
        return "none: no variable of a launcher is set"
    size = "" if launch.size is None else f"={launch.size}"
    managers = " and ".join(launch.managers) or "neither PMI nor PMIx"
    return f"{launch.launcher}: {launch.variable}{size}, {managers}"


def _crossovers(job: JobFacts) -> str:
    crossovers = job.crossovers
    if crossovers.problem and not crossovers.sizes:
        return f"unusable: {crossovers.problem}"
    if not crossovers.sizes:
        return "unknown: they are kept for each MPI library"
    sizes = ", ".join(
        f"{name} {'never' if size == NEVER else format_bytes(size)}"
        for name, size in crossovers.sizes.items()
    )
    source = (
        crossovers.source
        and f"{crossovers.source}, for {format_count(crossovers.ranks, 'rank')} on a node"
    )
    return f"{sizes} ({source or 'default'})"


def _alike(job: JobFacts) -> Sequence[Sequence[NodeFacts]]:
    """Return the nodes in groups of those that have the same to say."""
    groups: dict[str, list[NodeFacts]] = {}
    for node in job.nodes:
        groups.setdefault(" ".join([*_kind(node), _cores(job, node)]), []).append(node)
    return list(groups.values())


def _title(nodes: Sequence[NodeFacts]) -> str:
    names = [f"{node.host} ({rank_names(node.ranks)})" for node in nodes[:_FEW]]
    if len(nodes) > _FEW:
        names.append(f"and {len(nodes) - _FEW} more")
    return f"Node{'s' * (len(nodes) > 1)} {', '.join(names)}"


def _kind(node: NodeFacts) -> tuple[str, str, str, str]:
    """Return what nodes of one kind have in common."""
    shared = f"{format_bytes(node.shared.total)} in {node.shared.path}" if node.shared else "none"
    driver = f", driver {node.driver}" if node.driver else ""
    cuda = f" for CUDA {node.cuda} and older" if node.cuda else ""
    return f"{node.system}, {node.machine}", node.processor, shared, f"{_gpus(node)}{driver}{cuda}"


def _gpus(node: NodeFacts) -> str:
    models = [f"{gpu.name}, {format_bytes(gpu.memory)}" for gpu in node.gpus]
    return ", ".join(f"{models.count(gpu)} x {gpu}" for gpu in dict.fromkeys(models)) or "none"


def _cores(job: JobFacts, node: NodeFacts) -> str:
    ranks = job.on(node)
    counts = sorted({len(rank.cores) for rank in ranks})
    spread = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    usable = job.usable(node)
    if len(ranks) == 1:
        return f"{node.cores}, {usable} usable"
    shared = "" if sum(len(rank.cores) for rank in ranks) == usable else ", in part the same"
    return f"{node.cores}, {usable} usable; {spread} for each rank{shared}"


def _node(job: JobFacts, nodes: Sequence[NodeFacts]) -> Rows:
    system, model, shared, gpus = _kind(nodes[0])
    yield "system", system
    yield "processor", f"{model}, {format_bytes(nodes[0].memory)} of memory"
    yield "cores", _cores(job, nodes[0])
    free = sorted(node.shared.free for node in nodes if node.shared is not None)
    if free:
        shared += f", {format_bytes(free[0])} free"
    yield "shared memory", shared + (" on the fullest" if len(nodes) > 1 else "")
    yield "GPUs", gpus
    for node in nodes:
        prefix = f"{node.host}: " if len(nodes) > 1 else ""
        for text in _leftovers(node.leftovers):
            yield "files in it", prefix + text


def _leftovers(files: Sequence[Leftover]) -> Iterator[str]:
    """Yield one line for all files of one maker and owner that are in use, or not."""
    groups: dict[tuple[str, str, bool | None], list[Leftover]] = {}
    for file in files:
        groups.setdefault((file.maker, file.owner, file.used), []).append(file)
    for (maker, owner, used), group in groups.items():
        state = {True: "in use", False: "not in use", None: "perhaps in use"}[used]
        size, age = (
            format_bytes(sum(file.nbytes for file in group)),
            min(file.age for file in group),
        )
        yield f"{len(group)} of {maker}, {owner}'s, {state}: {size}, the newest {_age(age)} old"


def _age(seconds: float) -> str:
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


def _device_arrays(ranks: Sequence[RankFacts]) -> Rows:
    yield "CuPy", _of_ranks(ranks, _cupy)
    yield "NCCL", _of_ranks(ranks, _nccl)
    if any(rank.cupy.visible for rank in ranks):
        yield "device", _of_ranks(ranks, _device)
    yield "carried", _of_ranks(ranks, _carried)


def _cupy(rank: RankFacts) -> str:
    if not rank.cupy.version:
        return "none"
    return f"{rank.cupy.version}, CUDA {rank.cupy.runtime or 'of unknown version'}"


def _nccl(rank: RankFacts) -> str:
    nccl = rank.nccl
    if not nccl.version:
        return "none"
    differs = nccl.built and nccl.built != nccl.version
    return f"{nccl.version}, {nccl.file}" + (f"; CuPy was built with {nccl.built}" * bool(differs))


def _device(rank: RankFacts) -> str:
    if rank.device is None:
        return "none"
    seen = rank.cupy.visible
    return f"{rank.device} of {len(seen)}, {seen[rank.device]}"


def _carried(rank: RankFacts) -> str:
    if not rank.nccl.problem:
        return "by NCCL"
    if rank.gpu_fallback and not rank.cupy.problem:
        return f"by way of the host (MPIDIST_ENABLE_GPU_FALLBACK): {rank.nccl.problem}"
    return f"no: {rank.nccl.problem}"


def _software(ranks: Sequence[RankFacts]) -> Rows:
    yield "Python", _of_ranks(ranks, lambda rank: f"{rank.python}, {rank.executable}")
    yield "mpidist", _of_ranks(ranks, lambda rank: rank.package)
    yield "BLAS", _of_ranks(ranks, _blas)
    yield "HDF5", _of_ranks(ranks, lambda rank: _hdf5(rank.hdf5))
    yield "packages", _of_ranks(ranks, _packages)


def _blas(rank: RankFacts) -> str:
    blas = rank.blas
    if blas.threads is None:
        return f"{blas.name or 'not recognised'}, threads unknown"
    return f"{blas.name}, {format_count(blas.threads, 'thread')} per rank"


def _hdf5(hdf5: Hdf5) -> str:
    if hdf5.problem:
        return f"none: {hdf5.problem}"
    return f"{hdf5.version}, {'parallel' if hdf5.parallel else 'serial, which is all it needs'}"


def _packages(rank: RankFacts) -> str:
    return ", ".join(f"{name} {version}" for name, version in rank.versions.items())


def _settings(ranks: Sequence[RankFacts]) -> Rows:
    names = sorted({name for rank in ranks for name in rank.settings})
    for name in names:
        yield "", by_value([_setting(rank, name) for rank in ranks])
    if not names:
        yield "", "none of MPI, BLAS, NCCL or mpidist"


def _setting(rank: RankFacts, name: str) -> str:
    return f"{name}={rank.settings[name]}" if name in rank.settings else f"{name} not set"


def _wrong(problems: Sequence[Problem]) -> Rows:
    if not problems:
        yield "", "nothing was found"
    for problem in problems:
        yield "fatal" if problem.fatal else "warning", problem.what
        yield "  cure", problem.cure
