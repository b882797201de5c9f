"""One way to import what may be missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from mpidist.errors import BackendUnavailableError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Parameters
    ----------
    module : str
        Full name of the module, such as ``"torch"``.
    extra : str
        The extra of mpidist that installs it.
    purpose : str
        What needs it; the first words of the error.

    Returns
    -------
    ModuleType
        The module, imported.

    Raises
    ------
    BackendUnavailableError
        If it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"{purpose} needs {module}, which cannot be imported here ({error}); "
            f"install it with: pip install 'mpidist[{extra}]'"
        ) from None
