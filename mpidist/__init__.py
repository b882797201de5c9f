"""MPI-first communication for distributed training."""

from __future__ import annotations
