"""One way to import what may be missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from mpidist.errors import BackendUnavailableError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import and return a module, or say which extra of mpidist brings it.

    `purpose` says what needs it: the first words of the BackendUnavailableError.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"{purpose} needs {module}, which cannot be imported here ({error}); "
            f"install it with: pip install 'mpidist[{extra}]'"
        ) from None
