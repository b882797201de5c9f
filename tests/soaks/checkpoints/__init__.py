"""Soaks of checkpoints: jobs that are killed, files that are spoilt, system calls that fail.

::

    python -m tests.soaks.checkpoints.kills
    python -m tests.soaks.checkpoints.corruption
    python -m tests.soaks.checkpoints.failures
"""

from __future__ import annotations

__all__: list[str] = []
