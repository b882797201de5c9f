"""How a model is cut into units, and a unit into slices."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import FlatPart, Part, ShardedArray
from mpidist.nn import Embedding, LayerNorm, Linear, Recompute, ReLU, Residual, Sequential
from mpidist.parallel import FSDP, BucketSizes, Cut
from mpidist.parallel.sharded.flat_parameters import FlatLayout, FlatParameters
from mpidist.parallel.sharded.units import find_units
from mpidist.testing import run_ranks

KIB = 1 << 10


def linear(d_in, d_out):
    return Linear(d_in, d_out, rng=0, bias=False)


def transformer():
    """An embedding of 512 KiB, two blocks of 128 KiB, a norm of 1 KiB, and a head of 512 KiB."""
    block = lambda: Residual(Sequential(linear(128, 128), ReLU(), linear(128, 128)))  # noqa: E731
    return Sequential(
        Embedding(1024, 128, rng=0), block(), Recompute(block()), LayerNorm(128), linear(128, 1024)
    )


def found(model, units):
    return [(unit.name, unit.parameters) for unit in find_units(model, units)]


def test_units_are_the_largest_subtrees_that_are_small_enough():
    model = transformer()
    assert found(model, 128 * KIB) == [
        ("0", ("0.weight",)),
        ("1", ("1.inner.0.weight", "1.inner.2.weight")),
        ("2", ("2.inner.0.weight", "2.inner.2.weight")),
        ("(outermost)", ("3.weight", "3.bias")),
        ("4", ("4.weight",)),
    ]
    units = find_units(model, 128 * KIB)
    assert [unit.nbytes for unit in units] == [512 * KIB, 128 * KIB, 128 * KIB, KIB, 512 * KIB]
    assert [unit.modules for unit in units] == [("0",), ("1",), ("2",), ("",), ("4",)]


def test_what_fits_into_one_unit_is_one():
    model = transformer()
    ((name, parameters),) = found(model, 2 << 20)
    assert (name, parameters) == ("(outermost)", tuple(n for n, _ in model.named_parameters()))


def test_a_parameter_larger_than_a_unit_is_one_by_itself():
    model = Sequential(Linear(4, 100, rng=0), Linear(4, 100, rng=0))
    assert found(model, 1000) == [
        ("0, 0.weight", ("0.weight",)),
        ("0, 0.bias", ("0.bias",)),
        ("1, 1.weight", ("1.weight",)),
        ("1, 1.bias", ("1.bias",)),
    ]


@pytest.mark.parametrize("units", [1 * KIB, 64 * KIB, 4 * 200 * 100])
def test_a_bias_stays_with_a_weight_that_is_as_large_as_a_unit(units):
    model = Sequential(Linear(200, 100, rng=0), Linear(200, 100, rng=0))
    expected = [("0", ("0.weight", "0.bias")), ("1", ("1.weight", "1.bias"))]
    assert found(model, units) == expected


def test_units_by_names_and_by_a_function():
    model = transformer()
    rest = ("0.weight", "3.weight", "3.bias", "4.weight")
    expected = [
        ("(outermost)", rest),
        ("1", ("1.inner.0.weight", "1.inner.2.weight")),
        ("2", ("2.inner.0.weight", "2.inner.2.weight")),
    ]
    assert found(model, ["[12]"]) == expected
    assert found(model, lambda name, module: name in ("1", "2")) == expected
    # The innermost of several has a parameter.
    assert found(model, ["1", "1.inner.2"])[1:] == [
        ("1", ("1.inner.0.weight",)),
        ("1.inner.2", ("1.inner.2.weight",)),
    ]


def test_tied_parameters_are_a_unit_that_several_modules_need():
    model = transformer()
    model.layers[4].weight = model.layers[0].weight
    model.layers[2].inner.inner.layers[0].weight = model.layers[1].inner.layers[0].weight
    units = {unit.name: unit for unit in find_units(model, 128 * KIB)}
    assert units["0 + 4"].parameters == ("0.weight",)
    assert units["0 + 4"].modules == ("0", "4")
    assert units["1 + 2"].parameters == ("1.inner.0.weight",)
    assert units["1 to 2"].parameters == ("1.inner.2.weight", "2.inner.2.weight")
    # Where the outermost module needs it too, it is whole all along.
    assert found(model, ["4"]) == [("(outermost)", tuple(n for n, _ in model.named_parameters()))]


def test_a_module_may_hold_one_that_it_is_within():
    model = Sequential(linear(4, 4), linear(4, 4))
    model.layers[0].around = model
    rest = ("(outermost)", ("1.weight",))
    assert found(model, ["0"]) == [("0", ("0.weight",)), rest]
    assert [names for _, names in found(model, 64)] == [("0.weight",), ("1.weight",)]


def test_a_unit_has_one_dtype_and_is_trained_or_not():
    model = Sequential(linear(4, 4), Linear(4, 4, rng=0, dtype=np.float64), linear(4, 4))
    model.layers[2].weight.trainable = False
    units = find_units(model, 1 << 20)
    kinds = [(unit.parameters, unit.dtype, unit.trainable) for unit in units]
    assert kinds == [
        (("0.weight",), np.float32, True),
        (("1.weight", "1.bias"), np.float64, True),
        (("2.weight",), np.float32, False),
    ]
    assert len({unit.name for unit in units}) == 3


def test_buckets_are_units_too():
    model = transformer()
    blocks = [f"{block}.inner.{layer}.weight" for block in "21" for layer in "20"]
    assert [unit.parameters for unit in find_units(model, BucketSizes(KIB, 256 * KIB))] == [
        ("0.weight",),
        ("3.bias", "3.weight", *blocks),
        ("4.weight",),
    ]


def layout(shapes, cut, dtype=np.float64):
    return FlatLayout.of({n: np.empty(shape, dtype) for n, shape in shapes.items()}, cut)


def slices(shapes, cut, size):
    """Return each rank's part of each parameter."""
    flat = layout(shapes, cut)
    counts = flat.counts(size, size)
    assert sum(counts) == flat.length
    data = np.zeros(flat.length)
    return counts, [FlatParameters.sliced(flat, data, counts, rank) for rank in range(size)]


SHAPES = {"w": (33, 24), "b": (33,), "v": (7, 3, 5), "s": (), "e": (0, 4), "r": (1, 40)}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cut", Cut)
def test_slices_are_the_parameters_each_element_once(cut, size):
    _, ranks = slices(SHAPES, cut, size)
    views = ranks[0].layout.buffer(ranks[0].own.base).views
    for name, shape in SHAPES.items():
        times = np.zeros(shape, int)
        for flat in ranks:
            own = flat.within(name, flat.own)
            part = flat.part(name)
            views[name][...] = 0
            own[...] = 1
            np.testing.assert_array_equal(views[name].sum(), own.size)
            sharded = part.sharded(own)
            assert sum(box.count for box in sharded.pieces) == own.size
            for box, piece in sharded.pieces.items():
                times[box.slices] += piece.astype(int)
        np.testing.assert_array_equal(times, 1, err_msg=name)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_are_cut_at_rows_and_differ_by_one_at_most(size):
    counts, ranks = slices(SHAPES, Cut.ROWS, size)
    assert max(counts) - min(counts) <= 24 + 8  # the longest row, and padding
    for flat in ranks:
        part = flat.part("w")
        assert isinstance(part, Part)
        ((there, here),) = part.boxes
        assert there.sizes == here.sizes == flat.within("w", flat.own).shape
        assert there.sizes[1:] == (24,)
    starts = [flat.part("w").boxes[0][0].offsets[0] for flat in ranks]
    assert starts == sorted(starts)


@pytest.mark.parametrize("shapes", [{"w": (3, 900)}, {"w": (1, 900), "b": (4,)}])
def test_too_few_rows_are_cut_by_elements(shapes):
    counts, ranks = slices(shapes, Cut.ROWS, 4)
    assert max(counts) - min(counts) <= 8
    assert isinstance(ranks[0].part("w"), FlatPart)


def test_whole_parameters():
    shapes = {"a": (10, 10), "b": (10, 10), "c": (30, 10), "d": (5,)}
    for size, expected in [
        (2, [{"a", "b"}, {"c", "d"}]),
        (3, [{"a", "b"}, {"c"}, {"d"}]),
        (4, [{"a", "b"}, {"c"}, {"d"}, set()]),
    ]:
        _, ranks = slices(shapes, Cut.PARAMETERS, size)
        assert [{n for n in shapes if flat.within(n, flat.own).size} for flat in ranks] == expected
        for flat in ranks:
            for name, shape in shapes.items():
                assert flat.within(name, flat.own).shape in (shape, (0, *shape[1:]))


def test_a_range_of_elements_as_a_part_of_the_whole():
    part = FlatPart((3, 4), 2)
    flat = np.arange(2.0, 9.0)
    sharded = part.sharded(flat)
    assert isinstance(sharded, ShardedArray)
    whole = np.arange(12.0).reshape(3, 4)
    for box, piece in sharded.pieces.items():
        np.testing.assert_array_equal(piece, whole[box.slices])
    next(iter(sharded.pieces.values()))[...] = -1
    assert flat[0] == -1
    assert Box((0, 2), (1, 2)) in sharded.pieces


def test_an_fsdp_shows_its_units_as_a_table():
    def body(group):
        model = transformer()
        model.layers[0].weight.trainable = False
        return repr(FSDP(model, group, units=128 * KIB))

    (shown,) = run_ranks(1, body)
    assert shown.splitlines() == [
        "FSDP over group 'world/fsdp', rank 0 of 1, FULL_SHARD, 5 units:",
        "  bytes    dtype          unit",
        "512 KiB  float32  frozen  0",
        "128 KiB  float32          1",
        "128 KiB  float32          2",
        "  1 KiB  float32          (outermost)",
        "512 KiB  float32          4",
    ]


def test_neighbours_that_fit_together_are_one_unit():
    model = transformer()
    assert found(model, 512 * KIB) == [
        ("0", ("0.weight",)),
        ("1 to 2", tuple(f"{b}.inner.{layer}.weight" for b in "12" for layer in "02")),
        ("(outermost)", ("3.weight", "3.bias")),
        ("4", ("4.weight",)),
    ]
    layers = Sequential(*(linear(128, 128) for _ in range(7)))
    units = find_units(layers, 200 * KIB)
    assert [unit.modules for unit in units] == [("0", "1", "2"), ("3", "4", "5"), ("6",)]
    assert [unit.nbytes for unit in units] == [192 * KIB, 192 * KIB, 64 * KIB]
    # Not those that are tied, of another dtype, or below another module.
    layers.layers[4].weight = layers.layers[2].weight
    layers.layers[6].weight.trainable = False
    nested = Sequential(layers, Sequential(*(linear(128, 128) for _ in range(5))))
    assert [unit.modules for unit in find_units(nested, 200 * KIB)] == [
        *(("0.0", "0.1"), ("0.2", "0.4"), ("0.3", "0.5"), ("0.6",)),
        *(("1.0", "1.1", "1.2"), ("1.3", "1.4")),
    ]
