"""Messages of a pipeline: without envelopes where shapes repeat, right where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.backends.base import Traffic
from mpidist.nn import Context, Mode, Module, Sequential
from mpidist.parallel import Pipeline
from mpidist.testing import DeliveryMode, run_ranks

SHAPES = {
    "(2, 6)": [((2, 6), np.float32), ((2, 6), np.float32)],
    "(3, 4)": [((3, 4), np.float32), ((3, 4), np.float32)],
    "integers": [((3, 4), np.int32), ((3, 4), np.int32)],
    "longer": [((300, 7), np.float64), ((300, 7), np.float64)],
    "much longer": [((3000, 7), np.float64), ((3000, 7), np.float64)],
    "empty": [((0, 4), np.float32), ((0, 4), np.float32)],
    "uneven": [((3, 4), np.float32), ((2, 4), np.float32)],
    "swapped": [((2, 4), np.float32), ((3, 4), np.float32)],
}
"""By micro-batch."""


class Given(Module):
    """Gives arrays of any shapes and dtypes, forward and backward, and keeps what it gets."""

    def __init__(self, draw):
        vars(self).update(draw=draw, got={})

    def forward(self, x, mode):
        self.got[mode.step, "F", mode.sample_offset] = x.copy()
        return self.draw(mode.step, "F", mode.sample_offset), Context((mode.step, mode))

    def backward_input(self, ctx, dy):
        _, mode = ctx.saved
        self.got[mode.step, "B", mode.sample_offset] = dy.copy()
        return self.draw(mode.step, "B", mode.sample_offset), None

    def backward_weight(self, wctx):
        pass


def no_loss(y, target, *, denominator):
    return np.float64(0), y


def run(group, steps):
    """Run steps; return what came from the other rank, and the bytes of the messages of each."""

    def draw(step, kind, micro):
        shape, dtype = SHAPES[steps[step]][micro]
        rng = np.random.default_rng([step, ord(kind), micro])
        return rng.integers(0, 256, (*shape, dtype().nbytes), np.uint8).view(dtype)[..., 0]

    layers = [Given(draw) for _ in range(group.size)]
    with Pipeline(Sequential(*layers), group, micro_batches=2, loss=no_loss) as pipe:
        transport, sent = pipe.group.transport, []
        span = transport.lane(Traffic.PAYLOAD, 0) - transport.lane(Traffic.ENVELOPE, 0)
        first, exchange = transport.lane(Traffic.ENVELOPE, 0), transport.exchange

        def count(sends, receives):
            sent.extend(m.array.nbytes for m in sends if first <= m.lane < first + 2 * span)
            return exchange(sends, receives)

        transport.exchange = count
        nbytes = []
        for step in range(len(steps)):
            pipe.step(np.ones((2, 1)), np.ones((2, 1)), Mode(True, step=step))
            nbytes.append(sorted(sent))
            sent.clear()
        del transport.exchange
    (layer,) = layers[group.rank : group.rank + 1]
    kind = "B" if group.rank == 0 else "F"
    expected = {key: draw(*key) for key in layer.got if key[1] == kind}
    return [(layer.got[key], array) for key, array in expected.items()], nbytes


@pytest.mark.parametrize("mode", DeliveryMode)
def test_what_arrives_is_what_was_sent_whatever_shapes_follow_each_other(mode):
    rng = np.random.default_rng(0)
    steps = [*SHAPES, *rng.choice(list(SHAPES), 40), *np.repeat(rng.choice(list(SHAPES), 9), 4)]
    for pairs, _ in run_ranks(2, run, steps, mode=mode):
        assert len(pairs) == 2 * len(steps)
        for got, expected in pairs:
            np.testing.assert_array_equal(got, expected, strict=True)


def test_a_shape_that_repeats_is_sent_in_one_message_of_its_bytes():
    small, long = "(3, 4)", "much longer"
    steps = [small, small, small, long, long, long, small, "(2, 6)", small, small]
    bare, long_bare, other = [48, 48], [168000] * 2, [49, 49]
    for _, nbytes in run_ranks(2, run, steps):
        head = nbytes[0][0] - 48  # of two dimensions
        assert head > 0
        enveloped, long_enveloped = [head + 48] * 2, [head, head, *long_bare]
        assert nbytes == [
            enveloped,
            bare,
            bare,
            sorted(other + long_enveloped),
            long_enveloped,
            long_bare,
            sorted([168001] * 2 + enveloped),
            enveloped,
            enveloped,
            enveloped,
        ]
