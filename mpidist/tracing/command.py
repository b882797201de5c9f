"""``python -m mpidist trace``: add up a trace, or make one of the parts of a job that broke."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpidist.tracing.chrome import write_trace
from mpidist.tracing.parts import Part
from mpidist.tracing.summary import load, summarise
from mpidist.tracing.table import render_summary
from mpidist.usage import write_once

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what can be done with a trace."""
    choices = parser.add_subparsers(title="what to do", dest="action", required=True)
    text = "where each rank's time went, and for whom the others waited"
    summary = choices.add_parser("summary", help=text, description=text)
    summary.add_argument("file", type=Path, metavar="FILE", help="a trace, .json or .json.gz")
    summary.add_argument("--json", action="store_true", help="print everything as JSON, in seconds")
    summary.add_argument(
        "--top", type=int, default=10, metavar="N", help="rows of the longer tables (default: 10)"
    )
    text = "make one trace of the parts that a broken job has left"
    merge = choices.add_parser("merge", help=text, description=text)
    merge.add_argument("parts", type=Path, metavar="DIRECTORY", help="whose name ends with .parts")
    merge.add_argument(
        "--out", type=Path, metavar="FILE", help="the trace (default: the name without .parts)"
    )


def run(options: argparse.Namespace, *, words: Sequence[str]) -> int:
    """Do it.

    Parameters
    ----------
    options : Namespace
        What the parser of `configure` made.
    words : sequence of str
        The command line, for the output.

    Returns
    -------
    int
        Exit code: 0; 2 if a file is not what it should be.
    """
    try:
        text = _summary(options, words) if options.action == "summary" else _merge(options)
    except (OSError, ValueError) as error:
        write_once(f"trace {options.action}: {error}\n")
        return 2
    sys.stdout.write(text)
    return 0


def _summary(options: argparse.Namespace, words: Sequence[str]) -> str:
    summary = summarise(load(options.file))
    if options.json:
        return json.dumps(asdict(summary), indent=1) + "\n"
    return render_summary(summary, " ".join(["python", "-m", "mpidist", *words]), top=options.top)


def _merge(options: argparse.Namespace) -> str:
    directory: Path = options.parts
    out = options.out
    if out is None:
        if directory.suffix != ".parts":
            raise ValueError(f"{directory} does not end with .parts; say with --out where to write")
        out = directory.with_suffix("")
    parts = [Part.of(path.read_bytes()) for path in sorted(directory.glob("rank-*.jsonl.gz"))]
    usable = [part for part in parts if "began" in part.facts]
    if not usable:
        raise ValueError(f"{directory} holds no rank's part of a trace")
    if len({part.facts["run"] for part in usable}) > 1:
        raise ValueError(f"{directory} holds parts of several traces; keep those of one")
    write_trace(usable, out)
    return f"{out}: {len(usable)} of {usable[0].facts['size']} ranks\n"
