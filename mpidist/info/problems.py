"""What a check returns."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Problem", "fatal", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is wrong.

    Attributes
    ----------
    check : str
        Which check has found it.
    fatal : bool
        Whether no job can run like this; else it is slower than it must be, or may surprise.
    what, cure : str
        What was found, and what to do.
    """

    check: str
    fatal: bool
    what: str
    cure: str


def fatal(check: str, what: str, cure: str) -> Problem:
    """Return a problem with which no job can run."""
    return Problem(check=check, fatal=True, what=what, cure=cure)


def warning(check: str, what: str, cure: str) -> Problem:
    """Return a problem with which jobs run."""
    return Problem(check=check, fatal=False, what=what, cure=cure)
