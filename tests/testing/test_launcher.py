"""The environment that tests give to the jobs they start."""

from __future__ import annotations

import os
import threading

from tests._ranks.launcher import clean_environment


def test_environment_may_change_while_it_is_read() -> None:
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            os.environ["MPIDIST_TEST_PASSING"] = "1"
            del os.environ["MPIDIST_TEST_PASSING"]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(2000):
            assert clean_environment()["OMP_NUM_THREADS"] == "1"
    finally:
        stop.set()
        thread.join()


def test_every_job_of_open_mpi_has_a_session_directory_of_its_own() -> None:
    first, second = (clean_environment()["PRTE_MCA_prte_tmpdir_base"] for _ in range(2))
    assert first != second
