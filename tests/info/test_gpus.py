"""GPUs: what is asked, what is told, and what can be wrong with them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from mpidist._formatting import format_nccl_version
from mpidist.info import probes
from mpidist.info.checks import differences, shared_gpus, unused_gpus
from mpidist.info.facts import Cupy, Gpu, JobFacts
from mpidist.info.text import render_facts
from tests.info.made_up import GPU, NO_GPU, RANK, a_job, with_gpus, with_ranks

ROOT = Path(probes.__file__).parents[2]
NO_CUPY = Cupy(version="", runtime="", visible=[], problem="CuPy is not installed")


class Nvml:
    """The driver's library of a machine with two GPUs, of which one has fallen off the bus."""

    calls: ClassVar[list[str]] = []
    started = 0

    @classmethod
    def nvmlInit_v2(cls) -> int:
        return cls.started

    @staticmethod
    def nvmlSystemGetDriverVersion(text: Any, length: int) -> int:
        text.value = b"550.54"
        return 0

    @staticmethod
    def nvmlSystemGetCudaDriverVersion_v2(place: Any) -> int:
        place._obj.value = 12040
        return 0

    @staticmethod
    def nvmlDeviceGetCount_v2(place: Any) -> int:
        place._obj.value = 2
        return 0

    @staticmethod
    def nvmlDeviceGetHandleByIndex_v2(index: int, place: Any) -> int:
        return 15 if index else 0

    @staticmethod
    def nvmlDeviceGetName(handle: Any, text: Any, length: int) -> int:
        text.value = b"Abacus H9"
        return 0

    @staticmethod
    def nvmlDeviceGetMemoryInfo(handle: Any, place: Any) -> int:
        place._obj.total = 80 << 30
        return 0

    @staticmethod
    def nvmlDeviceGetPciInfo_v3(handle: Any, place: Any) -> int:
        place._obj.bus_id = b"00000000:1B:00.0"
        return 0

    @classmethod
    def nvmlShutdown(cls) -> int:
        cls.calls.append("shutdown")
        return 0


def test_gpus_are_described_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.ctypes, "CDLL", lambda path: Nvml)
    monkeypatch.setattr(Nvml, "calls", [])
    lost = Gpu(name="unknown", memory=0, bus_id="")
    assert probes.ask_driver() == ([GPU, lost], "550.54", "12.4")
    assert Nvml.calls == ["shutdown"]


def test_the_structures_are_those_of_nvml() -> None:
    """The sizes that its header gives them on 64-bit machines."""
    assert probes.ctypes.sizeof(probes._Memory) == 24
    assert probes.ctypes.sizeof(probes._Pci) == 68


def test_a_driver_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.ctypes, "CDLL", lambda path: Nvml)
    monkeypatch.setattr(Nvml, "started", 9)
    assert probes.ask_driver() == ([], "the driver's library answers with error 9", "")


def no_library(path: str) -> None:
    raise OSError(path)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.ctypes, "CDLL", no_library)
    assert probes.ask_driver() == ([], "", "")


@pytest.mark.parametrize(
    ("number", "version"), [(22304, "2.23.4"), (2804, "2.8.4"), (23203, "2.32.3"), (0, "")]
)
def test_versions_of_nccl(number: int, version: str) -> None:
    assert format_nccl_version(number) == version


def test_nccl_is_asked_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nccl:
        @staticmethod
        def ncclGetVersion(place: Any) -> int:
            place._obj.value = 22304
            return 0

    monkeypatch.setattr(probes.ctypes, "CDLL", lambda path: Nccl)
    monkeypatch.setattr(probes, "loaded_libraries", lambda: ["/n/libnccl.so.2"])
    found = probes.look_at_nccl(NO_CUPY)
    assert (found.version, found.file, found.built) == ("2.23.4", "/n/libnccl.so.2", "")
    assert found.problem == NO_CUPY.problem
    monkeypatch.setattr(probes.ctypes, "CDLL", no_library)
    assert probes.look_at_nccl(NO_CUPY).version == ""


def install_cupy(monkeypatch: pytest.MonkeyPatch, gpus: int, nccl: Any) -> None:
    """Put a CuPy among the imported modules that sees so many GPUs."""

    def places(index: int) -> str:
        return f"0000:{index:02d}:00.0"

    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.__version__, cupy.cuda = "14.2", cuda  # type: ignore[attr-defined]
    cuda.is_available = lambda: gpus > 0  # type: ignore[attr-defined]
    cuda.nccl = nccl  # type: ignore[attr-defined]
    cuda.runtime = SimpleNamespace(  # type: ignore[attr-defined]
        runtimeGetVersion=lambda: 12090,
        getDeviceCount=lambda: gpus,
        deviceGetPCIBusId=places,
    )
    cupy.__spec__ = importlib.util.spec_from_loader("cupy", None)
    for name, module in {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl}.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_cupy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl = SimpleNamespace(
        available=True, get_version=lambda: 23203, get_build_version=lambda: 22501
    )
    install_cupy(monkeypatch, 2, nccl)
    found = probes.look_at_cupy()
    assert (found.version, found.runtime, found.problem) == ("14.2", "12.9", "")
    assert found.visible == ["0000:00:00.0", "0000:01:00.0"]
    library = probes.look_at_nccl(found)
    assert (library.version, library.built, library.problem) == ("2.32.3", "2.25.1", "")


def test_a_cupy_without_gpus_and_nccl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cupy(monkeypatch, 0, SimpleNamespace(available=False))
    monkeypatch.setattr(probes.ctypes, "CDLL", no_library)
    found = probes.look_at_cupy()
    assert found.visible == []
    assert "finds no GPU" in found.problem
    library = probes.look_at_nccl(found)
    assert (library.version, library.problem) == ("", found.problem)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_real_cupy_is_told() -> None:
    """On machines with a GPU and without, with NCCL and without."""
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mpidist", "info", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    (rank,) = json.loads(answer.stdout)["ranks"]
    assert rank["cupy"]["version"]
    assert rank["cupy"]["runtime"]
    assert bool(rank["cupy"]["visible"]) is not bool(rank["cupy"]["problem"])
    assert rank["device"] == (0 if rank["cupy"]["visible"] else None)


def section(job: JobFacts) -> str:
    return render_facts(job, [], date="today").partition("Device arrays\n")[2].partition("\n\n")[0]


def test_machines_without_a_gpu_need_three_lines() -> None:
    assert section(a_job(2)).splitlines() == [
        "  CuPy          none",
        "  NCCL          none",
        f"  carried       no: {NO_GPU}",
    ]


def test_each_rank_tells_its_gpu() -> None:
    job = with_gpus(2, gpus=2)
    assert section(job).splitlines() == [
        "  CuPy          14.2.0, CUDA 12.9",
        "  NCCL          2.28.3, /n/libnccl.so.2; CuPy was built with 2.25.1",
        "  device        0 of 2, 0000:00:00.0 (rank 0); 1 of 2, 0000:01:00.0 (rank 1)",
        "  carried       by NCCL",
    ]
    assert (
        "  GPUs          2 x Abacus H9, 80 GiB, driver 550.54 for CUDA 12.4 and older\n"
        in render_facts(job, [], date="today")
    )


@pytest.mark.parametrize(
    ("fallback", "carried"),
    [
        (False, "no: CuPy finds no NCCL"),
        (True, "by way of the host (MPIDIST_ENABLE_GPU_FALLBACK): CuPy finds no NCCL"),
    ],
)
def test_it_is_told_what_carries_device_arrays(fallback: bool, carried: str) -> None:
    nccl = dataclasses.replace(RANK.nccl, problem="CuPy finds no NCCL")
    job = with_gpus(1, gpus=1, nccl=nccl, gpu_fallback=fallback)
    assert section(job).splitlines()[-1] == f"  carried       {carried}"
    problems = unused_gpus(job)
    assert [problem.cure for problem in problems] == [
        "CuPy finds no NCCL; or MPIDIST_ENABLE_GPU_FALLBACK=1, by way of the host"
    ][fallback:]


def test_gpus_that_nobody_wants_are_no_problem() -> None:
    """A job of host arrays, without CuPy, on nodes that have GPUs."""
    assert unused_gpus(a_job(2, node={"gpus": [GPU]})) == []
    assert unused_gpus(with_gpus(2, gpus=2)) == []


@pytest.mark.parametrize(
    ("ranks", "gpus", "what"),
    [
        (2, 2, None),
        (2, 4, None),
        (3, 2, "n0: ranks 0, 2 would share the GPU 0000:00:00.0, of 2 GPUs that its ranks see"),
    ],
)
def test_ranks_that_share_a_gpu(ranks: int, gpus: int, what: str | None) -> None:
    problems = shared_gpus(with_gpus(ranks, gpus=gpus))
    assert [problem.what for problem in problems] == ([] if what is None else [what])


def test_ranks_that_see_one_gpu_each_share_none() -> None:
    """As srun --gpus-per-task=1 starts them: the only one of each is another one."""
    one = [
        {"device": 0, "cupy": dataclasses.replace(RANK.cupy, version="14", visible=[place])}
        for place in ("0000:00:00.0", "0000:01:00.0")
    ]
    assert shared_gpus(with_ranks(a_job(2), one)) == []


def test_what_has_to_be_the_same_on_all_ranks() -> None:
    other = dataclasses.replace(RANK.nccl, version="2.19.4")
    job = with_gpus(2, gpus=2)
    fields: list[dict[str, Any]] = [{}, {"nccl": other, "gpu_fallback": True}]
    assert [problem.what for problem in differences(with_ranks(job, fields))] == [
        "NCCL differs between ranks: 2.28.3 (rank 0); 2.19.4 (rank 1)",
        "MPIDIST_ENABLE_GPU_FALLBACK differs between ranks: 0 (rank 0); 1 (rank 1)",
    ]
