"""Standard output that takes every text: names of files need not be text in any encoding."""

from __future__ import annotations

import codecs
import io
import sys

_NAME = "mpidist.any_text"


def accept_any_text() -> None:
    r"""Let standard output of this program raise no UnicodeEncodeError.

    Bytes of a file's name that Python could not decode are written as they are, as ``ls`` does, and
    characters that the encoding does not have as escapes, such as ``\u00e9``.
    """
    codecs.register_error(_NAME, _encode)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_NAME)


def _encode(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return b"".join(map(_encode_one, text)), error.end


def _encode_one(character: str) -> bytes:
    if "\udc80" <= character <= "\udcff":
        return character.encode("ascii", "surrogateescape")
    return character.encode("ascii", "backslashreplace")
