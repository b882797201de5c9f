"""Every error that mpidist raises.

::

    DistributedError
    ├── LaunchError                      the job was started in a way that cannot work
    ├── InvalidWorldSizeError            a number of ranks that the operation cannot serve
    ├── InvalidRankError                 a rank outside the group
    ├── SelfSendError                    a message addressed to its own sender
    ├── ScheduleError                    a pipeline's schedule that cannot be run
    ├── SizeMismatchError                shapes, dtypes or counts that do not fit together
    ├── UnsupportedOperationError        a verb, op or dtype that this transport does not offer
    ├── BackendUnavailableError          a library that is missing here
    ├── NoConnectionError                a peer that cannot be reached
    ├── CollectiveTimeoutError           somebody did not come before the deadline
    ├── CollectiveMismatchError          the ranks called different things
    ├── PeerLostError                    a rank died
    ├── GroupBrokenError                 the group was left unusable by an earlier error
    ├── TransportError                   the vendor's library failed; keeps its code
    └── CheckpointError                  a run could not be written to files, or read
        ├── CheckpointNotFoundError      there is none
        ├── CheckpointCorruptError       cut off, damaged, or another kind of file
        ├── CheckpointMissingShardError  a file that the manifest names is not there
        ├── CheckpointIncompatibleError  of another model, optimizer, order of samples or format
        └── CheckpointAsyncError         an earlier save, which ran beside the program, failed

A mistake of the caller is also a `ValueError`, a missed deadline also a `TimeoutError`, so that
code which knows nothing of mpidist can still catch them.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "CheckpointAsyncError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointIncompatibleError",
    "CheckpointMissingShardError",
    "CheckpointNotFoundError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "DistributedError",
    "GroupBrokenError",
    "InvalidRankError",
    "InvalidWorldSizeError",
    "LaunchError",
    "NoConnectionError",
    "PeerLostError",
    "ScheduleError",
    "SelfSendError",
    "SizeMismatchError",
    "TransportError",
    "UnsupportedOperationError",
]


class DistributedError(Exception):
    """Base of every error raised by mpidist."""

    _reported = ""
    """What the title of a report says of it; ranks that stop because of one report are brief."""


class LaunchError(DistributedError):
    """The job was started in a way that cannot work; the message gives the cure."""


class InvalidWorldSizeError(DistributedError, ValueError):
    """The number of ranks does not fit the operation."""


class InvalidRankError(DistributedError, ValueError):
    """A rank lies outside the group."""


class SelfSendError(InvalidRankError):
    """A rank sent a message to itself, or waits for one from itself."""


class ScheduleError(DistributedError, ValueError):
    """A schedule of a pipeline lacks a pass, or would wait for ever."""


class SizeMismatchError(DistributedError, ValueError):
    """Shapes, dtypes or counts do not fit together."""


class UnsupportedOperationError(DistributedError, ValueError):
    """The transport does not offer this verb, op or dtype."""


class BackendUnavailableError(DistributedError, RuntimeError):
    """A backend was asked for whose library is not usable here."""


class NoConnectionError(DistributedError, ConnectionError):
    """A peer cannot be reached."""


class CollectiveTimeoutError(DistributedError, TimeoutError):
    """A rank did not take part before the deadline."""


class CollectiveMismatchError(DistributedError, ValueError):
    """The ranks of a group called different operations, or the same one with other arguments.

    Attributes
    ----------
    usable : bool
        Whether nothing was changed, so that the group can still be used; else it is broken.
    """

    usable: bool = True


class PeerLostError(DistributedError, ConnectionError):
    """Another rank of the group died or left."""


class GroupBrokenError(DistributedError, RuntimeError):
    """An earlier failure left the group unusable; only `close()` may still be called."""


class TransportError(DistributedError, RuntimeError):
    """The vendor's library reported a failure.

    Parameters
    ----------
    message : str
        What failed, with operation, group and rank.
    code : int
        The vendor's own error code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class CheckpointError(DistributedError):
    """What was to be kept in files could not be written, or not be read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at this place."""


class CheckpointCorruptError(CheckpointError, ValueError):
    """The files are cut off, damaged, or of another kind."""


class CheckpointMissingShardError(CheckpointError, FileNotFoundError):
    """A file that the manifest names is not there."""


class CheckpointIncompatibleError(CheckpointError, ValueError):
    """The checkpoint is of another model, optimizer or order of samples."""


class CheckpointAsyncError(CheckpointError):
    """An earlier save, which ran beside the program, failed."""
