"""Parameters that are parts of whole arrays: their states are parts, too."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import Part, ShardedArray
from mpidist.errors import SizeMismatchError
from mpidist.nn import Linear
from mpidist.optim import Adam

# Of a (6, 3) weight of queries, keys and values with two heads of one row each: the second head.
SECOND = Part((6, 3), tuple((Box((2 * i + 1, 0), (1, 3)), Box((i, 0), (1, 3))) for i in range(3)))


def _layer() -> Linear:
    layer = Linear(3, 3, rng=0, bias=False)
    layer.weight.part = SECOND
    return layer


def test_a_state_is_a_part_of_the_whole():
    layer = _layer()
    state = layer.state_dict()["weight"]
    assert isinstance(state, ShardedArray)
    assert state.shape == (6, 3)
    for (there, local), piece in zip(SECOND.boxes, state.pieces.values(), strict=True):
        assert there in state.pieces
        assert np.shares_memory(piece, layer.weight.data)
        np.testing.assert_array_equal(piece, layer.weight.data[local.slices])


def test_whole_arrays_and_other_parts_load():
    whole = np.arange(18, dtype=np.float32).reshape(6, 3)
    for source in (
        whole,
        ShardedArray((6, 3), np.float32, {Box((i, 0), (3, 3)): whole[i : i + 3] for i in (0, 3)}),
    ):
        layer = _layer()
        layer.load_state_dict({"weight": source})
        np.testing.assert_array_equal(layer.weight.data, whole[1::2])
    top = ShardedArray((6, 3), np.float32, {Box((0, 0), (3, 3)): whole[:3]})
    layer = _layer()
    before = layer.weight.data.copy()
    with pytest.raises(ValueError, match="does not hold all"):
        layer.load_state_dict({"weight": top})
    with pytest.raises(ValueError, match=r"expected \(6, 3\) float32"):
        layer.load_state_dict({"weight": whole[:3]})
    np.testing.assert_array_equal(layer.weight.data, before)
    plain = Linear(3, 6, rng=0, bias=False)
    plain.load_state_dict({"weight": ShardedArray((6, 3), np.float32, {Box.whole((6, 3)): whole})})
    np.testing.assert_array_equal(plain.weight.data, whole)


def test_an_optimizers_state_is_split_as_its_parameter_is():
    layer, whole = _layer(), Linear(3, 6, rng=0, bias=False)
    optimizer, reference = Adam(layer, lr=0.1), Adam(whole, lr=0.1)
    layer.load_state_dict(whole.state_dict())
    for step in range(2):
        grad = np.random.default_rng(step).normal(size=(6, 3)).astype(np.float32)
        for each, rows in ((layer, grad[1::2]), (whole, grad)):
            each.zero_grad()
            each.weight.add_grad(rows)
        optimizer.step()
        reference.step()
    mean = optimizer.state_dict()["weight/mean"]
    for box, piece in mean.pieces.items():
        np.testing.assert_array_equal(piece, reference.state_dict()["weight/mean"][box.slices])
    again = Adam(_layer(), lr=0.1)
    again.load_state_dict(reference.state_dict())
    np.testing.assert_array_equal(
        again._state["weight"]["mean"], reference.state_dict()["weight/mean"][1::2]
    )
    assert again.step_count == 2


def test_a_part_is_cut_within():
    cut = SECOND.within(Box((1, 1), (2, 2)))
    assert cut.shape == (6, 3)
    assert cut.boxes == (
        (Box((3, 1), (1, 2)), Box((0, 0), (1, 2))),
        (Box((5, 1), (1, 2)), Box((1, 0), (1, 2))),
    )
    array = np.arange(4.0).reshape(2, 2)
    assert [p.tolist() for p in cut.sharded(array).pieces.values()] == [[[0, 1]], [[2, 3]]]
    assert SECOND.within(Box((0, 0), (0, 3))).boxes == ()
    assert Part((4,), (), first=False).within(Box((0,), (1,))).first is False


def test_boxes_of_a_part_have_the_same_sizes_here_and_there():
    with pytest.raises(SizeMismatchError, match="different sizes"):
        Part((4,), ((Box((0,), (2,)), Box((0,), (3,))),))
