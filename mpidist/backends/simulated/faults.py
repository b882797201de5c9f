"""What a simulated network does with messages, and what goes wrong in it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class DeliveryMode(Enum):
    """How a message moves.

    Attributes
    ----------
    EAGER
        A send is complete at once; its bytes wait in the network.
    RENDEZVOUS
        A send is complete when its receive has been posted, and its bytes are copied then.
    POLLED
        As RENDEZVOUS, but a message moves in three steps (request to send, clear to send, data),
        and each happens only inside a polling call of the rank whose turn it is.
    """

    EAGER = "eager"
    RENDEZVOUS = "rendezvous"
    POLLED = "polled"


class Drop(NamedTuple):
    """The `number`-th message (from 1) from rank `source` to rank `dest` of the world is lost."""

    source: int
    dest: int
    number: int


class Death(NamedTuple):
    """Rank `rank` dies as it calls its transport for the `call`-th time (from 1).

    Calls that start something count, polls do not. Where the death is announced, `Backend.lost`
    reports it to the others; otherwise the rank is merely silent.
    """

    rank: int
    call: int
    announce: bool = True


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong in a network.

    Parameters
    ----------
    delay : float, optional
        Largest delay of a message in seconds; each is drawn from the network's seed. Messages
        between two ranks keep their order.
    drops : tuple of Drop, optional
        Messages that never arrive.
    deaths : tuple of Death, optional
        Ranks that end in the middle of the job.
    """

    delay: float = 0.0
    drops: tuple[Drop, ...] = ()
    deaths: tuple[Death, ...] = ()


class RankDied(BaseException):
    """Ends the thread of a rank whose death was injected; no handler for errors stops it."""


class JobAborted(SystemExit):
    """Ends every rank of a network after `Backend.abort`; its code is the job's exit code."""
