from __future__ import annotations

import importlib.util
import json

import pytest

from mpidist.bench import Row, Times, ddp
from mpidist.bench.ddp import Shape
from tests.bench.running import bench


@pytest.mark.parametrize("millions", [0.1, 1, 10, 50, 1000])
def test_a_model_has_about_as_many_parameters_as_asked_for_in_several_layers(millions):
    shape = Shape.of(millions * 1e6)
    assert shape.parameters == pytest.approx(millions * 1e6, rel=0.1)
    assert shape.layers >= 4
    model = ddp.make_model(Shape(32, 4))
    sizes = [parameter.size for parameter in model.parameters()]
    assert sum(sizes) == Shape(32, 4).parameters == 4224


def rows_of(shape, times):
    return {
        name: Row(operation="", series=name, nbytes=0, times=times[name], values=values)
        for name, values in ddp._values(shape, times).items()
    }


def test_what_is_added_is_over_the_step_alone_and_compared_with_what_torch_adds():
    milliseconds = {"DDP": 12, "alone": 10, "torch DDP": 30, "torch alone": 14}
    times = {name: Times.of([value * 1e-3] * 5) for name, value in milliseconds.items()}
    rows = rows_of(Shape(512, 4), times)
    assert rows["DDP"].values["added"] == pytest.approx(2e-3)
    assert rows["DDP"].values["ratio"] == pytest.approx(1 / 8)
    assert rows["torch DDP"].values["added"] == pytest.approx(16e-3)
    assert rows["alone"].values == {"parameters": 1_050_624, "layers": 4, "width": 512}
    assert Shape(512, 4).nbytes == 4 * 1_050_624
    told = ddp._verdict(rows["DDP"])
    assert told == (
        "1.05 million parameters in 4 layers: DDP adds 2.00 ms, 0.125 of what torch DDP adds"
    )


def test_without_torch_nothing_is_compared_with_it():
    times = {name: Times.of([1e-3] * 5) for name in ("DDP", "alone", "one all_reduce")}
    values = ddp._values(Shape(512, 4), times)
    assert list(values) == list(times)
    assert "ratio" not in values["DDP"]
    assert values["DDP"]["added"] == 0


@pytest.mark.any_mpi
@pytest.mark.mpirun
@pytest.mark.timeout(120)
@pytest.mark.parametrize("peer", [True, False], ids=["torch", "no torch"])
def test_the_command_measures_a_small_model(mpirun, tmp_path, peer):
    if peer and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is missing")
    words = ["ddp", "--millions", "0.1", "--repeats", "5", *([] if peer else ["--no-torch"])]
    job = bench(mpirun, tmp_path / "r", *words)
    report = json.loads((tmp_path / "r").read_text())
    series = ["DDP", "alone", "one all_reduce"] + ["torch DDP", "torch alone"] * peer
    assert [row["series"] for row in report["rows"]] == series
    assert ("of what torch DDP adds" in job.stdout) == peer
    assert ("torch was left out" in job.stdout) != peer
    assert "0.10 million parameters in 4 layers: DDP adds" in job.stdout
