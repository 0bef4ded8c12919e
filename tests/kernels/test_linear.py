"""The linear layer: extreme values, masks of gradients, autocast, who computes what, and bad input."""

import pytest
import torch
import torch.nn.functional as F

import vlkern
from vlkern._op import REGISTRY
from vlkern.ops import linear
from vlkern.testing import record


def layer(m=5, k=6, n=7, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_pytorchs_linear_and_gelu(backend):
    x, weight, bias = layer(40, 33, 50)
    with vlkern.backend(f"linear={backend}"):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        torch.testing.assert_close(linear(x, weight, bias, activation="gelu_tanh"), expected)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e-6, 0.75, 5.0, 9.0, 13.2, 1e3, 1e19, 3e38])
def test_gelu_of_extreme_values(value):
    """Large negative values give 0, large positive ones themselves; so do their slopes."""
    x = torch.tensor([[value], [-value]], requires_grad=True)
    with vlkern.backend("linear=cpu"):
        y = linear(x, torch.ones(1, 1), activation="gelu_tanh")
        slope = torch.autograd.grad(y.sum(), x)[0]
    z = x.detach().double().requires_grad_()
    want = z * torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))  # 1 + tanh would cancel
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-36)
    assert slope.isfinite().all()
    if value < 1e19:  # beyond, the formula overflows even in float64
        want_slope = torch.autograd.grad(want.sum(), z)[0]
        torch.testing.assert_close(slope, want_slope.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_a_frozen_input_costs_no_matmul(wanted):
    """What needs no gradient is not computed."""
    tensors = [t.requires_grad_(want) for t, want in zip(layer(dtype=torch.float16), wanted, strict=True)]
    with vlkern.backend("linear=reference"), record() as calls:
        linear(*tensors, activation="gelu_tanh").sum().backward()
    assert [t.grad is not None for t in tensors] == list(wanted)
    assert sum("linear_product" in call.op._schema.name for call in calls) == sum(wanted[:2])


def test_autocast_takes_autocasts_dtype():
    x, weight, bias = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


def test_a_narrow_dtype_that_the_cpu_multiplies_natively_is_left_to_pytorch(monkeypatch):
    from vlkern.kernels import linear as room

    x, weight, bias = layer(room.FEW_ROWS + 1, dtype=torch.bfloat16)
    for native, backend in ((True, "reference"), (False, "cpu")):
        monkeypatch.setitem(room._NATIVE, torch.bfloat16, native)
        assert vlkern.explain(linear, x, weight, bias).backend == backend
        assert vlkern.explain(linear, x[1:], weight, bias).backend == "cpu"
        assert REGISTRY["linear"].choose(x.float(), weight.float()) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 15, 16, 33, 130])
def test_a_row_among_few_has_the_bits_that_it_has_alone(dtype, k):
    """What batched decoding gives does not depend on the batch, up to the 16 rows of the kernel for few."""
    x, weight, bias = layer(16, k, 41, dtype)
    x[3, k // 2], weight[5] = 2048.0, 0.0
    weight[:, 0] = 6e-8  # a subnormal float16
    with vlkern.backend("linear=cpu"):
        alone = torch.cat([linear(row, weight, bias) for row in x.split(1)])
        exact = F.linear(x.double(), weight.double(), bias.double())
        for rows in (2, 3, 4, 5, 7, 16):
            assert torch.equal(linear(x[:rows], weight, bias), alone[:rows])
    torch.testing.assert_close(alone.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"x must have shape \[..., 6\], got \[2, 5\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[..., 6\], got \[\]"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "x must be float64"),
        ({"weight": torch.ones(7, 6, 1)}, ValueError, r"weight must have shape \[N, K\]"),
        ({"weight": torch.ones(7, 0), "x": torch.ones(2, 0)}, ValueError, "with K >= 1"),
        ({"weight": torch.ones(7, 6).bfloat16()}, TypeError, "weight must have the dtype of x"),
        ({"bias": torch.ones(6)}, ValueError, r"bias must have shape \[7\], got \[6\]"),
        ({"bias": torch.ones(7).half()}, TypeError, "bias must have the dtype of x"),
        ({"activation": "relu"}, ValueError, "activation must be None or 'gelu_tanh', got 'relu'"),
    ],
)
def test_bad_input(change, error, message):
    x, weight, bias = layer()
    with pytest.raises(error, match=message):
        linear(**{"x": x, "weight": weight, "bias": bias, **change})
