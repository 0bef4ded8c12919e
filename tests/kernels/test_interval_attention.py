"""Interval attention: against PyTorch's own with a dense mask, its LSE, odd strides and intervals, bad input.

What all rooms share is in test_contract.py.
"""

import pytest
import torch
import torch.nn.functional as F
from rooms import KERNELS, device, dtypes

import vlkern
from vlkern._op import REGISTRY
from vlkern.ops import interval_attention, interval_attention_lse
from vlkern.testing import assert_as_good, assert_same_direction, differentiate, in_float64

OP = REGISTRY["interval_attention"]
EVERY = ("reference", *(name for name in KERNELS if name in OP.backends))
every_backend = pytest.mark.parametrize("name", EVERY)
every_kernel = pytest.mark.parametrize("name", EVERY[1:])


def problem(nq, nk, hq=2, hkv=1, d=16, dv=24, dtype=torch.float32, where="cpu", seed=0, empty=0.1):
    """q, k, v and random intervals: in no order, overlapping, beyond the keys, a share of them empty."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(nq, hq, d), (nk, hkv, d), (nk, hkv, dv)]
    q, k, v = (torch.randn(*size, generator=g).to(where, dtype) for size in sizes)
    start, stop = torch.randint(-3, nk + 4, (2, nq), generator=g, dtype=torch.int32).sort(0).values
    stop = torch.where(torch.rand(nq, generator=g) < empty, start - 1, stop)
    return q, k, v, start.to(where), stop.to(where)


def mask(start, stop, nk):
    j = torch.arange(nk, device=start.device)
    return (j >= start[:, None]) & (j < stop[:, None])


def attend(name, *args, **kwargs):
    with vlkern.backend(f"interval_attention={name}"):
        return interval_attention_lse(*args, **kwargs)


@every_backend
@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (4, 2), (3, 1)])
def test_it_is_pytorchs_attention_under_the_mask(name, hq, hkv):
    q, k, v, start, stop = problem(90, 75, hq, hkv, where=device(name))
    visible = mask(start, stop, 75)
    some = visible.any(1)
    out, lse = attend(name, q, k, v, start, stop)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(
            *(t.double().transpose(0, 1) for t in (q, k, v)), attn_mask=visible, enable_gqa=True
        ).transpose(0, 1)
    torch.testing.assert_close(out[some], wanted[some].float(), rtol=1e-5, atol=2e-6)
    assert not out[~some].any()
    assert (lse[~some] == -torch.inf).all() and lse[some].isfinite().all()
    assert 0 < (~some).sum() < 40


@every_kernel
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lse_and_gradients_through_both_results(name, softcap):
    for dtype in dtypes(name):
        *tensors, start, stop = problem(70, 70, 2, 2, dtype=dtype, where=device(name), empty=0.0)
        start, stop = start.clamp(max=69), torch.maximum(stop, start.clamp(0, 69) + 1)

        def run(backend, args, cotangents=None, bounds=(start, stop)):
            def function(*qkv):
                return attend(backend, *qkv, *bounds, softcap=softcap)

            return differentiate(function, tuple(args), {}, cotangents)

        ours, low = run(name, tensors), run("reference", tensors)
        exact = run("reference", in_float64(tensors), ours.cotangents)
        assert ours.outputs[1].dtype == torch.float32
        assert_as_good(ours.outputs[1], low.outputs[1], exact.outputs[1])
        for results in zip(ours.gradients, low.gradients, exact.gradients, strict=True):
            assert_as_good(*results, slack=3.0)
            assert_same_direction(*results)


@every_backend
def test_gradient_of_the_lse_alone(name):
    """d lse_i / d q_i is the mean of the visible keys under the softmax: attention whose values are the keys."""
    q, k, _, start, stop = problem(50, 60, 2, 1, d=16, dv=16, where=device(name))
    q.requires_grad_()
    _, lse = attend(name, q, k, k, start, stop, scale=0.5)
    seen = lse > -torch.inf
    (found,) = torch.autograd.grad(lse[seen].sum(), q)
    wanted, _ = attend(name, q.detach(), k, k, start, stop, scale=0.5)
    torch.testing.assert_close(found, 0.5 * wanted, rtol=1e-5, atol=2e-6)


@every_backend
def test_two_calls_are_merged_by_their_lse(name):
    """Over disjoint keys; also where one of the calls sees none. With gradients through out and LSE."""
    q, k, v, start, stop = problem(60, 80, 2, 2, where=device(name))
    some = (start < stop) & (stop > 0) & (start < 80)
    q, start, stop = q[some], start[some], stop[some]
    k, v, q = (t.requires_grad_() for t in (k, v, q))
    cut = torch.full_like(start, 33)
    out, _ = attend(name, q, k, v, start, stop)
    parts = [
        attend(name, q, k, v, start, torch.minimum(stop, cut)),
        attend(name, q, k, v, torch.maximum(start, cut), stop),
    ]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    assert any((lse == -torch.inf).any() for _, lse in parts)
    merged = sum(torch.exp(lse - total)[..., None] * o for o, lse in parts)
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=2e-6)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    for one, two in zip(*(torch.autograd.grad(o, (q, k, v), g) for o in (out, merged)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@every_backend
def test_keys_that_nobody_sees_get_no_gradient(name):
    q, k, v, start, stop = problem(40, 200, where=device(name))
    start, stop = (t.clamp(70, 130) for t in (start, stop))
    run = differentiate(
        lambda *qkv: attend(name, *qkv, start, stop)[0], (q, k, v), {}, [torch.ones(40, 2, 24, device=q.device)]
    )
    for gradient in run.gradients[1:]:
        assert not gradient[:70].any() and not gradient[130:].any() and gradient[70:130].any()


@every_backend
@pytest.mark.parametrize("scale", [-0.7, 0.0, 50.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_any_scale(name, scale, softcap):
    """Negative, zero (every visible key weighs the same) and so large that the softmax takes one key."""
    q, k, v, start, stop = problem(40, 50, 2, 2, where=device(name))
    mine = differentiate(lambda *a: attend(name, *a, start, stop, scale=scale, softcap=softcap)[0], (q, k, v), {})
    wide = in_float64((q, k, v))
    theirs = differentiate(
        lambda *a: attend("reference", *a, start, stop, scale=scale, softcap=softcap)[0], wide, {}, mine.cotangents
    )
    loose = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, scale * scale)}  # a score's error and the slope both grow with scale
    for one, two in zip(mine.outputs + mine.gradients, theirs.outputs + theirs.gradients, strict=True):
        torch.testing.assert_close(one.double(), two, **loose)


@every_backend
@pytest.mark.parametrize(("nq", "nk"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(name, nq, nk):
    q, k, v, start, stop = problem(nq, nk, where=device(name))
    start, stop = torch.zeros_like(start), torch.full_like(stop, 9)
    for t in (q, k, v):
        t.requires_grad_()
    out, lse = attend(name, q, k, v, start, stop)
    assert out.shape == (nq, 2, 24) and not out.any() and (lse == -torch.inf).all()
    for t, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.shape == t.shape and not gradient.any()


@every_backend
def test_the_widest_intervals(name):
    """Every int32 is allowed; nothing overflows on the way to [0, Nk]."""
    q, k, v, start, stop = problem(20, 30, where=device(name))
    limits = torch.iinfo(torch.int32)
    whole, _ = attend(name, q, k, v, torch.full_like(start, limits.min), torch.full_like(stop, limits.max))
    plain, _ = attend(name, q, k, v, torch.zeros_like(start), torch.full_like(stop, 30))
    assert torch.equal(whole, plain)
    nothing, lse = attend(name, q, k, v, torch.full_like(start, limits.max), torch.full_like(stop, limits.min))
    assert not nothing.any() and (lse == -torch.inf).all()


def heads_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def padded(t):
    """Rows an odd number of elements apart."""
    return F.pad(t, (0, 3))[..., : t.shape[-1]]


def reversed_columns(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@every_backend
@pytest.mark.parametrize("lay", [heads_first, padded, reversed_columns])
def test_any_strides(name, lay):
    q, k, v, start, stop = problem(33, 40, 4, 2, where=device(name))
    plain = differentiate(lambda *a: attend(name, *a, start, stop)[0], (q, k, v), {})
    strided = tuple(lay(t) for t in (q, k, v))
    assert not any(t.is_contiguous() for t in strided)
    twice = torch.stack([start, stop], 1)
    other = differentiate(lambda *a: attend(name, *a, twice[:, 0], twice[:, 1])[0], strided, {})
    for one, two in zip(plain.outputs + plain.gradients, other.outputs + other.gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@every_backend
def test_large_scores_stay_finite(name):
    q, k, v, start, stop = problem(50, 70, where=device(name))
    run = differentiate(lambda *a: attend(name, *a, start, stop, scale=1.0)[0], (1e4 * q, 1e4 * k, v), {})
    assert all(t.isfinite().all() for t in run.outputs + run.gradients)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(3, 2, 12)}, ValueError, r"q must have a head dim that is a multiple of 8 up to 256, got 12"),
        ({"v": torch.zeros(5, 1, 264)}, ValueError, r"v must have a head dim .* up to 256, got 264"),
        ({"q": torch.zeros(3, 16)}, ValueError, r"q must have shape \[tokens, heads, head dim\]"),
        (
            {"q": torch.zeros(3, 3, 16), "k": torch.zeros(5, 2, 16)},
            ValueError,
            r"a multiple of k's 2 heads",
        ),
        ({"k": torch.zeros(5, 1, 24)}, ValueError, r"k must have q's head dim 16, got 24"),
        ({"v": torch.zeros(4, 1, 16)}, ValueError, r"v must have shape"),
        ({"k": torch.zeros(5, 1, 16, dtype=torch.float16)}, TypeError, r"k must .*float16"),
        ({"start": torch.zeros(3)}, TypeError, r"start must be int32"),
        ({"stop": torch.zeros(3, dtype=torch.int64)}, TypeError, r"stop must be int32, got torch.int64"),
        ({"stop": torch.zeros(4, dtype=torch.int32)}, ValueError, r"stop must have shape"),
        ({"start": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, r"start .*meta"),
        ({"scale": float("nan")}, ValueError, r"scale"),
        ({"softcap": 0.0}, ValueError, r"softcap"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {
        "q": torch.zeros(3, 2, 16),
        "k": torch.zeros(5, 1, 16),
        "v": torch.zeros(5, 1, 16),
        "start": torch.zeros(3, dtype=torch.int32),
        "stop": torch.zeros(3, dtype=torch.int32),
    }
    with pytest.raises(error, match=words):
        interval_attention(**{**arguments, **change})
