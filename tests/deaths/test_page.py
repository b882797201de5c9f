"""docs/faults.rst has a row for each fault of the matrix, and for no other."""

from __future__ import annotations

import re

from tests.deaths.job import ROOT
from tests.deaths.test_deaths import CASES


def test_the_page_has_a_row_for_each_fault() -> None:
    page = (ROOT / "docs" / "faults.rst").read_text()
    rows = re.findall(r"^   \* - (.*)$", page, re.MULTILINE)
    faults = {case.fault for case in CASES}
    assert sorted(set(rows) - {"one rank"}) == sorted(faults)
