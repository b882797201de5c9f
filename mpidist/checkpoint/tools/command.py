"""Look at checkpoints, and change them, without any ranks.

PATH is a directory of checkpoints, or the directory of one step in it. The exit code is 0 if all is
well, 1 if something is wrong with a checkpoint, two differ, or list finds no complete one, and 2 if
it cannot be done as asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mpidist._formatting import columns, format_bytes, format_count, shorten
from mpidist.checkpoint import directory
from mpidist.checkpoint.directory import Checkpoint, absolute, find, step_of
from mpidist.checkpoint.format.manifest import JSON, encode, printable
from mpidist.checkpoint.tools.differences import Difference, compare
from mpidist.checkpoint.tools.exporting import FORMATS, export_to, import_from
from mpidist.checkpoint.tools.pruning import STALE, prunable, prune, statuses
from mpidist.checkpoint.tools.resharding import Progress, ignore_progress, reshard
from mpidist.checkpoint.tools.verifying import verify
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMissingShardError,
    DistributedError,
)
from mpidist.usage import write_once


@contextmanager
def progress_bar(nbytes: int | None, name: str, *, show: bool) -> Iterator[Progress]:
    """Show the progress of work on `nbytes` bytes, if on a terminal and tqdm is installed.

    Yields a function to be called with how many more bytes are done.
    """
    if not (show and sys.stderr.isatty()):
        yield ignore_progress
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield ignore_progress
        return
    with tqdm(
        total=nbytes,
        desc=name,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update


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


def _argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return what `ArgumentParser.add_argument` is called with."""
    return names, options


_ONE = {"type": Path, "help": "directory of checkpoints, or of one step"}
_NEW = "directory of checkpoints, made if missing"
_PATH = _argument("path", metavar="PATH", **_ONE)
_DIRECTORY = _argument("path", type=Path, metavar="PATH", help="directory of checkpoints")
_FILE = _argument("file", type=Path, metavar="FILE", help=f"*{' or *'.join(FORMATS)}")
_STEP = _argument(
    "--step", type=_step, metavar="STEP", help="which one (default: the newest complete one)"
)


class _Outcome(NamedTuple):
    """What an action has found: as JSON, as lines of text, and its exit code."""

    fields: JSON
    lines: Iterable[str]
    code: int = 0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands for checkpoints."""
    parser.description = __doc__
    choices = parser.add_subparsers(title="what to do", dest="action", required=True)
    for name, (_, text, arguments, long) in _ACTIONS.items():
        own = choices.add_parser(name, help=text, description=text)
        for names, options in arguments:
            own.add_argument(*names, **options)
        own.add_argument("--json", action="store_true", help="print everything, as JSON")
        if long:
            own.add_argument(
                "--no-progress",
                dest="progress",
                action="store_false",
                help="no bar, which is shown on a terminal only",
            )


def run(options: argparse.Namespace) -> int:
    """Do it, and return the exit code.

    0; 1 if something is wrong with a checkpoint, or two differ; 2 if it cannot be done as asked.
    """
    try:
        outcome = _ACTIONS[options.action].act(options)
        if options.json:
            text = json.dumps(encode(outcome.fields), indent=1, allow_nan=False)
        else:
            # Whatever wrote the files: nothing in them shall control the terminal.
            text = "\n".join(map(printable, outcome.lines))
    except (CheckpointCorruptError, CheckpointMissingShardError) as error:
        return _refuse(options, error, 1)
    except (DistributedError, OSError, ValueError) as error:
        return _refuse(options, error, 2)
    sys.stdout.write(f"{text}\n")
    return outcome.code


def _refuse(options: argparse.Namespace, error: Exception, code: int) -> int:
    text = "\n".join(map(printable, str(error).split("\n")))
    write_once(f"checkpoint {options.action}: {text}\n")
    return code


def _list(options: argparse.Namespace) -> _Outcome:
    path = absolute(options.path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    partial = directory.partial(path)
    steps = [*(checkpoint.directory for checkpoint in directory.list(path)), *partial]
    rows = [
        _row_of(step_path, partial=step_path in partial) for step_path in sorted(steps, key=step_of)
    ]
    lines = [*_step_table(rows)] if rows else []
    if all(row["state"] == "partial" for row in rows):
        return _Outcome(rows, [*lines, f"there is no complete checkpoint in {path}"], 1)
    return _Outcome(rows, lines)


def _show(options: argparse.Namespace) -> _Outcome:
    checkpoint = _checkpoint_at(options.path, options.step)
    lines = [
        *_checkpoint_lines(checkpoint),
        *(["", *_box_table(checkpoint)] if options.boxes else ()),
    ]
    return _Outcome(_fields_of(checkpoint), lines)


def _verify(options: argparse.Namespace) -> _Outcome:
    checkpoint = _checkpoint_at(options.path, options.step)
    with progress_bar(_size(checkpoint), "verify", show=options.progress) as progress:
        errors = verify(checkpoint.directory.parent, step=checkpoint.step, progress=progress)
    fields = {
        "directory": str(checkpoint.directory),
        "whole": not errors,
        "errors": [{"kind": type(error).__name__, "message": str(error)} for error in errors],
    }
    if errors:
        return _Outcome(fields, [str(error) for error in errors], 1)
    return _Outcome(fields, [f"{checkpoint.directory} is whole: {_arrays_text(checkpoint)}"])


def _diff(options: argparse.Namespace) -> _Outcome:
    first, second = (_checkpoint_at(path, options.step) for path in (options.first, options.second))
    with progress_bar(_size(first), "diff", show=options.progress) as progress:
        differences = compare(first, second, progress=progress)
    fields = {
        "first": str(first.directory),
        "second": str(second.directory),
        "differences": [difference.as_json() for difference in differences],
    }
    return _Outcome(fields, _difference_lines(first, second, differences), int(bool(differences)))


def _reshard(options: argparse.Namespace) -> _Outcome:
    checkpoint = _checkpoint_at(options.path, options.step)
    with progress_bar(_size(checkpoint), "reshard", show=options.progress) as progress:
        new = reshard(
            checkpoint.directory.parent,
            options.destination,
            options.ranks,
            step=checkpoint.step,
            progress=progress,
        )
    return _made(new)


def _prune(options: argparse.Namespace) -> _Outcome:
    act = prunable if options.dry_run else prune
    removed = act(options.path, keep=options.keep, stale=options.stale)
    damaged = [s for s in statuses(options.path) if s.problem and s.directory not in removed]
    verb = "would remove" if options.dry_run else "removed"
    fields = {
        "dry_run": options.dry_run,
        "removed": [str(path) for path in removed],
        "damaged": [str(state.directory) for state in damaged],
    }
    lines = [f"{verb} {path}" for path in removed] or ["nothing to remove"]
    lines += [f"does not count: {state.problem}" for state in damaged]
    return _Outcome(fields, lines)


def _export(options: argparse.Namespace) -> _Outcome:
    checkpoint = _checkpoint_at(options.path, options.step)
    with progress_bar(_size(checkpoint), "export", show=options.progress) as progress:
        export_to(options.file, checkpoint, progress=progress)
    nbytes = options.file.stat().st_size
    fields = {"file": str(options.file), "step": checkpoint.step, "bytes": nbytes}
    return _Outcome(fields, [f"{options.file}: step {checkpoint.step}, {format_bytes(nbytes)}"])


def _import(options: argparse.Namespace) -> _Outcome:
    with progress_bar(None, "import", show=options.progress) as progress:
        new = import_from(options.file, options.path, step=options.step, progress=progress)
    return _made(new)


def _made(new: Checkpoint) -> _Outcome:
    fields = {
        "directory": str(new.directory),
        "step": new.step,
        "ranks": new.world_size,
        "bytes": new.nbytes,
    }
    return _Outcome(fields, [f"{new.directory}: {_ranks_text(new)}, {_arrays_text(new)}"])


def _checkpoint_at(path: Path, step: int | str | None) -> Checkpoint:
    """Return the checkpoint of a path, which may be that of the directory of its step."""
    where = path if path.name not in ("", "..") else path.resolve()
    try:
        own = step_of(where)
    except ValueError:
        return find(path, "latest" if step is None else step)
    if step not in (None, own):
        raise ValueError(f"{path} is the directory of one step; leave out --step {step}")
    return find(where.parent, own)


def _size(checkpoint: Checkpoint) -> int | None:
    """Return how many bytes its arrays have, if it says so."""
    try:
        return checkpoint.nbytes
    except CheckpointError:
        return None


def _row_of(directory: Path, *, partial: bool) -> dict[str, JSON]:
    """Return what `list` says of the directory of a step."""
    row: dict[str, JSON] = {"step": step_of(directory), "directory": str(directory)}
    if partial:
        return row | {"state": "partial"}
    try:
        checkpoint = Checkpoint(directory)
        return row | {
            "state": "complete",
            "created": checkpoint.created,
            "ranks": checkpoint.world_size,
            "arrays": len(checkpoint.arrays),
            "values": len(checkpoint.values),
            "bytes": checkpoint.nbytes,
        }
    except CheckpointError as error:
        return row | {"state": "damaged", "problem": str(error)}


def _step_table(rows: Sequence[Mapping[str, JSON]]) -> Iterator[str]:
    """Yield a table of the steps of a directory."""
    yield from columns(
        ("step", "saved", "ranks", "arrays", "size", "state"),
        [
            (
                str(row["step"]),
                _date(row["created"]) if "created" in row else "",
                str(row.get("ranks", "")),
                str(row.get("arrays", "")),
                format_bytes(row["bytes"]) if "bytes" in row else "",
                row["state"],
            )
            for row in rows
        ],
        left=1,
    )
    yield from (f"step {row['step']}: {row['problem']}" for row in rows if "problem" in row)


def _fields_of(checkpoint: Checkpoint) -> dict[str, JSON]:
    """Return what `show` says of a checkpoint."""
    return {
        "directory": str(checkpoint.directory),
        "step": checkpoint.manifest.step,
        "created": checkpoint.created,
        "id": checkpoint.manifest.id,
        "ranks": checkpoint.world_size,
        "bytes": checkpoint.nbytes,
        "versions": dict(checkpoint.versions),
        "metadata": checkpoint.metadata,
        "values": dict(checkpoint.values),
        "files": {file.name: file.size for file in checkpoint.manifest.files},
        "arrays": {
            name: {
                "dtype": str(array.dtype),
                "shape": array.shape,
                "boxes": [
                    {
                        "offsets": stored.box.offsets,
                        "sizes": stored.box.sizes,
                        "file": checkpoint.manifest.files[stored.file].name,
                        "dataset": stored.dataset,
                    }
                    for stored in array.boxes
                ],
            }
            for name, array in checkpoint.arrays.items()
        },
    }


def _checkpoint_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield all that is known of a checkpoint, but for the elements of its arrays."""
    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.versions.items())
    files = checkpoint.manifest.files
    step, date = checkpoint.manifest.step, _date(checkpoint.created)
    yield f"{checkpoint.directory}: step {step}, saved {date}"
    yield f"  by {_ranks_text(checkpoint)}, in {format_count(len(files), 'file')}"
    yield f"  with {versions}"
    yield f"  metadata {json.dumps(checkpoint.metadata)}"
    if checkpoint.values:
        yield ""
        yield format_count(len(checkpoint.values), "value")
        for name, value in sorted(checkpoint.values.items()):
            yield f"  {name} = {shorten(json.dumps(value), 90)}"
    yield ""
    yield _arrays_text(checkpoint)
    if checkpoint.arrays:
        yield from columns(
            ("size", "boxes", "array", "dtype", "shape"),
            [
                (
                    format_bytes(array.nbytes),
                    str(len(array.boxes)),
                    name,
                    str(array.dtype),
                    str(list(array.shape)),
                )
                for name, array in sorted(checkpoint.arrays.items())
            ],
            left=3,
        )


def _box_table(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a table of where each part of each array lies."""
    rows = [
        (
            name,
            "["
            + ", ".join(f"{o}:{s}" for o, s in zip(b.box.offsets, b.box.stops, strict=True))
            + "]",
            checkpoint.manifest.files[b.file].name,
            b.dataset,
            str(b.first),
        )
        for name, array in sorted(checkpoint.arrays.items())
        for b in array.boxes
    ]
    yield from columns(("array", "box", "file", "dataset", "from element"), rows, left=5)


def _difference_lines(
    first: Checkpoint, second: Checkpoint, differences: Sequence[Difference]
) -> Iterator[str]:
    """Yield what two checkpoints do not have in common."""
    yield f"first   {first.directory}"
    yield f"second  {second.directory}"
    yield ""
    if differences:
        rows = [(item.kind, item.name, item.text) for item in differences]
        yield from columns(("what", "name", "difference"), rows, left=3)
    else:
        yield f"the same: {_arrays_text(first)}"


def _arrays_text(checkpoint: Checkpoint) -> str:
    """Return how many arrays a checkpoint has, and their size."""
    return f"{format_count(len(checkpoint.arrays), 'array')}, {format_bytes(checkpoint.nbytes)}"


def _ranks_text(checkpoint: Checkpoint) -> str:
    """Return how many ranks saved a checkpoint."""
    return format_count(checkpoint.world_size, "rank")


def _date(created: str) -> str:
    """Return a date of a manifest without its fractions."""
    return f"{created[:19].replace('T', ' ')} UTC"


class _Action(NamedTuple):
    """Something to do: the function, its help, its arguments, and whether it may take long."""

    act: Callable[[argparse.Namespace], _Outcome]
    help: str
    arguments: Sequence[tuple[tuple[str, ...], dict[str, Any]]]
    long: bool


_ACTIONS: Mapping[str, _Action] = {
    "list": _Action(
        _list, "say which checkpoints are there, complete or in part", [_DIRECTORY], long=False
    ),
    "show": _Action(
        _show,
        "say what is in one: arrays, values, metadata, versions",
        [
            _PATH,
            _STEP,
            _argument("--boxes", action="store_true", help="also where each part of an array lies"),
        ],
        long=False,
    ),
    "verify": _Action(
        _verify, "read all of one, and say all that is wrong with it", [_PATH, _STEP], long=True
    ),
    "diff": _Action(
        _diff,
        "say in what two of them differ",
        [
            _argument("first", metavar="FIRST", **_ONE),
            _argument("second", metavar="SECOND", **_ONE),
            _STEP,
        ],
        long=True,
    ),
    "reshard": _Action(
        _reshard,
        "write one anew, split over another number of ranks",
        [
            _PATH,
            _argument("destination", type=Path, metavar="NEW", help=_NEW),
            _argument(
                "--ranks",
                type=_at_least(1),
                required=True,
                metavar="N",
                help="of the new checkpoint",
            ),
            _STEP,
        ],
        long=True,
    ),
    "prune": _Action(
        _prune,
        "remove all but the newest ones, and what killed saves have left",
        [
            _DIRECTORY,
            _argument(
                "--keep",
                type=_at_least(1),
                required=True,
                metavar="K",
                help="how many whole ones stay: those that were committed last",
            ),
            _argument("--dry-run", action="store_true", help="only say what would be removed"),
            _argument(
                "--stale",
                type=float,
                default=STALE,
                metavar="SECONDS",
                help="without a change, after which a partial one is taken for what a killed save "
                "has left (default: %(default)g)",
            ),
        ],
        long=False,
    ),
    "export": _Action(
        _export, "write one as a file of safetensors or npz", [_PATH, _FILE, _STEP], long=True
    ),
    "import": _Action(
        _import,
        "make a file of safetensors or npz a checkpoint",
        [
            _FILE,
            _argument("path", type=Path, metavar="PATH", help=_NEW),
            _argument(
                "--step",
                type=_at_least(0),
                metavar="STEP",
                help="of the checkpoint (default: as it was exported)",
            ),
        ],
        long=True,
    ),
}
