"""Soaks of checkpoints: jobs that are killed, files that are spoilt, system calls that fail.

::

    python -m mpidist.testing.checkpoints.kills
    python -m mpidist.testing.checkpoints.corruption
    python -m mpidist.testing.checkpoints.failures
"""

from __future__ import annotations

__all__: list[str] = []
