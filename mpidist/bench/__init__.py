"""Measuring: mpidist beside the MPI library and other peers, in the same run.

``python -m mpidist bench`` is the command; what is here writes and reads its reports.
"""

from __future__ import annotations

from mpidist.bench.machine import Machine
from mpidist.bench.plot import plot_report
from mpidist.bench.report import Comparison, Measure, Report, Row, Target, bus_factor
from mpidist.bench.table import render_table
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
