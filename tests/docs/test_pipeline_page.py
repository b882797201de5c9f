"""The pictures on the page about pipelines are those that the package draws."""

from __future__ import annotations

import pytest

from mpidist.parallel import one_f_one_b, simulate, zb_h1
from mpidist.parallel.pipeline.generators import SCHEDULES
from tests.docs.pages import DOCS

PAGE = (DOCS / "concepts" / "pipeline.rst").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_drawing_of_each_schedule_is_there(name: str) -> None:
    drawing = (DOCS / "schedules" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawing == simulate(SCHEDULES[name](4, 8)).svg(), "write it down anew"
    assert f".. figure:: /schedules/{name}.svg" in PAGE


def test_the_text_pictures_are_those_of_the_schedules() -> None:
    for schedule in (one_f_one_b(4, 6), zb_h1(4, 6)):
        for line in simulate(schedule).picture().splitlines():
            assert f"   {line}\n" in PAGE
