"""Norm and rotation of heads: known values, properties and bad input. What all rooms share is in test_contract.py."""

import math

import pytest
import torch
from rooms import KERNELS, device, dtypes

import vlkern
from vlkern.layers.rope import Rope
from vlkern.ops import norm_rope
from vlkern.testing import assert_as_good, differentiate, in_float64

BACKENDS = ("reference", *(b for b in KERNELS if b != "cuda"))
every_backend = pytest.mark.parametrize("name", BACKENDS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(name, t, c):
    return (a.to(device(name)) for a in Rope(c, 100.0)(torch.arange(t)))


@every_backend
def test_known_values(name):
    """(3, 4) has mean square 12.5; a quarter turn takes (a, b) to (-b, a)."""
    x = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]], [[0.0, 0.0]]], device=device(name))
    cos, sin = torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    weight = torch.tensor([0.0, 1.0], device=device(name))
    with vlkern.backend(name):
        y = norm_rope(x, cos.to(x), sin.to(x), weight, eps=1e-12)
        turned = norm_rope(x, cos.to(x), sin.to(x))
    r = math.sqrt(2) / 5
    expected = torch.tensor([[[3 * r, 8 * r]], [[-8 * r, 3 * r]], [[0.0, 0.0]]], device=device(name))
    torch.testing.assert_close(y, expected)
    assert turned.flatten().tolist() == [3, 4, -4, 3, 0, 0]


@every_backend
def test_agrees_with_separate_ops(name):
    """Against PyTorch's RMS norm and a complex product, gradients included."""
    x, weight = normal(7, 3, 24).to(device(name)), normal(24, seed=1).to(device(name))
    cos, sin = angles(name, 7, 24)

    def theirs(x, cos, sin, weight):
        h = torch.nn.functional.rms_norm(x, (24,), 1 + weight, 1e-6)
        y = torch.complex(*h.chunk(2, -1)) * torch.complex(cos, sin)[:, None]
        return torch.cat([y.real, y.imag], -1)

    with vlkern.backend(name):
        ours = differentiate(norm_rope, (x, cos, sin, weight), {})
    other = differentiate(theirs, (x, cos, sin, weight), {}, cotangents=ours.cotangents)
    for a, b in zip(ours.outputs + ours.gradients, other.outputs + other.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_backend
def test_rotation_keeps_lengths_and_depends_on_differences(name):
    q, k = normal(1, 1, 64).to(device(name)), normal(1, 1, 64, seed=1).to(device(name))
    rope = Rope(64, 10000.0)

    def at(x, p):
        return norm_rope(x, *(a.to(device(name)) for a in rope(torch.tensor([p]))))

    with vlkern.backend(name):
        torch.testing.assert_close(at(q, 1234).norm(), q.norm())
        dots = [(at(q, p + 5) * at(k, p)).sum() for p in (0, 100, 30000)]
    torch.testing.assert_close(dots[1:], dots[:1] * 2, rtol=1e-4, atol=1e-4)


@every_backend
def test_heads_and_tokens_do_not_meet(name):
    """The bits of a head depend on nothing beside it, nor on where it comes from."""
    x, weight = normal(40, 3, 50).to(device(name)), normal(50).to(device(name))
    cos, sin = angles(name, 40, 50)
    with vlkern.backend(name):
        whole = norm_rope(x, cos, sin, weight)
        for t in (0, 17, 39):
            alone = norm_rope(x[t : t + 1, 1:2], cos[t : t + 1], sin[t : t + 1], weight)
            assert torch.equal(alone[0, 0], whole[t, 1])


@every_backend
def test_finite_for_any_finite_input(name):
    for dtype in dtypes(name):
        top = torch.finfo(dtype).max / 2  # two channels are added up
        rows = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-4, 1.0, 1e4, top]).to(device(name), dtype)
        x = rows[:, None, None].expand(6, 1, 8).contiguous()
        for weight in (None, torch.zeros(8, device=device(name))):
            with vlkern.backend(name):
                run = differentiate(norm_rope, (x, *angles(name, 6, 8), weight), {})
            assert run.outputs[0].isfinite().all() and run.gradients[0].isfinite().all()


@every_backend
def test_nan_is_not_swallowed(name):
    for dtype in dtypes(name):
        x = normal(5, 2, 40, dtype=dtype).to(device(name))
        x[3, 1, 39] = math.nan
        with vlkern.backend(name):
            y = norm_rope(x, *angles(name, 5, 40), torch.ones(40, device=device(name)))
        assert y[3, 1].isnan().all() and y.isnan().sum() == 40


def test_one_rounding_where_separate_ops_have_several():
    """In bfloat16 as good as the exact result, rounded; rounding at each step loses about twice as much."""
    x, weight, (cos, sin) = normal(64, 4, 64, dtype=torch.bfloat16), normal(64), Rope(64, 100.0)(torch.arange(64))
    exact = norm_rope(*in_float64((x, cos, sin, weight)))
    ours = norm_rope(x, cos, sin, weight)
    h = torch.nn.functional.rms_norm(x.float(), (64,), 1 + weight, 1e-6).bfloat16()
    a, b = h.chunk(2, -1)
    c, s = (t.bfloat16()[:, None] for t in (cos, sin))
    separate = torch.cat([a * c - b * s, b * c + a * s], -1)
    assert_as_good(ours, exact.bfloat16(), exact, slack=1.0)
    assert (ours - exact).abs().mean() < 0.75 * (separate - exact).abs().mean()


X, COS = torch.ones(3, 2, 8), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "x must be a tensor, got list", ([1.0], COS, COS), {}),
        (TypeError, "x must be float.*got torch.int64", (X.long(), COS, COS), {}),
        (ValueError, r"x must have shape \[tokens, heads, even head dim\], got \[2, 8\]", (X[0], COS, COS), {}),
        (ValueError, r"x must have shape .*even head dim\], got \[3, 2, 7\]", (X[..., 1:], COS, COS), {}),
        (TypeError, "cos must be torch.float32, got torch.float64", (X, COS.double(), COS), {}),
        (TypeError, "sin must be torch.float32, got torch.bfloat16", (X.bfloat16(), COS, COS.bfloat16()), {}),
        (ValueError, r"sin must have shape \[3, 4\], got \[3, 8\]", (X, COS, torch.ones(3, 8)), {}),
        (ValueError, "cos must be on the device of x, cpu, got meta", (X, COS.to("meta"), COS), {}),
        (ValueError, r"weight must have shape \[8\], got \[4\]", (X, COS, COS, torch.ones(4)), {}),
        (TypeError, "weight must be float", (X, COS, COS, torch.ones(8).int()), {}),
        (ValueError, "eps must be a positive finite number, got 0", (X, COS, COS), {"eps": 0}),
        (TypeError, "offset must be a number, got NoneType", (X, COS, COS), {"offset": None}),
    ],
)
def test_bad_input(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        norm_rope(*args, **kwargs)
