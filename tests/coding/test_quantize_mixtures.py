"""Parameters of mixtures to whole numbers: the nearest ones, sums that are exact, and what the rounding costs."""

import math

import pytest
import torch

import vlkern
from vlkern.coding import SCALES, quantize_mixture

LEAST, MOST = math.log(0.11), math.log(256)


def params(shape=(40, 3, 16), seed=0, spread=(2.0, 2.0, 1.2)):
    """[..., 3, K, C], scales from narrow to wide."""
    g = torch.Generator().manual_seed(seed)
    draw = torch.randn(*shape[:-2], 3, *shape[-2:], generator=g)
    return draw * torch.tensor(spread)[:, None, None]


def exactly(given):
    """The same in float64."""
    logits, means, raw = given.double().unbind(-3)
    shares = logits.softmax(-2) * 4096
    rest, left = shares.frac(), 4096 - shares.floor().sum(-2, keepdim=True)
    rank = rest.sort(dim=-2, descending=True, stable=True).indices.argsort(-2)
    scales = ((raw.clamp(LEAST, MOST) - LEAST) * 63 / (MOST - LEAST) + 0.5).floor()
    return (256 * means).round().clamp(-(2**23), 2**23), scales, shares.floor() + (rank < left)


@pytest.mark.parametrize("shape", [(40, 3, 16), (2, 3, 5, 67), (7, 1, 1), (300, 2)])
def test_the_nearest_whole_numbers(shape):
    given = params(shape, seed=len(shape))
    found = quantize_mixture(given)
    assert [t.dtype for t in found] == [torch.int32, torch.uint8, torch.int16]
    assert (found.weights.sum(-2, dtype=torch.int32) == 4096).all() and (found.weights >= 0).all()
    for ours, exact in zip(found, exactly(given), strict=True):
        assert ours.shape == given.shape[:-3] + given.shape[-2:]
        off = (ours - exact).abs()
        assert off.max() <= 1 and (off > 0).double().mean() < 2e-3  # halves, and remainders that are almost equal


def test_largest_remainders_and_of_equal_ones_the_first():
    thirds = quantize_mixture(torch.zeros(3, 3, 1))
    assert thirds.weights.flatten().tolist() == [1366, 1365, 1365]
    fifths = quantize_mixture(torch.zeros(3, 5, 2))
    assert fifths.weights.T.tolist() == [[820, 819, 819, 819, 819]] * 2
    logits = torch.tensor([1.0, 2.0, 4093.0]).log()[:, None]
    assert quantize_mixture(torch.stack([logits] * 3)).weights.flatten().tolist() == [1, 2, 4093]


def test_ends_of_the_ranges():
    given = torch.tensor([[[-3e38], [3e38], [0.0]], [[3e38], [-3e38], [0.001]], [[-3e38], [3e38], [0.0]]])
    found = quantize_mixture(given)
    assert found.means.flatten().tolist() == [2**23, -(2**23), 0]
    assert found.scales.flatten().tolist() == [0, 63, 18]
    assert found.weights.flatten().tolist() == [0, 4096, 0]
    every = torch.tensor(SCALES).log().expand(3, 1, 64)
    assert quantize_mixture(every).scales.flatten().tolist() == list(range(64))


def test_the_same_from_any_memory_and_any_number_of_threads():
    given = params((900, 3, 40), seed=3)
    want = quantize_mixture(given, threads=1)
    turned = given.transpose(0, -1).contiguous().transpose(0, -1)
    for found in (quantize_mixture(given, threads=3), quantize_mixture(turned), quantize_mixture(given.double())):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    half = given.bfloat16()
    for a, b in zip(quantize_mixture(half), quantize_mixture(half.float()), strict=True):
        assert torch.equal(a, b)
    assert [t.shape for t in quantize_mixture(given[:0])] == [(0, 3, 40)] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(bad):
    for part in range(3):
        given = params((5, 3, 70), seed=4)
        given[4, part, 1, 69] = bad
        with pytest.raises(ValueError, match="params must be finite"):
            quantize_mixture(given)


def test_bad_input():
    with pytest.raises(TypeError, match="params must be float"):
        quantize_mixture(torch.zeros(3, 3, 2, dtype=torch.int32))
    for wrong in (torch.zeros(3, 4), torch.zeros(2, 3, 4), torch.zeros(3, 0, 4)):
        with pytest.raises(ValueError, match=r"params must have shape \[..., 3, K, C\]"):
            quantize_mixture(wrong)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        quantize_mixture(torch.zeros(3, 1, 1), threads=0)


def bits_lost(given, mixtures, size=64):
    """Of the mean symbol: what its integer row costs beyond its mixture in floating point."""
    logits, means, raw = given.double().unbind(-3)
    centre = ((logits.softmax(-2) * means).sum(-2)).round().int()
    low = centre - size // 2
    rows = vlkern.ops.mixture_cdf(*mixtures, low, size).double().diff()[..., :size] / 65536
    edges = low[..., None, :, None] + torch.arange(size + 1) - 0.5
    below = torch.special.ndtr((edges - means[..., None]) / raw.clamp(LEAST, MOST).exp()[..., None])
    exact = (below.diff() * logits.softmax(-2)[..., None]).sum(-3)
    lost = exact * (exact.clamp(min=1e-300) / rows).log2()
    return lost.sum(-1).mean().item()


def test_what_the_rounding_costs():
    """Against the next larger scale, and against windows alone, whose floor of 1 / 65536 a bin is in every figure."""
    for width in (-1.8, -0.5, 0.8):
        given = params((60, 3, 16), seed=5, spread=(1.5, 1.0, 0.4))
        given[..., 2, :, :] += width
        nearest = quantize_mixture(given)
        steps = (given[..., 2, :, :].double().clamp(LEAST, MOST) - LEAST) * 63 / (MOST - LEAST)
        larger = nearest._replace(scales=steps.ceil().clamp(max=63).byte())
        lost, lost_larger = bits_lost(given, nearest), bits_lost(given, larger)
        assert 0 < lost < 0.004 and lost < 0.75 * lost_larger, (width, lost, lost_larger)
