"""The watch: finds out what every rank is doing, and reports it when one waits for too long."""

from __future__ import annotations

from mpidist.observe.watch.watch import Watch

__all__ = ["Watch"]
