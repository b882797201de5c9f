from __future__ import annotations

import numpy as np
import pytest

from mpidist.arrays.flat import FlatBuffer
from mpidist.nn import Parameter


def _parameter() -> Parameter:
    return Parameter(np.arange(6, dtype=np.float32).reshape(2, 3), name="fc.weight")


def _ones(value: float = 1.0) -> np.ndarray:
    return np.full((2, 3), value, dtype=np.float32)


def test_the_first_contribution_is_copied_and_later_ones_are_added():
    p = _parameter()
    assert p.grad is None
    g = _ones()
    p.add_grad(g)
    p.add_grad(_ones(2.0))
    np.testing.assert_array_equal(p.grad, _ones(3.0))
    np.testing.assert_array_equal(g, _ones())


def test_what_was_written_into_first_grad_is_taken_as_it_stands():
    p = _parameter()
    flat = np.zeros(8, dtype=np.float32)
    p.attach(flat[1:7].reshape(2, 3))
    buffer = p.first_grad()
    buffer[...] = 4.0
    p.add_grad(buffer)
    assert p.grad is buffer
    assert p.first_grad() is None
    np.testing.assert_array_equal(flat, [0, 4, 4, 4, 4, 4, 4, 0])


def test_handing_in_the_same_memory_twice_is_refused():
    p = _parameter()
    buffer = p.first_grad()
    buffer[...] = 1.0
    p.add_grad(buffer)
    with pytest.raises(RuntimeError, match=r"fc\.weight.*twice"):
        p.add_grad(buffer)


def test_diverted_contributions_are_neither_added_nor_counted():
    p = _parameter()
    p.add_grad(_ones())
    p.zero_grad()
    ready, taken = [], []
    p.expect(1, ready.append)
    p.divert(taken.append)
    assert p.first_grad() is None
    assert p.empty_grad() is not p.grad_memory
    g = _ones(2.0)
    p.add_grad(g)
    with pytest.raises(ValueError, match=r"fc\.weight.*expects a gradient of shape \(2, 3\)"):
        p.add_grad(g[0])
    assert (len(taken), taken[0] is g, p.grad, ready) == (1, True, None, [])
    p.divert(None)
    p.add_grad(g)
    p.release()
    np.testing.assert_array_equal(p.grad, g)
    assert (len(taken), ready) == (1, [p])


def test_zero_grad_touches_no_memory():
    p = _parameter()
    p.add_grad(_ones(7.0))
    buffer = p.grad
    p.zero_grad()
    assert p.grad is None
    np.testing.assert_array_equal(buffer, _ones(7.0))
    p.add_grad(_ones(2.0))
    assert p.grad is buffer
    np.testing.assert_array_equal(buffer, _ones(2.0))


def test_attach_carries_a_gradient_over_and_checks_the_shape():
    p = _parameter()
    p.add_grad(_ones(5.0))
    view = np.zeros((2, 3), dtype=np.float32)
    p.attach(view)
    assert p.grad is view
    np.testing.assert_array_equal(view, _ones(5.0))
    with pytest.raises(ValueError, match=r"fc\.weight.*\(2, 3\).*\(3, 2\)"):
        p.attach(np.zeros((3, 2), dtype=np.float32))


def test_on_ready_fires_once_at_the_last_expected_contribution():
    p = _parameter()
    fired = []
    p.expect(2, lambda q: fired.append((q, q.unreduced_grad().copy())))
    p.add_grad(_ones())
    assert fired == []
    p.add_grad(_ones())
    assert len(fired) == 1
    assert fired[0][0] is p
    np.testing.assert_array_equal(fired[0][1], _ones(2.0))


def test_a_contribution_after_the_last_one_raises_until_release():
    p = _parameter()
    p.expect(1, None)
    p.add_grad(_ones())
    for operation in (lambda: p.add_grad(_ones()), p.first_grad):
        with pytest.raises(RuntimeError, match=r"fc\.weight.*expect"):
            operation()
    p.release()
    np.testing.assert_array_equal(p.grad, _ones())
    p.add_grad(_ones())
    np.testing.assert_array_equal(p.grad, _ones(2.0))


@pytest.mark.parametrize("uses", [0, 1])
def test_a_gradient_under_way_is_neither_read_nor_zeroed(uses):
    p = _parameter()
    p.add_grad(_ones(3.0))
    p.expect(uses, None)
    if uses:
        np.testing.assert_array_equal(p.grad, _ones(3.0))  # not complete yet
        p.add_grad(_ones())
    for operation in (lambda: p.grad, p.zero_grad):
        with pytest.raises(RuntimeError, match=r"fc\.weight.*before its gradient is read, zeroed"):
            operation()
    np.testing.assert_array_equal(p.unreduced_grad(), _ones(3.0 + uses))
    p.release()
    np.testing.assert_array_equal(p.grad, _ones(3.0 + uses))
    p.zero_grad()
    assert p.grad is None
    assert p.unreduced_grad() is None


def test_expecting_nothing_fires_nothing_and_refuses_contributions():
    p = _parameter()
    fired = []
    p.expect(0, fired.append)
    with pytest.raises(RuntimeError, match="announced"):
        p.add_grad(_ones())
    assert fired == []
    p.release()
    assert p.grad is None


def test_contributions_before_expect_stay_in_the_sum():
    p = _parameter()
    p.add_grad(_ones(10.0))
    fired = []
    p.expect(1, fired.append)
    assert p.first_grad() is None
    p.add_grad(_ones())
    assert fired == [p]
    p.release()
    np.testing.assert_array_equal(p.grad, _ones(11.0))


def test_misuse_of_expect_and_attach_is_refused():
    p = _parameter()
    with pytest.raises(ValueError, match="negative"):
        p.expect(-1, None)
    p.expect(1, None)
    with pytest.raises(RuntimeError, match="release"):
        p.expect(1, None)
    with pytest.raises(RuntimeError, match="release"):
        p.attach(_ones())


def test_a_gradient_of_another_shape_is_refused_and_counts_nothing():
    p = _parameter()
    p.expect(1, None)
    with pytest.raises(ValueError, match=r"fc\.weight.*\(2, 3\).*\(3,\)"):
        p.add_grad(np.ones(3, dtype=np.float32))
    assert p.grad is None
    p.add_grad(_ones())


def test_a_wider_contribution_keeps_the_gradients_dtype():
    p = _parameter()
    p.add_grad(np.ones((2, 3)))
    p.add_grad(np.ones((2, 3)))
    assert p.grad.dtype == np.float32
    np.testing.assert_array_equal(p.grad, _ones(2.0))


def test_parameters_are_told_apart_by_identity_and_print_their_name():
    a, b = _parameter(), _parameter()
    assert a != b
    assert len({a, b, a}) == 2
    assert "fc.weight" in repr(a)
    assert (a.shape, a.dtype, a.size) == ((2, 3), np.float32, 6)


def test_new_values_forget_the_gradient_and_its_memory():
    p = Parameter(np.ones(3))
    flat = FlatBuffer({"p": (3,)}, np.float64)
    p.attach(flat.views["p"], location=(flat, "p"))
    p.add_grad(np.ones(3))
    p.move(lambda values: values)
    assert p.grad is flat.views["p"]
    assert p.location == (flat, "p")
    p.move(np.copy)
    assert (p.grad, p.grad_memory, p.location) == (None, None, None)
    p.expect(1)
    with pytest.raises(RuntimeError, match="move: parameter"):
        p.move(np.copy)
