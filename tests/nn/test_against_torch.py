"""The same numbers as torch, forward and backward, where torch is installed."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.nn import (
    EVAL,
    GELU,
    AvgPool2d,
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    MaxPool2d,
    Mode,
    Module,
    ReLU,
    cross_entropy,
    mse_loss,
)
from mpidist.testing.gradcheck import gradients, projection

torch = pytest.importorskip("torch")
tnn = torch.nn

TRAIN = Mode(training=True)
F8 = {"rng": 1, "dtype": np.float64}
RNG = np.random.default_rng(7)
IMAGE = RNG.normal(size=(3, 2, 7, 6))
SEQUENCE = RNG.normal(size=(3, 5, 6))


def _load(module: Module, reference: tnn.Module) -> None:
    """Give torch's module the values of ours, shaken off 0 and 1, by the same names."""
    rng = np.random.default_rng(3)
    for _, array in module.named_buffers():
        array[...] += 0.3 * rng.random(array.shape)
    for p in module.parameters():
        p.data += 0.3 * rng.normal(size=p.shape)
    state = {name: torch.from_numpy(a.copy()) for name, a in module.state_dict().items()}
    own = reference.state_dict()
    reference.load_state_dict({name: state.get(name, own[name]) for name in own})
    assert state.keys() <= own.keys()


PAIRS = {
    "linear": (Linear(6, 4, **F8), lambda: tnn.Linear(6, 4), SEQUENCE),
    "conv": (
        Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), **F8),
        lambda: tnn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
        IMAGE,
    ),
    "max pool": (MaxPool2d(2), lambda: tnn.MaxPool2d(2), IMAGE),
    "max pool, overlapping": (
        MaxPool2d(3, stride=2, padding=1),
        lambda: tnn.MaxPool2d(3, stride=2, padding=1),
        np.round(IMAGE),  # ties
    ),
    "average pool": (AvgPool2d(2), lambda: tnn.AvgPool2d(2), IMAGE),
    "average pool, overlapping": (
        AvgPool2d(3, stride=2, padding=1),
        lambda: tnn.AvgPool2d(3, stride=2, padding=1),
        IMAGE,
    ),
    "batch norm": (BatchNorm2d(2, dtype=np.float64), lambda: tnn.BatchNorm2d(2), IMAGE),
    "layer norm": (LayerNorm(6, dtype=np.float64), lambda: tnn.LayerNorm(6), SEQUENCE),
    "embedding": (Embedding(9, 4, **F8), lambda: tnn.Embedding(9, 4), RNG.integers(0, 9, (3, 5))),
    "relu": (ReLU(), tnn.ReLU, SEQUENCE),
    "gelu": (GELU(), lambda: tnn.GELU(approximate="tanh"), SEQUENCE),
}


@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_equals_torchs(name, mode):
    module, make_reference, x = PAIRS[name]
    reference = make_reference().double().train(mode.training)
    _load(module, reference)
    got = gradients(module, x, mode=mode)

    tx = torch.from_numpy(x.copy()).requires_grad_(x.dtype.kind == "f")
    ty = reference(tx)
    ty.backward(torch.from_numpy(projection(got["y"])))
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    expected["y"] = ty.detach().numpy()
    if tx.requires_grad:
        expected["dx"] = tx.grad.numpy()
    else:
        assert not got.pop("dx").any()
    assert got.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(got[key], array, rtol=1e-11, atol=1e-12, err_msg=key)
    buffers = dict(reference.named_buffers())
    for key, array in module.named_buffers():
        np.testing.assert_allclose(array, buffers[key].numpy(), rtol=1e-12, err_msg=key)


def test_attention_equals_torchs():
    module = CausalSelfAttention(6, 3, **F8)
    reference = tnn.MultiheadAttention(6, 3, batch_first=True).double()
    names = {
        "qkv.weight": reference.in_proj_weight,
        "qkv.bias": reference.in_proj_bias,
        "proj.weight": reference.out_proj.weight,
        "proj.bias": reference.out_proj.bias,
    }
    with torch.no_grad():
        for name, p in module.named_parameters():
            names[name].copy_(torch.from_numpy(p.data))
    got = gradients(module, SEQUENCE)
    tx = torch.from_numpy(SEQUENCE.copy()).requires_grad_()
    ahead = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
    ty, _ = reference(tx, tx, tx, attn_mask=ahead, need_weights=False)
    ty.backward(torch.from_numpy(projection(got["y"])))
    expected = {name: p.grad.numpy() for name, p in names.items()}
    expected |= {"y": ty.detach().numpy(), "dx": tx.grad.numpy()}
    for key, array in expected.items():
        np.testing.assert_allclose(got[key], array, rtol=1e-11, atol=1e-12, err_msg=key)


def test_losses_equal_torchs():
    logits, target = RNG.normal(size=(4, 5, 6)), RNG.integers(0, 6, (4, 5))
    tlogits = torch.from_numpy(logits.copy()).requires_grad_()
    tloss = tnn.functional.cross_entropy(
        tlogits.reshape(-1, 6), torch.from_numpy(target).reshape(-1)
    )
    tloss.backward()
    loss, dlogits = cross_entropy(logits, target)
    np.testing.assert_allclose(loss, tloss.item(), rtol=1e-13)
    np.testing.assert_allclose(dlogits, tlogits.grad.numpy(), rtol=1e-11, atol=1e-14)

    tlogits.grad = None
    tloss = tnn.functional.mse_loss(tlogits, torch.ones_like(tlogits))
    tloss.backward()
    loss, dpred = mse_loss(logits, np.ones_like(logits))
    np.testing.assert_allclose(loss, tloss.item(), rtol=1e-13)
    np.testing.assert_allclose(dpred, tlogits.grad.numpy(), rtol=1e-12)
