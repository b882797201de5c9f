"""Runs a program on the stand-in for cupy: ``python on_stand_in.py PYTHON PROGRAM ARGUMENTS``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.nccl_stub import stand_in

stand_in.install()
del sys.argv[:2]  # this file's name, and that of the interpreter that would run the program
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
