"""Decode attention: against a loop over explicit lists of positions, in every state of a ring; int8; bad input.

What all rooms share is in test_contract.py.
"""

import math

import pytest
import torch
from rooms import KERNELS, device, dtypes

import vlkern
from vlkern._op import REGISTRY
from vlkern.kernels.decode_attention.samples import quantised
from vlkern.ops import decode_attention
from vlkern.testing import assert_as_good, poison

OP = REGISTRY["decode_attention"]
EVERY = ("reference", *(name for name in KERNELS if name in OP.backends))
every_backend = pytest.mark.parametrize("name", EVERY)


def attend(name, *args, **kwargs):
    with vlkern.backend(f"decode_attention={name}"), poison():
        return decode_attention(*args, **kwargs)


def history(lengths, slots, *, tokens=1, h=2, kh=1, c=16, cv=None, undone=0, dtype=torch.float32, seed=0):
    """q, the keys and values of every position of each row, and the caches after writing them one by one.

    `undone` more tokens were written and rolled back; they, and slots that were never written, hold NaN.
    """
    g = torch.Generator().manual_seed(seed)
    rows, longest, cv = len(lengths), max(lengths), cv or c
    q = torch.randn(rows, tokens, h, c, generator=g).to(dtype)
    past = [torch.randn(rows, longest, kh, width, generator=g).to(dtype) for width in (c, cv)]
    caches = [torch.full((rows, slots, kh, width), torch.nan, dtype=dtype) for width in (c, cv)]
    for cache, all_tokens in zip(caches, past, strict=True):
        for b, n in enumerate(lengths):
            for p in range(n):
                cache[b, p % slots] = all_tokens[b, p]
            for p in range(n, n + undone):
                cache[b, p % slots] = torch.nan
    return q, *past, *caches, torch.tensor(lengths, dtype=torch.int32)


def brute_force(q, k, v, lengths, window=None, scale=None, softcap=None):
    """The definition in float64: for each query the list of positions that it sees, in k, v [B, positions, K, C]."""
    q, k, v = (t.double() for t in (q, k, v))
    (rows, tokens, h, c), kh = q.shape, k.shape[2]
    out = torch.zeros(rows, tokens, h, v.shape[3], dtype=torch.float64)
    for b in range(rows):
        for i in range(tokens):
            p = int(lengths[b]) - tokens + i
            seen = [j for j in range(p + 1) if window is None or j > p - window]
            for head in range(h if seen else 0):
                s = k[b, seen, head // (h // kh)] @ q[b, i, head] * (c**-0.5 if scale is None else scale)
                if softcap is not None:
                    s = softcap * torch.tanh(s / softcap)
                out[b, i, head] = torch.softmax(s, 0) @ v[b, seen, head // (h // kh)]
    return out


def agrees(name, lengths, slots, options=None, **shape):
    """A backend against the loop, in all its dtypes."""
    options = options or {}
    for dtype in dtypes(name) if name != "reference" else (torch.float32,):
        q, past_k, past_v, k, v, length = history(lengths, slots, dtype=dtype, **shape)
        args = [t.to(device(name)) for t in (q, k, v, length)]
        ours = attend(name, *args, **options).cpu()
        exact = brute_force(q, past_k, past_v, length, **options)
        assert_as_good(ours, attend("reference", q, k, v, length, **options), exact)


@every_backend
@pytest.mark.parametrize(("tokens", "window", "slots"), [(1, 5, 5), (1, 3, 7), (3, 4, 9)])
def test_every_state_of_a_ring(name, tokens, window, slots):
    """Lengths from 0 to three times around, with as many tokens rolled back as the slack allows."""
    undone = slots - window - tokens + 1
    agrees(name, range(3 * slots + 1), slots, {"window": window}, tokens=tokens, undone=undone, h=2, kh=1, c=8, cv=16)


@every_backend
@pytest.mark.parametrize("window", [None, 1, 70])
def test_a_linear_cache_with_slots_to_spare(name, window):
    agrees(name, (1, 63, 64, 65, 150), 160, {"window": window}, undone=5)


@every_backend
@pytest.mark.parametrize(("h", "kh", "tokens"), [(1, 1, 1), (4, 1, 7), (6, 2, 1), (3, 3, 5), (8, 1, 16)])
def test_query_heads_share_key_heads(name, h, kh, tokens):
    agrees(name, (7, 40), 41, h=h, kh=kh, tokens=tokens)


@every_backend
@pytest.mark.parametrize("tokens", [2, 5, 16])
def test_several_tokens_in_rows_shorter_than_that(name, tokens):
    """Queries at negative positions give zeros."""
    agrees(name, (0, 1, 4, 16, 17), 20, {"window": 4}, tokens=tokens)


@every_backend
@pytest.mark.parametrize(("c", "cv"), [(8, 8), (64, 64), (72, 72), (128, 40), (24, 136), (256, 256)])
def test_head_dims(name, c, cv):
    agrees(name, (70,), 70, h=4, kh=2, c=c, cv=cv, tokens=2)


@every_backend
@pytest.mark.parametrize(
    "options", [{"softcap": 1.5}, {"scale": -0.7, "softcap": 20.0}, {"scale": 0.0}, {"scale": 30.0}]
)
def test_scale_and_softcap(name, options):
    agrees(name, (5, 33), 40, options, tokens=2)


@every_backend
def test_tokens_at_once_and_one_by_one(name):
    q, _, _, k, v, length = (t.to(device(name)) for t in history((9, 100, 30), 100, tokens=5, h=4, kh=2))
    together = attend(name, q, k, v, length)
    for i in range(5):
        alone = attend(name, q[:, i : i + 1], k, v, length - 4 + i)
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-5, atol=1e-6)


def strided(t):
    """In a larger tensor, whose rest is NaN."""
    big = torch.full([n + 3 for n in t.shape[:-1]] + [t.shape[-1] + 8], torch.nan).to(t)
    view = big[1:-2, 2:-1, 1:-2, : t.shape[-1]]
    return view.copy_(t)


@every_backend
def test_a_row_has_the_same_bits_anywhere(name):
    """Whatever its neighbours, and however the cache lies in memory."""
    q, _, _, k, v, length = (t.to(device(name)) for t in history((300, 3, 170), 320, h=4, kh=2, c=64))
    together = attend(name, q, k, v, length)
    assert torch.equal(attend(name, strided(q), strided(k), strided(v), length), together)
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (k, v)]
    assert torch.equal(attend(name, q, *columns, length), together)
    for b in range(3) if name != "reference" else ():
        rows = slice(b, b + 1)
        assert torch.equal(attend(name, q[rows], k[rows], v[rows], length[rows]), together[rows])


def int8_case(name, dtype=torch.float32, lengths=(40, 90), tokens=2, **shape):
    q, past_k, past_v, k, v, length = history(lengths, 64, tokens=tokens, h=4, kh=2, dtype=dtype, **shape)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    (k8, ks), (v8, vs) = quantised(k), quantised(v)
    return q, past_k, past_v, k, v, length, (k8, v8), {"k_scale": ks, "v_scale": vs}


@every_backend
@pytest.mark.parametrize(("c", "cv"), [(64, 64), (256, 72)])
def test_int8_is_attention_over_what_the_codes_say(name, c, cv):
    """And a head whose scale is 0 is a head of zeros."""
    for dtype in dtypes(name) if name != "reference" else (torch.float32,):
        q, _, _, _, _, length, codes, scales = int8_case(name, dtype, (40, 64), c=c, cv=cv)
        scales["v_scale"][0, 3] = scales["k_scale"][0, 5] = 0
        on = device(name)
        args = [t.to(on) for t in (q, *codes, length)]
        ours = attend(name, *args, **{n: s.to(on) for n, s in scales.items()}).cpu()
        low = attend("reference", q, *codes, length, **scales)
        wide = [t.double() * s.double()[..., None] for t, s in zip(codes, scales.values(), strict=True)]
        assert_as_good(ours, low, brute_force(q, *wide, length))


@every_backend
def test_error_of_int8_is_bounded(name):
    """A code is off by half a scale, so a score by d = scale sum |q| k_scale / 2 at most and a weight by e^2d."""
    q, past_k, past_v, _, _, length, codes, scales = int8_case(name, c=64)
    on = device(name)
    args = [t.to(on) for t in (q, *codes, length)]
    got = attend(name, *args, window=40, **{n: s.to(on) for n, s in scales.items()}).cpu().double()
    exact = brute_force(q, past_k, past_v, length, window=40)
    d = q.double().abs().sum(-1).max() * 64**-0.5 * scales["k_scale"].max() / 2
    bound = scales["v_scale"].max() / 2 + math.expm1(2 * d) * past_v.abs().max()
    error = (got - exact).abs().max()
    assert 1e-4 < error <= bound
    assert error < 0.02  # of values around 1: what to expect of random keys


@every_backend
def test_unused_codes_do_not_matter(name):
    q, _, _, _, _, length, codes, scales = int8_case(name, lengths=(3, 50))
    on = device(name)
    args, scales = [t.to(on) for t in (q, *codes, length)], {n: s.to(on) for n, s in scales.items()}
    out = attend(name, *args, **scales)
    for s in scales.values():
        s[0, 3:], s[1, 50:] = torch.nan, torch.nan
    assert torch.equal(attend(name, *args, **scales), out)


@every_backend
def test_large_scores_stay_finite(name):
    q, _, _, k, v, length = (t.to(device(name)) for t in history((50, 64), 64))
    assert attend(name, 1e4 * q, 1e4 * k, v, length, scale=1.0).isfinite().all()


@every_backend
def test_nothing_to_see(name):
    q, _, _, k, v, _ = (t.to(device(name)) for t in history((5, 5), 8, tokens=3))
    out = attend(name, q, k, v, torch.zeros(2, dtype=torch.int32, device=device(name)))
    assert out.shape == q.shape and not out.any()


def test_autocast_leaves_the_cache_alone():
    q, _, _, k, v, length = history((5, 9), 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_attention(q, k, v, length).dtype == torch.float32
        assert decode_attention(q, k.bfloat16(), v.bfloat16(), length).dtype == torch.bfloat16
        (k8, ks), (v8, vs) = quantised(k.nan_to_num()), quantised(v.nan_to_num())
        assert decode_attention(q, k8, v8, length, k_scale=ks, v_scale=vs).dtype == torch.bfloat16


INT8 = {"k": torch.zeros(2, 9, 1, 16, dtype=torch.int8), "v": torch.zeros(2, 9, 1, 16, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 1, 2, 12)}, ValueError, r"q must have a head dim .* multiple of 8 up to 256, got 12"),
        ({"v": torch.zeros(2, 9, 1, 264)}, ValueError, r"v must have a head dim .* up to 256, got 264"),
        ({"q": torch.zeros(2, 2, 16)}, ValueError, r"q must have shape \[B, L, H, C\], got \[2, 2, 16\]"),
        ({"q": torch.zeros(2, 17, 2, 16)}, ValueError, r"q must have 1 to 16 tokens a row, got 17"),
        ({"q": torch.zeros(2, 0, 2, 16)}, ValueError, r"q must have 1 to 16 tokens a row, got 0"),
        ({"k": torch.zeros(2, 9, 1, 24)}, ValueError, r"k must have shape \[2, S, K, 16\], got"),
        ({"k": torch.zeros(3, 9, 1, 16)}, ValueError, r"k must have shape \[2, S, K, 16\], got"),
        ({"k": torch.zeros(2, 0, 1, 16)}, ValueError, r"k must have at least one slot"),
        ({"k": torch.zeros(2, 9, 3, 16)}, ValueError, r"a multiple of k's 3 heads, got 2"),
        ({"v": torch.zeros(2, 8, 1, 16)}, ValueError, r"v must have shape \[2, 9, 1, 16\], got"),
        (
            {"k": torch.zeros(2, 9, 1, 16).half()},
            TypeError,
            r"k must have the dtype of q, .* or be int8, got .*float16",
        ),
        ({"k": INT8["k"]}, TypeError, r"v must have the dtype of k, torch.int8"),
        (INT8, ValueError, r"k_scale must be given when k is int8"),
        ({"k_scale": torch.zeros(2, 9, 1)}, ValueError, r"k_scale must be None when k is torch.float32"),
        ({**INT8, "k_scale": torch.zeros(2, 9, 1).half()}, TypeError, r"k_scale must be float32, got"),
        ({**INT8, "k_scale": torch.zeros(2, 9)}, ValueError, r"k_scale must have shape \[2, 9, 1\]"),
        ({"length": torch.zeros(2)}, TypeError, r"length must be int32, got torch.float32"),
        ({"length": torch.zeros(3, dtype=torch.int32)}, ValueError, r"length must have shape \[2\]"),
        ({"length": torch.tensor([3, -1], dtype=torch.int32)}, ValueError, r"length must not be negative, got -1"),
        ({"length": torch.tensor([3, 10], dtype=torch.int32)}, ValueError, r"at most the 9 slots .* got 10"),
        ({"length": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, r"length .*meta"),
        ({"length": 3}, TypeError, r"length must be a tensor, got int"),
        ({"window": 0}, ValueError, r"window must be at least 1, got 0"),
        ({"window": 2.0}, TypeError, r"window must be an int or None, got float"),
        ({"scale": float("nan")}, ValueError, r"scale"),
        ({"softcap": 0.0}, ValueError, r"softcap"),
        ({"v": torch.zeros(2, 9, 1, 16).requires_grad_()}, ValueError, r"v must not require a gradient"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {
        "q": torch.zeros(2, 1, 2, 16),
        "k": torch.zeros(2, 9, 1, 16),
        "v": torch.zeros(2, 9, 1, 16),
        "length": torch.tensor([3, 9], dtype=torch.int32),
    }
    with pytest.raises(error, match=words):
        decode_attention(**{**arguments, **change})


def test_how_many_slots_a_window_needs():
    q, _, _, k, v, length = history((9, 10), 9, tokens=2)
    decode_attention(q, k.nan_to_num(), v.nan_to_num(), length, window=8)
    with pytest.raises(
        ValueError, match=r"at most the 9 slots where window \+ L - 1 = 10 positions are needed, got 10"
    ):
        decode_attention(q, k, v, length, window=9)
