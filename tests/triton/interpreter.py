"""What is particular to the Triton kernels, run by test_interpreter.py in a process with TRITON_INTERPRET=1.

float32 and float16 only: in the interpreter tl.dot of bfloat16 returns garbage (triton #11584) and a cast to bfloat16
truncates. bfloat16 is compiled in test_aot.py and tested on GPUs by the contract tests.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlkern import _triton
from vlkern._native import TRITON_INTERPRETS
from vlkern._op import REGISTRY
from vlkern.kernels.decode_attention import triton as decoding
from vlkern.kernels.interval_attention import samples as attention_samples
from vlkern.kernels.interval_attention import triton as attention
from vlkern.kernels.interval_attention.triton_tiles import Tile
from vlkern.kernels.rms_norm import triton as rms_norm
from vlkern.kernels.sigmoid_loss import reference
from vlkern.kernels.sigmoid_loss import triton as sigmoid_loss
from vlkern.testing import assert_as_good, assert_same_direction, in_float64, poison

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])


class Counted:
    """A kernel that notes the grids it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    """Kernel name -> grids it was launched with. The kernels must be registered and will be interpreted."""
    assert TRITON_INTERPRETS
    kernels = {}
    rooms = [
        (rms_norm, ("_fwd", "_row_means", "_bwd")),
        (sigmoid_loss, ("_logits",)),
        (attention, ("_prepare", "_bwd_dq", "_bwd_dkdv")),
    ]
    for room, names in rooms:
        for name in names:
            kernels[name] = Counted(getattr(room, name))
            monkeypatch.setattr(room, name, kernels[name])
    for op in REGISTRY.values():
        assert op.missing["triton"] is None or "triton" not in op.backends
    return {name: counted.grids for name, counted in kernels.items()}


def run(op, raw, backend, *args):
    with poison():
        result = REGISTRY[op].raw[raw][backend](*args)
    return result if isinstance(result, tuple) else (result,)


def agrees(op, raw, args, magnitudes=None):
    """Triton against the reference, and against itself: the same bits the second time. Returns Triton's results."""
    ours, low = run(op, raw, "triton", *args), run(op, raw, "reference", *args)
    exact = run(op, raw, "reference", *in_float64(args))
    for one, two, three, magnitude in zip(ours, low, exact, magnitudes or [None] * len(ours), strict=True):
        # Gradients of float16 embeddings come from a float16 G; they are float32 for the range, not the precision.
        results = [t.half() if args[0].dtype == torch.float16 and t.dim() == 2 else t for t in (one, two)] + [three]
        assert_as_good(*results, magnitude=magnitude)
        assert_same_direction(*results)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(op, raw, "triton", *args), strict=True))
    return ours


def rms_norm_agrees(rows, n, dtype):
    g = torch.Generator().manual_seed(n)
    x, grad = torch.randn(2, rows, n, generator=g).to(dtype)
    weight = torch.randn(n, generator=g)
    _, rstd = agrees("rms_norm", "rms_norm", (x, weight, 1e-6, 1.0))
    agrees("rms_norm", "rms_norm_backward", (grad, x, weight, rstd, 1.0))


@DTYPES
@pytest.mark.parametrize("n", [rms_norm._WIDEST - 1, rms_norm._WIDEST + 1, 2 * rms_norm._WIDEST + 100])
def test_rms_norm_of_rows_around_the_widest_tile(launched, n, dtype):
    rms_norm_agrees(3, n, dtype)
    tiles = -(-n // rms_norm._WIDEST)
    assert launched["_fwd"] == [(3,)] * 2
    assert launched["_bwd"] == [(3, tiles)] * 2
    assert launched["_row_means"] == ([(3,)] * 2 if tiles > 1 else [])


@DTYPES
@pytest.mark.parametrize("rows", [63, 64, 65, 200])
def test_rms_norm_with_more_rows_than_programs(launched, monkeypatch, rows, dtype):
    """On a chip of two SMs a program of the backward takes several tiles of several rows, the last one in part."""
    monkeypatch.setattr(_triton, "STAND_IN", [replace(_triton.H200, sms=2)])
    rms_norm_agrees(rows, 40, dtype)
    c = rms_norm.pick((rows, 40), dtype, _triton.STAND_IN[0])
    assert c.rows > 1
    assert c.parts * c.rows < rows
    assert launched["_bwd"] == [(c.parts, 1)] * 2


def arguments(m, n, d, dtype, image_valid=None, text_valid=None, diagonal=True, scale=10.0, bias=-5.0):
    g = torch.Generator().manual_seed(m + n)
    image, text = (torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=-1) for k in (m, n))
    shared = min(m, n)
    text[:shared] = 0.7 * image[:shared] + 0.7 * text[:shared]
    scalars = (torch.tensor(v) for v in (scale, bias, 1 / m))
    return (image.to(dtype), text.to(dtype), *scalars, image_valid, text_valid, diagonal)


def magnitudes(args):
    """The gradients of scale and bias are sums whose terms cancel: the sums of |terms|."""
    _, _, scale, bias, weight, *_ = wide = in_float64(args)
    _, _, dots, z, mask = reference._terms(*wide[:4], *wide[5:])
    g = weight * mask * torch.sigmoid(-z * (scale * dots + bias))
    return None, None, None, (g * dots.abs()).sum(), g.sum()


def sigmoid_loss_agrees(*args):
    loss, *_ = agrees("sigmoid_loss", "sigmoid_loss_grad", args, magnitudes(args))
    assert torch.equal(loss, *run("sigmoid_loss", "sigmoid_loss", "triton", *args))


@pytest.mark.parametrize(
    ("dtype", "m", "n", "d"),
    [
        (torch.float16, 130, 300, 40),  # more texts than images
        (torch.float16, 300, 130, 40),  # images without a text of their own
        (torch.float16, 128, 256, 64),  # whole tiles, nothing masked
        (torch.float16, 129, 257, 65),  # one more of everything
        (torch.float16, 127, 255, 63),  # one less
        (torch.float32, 66, 150, 40),
        (torch.float32, 150, 66, 40),
        (torch.float32, 64, 64, 32),
        (torch.float32, 65, 65, 33),
        (torch.float32, 63, 63, 31),
    ],
)
def test_sigmoid_loss_of_any_block(launched, m, n, d, dtype):
    sigmoid_loss_agrees(*arguments(m, n, d, dtype))
    assert len(launched["_logits"]) == 3


@DTYPES
def test_sigmoid_loss_without_a_diagonal(launched, dtype):
    sigmoid_loss_agrees(*arguments(70, 140, 24, dtype, diagonal=False))
    assert len(launched["_logits"]) == 3


@pytest.mark.parametrize(
    ("sides", "dtype"),
    [("image", torch.float16), ("text", torch.float16), ("both", torch.float16), ("both", torch.float32)],
)
def test_sigmoid_loss_with_a_mask_on_either_side(launched, sides, dtype):
    image_valid = torch.arange(140) % 3 != 1 if sides != "text" else None
    text_valid = torch.arange(270) % 4 != 2 if sides != "image" else None
    sigmoid_loss_agrees(*arguments(140, 270, 24, dtype, image_valid, text_valid))
    assert launched["_logits"]


@pytest.mark.parametrize(
    ("m", "masked", "dtype"),
    [
        (128, False, torch.float16),
        (129, True, torch.float16),
        (260, False, torch.float16),
        (129, True, torch.float32),
    ],
)
def test_sigmoid_loss_around_the_edge_of_a_chunk(launched, monkeypatch, m, masked, dtype):
    pick = sigmoid_loss.pick
    valid = torch.arange(m) % 3 != 1 if masked else None
    args = arguments(m, 140, 24, dtype, image_valid=valid)
    whole, *_ = run("sigmoid_loss", "sigmoid_loss_grad", "triton", *args)
    monkeypatch.setattr(sigmoid_loss, "pick", lambda *shape: replace(pick(*shape), rows=128))
    launched["_logits"].clear()
    chunked, *_ = run("sigmoid_loss", "sigmoid_loss_grad", "triton", *args)
    assert len(launched["_logits"]) == -(-m // 128)
    assert torch.equal(chunked, whole)
    sigmoid_loss_agrees(*args)


@DTYPES
@pytest.mark.parametrize(("scale", "bias"), [(100.0, 7.5), (117.0, -16.0), (1.0, 80.0), (-10.0, 10.0)])
def test_sigmoid_loss_of_extreme_logits(launched, scale, bias, dtype):
    sigmoid_loss_agrees(*arguments(70, 70, 24, dtype, scale=scale, bias=bias))
    assert launched["_logits"]


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest floating-point tensor that any op returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def test_sigmoid_loss_holds_no_square(launched, monkeypatch):
    b, pick = 300, sigmoid_loss.pick
    monkeypatch.setattr(sigmoid_loss, "pick", lambda *shape: replace(pick(*shape), rows=128))
    args = arguments(b, b, 16, torch.float16)
    with Largest() as seen:
        sigmoid_loss.sigmoid_loss_grad(*args)
    assert len(launched["_logits"]) > 1
    assert seen.numel < 0.8 * b * b
    with Largest() as seen:
        sigmoid_loss.sigmoid_loss(*args)
    assert seen.numel < 4 * b * 16


def attention_bounds(kind, n):
    """A window; the same with two queries that see everything; blocks without any key; intervals in no order."""
    i = torch.arange(n, dtype=torch.int32)
    start, stop = (i - 20).clamp(min=0), i + 1
    if kind == "global":
        start[[0, n // 2]], stop[[0, n // 2]] = 0, n
    elif kind == "holes":
        stop[40:110] = start[40:110]
    elif kind == "shuffled":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        start, stop = start[order], stop[order]
    return start, stop


@pytest.mark.parametrize("kind", ["window", "global", "holes", "shuffled"])
def test_attention_finds_the_queries_of_a_key(launched, monkeypatch, kind):
    """With tiles so small that a key tile's queries lie in several chunks of blocks."""
    pick, small = attention.pick, Tile(16, 16, 4, 1)
    monkeypatch.setattr(attention, "pick", lambda *call: replace(pick(*call), dq=small, dkdv=small))
    monkeypatch.setattr(attention, "_SCAN", 4)
    monkeypatch.setattr(attention, "_CHUNK", 2)
    n, g = 130, torch.Generator().manual_seed(1)
    q, k, v, grad = torch.randn(4, n, 1, 16, generator=g)
    start, stop = attention_bounds(kind, n)
    out, lse = run("interval_attention", "interval_attention", "reference", q, k, v, start, stop, 0.25, None)
    args = (grad, torch.randn(n, 1, generator=g), q, k, v, out, lse, start, stop, 0.25, None)
    agrees(
        "interval_attention",
        "interval_attention_backward",
        args,
        attention_samples.magnitudes(grad, *args[2:5], start, stop),
    )
    assert launched["_bwd_dq"] == launched["_bwd_dkdv"] == [(9, 1)] * 2


def test_attention_holds_no_square(launched):
    n, g = 600, torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, n, 1, 8, generator=g).half()
    bounds = attention_bounds("window", n)
    with Largest() as seen:
        out, lse = attention.interval_attention(q, k, v, *bounds, 0.25, None)
        attention.interval_attention_backward(q, None, q, k, v, out, lse, *bounds, 0.25, None)
    assert launched["_bwd_dkdv"]
    assert seen.numel <= n * 8


@pytest.mark.parametrize("d", [8, 24, 64, 72, 80, 88, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("on", [_triton.A100, _triton.H200, _triton.B200, _triton.Chip(86, 82, 99 << 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_configurations_keep_their_bounds(d, on, dtype):
    one, two = attention.widths(d, dtype)
    assert d <= one + two <= max(16, 2 * d)
    assert {one & (one - 1), two & (two - 1)} == {0}
    if d in (72, 80):
        assert (one, two) == (64, 16)
    for dv in (8, d, 256):
        c = attention.pick((d, dv), dtype, on)
        both = sum(attention.widths(d, dtype)) + sum(attention.widths(dv, dtype))
        for tile, rows in ((c.forward, c.forward.bn), (c.dq, c.dq.bm + c.dq.bn), (c.dkdv, c.dkdv.bm + c.dkdv.bn)):
            assert rows * both * dtype.itemsize <= on.shared, (tile, d, dv)
            assert 1 <= tile.stages <= 3


@pytest.mark.parametrize("m", [1, 500, 2816, 8192, 32768, 100_000, 1 << 20])
@pytest.mark.parametrize("d", [1, 96, 768, 1152, 4096])
@pytest.mark.parametrize("on", [_triton.A100, _triton.H200, _triton.B200, _triton.Chip(86, 82, 99 << 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configurations_keep_their_bounds(m, d, on, dtype):
    c = sigmoid_loss.pick((m, m, d), dtype, on)
    assert c.rows % c.bm == 0
    assert c.rows <= max(4 * d, 1024) + c.bm
    assert c.stages * (c.bm + c.bn) * c.bk * dtype.itemsize <= on.shared
    r = rms_norm.pick((m, d), dtype, on)
    assert 1 <= r.parts <= 2 * on.sms
    assert r.rows * r.block <= rms_norm._WIDEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_decoding_adds_up_any_number_of_parts(launched, monkeypatch, dtype):
    """Parts without keys, rows without keys, and more parts than one tile of the sum holds."""
    pick, counted = decoding.pick, Counted(decoding._add_up)
    monkeypatch.setattr(decoding, "pick", lambda *call: replace(pick(*call), bn=16, splits=21))
    monkeypatch.setattr(decoding, "_PARTS", 8)
    monkeypatch.setattr(decoding, "_add_up", counted)
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 2, 2, 16, generator=g).to(dtype)
    k, v = torch.randn(2, 2, 330, 1, 16, generator=g).to(dtype)
    length = torch.tensor([1, 330], dtype=torch.int32)
    agrees("decode_attention", "decode_attention", (q, k, v, length, None, None, None, 0.25, None))
    assert counted.grids == [(8, 1)] * 2


@pytest.mark.parametrize("on", [_triton.A100, _triton.H200, _triton.B200, _triton.Chip(86, 82, 99 << 10)])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_decoding_configurations_keep_their_bounds(on, itemsize):
    rows, groups, spans = product((1, 4, 500), (1, 4, 16)), (1, 8, 128), (1, 512, 1 << 17)
    for (batch, heads), queries, span, width in product(rows, groups, spans, (8, 72, 256)):
        c = decoding.pick(batch, heads, queries, span, (width, width), itemsize, on)
        tiles = batch * heads * -(-queries // c.bm)
        assert c.splits >= 1 and tiles * c.splits <= max(tiles, 2 * on.sms)
        assert (c.splits - 1) * 4 * c.bn < span
        assert c.stages * 2 * c.bn * max(16, width) * itemsize <= on.shared and 16 <= c.bm <= 64 and c.bn >= 16
