"""Run all tests in least time: ``python -m tests [PYTEST_ARGUMENTS...]``.

First, on a few workers, those that leave cores idle most of the time; then, one after the other,
those on ranks, which share jobs that take all cores, and those that want the machine for
themselves. A plain ``pytest`` runs the same tests, all one after the other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

ONE_BY_ONE = "ranks or hosts or alone"

WORKERS = min(8, 1 + len(os.sched_getaffinity(0)))
"""One more than cores, since they wait much: for a deadline, for a tick of Slurm's."""

PARTS = ((f"not ({ONE_BY_ONE})", WORKERS), (ONE_BY_ONE, 0))
"""Which tests, and on how many workers."""

# Not the files with many tests first: they are not those that take long. A thread that ends a test
# at its deadline ends its worker, too, and another one then runs the same test again, up to its
# deadline: a signal ends the test alone, and no worker is replaced.
PARALLEL = (
    *("--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart=0"),
    *("-o", "timeout_method=signal"),
)

NOTHING_SELECTED = 5  # by the arguments, in one of the parts


def main(words: Sequence[str]) -> int:
    """Run both parts, whatever the first one finds, and return the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", dest="marks")
    asked, arguments = parser.parse_known_args(words)
    codes = []
    for marks, workers in PARTS:
        both = f"({asked.marks}) and ({marks})" if asked.marks else marks
        parallel = ["-n", str(workers), *(PARALLEL if workers else ())]
        command = [sys.executable, "-m", "pytest", *parallel, "-m", both, *arguments]
        codes.append(subprocess.call(command))
    failed = [code for code in codes if code not in (0, NOTHING_SELECTED)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
