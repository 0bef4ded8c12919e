"""GeGLU: what it is, extreme values, autocast and bad input. What all rooms share is in test_contract.py."""

import pytest
import torch
import torch.nn.functional as F
from rooms import KERNELS, device

import vlkern
from vlkern.ops import geglu
from vlkern.testing import differentiate

every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))


@every_backend
def test_it_is_pytorchs_gelu_times_up(name):
    gate, up = (3 * torch.randn(2, 40, 33, device=device(name))).unbind()
    with vlkern.backend(name):
        ours = differentiate(geglu, (gate, up), {})
    theirs = differentiate(lambda z, u: F.gelu(z, approximate="tanh") * u, (gate, up), {}, cotangents=ours.cotangents)
    for a, b in zip(ours.outputs + ours.gradients, theirs.outputs + theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_backend
def test_extreme_gates_close_or_pass(name):
    """Beyond 16 the gate is 0 or z, its slope 0 or 1, also where z^3 is no float32."""
    gate = torch.tensor([0.0, 20.0, -20.0, 1e13, -1e13, 3e38, -3e38], device=device(name))
    with vlkern.backend(name):
        run = differentiate(geglu, (gate, torch.ones_like(gate)), {}, cotangents=[torch.ones_like(gate)])
    torch.testing.assert_close(run.outputs[0], gate.clamp(min=0))
    torch.testing.assert_close(run.gradients[0], torch.tensor([0.5, 1, 0, 1, 0, 1, 0], device=device(name)))
    torch.testing.assert_close(run.gradients[1], gate.clamp(min=0))


@every_backend
def test_nan_is_not_swallowed(name):
    gate = torch.tensor([1.0, float("nan"), 1.0], device=device(name))
    with vlkern.backend(name):
        assert geglu(gate, torch.ones_like(gate)).isnan().tolist() == [False, True, False]
        assert geglu(torch.ones_like(gate), gate).isnan().tolist() == [False, True, False]


X = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "gate must be a tensor, got list", ([1.0], X)),
        (TypeError, "up must be float64.*got torch.int64", (X, X.long())),
        (TypeError, "up must have the dtype of gate", (X, X.half())),
        (ValueError, r"up must have shape \[4, 8\], got \[8\]", (X, X[0])),
        (ValueError, "up must be on the device of gate, cpu, got meta", (X, X.to("meta"))),
    ],
)
def test_bad_input(error, message, args):
    with pytest.raises(error, match=message):
        geglu(*args)
