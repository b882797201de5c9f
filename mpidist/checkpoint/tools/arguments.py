"""What the actions of ``python -m mpidist checkpoint`` are told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mpidist.checkpoint.tools.exporting import FORMATS
from mpidist.checkpoint.tools.pruning import STALE

__all__ = [
    "add_diff",
    "add_export",
    "add_import",
    "add_list",
    "add_prune",
    "add_reshard",
    "add_show",
    "add_verify",
]


def _step(text: str) -> int | str:
    if text == "latest" or text.isdecimal():
        return text if text == "latest" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor 'latest'")


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return read


def _path(parser: argparse.ArgumentParser, name: str = "path", metavar: str = "PATH") -> None:
    text = "directory of checkpoints, or of one step"
    parser.add_argument(name, type=Path, metavar=metavar, help=text)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add what `verify` is told."""
    _path(parser)
    _add_step(parser)


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", type=_step, metavar="STEP", help="which one (default: the newest complete one)"
    )


def add_list(parser: argparse.ArgumentParser) -> None:
    """Add what `list` is told."""
    parser.add_argument("path", type=Path, metavar="PATH", help="directory of checkpoints")


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add what `show` is told."""
    add_verify(parser)
    parser.add_argument(
        "--boxes", action="store_true", help="also where each part of an array lies"
    )


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Add what `diff` is told."""
    _path(parser, "first", "FIRST")
    _path(parser, "second", "SECOND")
    _add_step(parser)


def add_reshard(parser: argparse.ArgumentParser) -> None:
    """Add what `reshard` is told."""
    _path(parser)
    parser.add_argument(
        "destination", type=Path, metavar="NEW", help="directory of checkpoints, made if missing"
    )
    parser.add_argument(
        "--ranks", type=_at_least(1), required=True, metavar="N", help="of the new checkpoint"
    )
    _add_step(parser)


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add what `prune` is told."""
    add_list(parser)
    parser.add_argument(
        "--keep",
        type=_at_least(1),
        required=True,
        metavar="K",
        help="how many whole ones stay: those that were committed last",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument(
        "--stale",
        type=float,
        default=STALE,
        metavar="SECONDS",
        help="without a change, after which a partial one is taken for what a killed save has left "
        "(default: %(default)g)",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add what `export` is told."""
    _path(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help=f"*{' or *'.join(FORMATS)}")
    _add_step(parser)


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add what `import` is told."""
    parser.add_argument("file", type=Path, metavar="FILE", help=f"*{' or *'.join(FORMATS)}")
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="directory of checkpoints, made if missing"
    )
    parser.add_argument(
        "--step",
        type=_at_least(0),
        metavar="STEP",
        help="of the checkpoint (default: as it was exported)",
    )
