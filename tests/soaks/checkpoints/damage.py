"""Ways in which the files of a checkpoint are spoilt."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from mpidist.checkpoint.format.manifest import MANIFEST, VERSION
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointMissingShardError,
    CheckpointNotFoundError,
)

__all__ = ["DAMAGES", "Damage", "Place", "Touched"]

_PAGE = 4096

Touched: TypeAlias = set[str]
"""Names of the files that are no longer what they were."""


@dataclass(frozen=True)
class Place:
    """What is to be spoilt, and what can be put in its place.

    Attributes
    ----------
    directory : Path
        Of the step that is spoilt.
    before : Path
        Of the step before, of the same run; not to be touched.
    other : Path
        Of the same step of another run with the same names and shapes; not to be touched.
    """

    directory: Path
    before: Path
    other: Path

    def file(self, rng: random.Random) -> Path:
        """Draw a file."""
        return rng.choice(sorted(path for path in self.directory.iterdir() if path.is_file()))

    def shards(self) -> list[Path]:
        """Return the files of ranks."""
        return sorted(self.directory.glob("rank-*.h5"))


def _rewrite(path: Path, change: Callable[[bytearray], None]) -> Touched:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return {path.name}


def _flip(place: Place, rng: random.Random) -> Touched:
    def change(data: bytearray) -> None:
        for _ in range(rng.choice([1, 1, 1, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    return _rewrite(place.file(rng), change)


def _cut_off(place: Place, rng: random.Random) -> Touched:
    return _rewrite(
        place.file(rng), lambda data: data.__delitem__(slice(rng.randrange(len(data)), None))
    )


def _extend(place: Place, rng: random.Random) -> Touched:
    return _rewrite(place.file(rng), lambda data: data.extend(rng.randbytes(rng.randint(1, 9999))))


def _page(place: Place, rng: random.Random) -> Touched:
    def change(data: bytearray) -> None:
        begin = rng.randrange(0, len(data), _PAGE)
        length = min(_PAGE * rng.choice([1, 1, 16, 10**6]), len(data) - begin)
        data[begin : begin + length] = rng.choice([bytes(length), rng.randbytes(length)])

    return _rewrite(place.file(rng), change)


def _delete(place: Place, rng: random.Random) -> Touched:
    path = place.file(rng)
    path.unlink()
    return {path.name}


def _empty(place: Place, rng: random.Random) -> Touched:
    path = place.file(rng)
    path.write_bytes(b"")
    return {path.name}


def _become_directory(place: Place, rng: random.Random) -> Touched:
    path = place.file(rng)
    path.unlink()
    path.mkdir()
    return {path.name}


def _become_fifo(place: Place, rng: random.Random) -> Touched:
    path = place.file(rng)
    path.unlink()
    os.mkfifo(path)
    return {path.name}


def _swap(place: Place, rng: random.Random) -> Touched:
    files = sorted(place.directory.iterdir())
    one, two = rng.sample(place.shards() if len(place.shards()) > 1 else files, 2)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    return {one.name, two.name}


def _take(source: Path, place: Place, rng: random.Random) -> Touched:
    """Put files of another checkpoint in their place: one, or all but the manifest, or that."""
    names = sorted(path.name for path in place.directory.iterdir())
    shards = [name for name in names if name != MANIFEST]
    taken = rng.choice([[rng.choice(names)], shards, [MANIFEST]])
    for name in taken:
        shutil.copyfile(source / name, place.directory / name)
    return set(names)  # the one that does not fit may be named, or one that stayed


def _take_from_step(place: Place, rng: random.Random) -> Touched:
    return _take(place.before, place, rng)


def _take_from_run(place: Place, rng: random.Random) -> Touched:
    return _take(place.other, place, rng)


def _take_all(place: Place, _: random.Random) -> Touched:
    """Put a whole checkpoint into the directory of another step."""
    shutil.rmtree(place.directory)
    shutil.copytree(place.before, place.directory)
    return {MANIFEST}


def _manifest(place: Place) -> Path:
    return place.directory / MANIFEST


def _edit_bytes(place: Place, rng: random.Random) -> Touched:
    def change(data: bytearray) -> None:
        for _ in range(rng.randint(1, 3)):
            begin = rng.randrange(len(data))
            stop = begin + rng.choice([0, 1, rng.randrange(100)])
            data[begin:stop] = rng.choice(
                [b"", b" ", b"\n", b"0", rng.randbytes(rng.randrange(1, 20))]
            )

    return _rewrite(_manifest(place), change)


def _sign(body: Mapping[str, Any]) -> bytes:
    """Return a manifest with the digest that belongs to it."""
    rest = {key: value for key, value in body.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    digest = xxhash.xxh3_128_hexdigest(text)
    return b'{"digest":"' + digest.encode() + b'",' + text[1:] + b"\n"


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return all places in JSON: what holds them, and the key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += _nodes(value[key])
    return found


_STRANGE = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**40,
    2**63,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "..",
)


def _edited(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Change a random place of a manifest."""
    holder, key = rng.choice(_nodes(body))
    value = holder[key]
    ways: list[Callable[[], Any]] = [
        lambda: rng.choice(_STRANGE),
        lambda: [value],
        lambda: {"x": value},
        list,
        dict,
    ]
    if isinstance(value, int):
        ways += [lambda: value + 1, lambda: value - 1, lambda: 2 * value, lambda: -value] * 2
    if isinstance(value, str):
        ways += [lambda: value[:-1], lambda: value + "0", value.swapcase]
    if isinstance(value, list) and value:
        ways += [lambda: value[:-1], lambda: [*value, value[0]], lambda: value[::-1]] * 2
    if isinstance(value, dict) and value:
        ways += [
            lambda: dict(list(value.items())[:-1]),
            lambda: dict(zip(value, reversed(value.values()), strict=True)),
        ]
    if rng.random() < 0.15:
        del holder[key]
    elif isinstance(holder, dict) and rng.random() < 0.1:
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = rng.choice(ways)()
    return body


def _edit(place: Place, rng: random.Random) -> Touched:
    path = _manifest(place)
    edited = _edited(json.loads(path.read_bytes()), rng)
    indent = rng.choice([None, 1])
    path.write_text(json.dumps(edited, indent=indent, sort_keys=rng.random() < 0.5))
    return {path.name}


def _forge(place: Place, rng: random.Random) -> Touched:
    path = _manifest(place)
    body = json.loads(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3])):
        body = _edited(body, rng)
    path.write_bytes(_sign(body))
    return {path.name}


def _date_forward(place: Place, rng: random.Random) -> Touched:
    path = _manifest(place)
    body = json.loads(path.read_bytes())
    body["version"] = VERSION + rng.randint(1, 9)
    body[f"new {rng.random()}"] = body.pop(rng.choice(sorted(body.keys() - {"format", "version"})))
    path.write_bytes(_sign(body))
    return {path.name}


def _several(place: Place, rng: random.Random) -> Touched:
    touched: Touched = set()
    for damage in rng.choices([_flip, _page, _cut_off, _extend, _swap, _take_from_run], k=3):
        touched |= damage(place, rng)
    return touched


@dataclass(frozen=True)
class Damage:
    """A way to spoil a checkpoint.

    Attributes
    ----------
    spoil : callable
        Does it, and returns which files it has touched.
    errors : tuple of type
        Those that may tell of it.
    share : int
        How often it is drawn, compared with others.
    forged : bool
        Whether the result may be a checkpoint in its own right, which says something else.
    """

    spoil: Callable[[Place, random.Random], Touched]
    errors: tuple[type[CheckpointError], ...] = (CheckpointCorruptError,)
    share: int = 2
    forged: bool = False


# A bit of the version's digit makes it a later one.
_MANIFEST_TOO = (CheckpointCorruptError, CheckpointIncompatibleError)

DAMAGES: Mapping[str, Damage] = {
    "bits flipped": Damage(_flip, _MANIFEST_TOO, share=6),
    "cut off": Damage(_cut_off),
    "extended": Damage(_extend),
    "pages zeroed or overwritten": Damage(_page, share=4),
    "file deleted": Damage(_delete, (CheckpointMissingShardError, CheckpointNotFoundError)),
    "file emptied": Damage(_empty, share=1),
    "file became a directory": Damage(_become_directory, (CheckpointError,), share=1),
    "file became a FIFO": Damage(_become_fifo, share=1),
    "files swapped": Damage(_swap),
    "files of another step": Damage(_take_from_step),
    "files of another run": Damage(_take_from_run),
    "all files of another step": Damage(_take_all, share=1),
    "manifest edited": Damage(_edit, _MANIFEST_TOO, share=4),
    "manifest's bytes edited": Damage(_edit_bytes, _MANIFEST_TOO),
    "manifest edited and signed": Damage(_forge, (CheckpointError,), share=6, forged=True),
    "manifest of a later version": Damage(_date_forward, (CheckpointIncompatibleError,)),
    "several of these": Damage(_several, _MANIFEST_TOO, share=4),
}
