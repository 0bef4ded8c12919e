"""fsq: the published numbers, every code once, boundaries, extreme values, bad input. The rest: test_contract.py."""

import json
import math

import numpy as np
import pytest
import torch
from rooms import KERNELS, ROOT, device, dtypes

import vlkern
from vlkern.bench import tokens
from vlkern.bench.rivals import Absent, _lucidrains_fsq
from vlkern.kernels.fsq.table import constant
from vlkern.ops import fsq_dequantize, fsq_quantize

GOLDEN = sorted((ROOT / "tests/golden").glob("fsq_*.npz"))
INF, NAN = float("inf"), float("nan")
every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
every_variant = pytest.mark.parametrize("variant", ["official", "symmetric"])


@every_backend
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_published_numbers(name, path):
    """Also 1e-2 and 1e-4 to both sides of every boundary."""
    golden = np.load(path)
    levels = json.loads(str(golden["config"]))["levels"]
    with vlkern.backend(name):
        for case, points in (("random", "in/z"), ("boundary", "in/z_boundary")):
            z = torch.tensor(golden[points], dtype=torch.float32, device=device(name))
            codes, indices = fsq_quantize(z, levels)
            np.testing.assert_array_equal(indices.cpu(), golden[f"out/{case}/indices"])
            np.testing.assert_allclose(codes.cpu(), golden[f"out/{case}/codes"], atol=1e-7)
        z = torch.tensor(golden["in/z"], dtype=torch.float32, device=device(name)).requires_grad_()
        fsq_quantize(z, levels)[0].backward(torch.tensor(golden["in/cotangent"]).to(z))
        np.testing.assert_allclose(z.grad.cpu(), golden["out/random/grad_z"], rtol=1e-5, atol=1e-6)
        every = torch.tensor(golden["in/indices"], dtype=torch.int64, device=device(name))
        np.testing.assert_allclose(fsq_dequantize(every, levels).cpu(), golden["out/codes_from_indices"], atol=1e-7)


def test_the_golden_cases_are_there():
    assert len(GOLDEN) == 7


@every_backend
@pytest.mark.parametrize(
    ("value", "index"), [(0.0, 500), (0.3, 749), (-0.7, 250), (1.1, 998), (INF, 999), (-INF, 0), (3e38, 999)]
)
def test_numbers_by_hand(name, value, index):
    with vlkern.backend(name):
        codes, indices = fsq_quantize(torch.full((2, 4), value, device=device(name)), [8, 5, 5, 5])
    assert indices.tolist() == [index, index] and codes.isfinite().all()


@every_backend
@every_variant
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (6, 7, 9)])
def test_every_code_comes_once_and_back(name, variant, levels):
    """Distinct codes, one for each index, which z = atanh of somewhere inside its cell gives again."""
    total = math.prod(levels)
    every = torch.arange(total, device=device(name))
    with vlkern.backend(name):
        for dtype in dtypes(name):
            codes = fsq_dequantize(every, levels, variant=variant, dtype=dtype)
            assert codes.dtype == dtype and len(codes.unique(dim=0)) == total
        z = points_inside(every, levels, variant)
        again, indices = fsq_quantize(z, levels, variant=variant)
        assert torch.equal(indices, every)
        assert torch.equal(again, fsq_dequantize(every, levels, variant=variant))


def points_inside(indices, levels, variant):
    """For each index a z that has it: half-way between two thresholds."""
    symmetric = variant == "symmetric"
    thresholds = constant("thresholds", levels, symmetric, torch.float32, indices).split([n - 1 for n in levels])
    z = []
    for level, t in zip(levels, thresholds, strict=True):
        cells = torch.cat([t[:1] - 1, (t[:-1] + t[1:]) / 2, t[-1:] + 1])
        z.append(cells[indices % level])
        indices = indices // level
    return torch.stack(z, -1)


@every_backend
@every_variant
def test_a_threshold_is_reached_from_itself_on(name, variant):
    """One float32 below, the digit is one less: the same on every backend, to the last bit."""
    levels = (1000,)
    indices = torch.arange(1, 1000, device=device(name))
    z = constant("thresholds", levels, variant == "symmetric", torch.float32, indices)[:, None]
    assert (z.diff(dim=0) > 0).all()
    with vlkern.backend(name):
        assert torch.equal(fsq_quantize(z, levels, variant=variant)[1], indices)
        below = torch.nextafter(z, torch.full_like(z, -INF))
        assert torch.equal(fsq_quantize(below, levels, variant=variant)[1], indices - 1)


def test_thresholds_are_where_the_bound_is_half_way():
    """In float64, one float32 to either side of every threshold."""
    levels = (2, 5, 8, 31, 1000)
    t = constant("thresholds", levels, False, torch.float32, torch.ones(1)).split([n - 1 for n in levels])
    for level, above in zip(levels, t, strict=True):
        half, offset = (level - 1) * 0.999 / 2, 0.0 if level % 2 else 0.5
        below = torch.nextafter(above, torch.tensor(-INF))
        for z, digit in ((above, range(1, level)), (below, range(level - 1))):
            bound = torch.tanh(z.double() + math.tan(offset / half)) * half - offset
            assert (bound.round() + level // 2).tolist() == list(digit)


@every_backend
def test_nan_is_no_index(name):
    z = torch.zeros(40, 4, device=device(name))
    z[3, 1], z[37] = NAN, NAN
    with vlkern.backend(name):
        codes, indices = fsq_quantize(z.requires_grad_(), [8, 5, 5, 5])
        back = fsq_dequantize(indices, [8, 5, 5, 5])
    assert (indices == -1).nonzero().flatten().tolist() == [3, 37]
    assert codes[3].isnan().tolist() == [False, True, False, False] and codes[37].isnan().all()
    assert back[[3, 37]].isnan().all() and int(back.isnan().sum()) == 8
    with vlkern.validate(True), pytest.raises(ValueError, match=r"z must not hold NaN, got one in the vector at \[3\]"):
        fsq_quantize(z, [8, 5, 5, 5])


@every_backend
def test_gradient_is_that_of_the_bound(name):
    """Also where tanh is nearly one, and 1 - tanh^2 computed so would be zero; at infinity it is zero."""
    z = torch.tensor([[-INF, INF], [-11.0, 12.0], [-50.0, 60.0], [0.1, 0.2]], device=device(name), requires_grad=True)
    with vlkern.backend(name):
        fsq_quantize(z, [8, 5])[0].sum().backward()
    shift, gain = math.tan(0.5 / 3.4965), torch.tensor([3.4965 / 4, 1.998 / 2], dtype=torch.float64)
    x = z.detach().cpu().double() + torch.tensor([shift, 0.0], dtype=torch.float64)
    torch.testing.assert_close(z.grad.cpu().double(), gain / torch.cosh(x.clamp(-300, 300)) ** 2, rtol=2e-6, atol=1e-37)


@every_backend
@every_variant
def test_narrow_inputs_are_computed_in_float32(name, variant):
    levels = (8, 8, 8, 6, 5)
    for dtype in dtypes(name):
        z = (1.5 * torch.randn(700, 5, generator=torch.Generator().manual_seed(2))).to(device(name), dtype)
        with vlkern.backend(name):
            codes, indices = fsq_quantize(z, levels, variant=variant)
            wide, same = fsq_quantize(z.float(), levels, variant=variant)
        assert codes.dtype == dtype and torch.equal(indices, same)
        assert torch.equal(codes, wide.to(dtype))


@every_backend
def test_indices_are_exact_up_to_two_to_the_62(name):
    levels = [2] * 62
    z = torch.randn(9, 62, device=device(name))
    with vlkern.backend(name):
        codes, indices = fsq_quantize(z, levels)
        assert indices.tolist() == [sum(int(code == 0) << c for c, code in enumerate(row)) for row in codes.tolist()]
        assert torch.equal(fsq_dequantize(indices, levels), codes)


def _peer():
    try:
        return _lucidrains_fsq()
    except Absent as reason:
        pytest.skip(str(reason))


def test_vector_quantize_pytorch_agrees_where_it_is_right():
    z = 1.5 * torch.randn(5000, 4, generator=torch.Generator().manual_seed(3))
    codes, indices = fsq_quantize(z, (8, 5, 5, 5), variant="symmetric")
    theirs, their_indices = _peer()(z, (8, 5, 5, 5), variant="symmetric")
    assert torch.equal(indices, their_indices.long())
    torch.testing.assert_close(codes, theirs)


def test_where_vector_quantize_pytorch_loses_digits():
    """Its indices are sums in floating point: of bfloat16 codes, or of more than 2^24 codes in float32."""
    _peer()
    from vlkern.bench.rivals import _alone

    peer = _alone("vector_quantize_pytorch", "finite_scalar_quantization.py")
    for levels, dtype in (((8, 5, 5, 5), torch.bfloat16), ((32,) * 5, torch.float32)):
        every = torch.randint(math.prod(levels), (4000,), generator=torch.Generator().manual_seed(4))
        codes = fsq_dequantize(every, levels, dtype=dtype)
        theirs = peer.FSQ(list(levels), return_indices=False).codes_to_indices(codes)
        assert (theirs != every).float().mean() > 0.2
        inside = points_inside(every, levels, "official")
        assert torch.equal(fsq_quantize(inside, levels)[1], every)


def test_eager_code_agrees():
    z = 1.5 * torch.randn(3000, 5, generator=torch.Generator().manual_seed(5))
    for variant in ("official", "symmetric"):
        ours, theirs = (f(z, (7, 5, 5, 5, 5), variant=variant) for f in (fsq_quantize, tokens.fsq))
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[0], theirs[0])


def test_constants_survive_inference_mode():
    """They are made once: by whoever comes first."""
    with torch.inference_mode():
        fsq_quantize(torch.randn(3, 2), [11, 13])
    z = torch.randn(3, 2, requires_grad=True)
    fsq_quantize(z, [11, 13])[0].sum().backward()
    assert z.grad.isfinite().all()


Z = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "z must be a tensor, got list", ([1.0], [3]), {}),
        (TypeError, "z must be float64.*got torch.int64", (Z.long(), [3, 3]), {}),
        (TypeError, "levels must be a sequence of ints, got int", (Z, 3), {}),
        (TypeError, r"levels must be a sequence of ints, got \[3, 3.0\]", (Z, [3, 3.0]), {}),
        (ValueError, r"levels must be between 2 and 1000, got \[3, 1\]", (Z, [3, 1]), {}),
        (ValueError, "levels must be between 2 and 1000", (Z, [3, 10**30]), {}),
        (ValueError, r"levels must name at least one channel, got \[\]", (Z, []), {}),
        (ValueError, r"z must have shape \[..., 3\].*got \[3, 2\]", (Z, [3, 3, 3]), {}),
        (ValueError, r"z must have shape \[..., 1\].*got \[\]", (Z[0, 0], [3]), {}),
        (ValueError, r"levels must have a product of at most 2\^62", (torch.zeros(63), [2] * 63), {}),
        (ValueError, "variant must be 'official' or 'symmetric', got 'round'", (Z, [3, 3]), {"variant": "round"}),
    ],
)
def test_bad_input(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        fsq_quantize(*args, **kwargs)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "indices must be a tensor, got int", (3, [3, 3]), {}),
        (TypeError, "indices must be int64 or int32, got torch.float32", (torch.zeros(3), [3, 3]), {}),
        (ValueError, r"indices must be in \[0, 9\), or -1 for NaN, got 9", (torch.tensor([0, 9]), [3, 3]), {}),
        (ValueError, r"indices must be in \[0, 9\), or -1 for NaN, got -2", (torch.tensor([-2, 8]), [3, 3]), {}),
        (TypeError, "dtype must be float64.*got torch.int8", (torch.tensor([0]), [3]), {"dtype": torch.int8}),
        (ValueError, "variant must be", (torch.tensor([0]), [3]), {"variant": None}),
    ],
)
def test_bad_indices(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        fsq_dequantize(*args, **kwargs)


@every_backend
def test_an_unseen_bad_index_gives_nan(name):
    """Kernels cannot raise; nothing is read outside of the table."""
    raw = vlkern._op.REGISTRY["fsq"].raw["fsq_dequantize"]
    indices = torch.tensor([0, 9, -2, 1 << 62, -(1 << 63)], device=device(name))
    codes = raw[name](constant("codes", (3, 3), False, torch.float32, indices), indices, [3, 3])
    assert codes.isnan().all(-1).tolist() == [False, True, True, True, True]
