"""RMS normalisation: known values, properties and bad input. What all rooms share is in test_contract.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from rooms import KERNELS, device, dtypes

import vlkern
from vlkern.ops import rms_norm
from vlkern.testing import differentiate

BACKENDS = ("reference", *KERNELS)
every_backend = pytest.mark.parametrize("name", BACKENDS)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@every_backend
def test_known_values(name):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=device(name))
    weight = torch.tensor([1.0, 2.0], device=device(name))
    with vlkern.backend(name):
        plain = rms_norm(x, weight, eps=1e-12)
        gemma = rms_norm(x, weight - 1, eps=1e-12, offset=1.0)
    r = math.sqrt(2) / 5
    expected = torch.tensor([[3 * r, 8 * r], [0.0, 0.0]], device=device(name))
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(gemma, expected)


@every_backend
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_agrees_with_pytorch(name, eps):
    x, weight = normal(5, 7, 72, dtype=torch.float32), normal(72, seed=1, dtype=torch.float32)
    args = (x.to(device(name)), weight.to(device(name)))
    with vlkern.backend(name):
        ours = differentiate(rms_norm, args, {"eps": eps})
    theirs = differentiate(lambda x, w: F.rms_norm(x, (72,), w, eps), args, {}, cotangents=ours.cotangents)
    for a, b in zip(ours.outputs + ours.gradients, theirs.outputs + theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("factor", [2.0**-8, 2.0**12])
def test_scaling_the_input_changes_nothing(name, factor):
    """A power of two leaves every rounding alone, so up to eps the bits are the same."""
    x, weight = normal(33, 65, dtype=torch.float32).to(device(name)), torch.ones(65, device=device(name))
    with vlkern.backend(name):
        torch.testing.assert_close(
            rms_norm(x * factor, weight, eps=1e-30), rms_norm(x, weight, eps=1e-30), rtol=0, atol=0
        )


@every_backend
def test_scaling_the_weight_scales_the_output(name):
    x, weight = normal(9, 40, dtype=torch.float32).to(device(name)), normal(40, seed=3, dtype=torch.float32)
    weight = weight.to(device(name))
    with vlkern.backend(name):
        assert torch.equal(rms_norm(x, weight * 4), rms_norm(x, weight) * 4)
        assert torch.equal(rms_norm(x, weight, offset=1.0), rms_norm(x, weight + 1))


@every_backend
def test_rows_do_not_meet(name):
    """A row's bits do not depend on what stands beside it."""
    x, weight = normal(70, 50, dtype=torch.float32).to(device(name)), normal(50, dtype=torch.float32).to(device(name))
    with vlkern.backend(name):
        whole = rms_norm(x, weight)
        for i in (0, 1, 33, 69):
            assert torch.equal(rms_norm(x[i], weight), whole[i])


@every_backend
def test_finite_for_any_finite_input(name):
    for dtype in dtypes(name):
        top = torch.finfo(dtype).max
        rows = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-4, 1.0, 1e4, top]).to(device(name), dtype)
        x = rows[:, None].expand(6, 80) * torch.tensor([1.0, -1.0], device=device(name)).repeat(40).to(dtype)
        with vlkern.backend(name):
            run = differentiate(rms_norm, (x, torch.ones(80, device=device(name))), {})
        for t in run.outputs + run.gradients:
            assert t.isfinite().all()


@every_backend
def test_nan_is_not_swallowed(name):
    for dtype in dtypes(name):
        x = normal(6, 40, dtype=dtype).to(device(name))
        x[4, 39] = math.nan
        with vlkern.backend(name):
            run = differentiate(rms_norm, (x, torch.ones(40, device=device(name))), {})
        nan_rows = run.outputs[0].isnan().all(1)
        assert nan_rows.tolist() == [False] * 4 + [True, False] and not run.outputs[0][~nan_rows].isnan().any()
        assert run.gradients[0][4].isnan().all() and run.gradients[1].isnan().all()


@every_backend
def test_autocast_returns_float32(name):
    lower = dtypes(name if name in KERNELS else "cpu")[-1]
    x, weight = normal(4, 24, dtype=lower).to(device(name)), normal(24, dtype=lower).to(device(name))
    with vlkern.backend(name):
        with torch.autocast(device(name), lower):
            run = differentiate(rms_norm, (x, weight), {})
        plain = rms_norm(x.float(), weight.float())
    assert run.outputs[0].dtype == torch.float32 and torch.equal(run.outputs[0], plain)
    assert [g.dtype for g in run.gradients] == [lower, lower]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_keeps_its_own_dtype(weight_dtype):
    run = differentiate(rms_norm, (normal(6, 24, dtype=torch.bfloat16), normal(24, dtype=weight_dtype)), {})
    assert run.outputs[0].dtype == torch.bfloat16
    assert [g.dtype for g in run.gradients] == [torch.bfloat16, weight_dtype]


X, W = torch.ones(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "x must be a tensor, got list", ([1.0], W), {}),
        (TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int64", (X.long(), W), {}),
        (TypeError, "x must be float.*got torch.complex64", (X.cfloat(), W), {}),
        (TypeError, "weight must be a tensor, got NoneType", (X, None), {}),
        (TypeError, "weight must be float.*got torch.int32", (X, W.int()), {}),
        (ValueError, r"x must have shape \[..., N\] with N >= 1, got \[\]", (torch.tensor(1.0), W), {}),
        (ValueError, r"x must have shape \[..., N\] with N >= 1, got \[3, 0\]", (torch.ones(3, 0), torch.ones(0)), {}),
        (ValueError, r"weight must have shape \[8\], got \[7\]", (X, W[:7]), {}),
        (ValueError, r"weight must have shape \[8\], got \[1, 8\]", (X, W[None]), {}),
        (ValueError, "weight must be on the device of x, cpu, got meta", (X, W.to("meta")), {}),
        (ValueError, "x must|weight must be on the device of x, meta, got cpu", (X.to("meta"), W), {}),
        (ValueError, "eps must be a positive finite number, got 0", (X, W), {"eps": 0}),
        (ValueError, "eps must be a positive finite number, got -1e-06", (X, W), {"eps": -1e-6}),
        (ValueError, "eps must be a positive finite number, got nan", (X, W), {"eps": math.nan}),
        (ValueError, "eps must be a positive finite number, got inf", (X, W), {"eps": math.inf}),
        (TypeError, "eps must be a number, got bool", (X, W), {"eps": True}),
        (TypeError, "eps must be a number, got Tensor", (X, W), {"eps": torch.tensor(1e-6)}),
        (TypeError, "eps must be a number, got str", (X, W), {"eps": "1e-6"}),
        (ValueError, "offset must be a finite number, got nan", (X, W), {"offset": math.nan}),
        (TypeError, "offset must be a number, got NoneType", (X, W), {"offset": None}),
    ],
)
def test_bad_input(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        rms_norm(*args, **kwargs)
