"""Reports as JSON, for programs and for whoever was not there."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping

from mpidist import env
from mpidist._new_file import create_unique
from mpidist.observe.watch.states import RankState

__all__ = ["write_dump"]


def write_dump(title: str, states: Mapping[int, RankState]) -> str:
    """Write what is known of the ranks as JSON, and return a sentence that says where it is.

    Parameters
    ----------
    title : str
        Of the report.
    states : mapping of int to RankState
        The ranks.

    Notes
    -----
    The file is new, and readable by its owner alone; see `mpidist.env.dump_directory`.
    """
    content = {
        "format": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "title": title,
        "ranks": [state.as_json() for _, state in sorted(states.items())],
    }
    directory = env.dump_directory()
    path = ""
    try:
        directory = os.path.abspath(directory)  # noqa: PTH100  # it may have been removed
        stem = f"mpidist-report-{os.uname().nodename}-{os.getpid()}"
        descriptor, path = create_unique(directory, stem, ".json")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError as error:
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108  # half of it is of no use
        return f"The records could not be written to {directory}: {error}"
    return f"The last operations and all stacks of these ranks are in {path}"
