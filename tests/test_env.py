from __future__ import annotations

import os
import socket
from collections.abc import Iterator

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
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMI_FD",
    "PMI_PORT",
    "SLURM_PROCID",
    "SLURM_STEP_TASKS_PER_NODE",
    "PRTE_LAUNCHED",
    "PMIX_SERVER_URI2",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
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


REMOTE = {
    "PRTE_LAUNCHED": "1",
    "PMIX_SERVER_URI2": "prterun-n1-4711@0.1;tcp4://127.0.0.1:33059",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
LOCAL = REMOTE | {"PMIX_SERVER_URI2": "prterun-n1-4711@0.0;tcp4://127.0.0.1:33059"}


@pytest.mark.parametrize(
    ("variables", "remotely"),
    [
        ({}, False),
        (LOCAL, False),
        # all ranks on one node, which is not that of mpirun
        (REMOTE, True),
        # a rank of mpirun's node, and others elsewhere
        (LOCAL | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
    ],
)
def test_whether_open_mpi_has_daemons_on_other_nodes(
    environment: pytest.MonkeyPatch, variables: dict[str, str], remotely: bool
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert env.launched_remotely() is remotely


def test_a_delay_of_open_mpi_that_is_set_is_kept(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OMPI_MCA_opal_abort_delay", "60")
    env.delay_aborts_of_open_mpi(5)
    assert env.settings()["OMPI_MCA_opal_abort_delay"] == "60"
    environment.delenv("OMPI_MCA_opal_abort_delay")
    env.delay_aborts_of_open_mpi(5)
    assert env.settings()["OMPI_MCA_opal_abort_delay"] == "5"


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


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3"}, 3),
        ({"PMI_RANK": "2"}, 2),
        ({"PMIX_RANK": "1"}, 1),
        ({"SLURM_PROCID": "4"}, 4),
        # mpirun inside a batch script, which is process 0 of its own step
        ({"SLURM_PROCID": "0", "PMI_RANK": "5"}, 5),
    ],
)
def test_rank_of_the_launcher(
    environment: pytest.MonkeyPatch, variables: dict[str, str], rank: int
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert env.launcher_rank() == rank


@pytest.fixture
def rank(environment: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a rank that has called `init`, as another process inherits it."""
    for name in ("PMIX_NAMESPACE", "SLURM_STEP_ID"):
        environment.delenv(name, raising=False)
    mine, theirs = socket.socketpair()
    with mine, theirs:
        environment.setenv("PMI_RANK", "1")
        environment.setenv("PMI_FD", str(mine.fileno()))
        environment.setenv("OTHER_FD", str(theirs.fileno()))
        environment.delenv("MPIDIST_RANK_PROCESS", raising=False)
        assert env.inherited_rank() is None
        environment.setattr(env, "_marked_by", None)
        environment.setenv("MPIDIST_RANK_PROCESS", "")
        env.mark_rank()
        assert env.inherited_rank() is None  # it is the rank itself
        environment.setattr(env, "_marked_by", None)
        yield environment


def test_a_rank_that_was_inherited(rank: pytest.MonkeyPatch) -> None:
    assert env.inherited_rank() == os.getpid()  # by a fork
    descriptor = int(os.environ["PMI_FD"])
    held = os.dup(descriptor)
    os.close(descriptor)
    try:
        assert env.inherited_rank() == os.getpid()  # by a subprocess, which closes descriptors
    finally:
        os.dup2(held, descriptor)
        os.close(held)


@pytest.mark.parametrize("name", ["PMIX_NAMESPACE", "PMI_RANK", "SLURM_STEP_ID"])
def test_ranks_of_another_job_are_ranks(rank: pytest.MonkeyPatch, name: str) -> None:
    """A rank may start a job of its own, which inherits the mark."""
    rank.setenv(name, "5")
    assert env.inherited_rank() is None


def test_ranks_of_another_job_have_a_connection_of_their_own(rank: pytest.MonkeyPatch) -> None:
    """Under MPICH they may have the same numbers."""
    theirs, descriptor = int(os.environ["OTHER_FD"]), int(os.environ["PMI_FD"])
    held = os.dup(descriptor)
    os.dup2(theirs, descriptor)
    try:
        assert env.inherited_rank() is None
    finally:
        os.dup2(held, descriptor)
        os.close(held)


def test_a_mark_that_cannot_be_read_is_none(rank: pytest.MonkeyPatch) -> None:
    for text in ("", "1", "[]", "{}", '{"host": 1}'):
        rank.setenv("MPIDIST_RANK_PROCESS", text)
        assert env.inherited_rank() is None


def test_process_managers(environment: pytest.MonkeyPatch) -> None:
    assert env.process_managers() == ()
    environment.setenv("PMIX_RANK", "0")
    assert env.process_managers() == ("PMIx",)
    environment.setenv("PMI_FD", "7")
    assert env.process_managers() == ("PMI", "PMIx")


@pytest.mark.parametrize(
    ("text", "tasks"), [("4", 4), ("2(x3)", 2), ("4(x2),1", 4), ("1,3(x2)", 3), ("", None)]
)
def test_tasks_per_node(environment: pytest.MonkeyPatch, text: str, tasks: int | None) -> None:
    environment.setenv("SLURM_STEP_TASKS_PER_NODE", text)
    assert env.slurm_tasks_per_node() == tasks


def test_settings_are_what_changes_something_and_no_secret(
    environment: pytest.MonkeyPatch,
) -> None:
    before = env.settings()
    shown = {"MPIDIST_X": "1", "OMP_NUM_THREADS": "3", "OMPI_MCA_btl": "self"}
    hidden = {"MPIDIST_SECRET": "s", "OMPI_MCA_num_procs": "4", "HOME_OF_OMP_": "no"}
    for name, value in (shown | hidden).items():
        environment.setenv(name, value)
    assert env.settings() == dict(sorted((before | shown).items()))


def test_mpi_can_be_kept_from_starting(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MPI4PY_RC_INITIALIZE", "1")
    env.keep_mpi_from_starting()
    assert env.settings()["MPI4PY_RC_INITIALIZE"] == "0"


@pytest.mark.parametrize(
    ("text", "fallback", "aware"),
    [(None, False, None), ("", False, None), ("0", False, False), ("1", True, True)],
)
def test_what_is_asked_for_device_arrays(
    environment: pytest.MonkeyPatch, text: str | None, fallback: bool, aware: bool | None
) -> None:
    for name in ("MPIDIST_ENABLE_GPU_FALLBACK", "MPIDIST_CUDA_AWARE_MPI"):
        if text is None:
            environment.delenv(name, raising=False)
        else:
            environment.setenv(name, text)
    assert (env.gpu_fallback(), env.cuda_aware_mpi()) == (fallback, aware)
