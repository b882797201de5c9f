"""The level of the logger, and what is written without one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mpidist.log import configure, logger, shows


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("name", "info", "debug"),
    [
        ("", True, False),
        ("debug", True, True),
        ("info", True, False),
        ("warning", False, False),
        ("error", False, False),
    ],
)
def test_what_is_shown_at_each_level(name: str, info: bool, debug: bool) -> None:
    configure(name)
    assert (shows(logging.INFO), shows(logging.DEBUG)) == (info, debug)


def test_no_warnings_of_long_waits(caplog) -> None:
    configure("error")
    logger.warning("has waited")
    logger.error("not complete")
    assert [record.message for record in caplog.records] == ["not complete"]


def test_without_the_variable_the_programs_own_level_stays() -> None:
    logger.setLevel(logging.CRITICAL)
    configure("")
    assert logger.level == logging.CRITICAL


def test_another_word_is_no_error(caplog) -> None:
    configure("loud", warn=False)
    assert not caplog.records
    configure("loud")
    assert "MPIDIST_LOG=loud: expected one of debug, info" in caplog.text
    assert logger.level == logging.NOTSET
