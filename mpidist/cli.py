"""The command line, ``python -m mpidist`` or ``mpidist``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import Protocol, cast

from mpidist import __version__
from mpidist._stdout import accept_any_text
from mpidist.usage import RankArgumentParser


class Command(Protocol):
    """A module that is a command."""

    __doc__: str | None

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it, and return the exit code; ``options.argv`` is the command line as it was given."""
        ...


COMMANDS: Mapping[str, tuple[str, str]] = {
    "bench": (
        "mpidist.bench.command",
        "measure this machine, beside the MPI library and other peers",
    ),
    "checkpoint": (
        "mpidist.checkpoint.tools.command",
        "look at checkpoints, verify, compare, reshard, export them",
    ),
    "example": (
        "mpidist.example",
        "list, show or copy the examples: `example 00` shows the first one",
    ),
    "info": (
        "mpidist.info.command",
        "show this machine and job, and what is wrong with them, each with its cure",
    ),
    "plan": (
        "mpidist.bench.plan",
        "predict all_reduce and training steps on other numbers of ranks and nodes",
    ),
    "trace": (
        "mpidist.tracing.command",
        "summarise a trace: communication, overlap, the slowest rank of each step",
    ),
}
"""The module of every command, which is loaded if that is asked for, and its one line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The command and its options. `sys.argv` without the program when omitted.

    Returns
    -------
    int
        Exit code of the command.

    Raises
    ------
    SystemExit
        If it is no command line (code 2), or ask for help or the version (code 0).
    """
    accept_any_text()
    argv = sys.argv[1:] if argv is None else argv
    options = make_parser(argv).parse_args(argv)
    options.argv = argv
    return _load(options.command).run(options)


def make_parser(names: Collection[str] = tuple(COMMANDS)) -> RankArgumentParser:
    """Return the parser of all commands, with the options of those among `names`."""
    parser = RankArgumentParser(
        prog="python -m mpidist", description="MPI-first distributed training: its tools."
    )
    parser.add_argument("--version", action="version", version=f"mpidist {__version__}")
    choices = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = choices.add_parser(name, help=text, description=text)
        if name in names:
            _load(name).configure(command)
    return parser


def _load(name: str) -> Command:
    return cast(Command, import_module(COMMANDS[name][0]))
