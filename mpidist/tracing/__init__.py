"""Traces: what all ranks did and when, on one clock, as a file for Perfetto and for a summary."""

from __future__ import annotations

from mpidist.tracing.session import trace

__all__ = ["trace"]
