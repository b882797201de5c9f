"""What the command line says of checkpoints."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mpidist._formatting import columns, format_bytes, format_count
from mpidist.checkpoint.directory import Checkpoint, step_of
from mpidist.checkpoint.format.manifest import JSON
from mpidist.checkpoint.tools.differences import Difference
from mpidist.errors import CheckpointError


def row_of(directory: Path, *, partial: bool) -> dict[str, JSON]:
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


def step_table(rows: Sequence[Mapping[str, JSON]]) -> Iterator[str]:
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


def fields_of(checkpoint: Checkpoint) -> dict[str, JSON]:
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


def checkpoint_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield all that is known of a checkpoint, but for the elements of its arrays."""
    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.versions.items())
    files = checkpoint.manifest.files
    step, date = checkpoint.manifest.step, _date(checkpoint.created)
    yield f"{checkpoint.directory}: step {step}, saved {date}"
    yield f"  by {ranks_text(checkpoint)}, in {format_count(len(files), 'file')}"
    yield f"  with {versions}"
    yield f"  metadata {json.dumps(checkpoint.metadata)}"
    if checkpoint.values:
        yield ""
        yield format_count(len(checkpoint.values), "value")
        for name, value in sorted(checkpoint.values.items()):
            yield f"  {name} = {_short(json.dumps(value))}"
    yield ""
    yield arrays_text(checkpoint)
    if checkpoint.arrays:
        yield from columns(
            ("size", "boxes", "array", "dtype", "shape"),
            [
                (
                    format_bytes(array.nbytes),
                    str(len(array.boxes)),
                    name,
                    str(array.dtype),
                    str(builtins.list(array.shape)),
                )
                for name, array in sorted(checkpoint.arrays.items())
            ],
            left=3,
        )


def box_table(checkpoint: Checkpoint) -> Iterator[str]:
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


def difference_lines(
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
        yield f"the same: {arrays_text(first)}"


def arrays_text(checkpoint: Checkpoint) -> str:
    """Return how many arrays a checkpoint has, and their size."""
    return f"{format_count(len(checkpoint.arrays), 'array')}, {format_bytes(checkpoint.nbytes)}"


def ranks_text(checkpoint: Checkpoint) -> str:
    """Return how many ranks saved a checkpoint."""
    return format_count(checkpoint.world_size, "rank")


def _date(created: str) -> str:
    """Return a date of a manifest without its fractions."""
    return f"{created[:19].replace('T', ' ')} UTC"


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


_LONG = 90
