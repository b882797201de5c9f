"""What starts and ends jobs; it is in the package, whose own soaks start jobs, too."""

from __future__ import annotations

from mpidist.testing.launcher import (
    MARK,
    clean_environment,
    end_job,
    find_mpirun,
    marked_processes,
    vendor_arguments,
)

__all__ = [
    "MARK",
    "clean_environment",
    "end_job",
    "find_mpirun",
    "marked_processes",
    "vendor_arguments",
]
