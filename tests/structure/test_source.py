"""The shape of the source: no circle, no name used twice, the field's words."""

from __future__ import annotations

from collections import Counter

from tests.structure import source, words
from tests.structure.recorded import recorded

CURE = "fewer than written down: python -m tests.structure.recorded"


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "e"}, "e": {"d"}, "f": {"a"}}
    assert source.circles(graph) == [["b", "c"], ["d", "e"]]


def test_imports_of_all_kinds_are_found() -> None:
    imports = source.imports()
    assert "job/start.py" in imports["__init__.py"]  # for type checkers only
    assert "backends/__init__.py" not in imports["job/start.py"]  # a module of it is


def test_names_are_split_into_words() -> None:
    assert source.parts("_placeOf_PLACE2") == ["place", "of", "place"]
    assert words.banned(["in_place", "place_of", "BoardRoom", "cross_entropy", "cross"]) == {
        "place": 1,
        "board": 1,
        "room": 1,
        "cross": 1,
    }


def test_files_import_each_other_in_no_circle() -> None:
    circles = source.circles(source.imports())
    before = recorded()["files in import circles"]
    assert sum(map(len, circles)) <= before, circles
    assert sum(map(len, circles)) == before, CURE


def test_no_two_classes_have_one_name() -> None:
    before = set(recorded()["class names used twice"])
    now = {name: files for name, files in source.classes().items() if len(files) > 1}
    assert not now.keys() - before, {name: now[name] for name in now.keys() - before}
    assert now.keys() == before, CURE


def test_names_are_of_the_words_of_the_field() -> None:
    before = Counter(recorded()["words"])
    now = words.banned()
    more = {word: words.where(word) for word in now - before}
    assert not more, "\n".join(f"{word}: {', '.join(names)}" for word, names in more.items())
    assert now == before, CURE
