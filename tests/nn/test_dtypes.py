"""What dtypes go in and come out, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.arrays.namespaces import BFLOAT16
from mpidist.nn import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    MaxPool2d,
    Mode,
    PositionEmbedding,
    ReLU,
)
from mpidist.testing.gradcheck import gradients

WITH_PARAMETERS = {
    "Linear": (lambda d: Linear(6, 3, rng=0, dtype=d), (2, 4, 6)),
    "Conv2d": (lambda d: Conv2d(2, 3, 3, rng=0, padding=1, dtype=d), (2, 2, 5, 6)),
    "BatchNorm2d": (lambda d: BatchNorm2d(2, dtype=d), (2, 2, 5, 6)),
    "LayerNorm": (lambda d: LayerNorm(6, dtype=d), (2, 4, 6)),
    "PositionEmbedding": (lambda d: PositionEmbedding(4, 6, rng=0, dtype=d), (2, 4, 6)),
    "CausalSelfAttention": (lambda d: CausalSelfAttention(6, 2, rng=0, dtype=d), (2, 4, 6)),
}
WITHOUT = {
    "Dropout": (lambda d: Dropout(0.5), (2, 4, 6)),
    "GELU": (lambda d: GELU(), (2, 4, 6)),
    "ReLU": (lambda d: ReLU(), (2, 4, 6)),
    "MaxPool2d": (lambda d: MaxPool2d(2), (2, 2, 5, 6)),
    "AvgPool2d": (lambda d: AvgPool2d(2), (2, 2, 5, 6)),
}
ALL = WITH_PARAMETERS | WITHOUT


@pytest.mark.parametrize("name", ALL)
def test_float16_stays_float16(name):
    make, shape = ALL[name]
    x = np.random.default_rng(0).normal(size=shape)
    wide = gradients(make(np.float64), x)
    for key, array in gradients(make(np.float16), x.astype(np.float16)).items():
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, wide[key], rtol=0.02, atol=0.02, err_msg=key)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@pytest.mark.parametrize(
    ("parameters", "given"),
    [(np.float32, np.float64), (np.float64, np.float32), (np.float32, np.float16)],
)
def test_an_output_has_the_wider_dtype_and_a_gradient_the_parameters_own(name, parameters, given):
    make, shape = WITH_PARAMETERS[name]
    x = np.random.default_rng(0).normal(size=shape).astype(given)
    got = gradients(make(parameters), x)
    wider = np.result_type(parameters, given)
    assert {got.pop("y").dtype, got.pop("dx").dtype} == {wider}
    assert {array.dtype for array in got.values()} == {np.dtype(parameters)}


@pytest.mark.parametrize("dtype", [BFLOAT16, np.int32, np.complex64])
@pytest.mark.parametrize("name", [*WITH_PARAMETERS, "Embedding"])
def test_parameters_without_arithmetic_are_refused(name, dtype):
    layers = {**{n: make for n, (make, _) in WITH_PARAMETERS.items()}}
    layers["Embedding"] = lambda d: Embedding(3, 2, rng=0, dtype=d)
    with pytest.raises(ValueError, match=f"expected parameters of float16.*{np.dtype(dtype)}"):
        layers[name](dtype)


def test_numpys_integers_are_sizes():
    conv = Conv2d(np.int64(1), np.int32(2), np.int64(3), rng=0, stride=(np.int64(2), 1))
    assert conv.weight.shape == (2, 1, 3, 3)
    y, _ = conv.forward(np.zeros((1, 1, 5, 5), np.float32), Mode(training=False))
    assert y.shape == (1, 2, 2, 3)
    assert MaxPool2d(np.int64(2), stride=np.uint8(1)).window.kernel == (2, 2)
    with pytest.raises(TypeError):
        Conv2d(1, 1, 2.0, rng=0)
