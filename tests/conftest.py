"""Fixtures and plugins of the whole suite."""

from __future__ import annotations

pytest_plugins = ["tests._ranks.plugin", "tests.nccl_stub.fixtures", "tests.devices"]
