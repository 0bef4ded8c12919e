"""Mixtures in whole numbers: constants, the definition, the same integers everywhere, what rows cost. The rest is in
test_contract.py."""

import re
import subprocess

import pytest
import torch
from rooms import KERNELS, ROOT, device

import vlkern
from vlkern._native import TRITON_INTERPRETS
from vlkern.kernels.mixture_cdf.samples import draw
from vlkern.kernels.mixture_cdf.table import MOST_MEAN, constant
from vlkern.ops import mixture_cdf, mixture_window

every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
WORKED = [0, 882, 4109, 21824, 32082, 43415, 52323, 56911, 58997, 65536]


def numbers(name):
    return constant(name, torch.int64, torch.empty(0)).tolist()


def on(name, function, *args):
    moved = [a.to(device(name)) if isinstance(a, torch.Tensor) else a for a in args]
    with vlkern.backend(f"mixture_cdf={name}"):
        out = function(*moved)
    return out.cpu() if isinstance(out, torch.Tensor) else tuple(t.cpu() for t in out)


def extreme(shape, seed):
    """Means to the ends of their range, the widest and narrowest scales, all the weight on one or hardly any."""
    g = torch.Generator().manual_seed(seed)
    means, scales, weights = draw(shape, seed)
    kind = torch.randint(0, 4, shape, generator=g)
    far = torch.randint(-MOST_MEAN, MOST_MEAN + 1, shape, generator=g, dtype=torch.int32)
    means = torch.where(kind == 0, far, means)
    means = torch.where(kind == 1, MOST_MEAN * (2 * (far % 2) - 1), means).int()
    scales = torch.where(torch.rand(shape, generator=g) < 0.5, scales, 63 * (far % 2).byte())
    lone = torch.zeros_like(weights).scatter_(
        -2, torch.randint(0, shape[-2], weights[..., :1, :].shape, generator=g), 4096
    )
    return means, scales, torch.where(torch.rand(weights[..., :1, :].shape, generator=g) < 0.3, lone, weights)


def test_constants_are_those_of_the_header():
    """The header's are frozen text; the reference's come from series in whole numbers."""
    phi = (ROOT / "csrc/mixture_cdf_phi.inc").read_text().split("\n", 1)[1]
    assert [int(n) for n in re.findall(r"\d+", phi)] == numbers("phi")
    header = (ROOT / "csrc/mixture_cdf.h").read_text()
    sigma = re.search(r"kSigma\[kScales\] = \{([^}]*)\}", header)[1]
    assert [int(n) for n in re.findall(r"\d+", sigma)] == numbers("sigma")
    assert numbers("phi")[512] == 1 << 29 and numbers("phi")[512 + 64] == 903387042


def test_division_in_double_precision_is_exact(tmp_path):
    """Whether or not products and sums are rounded together: both happen."""
    program, source = tmp_path / "exact", ROOT / "tests/kernels/mixture_cdf_exact.cpp"
    for how in (["-ffp-contract=off"], ["-ffp-contract=fast", "-march=native"]):
        options = ["-std=c++20", "-O2", "-Wno-psabi", *how, "-I", ROOT / "csrc"]
        subprocess.run(["c++", *options, source, "-o", program], check=True)
        done = subprocess.run([program], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert int(done.stdout) > 9_000_000


def by_definition(means, scales, weights, low, size):
    """One row in Python's integers."""
    phi, sigma = numbers("phi"), numbers("sigma")

    def part(num, den):
        q, r = divmod(64 * num, den)
        if not -512 <= q < 512:
            return (q > 0) << 30
        return phi[q + 512] + (phi[q + 513] - phi[q + 512]) * r // den

    def below(k):
        parts = (w * part(256 * k + 128 - mu, sigma[s]) for mu, s, w in zip(means, scales, weights, strict=True))
        return sum(parts) >> 12

    start, total = below(low - 1), 65536 - (size + 1)
    return [*(((below(low + j - 1) - start) * total >> 30) + j for j in range(size + 1)), 65536]


@every_backend
def test_the_worked_example_and_the_definition(name):
    mixtures = [torch.tensor(v)[:, None] for v in ([0, 256, -512], [20, 30, 10], [2048, 1024, 1024])]
    mixtures = [t.to(d) for t, d in zip(mixtures, (torch.int32, torch.uint8, torch.int16), strict=True)]
    low = torch.tensor([-4], dtype=torch.int32)
    assert on(name, mixture_cdf, *mixtures, low, 8)[0].tolist() == WORKED
    mixtures = extreme((3, 40), seed=1)
    low, _ = on(name, mixture_window, *mixtures)
    rows = on(name, mixture_cdf, *mixtures, low, 17)
    for c in range(40):
        assert rows[c].tolist() == by_definition(*(t[:, c].tolist() for t in mixtures), int(low[c]), 17)


@every_backend
def test_the_same_integers_from_random_and_extreme_mixtures(name):
    if name == "reference":
        return  # what the others are compared with
    points = 1 if name == "triton" and TRITON_INTERPRETS else 1500
    for make, components, seed in ((draw, 3, 2), (extreme, 3, 3), (extreme, 5, 4)):
        mixtures = make((points, components, 61), seed)
        low, half = on(name, mixture_window, *mixtures)
        same = on("reference", mixture_window, *mixtures)
        assert torch.equal(low, same[0]) and torch.equal(half, same[1])
        few = [t[: points // 8 + 1] for t in (*mixtures, low + half - 9)]
        for size in (1, 18):
            rows = on(name, mixture_cdf, *few, size)
            assert torch.equal(rows, on("reference", mixture_cdf, *few, size))
            assert (rows.diff() > 0).all() and not rows[..., 0].any() and (rows[..., -1] == 65536).all()


@every_backend
def test_windows_hold_the_mixture(name):
    mixtures = draw((50, 3, 16), 5)
    low, half = on(name, mixture_window, *mixtures)
    assert set(half.unique().tolist()) <= {8, 16, 32, 64, 128, 256, 512} and len(half.unique()) > 3
    means, weights = mixtures[0].double(), mixtures[2].double()
    sigma = torch.tensor(numbers("sigma"), dtype=torch.float64)[mixtures[1].long()]
    first, end = (256 * edge[..., None, :] for edge in (low, low + 2 * half))  # 6 standard deviations on either side
    outside = torch.special.ndtr((first - means) / sigma) + torch.special.ndtr((means - end) / sigma)
    lost = (outside * weights / 4096).sum(-2)
    assert (lost < 2e-9)[half < 512].all()
    at_end = torch.full((1, 1), MOST_MEAN, dtype=torch.int32)
    low, half = on(name, mixture_window, at_end, torch.zeros_like(at_end).byte(), torch.full_like(at_end, 4096).short())
    assert (int(low), int(half)) == (32768 - 8, 8)


def test_rows_cost_hardly_more_than_the_mixture():
    """Bits a symbol that the row costs beyond the mixture's own distribution over the window, at worst."""
    mixtures = draw((20, 3, 16), 6)
    low, half = mixture_window(*mixtures)
    sigma = torch.tensor(numbers("sigma"), dtype=torch.float64)[mixtures[1].long()]
    for h in half.unique().tolist():
        size, rows = 2 * h, half == h
        cdf = mixture_cdf(*mixtures, low, size).double()[rows].diff()[:, :size] / 65536
        edges = (low[..., None, :, None] + torch.arange(size + 1) - 0.5) * 256
        below = torch.special.ndtr((edges - mixtures[0][..., None]) / sigma[..., None])
        exact = (below.diff() * mixtures[2][..., None].double() / 4096).sum(-3)[rows]
        excess = (exact * (exact.clamp(min=1e-300) / cdf).log2()).sum(-1)
        assert excess.max() < 0.002 + 1.6 * (size + 1) / 65536


def test_bad_input():
    means, scales, weights = draw((2, 3, 4))
    low = torch.zeros(2, 4, dtype=torch.int32)
    for wrong, message in (
        ((means.long(), scales, weights, low, 8), "means must be torch.int32"),
        ((means, scales.int(), weights, low, 8), "scales must be torch.uint8"),
        ((means, scales, weights, low.long(), 8), "low must be torch.int32"),
        ((means, scales, weights, low, 8.0), "size must be a whole number"),
    ):
        with pytest.raises(TypeError, match=message):
            mixture_cdf(*wrong)
    for wrong, message in (
        ((means[0, 0], scales[0, 0], weights[0, 0], low, 8), r"means must have shape \[..., K, C\]"),
        ((means, scales[:1], weights, low, 8), "scales must have shape"),
        ((means, scales, weights, low[:1], 8), "low must have shape"),
        ((means, scales, weights, low, 0), "size must be from 1 to 4096"),
        ((means, scales, weights, low + 65536, 8), r"within \+-2\^16"),
        ((means + (1 << 24), scales, weights, low, 8), r"means must lie within \+-2\^23"),
        ((means, scales | 64, weights, low, 8), "scales must be from 0 to 63"),
        ((means, scales, weights + 1, low, 8), "weights must sum to 4096"),
        ((means, scales, weights - 4097, low, 8), "weights must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture_cdf(*wrong)
    with pytest.raises(ValueError, match="at least one component"):
        mixture_window(*(t[:, :0] for t in (means, scales, weights)))
