"""The command line, ``python -m mpidist`` or ``mpidist``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from mpidist import __version__, example
from mpidist._stdout import accept_any_text
from mpidist.bench import command as bench
from mpidist.bench import plan
from mpidist.checkpoint.tools import command as checkpoint
from mpidist.info import command as info
from mpidist.tracing import command as trace
from mpidist.usage import RankArgumentParser


class Command(Protocol):
    """A module that is a command."""

    __doc__: str | None

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it, and return the exit code; ``options.argv`` is the command line as it was given."""
        ...


COMMANDS: Mapping[str, tuple[Command, str]] = {
    "bench": (bench, "measure this machine, beside the MPI library and other peers"),
    "checkpoint": (checkpoint, "look at checkpoints, verify, compare, reshard, export them"),
    "example": (example, "list, show or copy the examples: `example 00` shows the first one"),
    "info": (info, "show this machine and job, and what is wrong with them, each with its cure"),
    "plan": (plan, "predict all_reduce and training steps on other numbers of ranks and nodes"),
    "trace": (trace, "summarise a trace: communication, overlap, the slowest rank of each step"),
}
"""Every command with its one line of help."""


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
    options = make_parser().parse_args(argv)
    options.argv = argv
    return COMMANDS[options.command][0].run(options)


def make_parser() -> RankArgumentParser:
    """Return the parser of all commands."""
    parser = RankArgumentParser(
        prog="python -m mpidist", description="MPI-first distributed training: its tools."
    )
    parser.add_argument("--version", action="version", version=f"mpidist {__version__}")
    choices = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, (command, text) in COMMANDS.items():
        command.configure(choices.add_parser(name, help=text, description=text))
    return parser
