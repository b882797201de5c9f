from __future__ import annotations

import pytest

from mpidist import env

VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "PMIX_RANK",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "RANK",
    "WORLD_SIZE",
    "MPIDIST_RANKS_PER_NODE",
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "variable", "size"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE", 4),
        ({"PMI_SIZE": "2"}, "PMI_SIZE", 2),
        ({"PMI_SIZE": "1"}, "PMI_SIZE", 1),
        ({"PMIX_RANK": "0"}, "PMIX_RANK", None),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS", 3),
        # srun with no PMI for its ranks: each of them is alone, and must say so
        ({"SLURM_STEP_NUM_TASKS": "3", "PMI_SIZE": "1"}, "SLURM_STEP_NUM_TASKS", 3),
        # mpirun inside a batch script, whose own step has one task
        ({"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "4"}, "PMI_SIZE", 4),
        ({"PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE", 4),
    ],
)
def test_evidence(
    environment: pytest.MonkeyPatch, variables: dict[str, str], variable: str, size: int | None
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    evidence = env.launcher_evidence()
    assert evidence is not None
    assert (evidence.variable, evidence.size) == (variable, size)
    assert evidence.several == (size is not None and size > 1)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4"},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_SIZE": "many"},
        {"RANK": "0", "WORLD_SIZE": "2"},
    ],
)
def test_no_evidence(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert env.launcher_evidence() is None


def test_store_evidence_needs_both(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    assert env.store_evidence() is None
    environment.setenv("WORLD_SIZE", "3")
    evidence = env.store_evidence()
    assert evidence is not None
    assert (evidence.size, evidence.several) == (3, True)


def test_pretended_nodes(environment: pytest.MonkeyPatch) -> None:
    assert env.ranks_per_node() is None
    environment.setenv("MPIDIST_RANKS_PER_NODE", "2")
    assert env.ranks_per_node() == 2
