"""Norm, rotation and the write into a cache: what is written where. What all rooms share is in test_contract.py."""

import math

import pytest
import torch
from rooms import KERNELS, device, dtypes

import vlkern
from vlkern.kernels.norm_rope.samples import angles
from vlkern.kernels.rope_append.reference import quantise
from vlkern.ops import norm_rope, rope_append

BACKENDS = ("reference", *(b for b in KERNELS if b != "cuda"))
every_backend = pytest.mark.parametrize("name", BACKENDS)
ROWS, POSITIONS = [2, 0, 0, 1, 2], [6, 3, 11, -1, 0]
SLOTS = 5


def call(name, dtype=torch.float32, stored=None, seed=0, values=None, positions=POSITIONS, **options):
    """Five tokens of three rows -> q', caches and scales before and after, and the arguments."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(5, heads, c, generator=g).to(device(name), dtype) for heads, c in ((4, 24), (2, 24), (2, 14))
    )
    if values is not None:
        k, v = k * 0 + values, v * 0 + values
    rows, places = (torch.tensor(t, dtype=torch.int32, device=device(name)) for t in (ROWS, positions))
    cos, sin = (t.to(device(name)) for t in angles(places.cpu(), 24, dtype))
    stored = stored or dtype
    caches = [(torch.randn(3, SLOTS, 2, c, generator=g) * 20).to(device(name), stored) for c in (24, 14)]
    if stored == torch.int8:
        for s in ("k_scale", "v_scale"):
            options[s] = torch.rand(3, SLOTS, 2, generator=g).to(device(name))
    written = [t for t in (*caches, options.get("k_scale"), options.get("v_scale")) if t is not None]
    before = [t.clone() for t in written]
    with vlkern.backend(f"rope_append={name},norm_rope=reference"):
        out = rope_append(q, k, v, cos, sin, rows, places, *caches, **options)
    return out, before, written, (q, k, v, cos, sin)


@every_backend
def test_tokens_go_where_they_belong_and_nothing_else_changes(name):
    for dtype in dtypes(name):
        weights = {w: torch.linspace(-1, 1, 24, device=device(name)) for w in ("q_weight", "k_weight")}
        out, before, written, (q, k, v, cos, sin) = call(name, dtype, **weights)
        with vlkern.backend("reference"):
            turned_q, turned_k = (norm_rope(x, cos, sin, weights["q_weight"]) for x in (q, k))
        torch.testing.assert_close(out[[0, 1, 2, 4]], turned_q[[0, 1, 2, 4]])
        assert not out[3].any()
        for cache, old, new in zip(written, before, (turned_k, v), strict=True):
            for t in (0, 1, 2, 4):
                old[ROWS[t], POSITIONS[t] % SLOTS] = cache[ROWS[t], POSITIONS[t] % SLOTS]
                torch.testing.assert_close(cache[ROWS[t], POSITIONS[t] % SLOTS], new[t])
            assert torch.equal(cache, old)
        torch.testing.assert_close(written[1][2, 1], v[0], rtol=0, atol=0)


@every_backend
def test_int8_is_the_reference_s_up_to_a_step(name):
    for dtype in dtypes(name):
        out, before, written, (_, k, v, cos, sin) = call(
            name, dtype, torch.int8, k_weight=torch.zeros(24, device=device(name))
        )
        assert out.dtype == dtype
        with vlkern.backend("reference"):
            exact = norm_rope(k.float(), cos, sin, torch.zeros(24, device=k.device)), v.float()
        for x, codes, scales, old, old_scales in zip(
            exact, written[:2], written[2:], before[:2], before[2:], strict=True
        ):
            expected, steps = quantise(x)
            for t in (0, 1, 2, 4):
                slot = ROWS[t], POSITIONS[t] % SLOTS
                torch.testing.assert_close(scales[slot], steps[t])
                assert (codes[slot].int() - expected[t].int()).abs().max() <= 1  # a tie may fall either way
                error = (codes[slot] * scales[slot][:, None] - x[t]).abs()
                assert (error <= steps[t][:, None] * 0.501).all()
                assert (codes[slot].abs().amax(-1) == 127).all()
                old[slot], old_scales[slot] = codes[slot], scales[slot]
            assert torch.equal(codes, old) and torch.equal(scales, old_scales)


@every_backend
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-33])
def test_int8_of_nothing_is_nothing(name, size):
    _, _, written, _ = call(name, stored=torch.int8, values=size, positions=[0, 1, 2, 3, 4])
    for t in (0, 1, 2, 3, 4):
        for cache in written:
            assert not cache[ROWS[t], t].any()


@every_backend
def test_int8_does_not_hide_nan(name):
    for value in (math.nan, math.inf):
        _, _, written, _ = call(name, stored=torch.int8, values=value)
        assert written[3][0, POSITIONS[1] % SLOTS].isfinite().sum() == 0


@every_backend
def test_large_numbers_fill_the_range(name):
    top = torch.finfo(torch.float16).max
    _, _, written, _ = call(name, torch.float16, torch.int8, values=top)
    assert (written[1][0, 3] == 127).all()
    torch.testing.assert_close(written[3][0, 3], torch.full((2,), top / 127, device=written[3].device))


Q, K, COS = torch.ones(2, 4, 8), torch.ones(2, 1, 8), torch.ones(2, 4)
AT = torch.zeros(2, dtype=torch.int32)
CACHE, CODES, SCALE = torch.zeros(3, 5, 1, 8), torch.zeros(3, 5, 1, 8, dtype=torch.int8), torch.zeros(3, 5, 1)
GOOD = {"q": Q, "k": K, "v": K, "cos": COS, "sin": COS, "rows": AT, "positions": AT}
GOOD |= {"k_cache": CACHE, "v_cache": CACHE.clone()}
CODED = {"k_cache": CODES, "v_cache": CODES, "k_scale": SCALE, "v_scale": SCALE}


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, r"k must have shape \[2, 1, 8\], got \[2, 1, 6\]", {"k": K[..., 2:]}),
        (ValueError, r"v must have shape \[2, 1, 8\], got \[1, 1, 8\]", {"v": K[:1]}),
        (TypeError, "k must have the dtype of q, torch.float32, got torch.float16", {"k": K.half()}),
        (TypeError, "cos must be torch.float32", {"cos": COS.half()}),
        (TypeError, "rows must be int32, got torch.int64", {"rows": AT.long()}),
        (ValueError, r"positions must have shape \[2\], got \[1\]", {"positions": AT[:1]}),
        (ValueError, "rows must be within 0 to 2, got 0 to 3", {"rows": torch.tensor([0, 3]).int()}),
        (ValueError, "rows must be within 0 to 2, got -1 to 0", {"rows": torch.tensor([0, -1]).int()}),
        (TypeError, "k_cache must have the dtype of k, torch.float32, or be int8", {"k_cache": CACHE.half()}),
        (ValueError, r"k_cache must have shape \[B, S, 1, 8\], S >= 1, got \[3, 0, 1, 8\]", {"k_cache": CACHE[:, :0]}),
        (ValueError, "k_cache must be contiguous", {"k_cache": CACHE.repeat(1, 2, 1, 1)[:, ::2]}),
        (ValueError, "v_cache must have the rows, slots, heads and dtype of k_cache", {"v_cache": CACHE[:2]}),
        (ValueError, "v_cache must have the rows, slots", {"v_cache": CODES, "v_scale": SCALE}),
        (ValueError, "k_scale must be None when k_cache is torch.float32", {"k_scale": SCALE}),
        (ValueError, "v_scale must be given when v_cache is int8", CODED | {"v_scale": None}),
        (TypeError, "k_scale must be torch.float32, got torch.float16", CODED | {"k_scale": SCALE.half()}),
        (ValueError, r"k_scale must have shape \[3, 5, 1\], got \[3, 5\]", CODED | {"k_scale": SCALE[..., 0]}),
        (ValueError, r"q_weight must have shape \[8\], got \[4\]", {"q_weight": torch.ones(4)}),
        (ValueError, "eps must be a positive finite number", {"eps": -1.0}),
    ],
)  # fmt: skip
def test_bad_input_and_nothing_is_written(error, message, wrong):
    arguments = GOOD | wrong
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(error, match=message):
        rope_append(**arguments)
    assert all(torch.equal(arguments[n], t) for n, t in before.items())


def test_the_kernel_checks_rows_before_it_writes():
    """What a call under torch.compile relies on, where values are not looked at."""
    raw = torch.ops.vlkern.rope_append.cpu
    caches = torch.zeros(2, 3, 5, 1, 8).unbind()
    with pytest.raises(RuntimeError, match="rows must be within 0 to 2, got 3"):
        raw(Q, K, K, COS, COS, torch.tensor([0, 3]).int(), AT, *caches, None, None, None, None, 1e-6, 1.0)
    assert not any(c.any() for c in caches)
