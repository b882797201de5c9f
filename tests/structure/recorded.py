"""What is not yet as it shall be, as numbers that may only fall: recorded.json.

::

    python -m tests.structure.recorded                   # write down what the source says now
    mpirun -n 2 python -m tests.structure.recorded       # and how many files a call passes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mpidist
from tests.structure import source, words
from tests.structure.walk import CALLS

FILE = Path(__file__).with_suffix(".json")
AIMS = {"all_reduce": 8, "ddp.backward": 15, "checkpoint.save": 16, "checkpoint.load": 16}


def recorded() -> dict[str, Any]:
    """Return what is written down."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def present() -> dict[str, Any]:
    """Return the same of the source as it is, but for the walks."""
    return {
        "files in import circles": sum(map(len, source.circles(source.imports()))),
        "class names used twice": sorted(n for n, files in source.classes().items() if files[1:]),
        "words": dict(sorted(words.banned().items())),
    }


def main() -> None:
    """Write down what there is now."""
    numbers = recorded() | present()
    with mpidist.init() as world:
        if world.size > 1:
            walks = {name: len(follow(world).files) for name, follow in CALLS.items()}
            numbers["files of a walk"] = walks
        if world.rank == 0:
            FILE.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
