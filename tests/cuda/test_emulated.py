"""The CUDA kernels on an emulated GPU (emulator/): every index, mask, barrier and sum, without the hardware."""

import math

import pytest
import torch
from emulation import DTYPES, compare, misaligned, run

from vlkern._op import REGISTRY
from vlkern.kernels import coupling, decode_attention, fsq, rms_norm, sigmoid_loss
from vlkern.kernels.mixture_cdf import samples as mixture_samples
from vlkern.testing import in_float64

#: Where only the cut of the memory is looked at: both 16-bit types have the same.
WIDTHS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


def rms_norm_agrees(x, weight, offset):
    g = torch.Generator().manual_seed(7)
    _, rstd = compare("rms_norm", "rms_norm", (x, weight, 1e-6, offset))
    grad = torch.randn(x.shape, generator=g).to(x.dtype)
    compare("rms_norm", "rms_norm_backward", (grad, x, weight, rstd, offset), gradients=True)


@DTYPES
@pytest.mark.parametrize("sample", [s for s in rms_norm.samples.SAMPLES if not s.bench], ids=lambda s: s.name)
def test_rms_norm_on_its_samples(emulated, sample, dtype):
    (x, weight), kwargs = rms_norm.samples.inputs(sample, dtype, "cpu")
    rms_norm_agrees(x, weight.float(), kwargs["offset"])


@WIDTHS
@pytest.mark.parametrize(
    ("rows", "n"),
    [
        (9, 8),  # one vector a row
        (70, 512),  # two vectors a lane
        (67, 640),  # a warp a row; the three multiprocessors' blocks take several rounds
        (50, 1152),  # two warps a row
        (9, 4096),  # the block holds two rows
        (5, 4104),  # the block holds one row
        (300, 1153),  # odd: no vectors, two slabs of rows
    ],
)
def test_rms_norm_at_every_block_shape(emulated, rows, n, dtype):
    g = torch.Generator().manual_seed(n)
    rms_norm_agrees(torch.randn(rows, n, generator=g).to(dtype), torch.randn(n, generator=g), 1.0)


@pytest.mark.parametrize(
    ("dtype", "n"),
    [
        (torch.bfloat16, 16384),  # longest row that the backward holds in registers, in two bytes
        (torch.float16, 16392),  # one vector more
        (torch.float32, 16384),  # longest row that the forward holds, in four bytes
        (torch.float32, 16388),  # one vector more
    ],
    ids=str,
)
def test_rms_norm_of_long_rows(emulated, dtype, n):
    test_rms_norm_at_every_block_shape(emulated, 2, n, dtype)


@DTYPES
@pytest.mark.parametrize("which", ["x", "weight"])
def test_rms_norm_of_misaligned_memory(emulated, which, dtype):
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 64, generator=g).to(dtype), torch.randn(64, generator=g)
    x, weight = (misaligned(x), weight) if which == "x" else (x, misaligned(weight))
    rms_norm_agrees(x, weight, 0.0)


@DTYPES
@pytest.mark.parametrize("n", [32, 33])
def test_rms_norm_is_finite_for_finite_rows(emulated, n, dtype):
    limits = torch.finfo(dtype)
    x = torch.tensor([0.0, limits.tiny, 1e4, limits.max])[:, None].expand(4, n).to(dtype).contiguous()
    weight = torch.linspace(-2, 2, n)
    y, rstd = run("rms_norm", "rms_norm", "cuda", x, weight, 1e-6, 0.0)
    gradients = run("rms_norm", "rms_norm_backward", "cuda", torch.ones_like(x), x, weight, rstd, 0.0)
    assert all(t.isfinite().all() for t in (y, rstd, *gradients))


def sigmoid_arguments(m, n, d, dtype, scale=10.0, bias=-10.0, valid=None, diagonal=True):
    g = torch.Generator().manual_seed(m + n)
    image = torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=-1)
    text = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=-1)
    shared = min(m, n)
    text[:shared] = 0.7 * image[:shared] + 0.7 * text[:shared]
    masks = (None, None) if valid is None else (torch.arange(m) % valid != 1, torch.arange(n) % valid != 2)
    scalars = (torch.tensor(v) for v in (scale, bias, 1 / m))
    return image.to(dtype), text.to(dtype), *scalars, *masks, diagonal


def sigmoid_magnitudes(args):
    """The gradients of scale and bias are sums whose terms cancel: the sums of |terms|."""
    _, _, scale, bias, weight, *_ = wide = in_float64(args)
    _, _, dots, z, mask = sigmoid_loss.reference._terms(*wide[:4], *wide[5:])
    g = weight * mask * torch.sigmoid(-z * (scale * dots + bias))
    return None, None, None, (g * dots.abs()).sum(), g.sum()


def sigmoid_gradients_agree(args):
    return compare("sigmoid_loss", "sigmoid_loss_grad", args, gradients=True, magnitudes=sigmoid_magnitudes(args))


def sigmoid_agrees(args):
    (loss,) = compare("sigmoid_loss", "sigmoid_loss", args)
    assert torch.equal(loss, sigmoid_gradients_agree(args)[0])


@DTYPES
@pytest.mark.parametrize("sample", [s for s in sigmoid_loss.samples.SAMPLES if s.b < 1000], ids=lambda s: s.name)
def test_sigmoid_loss_on_its_samples(emulated, sample, dtype):
    args, kwargs = sigmoid_loss.samples.inputs(sample, dtype, "cpu")
    bound = REGISTRY["sigmoid_loss"].bind(*args, **kwargs)
    image, text, scale, bias, count, *rest = bound
    sigmoid_agrees((image, text, scale, bias, 1 / count, *rest))


@DTYPES
@pytest.mark.parametrize(
    ("m", "n", "options"),
    [
        (7, 130, {}),  # more texts than images
        (130, 7, {}),
        (17, 2049, {"valid": 3}),  # two blocks of columns, the second with one; two of rows
        (40, 40, {"diagonal": False, "valid": 5}),  # a shard of negatives
        (9, 9, {"scale": 1e4, "bias": 10.0}),
        (33, 24, {"scale": 100.0, "bias": -100.0}),
    ],
)
def test_sigmoid_loss_blocks(emulated, m, n, options, dtype):
    sigmoid_agrees(sigmoid_arguments(m, n, 24, dtype, **options))


@pytest.mark.parametrize(("m", "n"), [(2177, 3), (3, 2177), (1168, 2177)])
def test_sigmoid_loss_over_several_tiles(emulated, m, n):
    """2177 make two tiles, of 1152 and the rest. The diagonal crosses the border, masks and sums go on."""
    args = sigmoid_arguments(m, n, 2, torch.float32, scale=3.0, bias=-1.0, valid=7)
    sigmoid_gradients_agree(args)


def test_a_masked_pair_may_hold_anything(emulated):
    image, text, *rest = sigmoid_arguments(20, 20, 8, torch.float32, valid=4)
    expected = run("sigmoid_loss", "sigmoid_loss_grad", "cuda", image, text, *rest)
    image[1], text[2] = float("inf"), float("nan")
    ours = run("sigmoid_loss", "sigmoid_loss_grad", "cuda", image, text, *rest)
    for scalar in (0, 3, 4):
        assert torch.equal(ours[scalar], expected[scalar])


def test_fp16_gradients_of_confident_negatives_do_not_underflow(emulated):
    """sigmoid(-18) = 1.5e-8 is less than half of fp16's smallest number; G is stored times 2^15."""
    image, text, _, _, weight, *_ = sigmoid_arguments(16, 16, 8, torch.float16)
    args = image, text, torch.tensor(1.0), torch.tensor(-18.0), weight, None, None, False
    ours, exact = (
        run("sigmoid_loss", "sigmoid_loss_grad", b, *a) for b, a in (("cuda", args), ("reference", in_float64(args)))
    )
    for gradient, expected in zip(ours[1:3], exact[1:3], strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).abs().max() <= 2**-10 * expected.abs().max()


def test_kernels_check_what_python_has_checked(emulated):
    """Second line of defence, before any memory is touched."""
    forward = REGISTRY["rms_norm"].raw["rms_norm"]["cuda"]
    with pytest.raises(RuntimeError, match="weight must be float32"):
        forward(torch.ones(2, 8), torch.ones(7), 1e-6, 0.0)
    loss = REGISTRY["sigmoid_loss"].raw["sigmoid_loss"]["cuda"]
    image, text, scale, *rest = sigmoid_arguments(4, 4, 8, torch.float32)
    with pytest.raises(RuntimeError, match="one dtype"):
        loss(image, text.half(), scale, *rest)
    with pytest.raises(RuntimeError, match="float32 scalars"):
        loss(image, text, scale.double(), *rest)
    with pytest.raises(RuntimeError, match="must not be empty"):
        loss(image[:0], text, scale, *rest)
    couple = REGISTRY["coupling"].raw["affine_coupling"]["cuda"]
    x, half = torch.ones(2, 4, 8), torch.arange(4)
    with pytest.raises(RuntimeError, match="raw_scale must have the shape"):
        couple(x, x[..., :4], x[..., :4], None, None, 2.0)
    with pytest.raises(RuntimeError, match="channels must be int32"):
        couple(x, x[..., :4], x[..., :4], None, half, 2.0)


def fsq_agrees(z, levels, symmetric=False):
    """The very numbers of the reference, and a gradient as good."""
    thresholds, slopes = (fsq.constant(what, levels, symmetric, torch.float32, z) for what in ("thresholds", "slopes"))
    codes, index = run("fsq", "fsq_quantize", "cuda", z, thresholds, levels, symmetric)
    same, same_index = run("fsq", "fsq_quantize", "reference", z, thresholds, levels, symmetric)
    assert torch.equal(index, same_index) and torch.equal(codes.nan_to_num(7), same.nan_to_num(7))
    table = fsq.constant("codes", levels, symmetric, z.dtype, z)
    (back,) = run("fsq", "fsq_dequantize", "cuda", table, index, levels)
    assert torch.equal(back[index >= 0], codes[index >= 0]) and back[index < 0].isnan().all()
    z = z.nan_to_num(0)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(7)).to(z.dtype)
    compare("fsq", "fsq_quantize_backward", (grad, z, slopes), gradients=True)


@DTYPES
@pytest.mark.parametrize(
    "levels", [(3,), (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 5, 5, 5), (5,) * 7], ids=len
)
@pytest.mark.parametrize("rows", [1, 7, 301])
def test_fsq_in_vectors_and_rows_left_over(emulated, rows, levels, dtype):
    z = 1.5 * torch.randn(rows, len(levels), generator=torch.Generator().manual_seed(rows))
    z[rows // 2, 0] = float("nan") if rows > 1 else float("inf")
    fsq_agrees(z.to(dtype), levels, symmetric=rows == 7)


@pytest.mark.parametrize("levels", [(1000, 2, 63, 70), (16,) * 15, (2,) * 62], ids=len)
def test_fsq_of_many_levels_and_channels(emulated, levels):
    fsq_agrees(1.5 * torch.randn(50, len(levels), generator=torch.Generator().manual_seed(8)), levels)


@DTYPES
def test_fsq_of_misaligned_memory(emulated, dtype):
    fsq_agrees(misaligned(torch.randn(40, 4, generator=torch.Generator().manual_seed(9)).to(dtype)), (8, 5, 5, 5))


@pytest.mark.parametrize("size", [1, 16, 40])
def test_rows_and_windows_of_mixtures_are_the_very_ones(emulated, size):
    for shape in ((3, 1), (5, 2, 9)):
        mixtures = mixture_samples.draw(shape, seed=size)
        low, half = run("mixture_cdf", "mixture_window", "cuda", *mixtures)
        same = run("mixture_cdf", "mixture_window", "reference", *mixtures)
        assert torch.equal(low, same[0]) and torch.equal(half, same[1])
        rows, wanted = (run("mixture_cdf", "mixture_cdf", b, *mixtures, low, size) for b in ("cuda", "reference"))
        assert torch.equal(rows[0], wanted[0])


def coupling_agrees(sample, dtype, change=lambda t: t, max_scale=1.5):
    """Both ways and the gradients; `change` moves the tensors in memory."""
    (x, shift, raw), options = coupling.samples.inputs(sample, dtype, "cpu")
    x = change(x)
    if not sample.strided:
        shift, raw = change(shift), change(raw)
    lists = options.get("tokens"), options.get("channels")
    args = x, shift, raw, *lists, max_scale
    magnitudes = [None, (torch.nn.functional.logsigmoid(raw.double()).abs() + 1).flatten(1).sum(1)]
    _, logdet = compare("coupling", "affine_coupling", args, magnitudes=magnitudes)
    y, _ = run("coupling", "affine_coupling", "reference", *args)
    compare("coupling", "affine_coupling_inverse", (change(y), *args[1:]), magnitudes=magnitudes)
    y2 = change(coupling.reference.part(y, *lists).contiguous())
    g = torch.Generator().manual_seed(7)
    grads = change(torch.randn(x.shape, generator=g).to(dtype)), torch.randn(x.shape[0], generator=g)
    of_raw = coupling.samples.magnitudes(*grads, x, shift, raw, **options)[2]
    if lists == (None, None):
        compare("coupling", "affine_coupling_backward", (*grads, y2, raw, max_scale), True, (None, of_raw))
        return
    of_part = compare("coupling", "affine_coupling_part", args, magnitudes=[*magnitudes, None])
    assert torch.equal(of_part[1], logdet) and torch.equal(of_part[2], coupling.reference.part(of_part[0], *lists))
    args = *grads, y2, raw, *lists, max_scale
    compare("coupling", "affine_coupling_part_backward", args, True, (None, None, of_raw))


@DTYPES
@pytest.mark.parametrize("sample", [s for s in coupling.samples.SAMPLES if not s.bench], ids=lambda s: s.name)
def test_coupling_on_its_samples(emulated, sample, dtype):
    coupling_agrees(sample, dtype)


COUPLINGS = [
    coupling.samples.Sample("all_of_it", (2, 60, 96)),
    coupling.samples.Sample("halves", (2, 9, 16), strided=True),
    coupling.samples.Sample("some_tokens", (2, 90, 48), tokens=True, strided=True),
    coupling.samples.Sample("some_channels", (2, 150, 48), channels=True, strided=True),
    coupling.samples.Sample("of_some_tokens", (2, 150, 48), tokens=True, channels=True),
    coupling.samples.Sample("rows_larger_than_a_tile", (1, 2, 4128), channels=True),
]


@WIDTHS
@pytest.mark.parametrize("sample", COUPLINGS, ids=lambda s: s.name)
def test_coupling_in_vectors(emulated, sample, dtype):
    coupling_agrees(sample, dtype)


@DTYPES
@pytest.mark.parametrize("channels", [False, True])
def test_coupling_of_misaligned_memory(emulated, channels, dtype):
    coupling_agrees(coupling.samples.Sample("misaligned", (2, 5, 32), channels=channels), dtype, misaligned)


@DTYPES
def test_coupling_is_finite_for_extreme_scales(emulated, dtype):
    raw = torch.tensor([0.0, 80, -80, 88, -88, 103, -103, -1e4]).to(dtype).expand(2, 3, 8).contiguous()
    x, shift = torch.full_like(raw, 3.0), torch.full_like(raw, -1.0)
    y, logdet = run("coupling", "affine_coupling", "cuda", x, shift, raw, None, None, 2.0)
    grads = run("coupling", "affine_coupling_backward", "cuda", x, logdet, y, raw, 2.0)
    assert all(t.isfinite().all() for t in (y, logdet, *grads))
    exact = (torch.nn.functional.logsigmoid(raw.double()) + math.log(2.0)).sum((1, 2))
    torch.testing.assert_close(logdet.double(), exact, rtol=1e-6, atol=0)


def decode_agrees(sample, dtype, seed=0, change=lambda args: args):
    args, kwargs = decode_attention.samples.inputs(sample, dtype, "cpu", seed)
    bound = REGISTRY["decode_attention"].bind(*args, **kwargs)
    return compare("decode_attention", "decode_attention", change(bound))


@DTYPES
@pytest.mark.parametrize("sample", [s for s in decode_attention.samples.SAMPLES if not s.bench], ids=lambda s: s.name)
def test_decode_attention_on_its_samples(emulated, sample, dtype):
    decode_agrees(sample, dtype)


CACHES = [
    # Six blocks at once: parts of 64, 128, ... keys, the last of one key or of all; none for a row, or for all but one.
    decode_attention.samples.Sample("one_key_in_the_second_part", (65,), 400, h=1, c=8),
    decode_attention.samples.Sample("whole_parts", (384,), 384, h=1, c=8),
    decode_attention.samples.Sample("ragged_parts", (385, 0), 640, h=1, c=8, tokens=2),
    decode_attention.samples.Sample("ring_in_parts", (1000,), 200, h=2, c=16, window=190, tokens=3),
    # More stages than fit, more queries than a warp has, than a block has.
    decode_attention.samples.Sample("ring_of_stages", (300,), 300, h=2, c=16, tokens=8),
    decode_attention.samples.Sample("wide", (90,), 96, h=1, c=256),
    decode_attention.samples.Sample("two_blocks", (50, 20), 52, h=6, kh=2, c=32, tokens=12, window=30),
    # int8: rows that eight bytes divide, parts, every limit.
    decode_attention.samples.Sample("int8_odd", (40, 9), 48, h=4, kh=2, c=24, cv=8, int8=True, softcap=3.0),
    decode_attention.samples.Sample("int8_parts", (500,), 150, h=2, c=16, cv=136, int8=True, window=140),
]


@WIDTHS
@pytest.mark.parametrize("sample", CACHES, ids=lambda s: s.name)
def test_decode_attention_of_every_cut(emulated, sample, dtype):
    decode_agrees(sample, dtype)


@pytest.mark.parametrize("seed", range(6))
def test_decode_attention_of_random_shapes(emulated, seed):
    g = torch.Generator().manual_seed(seed)

    def pick(*of):
        return of[int(torch.randint(len(of), (), generator=g))]

    slots, tokens, kh, int8 = pick(9, 40, 130), pick(1, 1, 2, 5, 16), pick(1, 2, 3), pick(False, True)
    window = pick(None, None, 1, slots // 2)
    longest = slots if window is None or window + tokens - 1 > slots else 3 * slots
    lengths = tuple(int(torch.randint(longest + 1, (), generator=g)) for _ in range(pick(1, 2, 4)))
    shape = {"h": kh * pick(1, 2, 4), "kh": kh, "c": pick(8, 24, 64, 72), "cv": pick(8, 40, 64, 136)}
    sample = decode_attention.samples.Sample(
        "random", lengths, slots, tokens, window=window, softcap=pick(None, 2.0), int8=int8, **shape
    )
    decode_agrees(sample, pick(torch.float32, torch.bfloat16, torch.float16), seed)


def test_decode_attention_reads_what_it_sees_and_no_more(emulated):
    """NaN in slots that no query sees, and around rows that are not aligned."""
    sample = decode_attention.samples.Sample("unseen", (70, 3), 90, h=2, c=40, window=20, tokens=2)

    def change(args):
        q, k, v, length, *rest = args
        seen = decode_attention.reference.visible_slots(length, q.shape[1], k.shape[1], rest[2]).any(1)
        for t in (k, v):
            t[~seen] = math.nan
        return misaligned(q), misaligned(k), misaligned(v), length, *rest

    (out,) = decode_agrees(sample, torch.bfloat16, change=change)
    assert out.isfinite().all()


@DTYPES
def test_decode_attention_widens_every_code(emulated, dtype):
    """Of one key the output is the value. Two keys: the score of the larger one decides."""
    codes = torch.arange(-128, 128).to(torch.int8)
    q, length = torch.zeros(1, 1, 1, 256, dtype=dtype), torch.ones(1, dtype=torch.int32)
    k, scale = codes.view(1, 1, 1, 256), torch.full((1, 1, 1), 0.125)
    (out,) = run("decode_attention", "decode_attention", "cuda", q, k, k, length, scale, scale, None, 1.0, None)
    assert torch.equal(out.flatten().float(), codes.float() / 8)
    q[..., ::2] = 1
    for at in range(0, 256, 32):
        keys = torch.zeros(1, 2, 1, 256, dtype=torch.int8)
        keys[0, 1, 0, at + 2 * torch.arange(16)] = codes[at : at + 32 : 2]
        two = torch.full((1,), 2, dtype=torch.int32), torch.ones(1, 2, 1), torch.ones(1, 2, 1)
        values = torch.tensor([0, 1]).to(torch.int8).view(1, 2, 1, 1).expand(1, 2, 1, 8).contiguous()
        args = q, keys, values, *two, None, 0.001, None
        (out,) = run("decode_attention", "decode_attention", "cuda", *args)
        exact = torch.sigmoid(0.001 * codes[at : at + 32 : 2].double().sum())
        torch.testing.assert_close(out[0, 0, 0, 0].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
