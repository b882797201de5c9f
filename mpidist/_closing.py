"""What is closed at the end of a ``with`` block, unless an error has ended it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Closing(ABC):
    """Something whose closing waits for what is under way with other ranks.

    After an error it is left as it is, since other ranks may not call it.
    """

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way, and release what is held."""

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; after an error leave it as it is."""
        if error is None:
            self.close()
