from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import pytest

from mpidist import errors
from mpidist._optional import require
from mpidist.backends.device.nccl.communicator import binding
from mpidist.backends.mpi.library import load_mpi

CLASSES = [getattr(errors, name) for name in errors.__all__]

ALSO: dict[type[Exception], set[str]] = {
    ValueError: {
        "CheckpointCorruptError",
        "CheckpointIncompatibleError",
        "CollectiveMismatchError",
        "InvalidRankError",
        "InvalidWorldSizeError",
        "ScheduleError",
        "SelfSendError",
        "SizeMismatchError",
        "UnsupportedOperationError",
    },
    FileNotFoundError: {"CheckpointMissingShardError", "CheckpointNotFoundError"},
    TimeoutError: {"CollectiveTimeoutError"},
    ConnectionError: {"NoConnectionError", "PeerLostError"},
    RuntimeError: {"BackendUnavailableError", "GroupBrokenError", "TransportError"},
}


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_is_one_of_ours_and_stands_in_the_tree(error: type[Exception]) -> None:
    assert issubclass(error, errors.DistributedError)
    assert error.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("builtin", ALSO, ids=lambda error: error.__name__)
def test_code_that_knows_nothing_of_mpidist_can_catch_them(builtin: type[Exception]) -> None:
    found = {error.__name__ for error in CLASSES if issubclass(error, builtin)}
    assert found == ALSO[builtin]


def test_transport_error_keeps_the_code() -> None:
    error = errors.TransportError("all_reduce: no", code=15)
    assert (str(error), error.code) == ("all_reduce: no", 15)


@pytest.mark.parametrize(
    ("module", "load", "cure"),
    [
        ("mpi4py", load_mpi, "pip install 'mpidist[mpich]'"),
        ("torch", lambda: require("torch", extra="torch", purpose="x"), "'mpidist[torch]'"),
        ("cupy.cuda.nccl", binding, "NCCL needs CuPy"),
    ],
)
def test_of_a_missing_library_only_the_cure_is_shown(
    monkeypatch, module: str, load: Callable[[], object], cure: str
) -> None:
    """Not forty lines of where somebody has looked for it."""
    binding.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(errors.BackendUnavailableError) as caught:
        load()
    text = "".join(traceback.format_exception(caught.value))
    assert "another exception" not in text
    assert "direct cause" not in text
    assert cure in text.splitlines()[-1]
