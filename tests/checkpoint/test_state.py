from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

from mpidist import Box, ShardedArray, checkpoint
from mpidist.arrays.namespaces import DTYPES
from mpidist.checkpoint.state import flatten, restore
from mpidist.errors import (
    CheckpointError,
    CheckpointIncompatibleError,
    UnsupportedOperationError,
)
from mpidist.testing import run_ranks


class Counter:
    """An object with a state, and another one inside."""

    def __init__(self, length=3, inner=None):
        self.count = 0
        self.sums = np.zeros(length)
        self.inner = inner

    def state_dict(self):
        state = {"count": self.count, "sums": self.sums, "note": {"item": "s"}}
        return state if self.inner is None else state | {"inner": self.inner}

    def load_state_dict(self, state):
        if state["count"] < 0:
            raise ValueError("a count is not negative")
        self.count = state["count"]
        self.sums = state["sums"].copy()


def test_names():
    x = np.zeros(2)
    piece = ShardedArray((4,), float, {Box((0,), (2,)): x})
    state = {
        "x": x,
        "deep": {"er": {"x": x, "empty": {}, "n": 1}, "piece": piece},
        "values": {"no": {"array": [1, (2.5, None)]}},
        "count": Counter(inner=Counter()),
        "a/b": x,
    }
    flat = flatten(state)
    assert set(flat.arrays) == {
        "x",
        "deep/er/x",
        "deep/piece",
        "count/sums",
        "count/inner/sums",
        "a/b",
    }
    assert flat.arrays["deep/piece"] is piece
    assert flat.values == {
        "deep/er/empty": {},
        "deep/er/n": 1,
        "values": {"no": {"array": [1, [2.5, None]]}},
        "count/count": 0,
        "count/note": {"item": "s"},
        "count/inner/count": 0,
        "count/inner/note": {"item": "s"},
    }
    assert flat.objects == {"count", "count/inner"}
    assert flat.inside == {name for name in (*flat.arrays, *flat.values) if "count" in name}


def test_items_of_lists_are_named_by_their_positions():
    x, y = np.zeros(2), np.ones(3)
    state = {"s": [x, (y, 5)], "t": ({"w": [x]}, Counter()), "plain": [1, [2]], "empty": []}
    flat = flatten(state)
    assert set(flat.arrays) == {"s/0", "s/1/0", "t/0/w/0", "t/1/sums"}
    assert flat.arrays["s/0"] is x
    assert flat.lists == {"s", "s/1", "t", "t/0/w"}
    assert flat.values == {
        "s/1/1": 5,
        "t/1/count": 0,
        "t/1/note": {"item": "s"},
        "plain": [1, [2]],
        "empty": [],
    }


class Point(NamedTuple):
    where: object
    name: str


class Lists:
    """An object whose state has lists and tuples, as those of other packages have."""

    def __init__(self, fill, name="a"):
        self.state = {
            "moments": [np.full(3, fill), np.full((2, 2), fill)],
            "groups": [{"lr": fill, "of": [np.full(1, fill), None]}],
            "point": Point(np.full(2, fill), name),
            "pair": (np.full(1, fill), "text"),
            "plain": [1.5, [2]],
        }

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize("asynchronous", [False, True])
def test_lists_come_back_as_they_were(tmp_path, asynchronous):
    def save(group):
        rows = Box((group.rank, 0), (1, 2))
        part = ShardedArray((2, 2), float, {rows: np.full((1, 2), group.rank + 1.0)})
        state = {"object": Lists(7.0), "arrays": [np.arange(4), part, 3]}
        call = checkpoint.save_async if asynchronous else checkpoint.save
        saving = call(tmp_path, state, group, step=1)
        if asynchronous:
            saving.wait()

    run_ranks(2, save)
    checkpoint.reshard(tmp_path, tmp_path / "other", 3)

    def load(group, path):
        mine, first, second = Lists(0.0, "b"), np.zeros(4, int), np.zeros((2, 2))
        state = {"object": mine, "arrays": [first, second, None]}
        values = checkpoint.load(path, state, group).values
        assert values["arrays/2"] == 3
        np.testing.assert_array_equal(first, np.arange(4))
        np.testing.assert_array_equal(second, [[1, 1], [2, 2]])
        found, expected = mine.state, Lists(7.0).state
        assert isinstance(found["point"], Point)
        assert found["point"].name == "a"
        assert isinstance(found["pair"], tuple)
        assert found["plain"] == [1.5, [2]]
        assert (found["groups"][0]["lr"], found["groups"][0]["of"][1]) == (7.0, None)
        for one, other in zip(found["moments"], expected["moments"], strict=True):
            np.testing.assert_array_equal(one, other)

    for path in (tmp_path, tmp_path / "other"):
        run_ranks(3, load, path)
    assert checkpoint.verify(tmp_path) == []
    assert checkpoint.load_full(tmp_path)["arrays/1"].tolist() == [[1, 1], [2, 2]]


def test_parts_of_an_object_of_one_rank_are_not_left_over_without_a_word(tmp_path):
    def save(group):
        state = {"all": np.zeros(2)}
        if group.rank == 1:
            state["extra"] = [np.zeros(2), np.ones(3)]
        checkpoint.save(tmp_path, state, group, step=1)

    def load(group):
        state = {"all": np.zeros(2)}
        if group.rank == 1:
            state["extra"] = [np.zeros(2)]
        with pytest.raises(CheckpointIncompatibleError, match=r"rank 1: .*\n  extra/1: saved, but"):
            checkpoint.load(tmp_path, state, group)

    run_ranks(2, save)
    run_ranks(2, load)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([np.zeros(2)], "s/1: saved, but 's' has no such part"),
        ([np.zeros(2), np.zeros(3)], "s/2: saved, but 's' has no such part"),
        ([np.zeros(2), np.zeros(3), 1, np.zeros(4)], "s/3: not in it"),
        ([np.zeros(2), np.zeros(3), 1, 5], "s/3: not in it"),
        ([np.zeros(3), np.zeros(2), 1], "s/0: expected float64"),
        ([], "s: not in it"),
        ([1, 2, 3], "s: not in it"),
    ],
)
def test_a_list_of_another_length_is_refused(tmp_path, items, words):
    saved = {"s": [np.ones(2), np.ones(3), 5]}
    run_ranks(1, lambda g: checkpoint.save(tmp_path, saved, g, step=1))

    class Holder:
        def state_dict(self):
            return {"s": items}

        def load_state_dict(self, state):
            raise AssertionError("never called")

    run_ranks(1, lambda g: checkpoint.save(tmp_path / "o", {"o": saved}, g, step=1))

    def body(group):
        with pytest.raises(CheckpointIncompatibleError, match=words):
            checkpoint.load(tmp_path, {"s": items}, group)
        if items and not isinstance(items[0], int):
            inside = words.replace("s/", "o/s/").replace("'s'", "'o/s'")
            with pytest.raises(CheckpointIncompatibleError, match=inside):
                checkpoint.load(tmp_path / "o", {"o": Holder()}, group)

    run_ranks(2, body)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_can_be_kept(dtype):
    assert flatten({"x": np.zeros(2, dtype)}).arrays["x"].dtype == dtype


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"": 1}, "'' cannot be a name"),
        ({"a/": 1}, "'a/' cannot be a name"),
        ({"a//b": 1}, "cannot be a name"),
        ({"../a": 1}, "cannot be a name"),
        ({"a/./b": 1}, "cannot be a name"),
        ({"a\0": 1}, "cannot be a name"),
        ({"a\x1b[2J": 1}, r"'a\\x1b\[2J' cannot be a name; .* without control"),
        ({"a\nb": np.zeros(1)}, "without control"),
        ({"a\u202eb": np.zeros(1)}, "without control"),
        ({"a\ud800": np.zeros(1)}, "without control"),
        ({"a" * 5000: 1}, "5000 characters, at most 4096"),
        ({"a": np.zeros((1,) * 33)}, "'a' has 33 dimensions; HDF5 has at most 32"),
        ({"a": ShardedArray((0, 2**60, 8), float, {})}, r"'a' has the shape \[0, .* 2\*\*63"),
        ({3: 1}, "3 cannot be a name"),
        ({"mpidist:float": "inf"}, "the state has the key 'mpidist:float'"),
        ({"a": {"b": {"mpidist:float": 1}}}, "'a/b' has the key 'mpidist:float'"),
        ({"a": {3: np.zeros(1)}}, "3 cannot be a name"),
        ({"a": np.array([None])}, "'a' has dtype object"),
        ({"a": np.array(["text"])}, "'a' has dtype <U4"),
        ({"a": np.zeros(1, "M8[s]")}, "'a' has dtype datetime64"),
        ({"a": np.zeros(1, [("x", int)])}, "'a' has dtype"),
        ({"a": np.zeros(1, np.longdouble)}, "'a' has dtype"),
        ({"a": {1, 2}}, "'a' is a builtins.set"),
        ({"a": b"bytes"}, "'a' is a builtins.bytes"),
        ({"a": 1j}, "'a' is a builtins.complex"),
        ({"a": object}, "'a' is a builtins.type"),
        ({"a": {"b": [1, {2: 3}]}}, r"'a/b\[1\]' is a builtins.dict"),
        ({"a": [np.zeros(2), {1, 2}]}, "'a/1' is a builtins.set"),
        ({"a": [np.zeros(2)], "a/0": 1}, "the name 'a/0' comes twice"),
        ({"a/b": 1, "a": {"b": np.zeros(1)}}, "the name 'a/b' comes twice"),
        ({"a": np.zeros(1), "a/b": np.zeros(1)}, "'a' is an array, so that 'a/b' cannot be inside"),
        ({"a": np.zeros(1), "a/b/c": {"d": np.zeros(1)}}, "'a' is an array"),
    ],
)
def test_what_cannot_be_kept(state, words):
    with pytest.raises(UnsupportedOperationError, match=words):
        flatten(state)


def test_objects_are_given_what_is_theirs_and_nothing_else():
    there = Counter(inner=Counter())
    there.count, there.sums[:], there.inner.count = 5, 2.5, 6
    flat = flatten({"deep": {"c": there}})
    here = Counter(inner=Counter())
    restore({"deep": {"c": here}}, flat.arrays, flat.values)
    assert (here.count, here.inner.count) == (5, 6)
    np.testing.assert_array_equal(here.sums, [2.5] * 3)


def test_an_object_that_refuses_is_named():
    flat = flatten({"c": Counter()})
    with pytest.raises(CheckpointIncompatibleError, match=r"'c' does not take .* not negative"):
        restore({"c": Counter()}, flat.arrays, flat.values | {"c/count": -1})


BITS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]


@pytest.mark.parametrize("bits", BITS)
def test_a_generator_goes_on_bit_for_bit(tmp_path, bits):
    there = np.random.Generator(bits(3))
    there.random(77)
    there.random(1, np.float32)  # half of a number is left
    run_ranks(2, lambda group: checkpoint.save(tmp_path, {"rng": there}, group, step=1))
    expected = [there.random(3, np.float32), there.normal(size=700), there.integers(0, 9, 30)]

    def body(group):
        here = np.random.Generator(bits(group.rank))
        checkpoint.load(tmp_path, {"rng": here}, group)
        return [here.random(3, np.float32), here.normal(size=700), here.integers(0, 9, 30)]

    for got in run_ranks(3, body):
        for mine, its in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine, its)


def test_a_generator_of_another_kind_is_refused(tmp_path):
    run_ranks(1, lambda g: checkpoint.save(tmp_path, {"rng": np.random.default_rng(1)}, g, step=1))

    def body(group):
        mersenne = np.random.Generator(np.random.MT19937(0))
        with pytest.raises(CheckpointIncompatibleError, match="rng"):
            checkpoint.load(tmp_path, {"rng": mersenne}, group)
        other = np.random.Generator(np.random.PCG64DXSM(0))
        with pytest.raises(CheckpointIncompatibleError, match="'rng' does not take"):
            checkpoint.load(tmp_path, {"rng": other}, group)

    run_ranks(2, body)


def test_values_come_back_as_json_has_them(tmp_path):
    state = {
        "none": None,
        "flag": np.bool_(True),
        "int": 2**200,
        "float": [0.1, -0.0, 5e-324, math.inf, -math.inf],
        "text": "ünï \ud800 \0",
        "nested": {"a": (1, [2, {"b": np.int8(3)}])},
        "": None,
    }
    del state[""]
    run_ranks(1, lambda g: checkpoint.save(tmp_path, state, g, step=1, metadata={"m": (math.inf,)}))
    found = checkpoint.latest(tmp_path)
    assert found.values == checkpoint.load_full(tmp_path)
    expected = state | {"flag": True, "nested": {"a": [1, [2, {"b": 3}]]}}
    assert repr(sorted(found.values.items())) == repr(sorted(expected.items()))
    assert found.metadata == {"m": [math.inf]}


def test_an_object_that_fails_fails_on_all_ranks(tmp_path):
    class Broken:
        def state_dict(self):
            raise KeyError("lost")

        def load_state_dict(self, state):
            raise AssertionError("never called")

    def body(group):
        state = {"c": Broken() if group.rank == 1 else Counter()}
        words = []
        for call in (
            lambda: checkpoint.save(tmp_path, state, group, step=1),
            lambda: checkpoint.load(tmp_path, state, group),
        ):
            with pytest.raises(CheckpointError, match=r"rank 1: KeyError: 'lost'") as caught:
                call()
            words.append(str(caught.value))
            checkpoint.save(tmp_path, {"c": Counter()}, group, step=2 + len(words))
        return words

    words = run_ranks(3, body)
    assert words[0] == words[1] == words[2]
    assert [found.step for found in checkpoint.list(tmp_path)] == [3, 4]
