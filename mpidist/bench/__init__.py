"""Benchmarks: mpidist beside the MPI library and other peers, in the same run.

``python -m mpidist bench`` is the command. This package writes, reads and draws its reports.
"""

from __future__ import annotations

from mpidist.bench.rendering import plot_report, render_table
from mpidist.bench.report import Comparison, Machine, Measure, Report, Row, Target, bus_factor
from mpidist.bench.times import Effort, Series, Times, measure

__all__ = [
    "Comparison",
    "Effort",
    "Machine",
    "Measure",
    "Report",
    "Row",
    "Series",
    "Target",
    "Times",
    "bus_factor",
    "measure",
    "plot_report",
    "render_table",
]
