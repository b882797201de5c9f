"""What is shown of an exception that nobody caught."""

from __future__ import annotations

import numpy as np
import pytest

import mpidist
from mpidist.errors import CollectiveMismatchError, CollectiveTimeoutError
from mpidist.observe.watch.failures import callers_of, lines_of, reason_of, summary_of
from mpidist.testing import run_ranks


def mistake(group: mpidist.ProcessGroup) -> BaseException:
    with pytest.raises(ValueError, match="out must have shape") as caught:
        mpidist.all_reduce(np.ones(3), group, out=np.ones(4))
    return caught.value


def test_frames_of_the_package_are_left_out() -> None:
    (error,) = run_ranks(1, mistake)
    lines = lines_of(error, error.__traceback__)
    files = [line for line in lines if line.startswith("  File ")]
    assert len(files) == 1
    assert "test_tracebacks.py" in files[0]
    assert "in mistake" in files[0]
    whole = lines_of(error, error.__traceback__, full=True)
    assert sum(line.startswith("  File ") for line in whole) > 1
    # The message is told before.
    assert not any("out must have shape" in line for line in lines + whole)
    assert summary_of(error).startswith("mpidist.errors.SizeMismatchError: all_reduce on group")


def test_frames_of_the_package_are_all_there_is() -> None:
    """As in one of its own threads."""
    scope: dict[str, object] = {}
    source = "def fail():\n    raise ValueError('inside')"
    exec(compile(source, mpidist.errors.__file__, "exec"), scope)
    with pytest.raises(ValueError, match="inside") as caught:
        scope["fail"]()  # type: ignore[operator]
    trace = caught.value.__traceback__
    assert trace is not None
    assert any("errors.py" in line for line in lines_of(caught.value, trace.tb_next))


def test_exceptions_that_led_to_it_are_shown_without_frames_of_the_package_too() -> None:
    (cause,) = run_ranks(1, mistake)

    def fail() -> None:
        raise RuntimeError("training failed") from cause

    with pytest.raises(RuntimeError, match="training failed") as caught:
        fail()
    lines = lines_of(caught.value, caught.value.__traceback__)
    assert any("SizeMismatchError: all_reduce on group" in line for line in lines)
    assert not any("mpidist/collectives" in line for line in lines)


def test_a_message_of_several_lines_is_kept() -> None:
    with pytest.raises(ValueError, match="first") as caught:
        raise ValueError("first\nsecond")
    assert lines_of(caught.value, caught.value.__traceback__)[-2:] == [
        "ValueError: first",
        "second",
    ]


def test_the_same_mistake_has_the_same_reason_on_all_ranks() -> None:
    """Though the message names the rank."""
    errors = run_ranks(3, mistake)
    assert len({str(error) for error in errors}) == 3
    assert len({reason_of(error, error.__traceback__) for error in errors}) == 1


def test_different_mistakes_have_different_reasons() -> None:
    def raised(number: int) -> ValueError:
        with pytest.raises(ValueError, match="loss") as caught:
            raise ValueError(f"loss {number}")
        return caught.value

    reasons = {reason_of(error, error.__traceback__) for error in map(raised, (1, 2))}
    assert len(reasons) == 2
    error = raised(1)
    assert reason_of(error, error.__traceback__) != reason_of(error, None)  # at other lines


def test_ranks_that_differ_have_one_reason() -> None:
    """Whichever line each of them called."""
    texts = [
        f"reduce #3 on group 'world', rank {rank} of 2: rank {rank}: reduce" for rank in (0, 1)
    ]
    errors = [CollectiveMismatchError(text) for text in texts]
    assert len({reason_of(error, None) for error in errors}) == 1


def test_ranks_that_stop_because_of_a_report_have_one_reason() -> None:
    def late(rank: int) -> CollectiveTimeoutError:
        error = CollectiveTimeoutError(f"rank {rank} of 2: not complete. Missing: 3.{rank} s ago")
        error._reported = "all_reduce #7 on group 'world', called at a.py:1: not complete after 4 s"
        return error

    assert len({reason_of(late(rank), None) for rank in (0, 1)}) == 1


def test_the_callers_are_lines_of_the_program() -> None:
    (error,) = run_ranks(1, mistake)
    assert callers_of(error.__traceback__).endswith("in mistake")
    assert " < " not in callers_of(error.__traceback__)
