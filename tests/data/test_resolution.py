"""Resolutions drawn as the paper says, grids that keep the aspect ratio, and packing with little padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkern.data.dropping import ByLength, keep
from vlkern.data.resolution import Resolutions, between, grid
from vlkern.packing import pack


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("of", ["side", "area"])
@pytest.mark.parametrize("mean", [None, -0.5, 0.0, 0.5])
def test_distribution(mean, of):
    """Against the CDF of the distribution that is meant, at 200,000 draws (largest deviation, Kolmogorov-Smirnov)."""
    drawn = Resolutions(64, 384, mean, of).draw(200_000, generator()).sort().values
    power = 1 if of == "side" else 2
    u = (drawn**power - 64**power) / (384**power - 64**power) * 2 - 1
    assert u.min() >= -1 and u.max() <= 1
    if mean is None:
        cdf = (u + 1) / 2
    else:
        low, high = (0.5 * (1 + math.erf((edge - mean) / math.sqrt(2))) for edge in (-1, 1))
        cdf = (0.5 * (1 + torch.erf((u - mean) / math.sqrt(2))) - low) / (high - low)
    assert (cdf - torch.linspace(0, 1, 200_000)).abs().max() < 0.005
    assert torch.equal(drawn, Resolutions(64, 384, mean, of).draw(200_000, generator()).sort().values)


def test_draws_depend_on_the_generator_alone():
    before = torch.get_rng_state()
    one, two = (Resolutions(64, 256).draw(5, generator(seed)) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(one, two)
    assert Resolutions(100, 100).draw(3, generator()).tolist() == [100.0] * 3


def test_between_reaches_its_edges():
    assert between(torch.tensor([0.0, 1.0], dtype=torch.float64), -2, 2, 0, 1).tolist() == pytest.approx([-2, 2])


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(1, 600), st.integers(1, 40))
def test_grid_never_exceeds_its_area_and_keeps_the_aspect_ratio(height, width, resolution, patch):
    area = max((resolution / patch) ** 2, 1)
    rows, columns = grid(height, width, resolution, patch)
    assert rows >= 1 and columns >= 1 and rows * columns <= area * (1 + 1e-9)
    assert grid(width, height, resolution, patch) == (columns, rows)
    assert (rows <= columns) if height <= width else (columns <= rows)
    ideal = math.sqrt(area * min(height, width) / max(height, width))
    short, long = sorted((rows, columns))
    assert abs(short - max(ideal, 1)) <= 0.5 + 1e-6 or short == math.floor(math.sqrt(area) + 1e-9)
    if height == width:
        assert short == long
    elif ideal >= 1.5:
        # What rounding the short side up takes away from the long side, and less than a patch beyond.
        assert long >= area / (ideal + 0.5) - 1.001


@pytest.mark.parametrize("side", [16, 64, 224, 256, 512])
def test_a_square_gets_exactly_its_resolution(side):
    assert grid(100, 100, side, 16) == (side // 16, side // 16)


def test_grid_by_hand():
    assert grid(480, 640, 256, 16) == (14, 18)
    assert grid(10, 1000, 64, 16) == (1, 16)
    assert grid(10, 1000, 64, 16, longest=5) == (1, 5)
    assert grid(3, 2, 1, 16) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 64, 16), "height must be above 0, got 0"),
        ((5, -1, 64, 16), "width must be above 0, got -1"),
        ((5, 5, math.nan, 16), "resolution must be above 0, got nan"),
        ((5, 5, 64, 0), "patch must be above 0, got 0"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid(*arguments)
    with pytest.raises(ValueError, match="longest must be at least 1 patch, got 0"):
        grid(5, 5, 64, 16, longest=0)


def test_bad_resolutions():
    with pytest.raises(ValueError, match="resolutions must be 0 < low <= high, got low 8 and high 4"):
        Resolutions(8, 4)
    with pytest.raises(ValueError, match="resolutions must be 0 < low <= high, got low 0 and high 4"):
        Resolutions(0, 4)
    with pytest.raises(ValueError, match="mean must be a finite number or None, got inf"):
        Resolutions(4, 8, math.inf)
    with pytest.raises(ValueError, match="of must be one of side, area, got 'edge'"):
        Resolutions(4, 8, of="edge")


@pytest.mark.parametrize("dropping", [None, ByLength(0.3, 0.6, 16, 256)], ids=["whole", "dropped"])
def test_greedy_packing_wastes_less_than_two_percent(dropping):
    """Sides U(64, 256) and aspect ratios from 1:2 to 2:1, patches of 16, sequences of 256 tokens, 4096 of them.

    What fits into none of the 4096 goes into the next ones, as in a stream.
    """
    g, count = generator(), 20_000
    sides = Resolutions(64, 256, None).draw(count, g).tolist()
    ratios = (torch.rand(count, generator=g, dtype=torch.float64) * 2 - 1).exp2().tolist()
    lengths = torch.tensor([math.prod(grid(1, ratio, side, 16)) for side, ratio in zip(sides, ratios, strict=True)])
    if dropping is not None:
        lengths = keep(lengths, dropping.rates(lengths, 0, g), g).cu_seqlens.diff().long()
    packing = pack(lengths, 256, method="first_fit")
    tokens = torch.bincount(torch.from_numpy(packing.bin), lengths.double())[:4096]
    assert packing.bins > 4096 and tokens.sum() > 0.98 * 4096 * 256
