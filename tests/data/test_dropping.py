"""Token dropping: every schedule has the distribution it should, and what stays is drawn fairly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkern.data.dropping import Beta, ByLength, BySeen, Constant, keep

MANY = torch.full((100_000,), 100)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_constant():
    assert Constant(0.25).rates(torch.tensor([3, 4]), 7, generator()).tolist() == [0.25, 0.25]


@pytest.mark.parametrize(("mean", "most"), [(0.5, 0.8), (0.3, 0.9), (0.1, 0.95), (0.7, 0.75)])
def test_beta(mean, most):
    """Mean d_mu, u = d / d_max with variance 0.3 u_mu (1 - u_mu), and the third moment of a Beta."""
    u = Beta(mean, most).rates(MANY, 0, generator()) / most
    m = mean / most
    assert u.min() >= 0 and u.max() <= 1
    assert u.mean().item() == pytest.approx(m, abs=0.005)
    assert u.var().item() == pytest.approx(0.3 * m * (1 - m), rel=0.02)
    a, total = m * (1 / 0.3 - 1), 1 / 0.3 - 1
    third = a * (a + 1) * (a + 2) / (total * (total + 1) * (total + 2))
    assert (u**3).mean().item() == pytest.approx(third, rel=0.03)


def test_by_length():
    """Linear in the length between the ends, constant beyond; never more than two standard deviations off."""
    way = ByLength(0.3, 0.7, 16, 256)
    for length, mu in ((16, 0.3), (136, 0.5), (256, 0.7), (1, 0.3), (1000, 0.7)):
        rates = way.rates(torch.full((50_000,), length), 0, generator())
        assert rates.mean().item() == pytest.approx(mu, abs=5e-4)
        assert (rates - mu).abs().max() <= 0.04 + 1e-12
        cut = 1 - 2 * 2 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
        assert rates.std().item() == pytest.approx(0.02 * math.sqrt(cut), rel=0.02)
    falling = ByLength(0.7, 0.3, 16, 256, std=0).rates(torch.tensor([16, 256]), 0, generator())
    assert falling.tolist() == [0.7, 0.3]


def test_by_seen():
    way = BySeen(middle=1000, tau=-100)
    rates = [way.rates(torch.ones(2), seen, generator()) for seen in (0, 900, 1000, 1100, 10**9)]
    assert all(len(r) == 2 and r[0] == r[1] for r in rates)
    sigmoid = 1 / (1 + math.exp(-1))
    want = [0.8, 0.2 + 0.6 * sigmoid, 0.5, 0.8 - 0.6 * sigmoid, 0.2]
    assert [r[0].item() for r in rates] == pytest.approx(want, abs=1e-4)
    assert BySeen(5, 1, 0.1, 0.3).rates(torch.ones(1), 10**6, generator()).item() == pytest.approx(0.3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 0.999)), max_size=12), st.integers(0, 2**32))
def test_keep(images, seed):
    lengths = torch.tensor([n for n, _ in images], dtype=torch.int64)
    rates = torch.tensor([d for _, d in images], dtype=torch.float64)
    kept = keep(lengths, rates, generator(seed))
    stay = [max(1, n - math.floor(d * n + 0.5)) for n, d in images]
    assert kept.cu_seqlens.dtype == torch.int32 and kept.cu_seqlens.diff().tolist() == stay
    assert torch.equal(kept.numbers, kept.numbers.unique())
    starts = lengths.cumsum(0) - lengths
    for i, (n, _) in enumerate(images):
        part = kept.numbers[kept.cu_seqlens[i] : kept.cu_seqlens[i + 1]]
        assert bool(((part >= starts[i]) & (part < starts[i] + n)).all())
    again = keep(lengths, rates, generator(seed))
    assert torch.equal(again.numbers, kept.numbers)


def test_every_token_is_as_likely():
    kept = keep(torch.full((20_000,), 10), torch.full((20_000,), 0.4), generator())
    counts = (kept.numbers % 10).bincount()
    assert counts.sum() == 20_000 * 6
    assert (counts / 20_000 - 0.6).abs().max() < 0.015
    pairs = ((kept.numbers % 10).unflatten(0, (-1, 6)) < 2).sum(1)
    assert (pairs == 2).float().mean().item() == pytest.approx(6 * 5 / 90, abs=0.015)  # both of two given tokens


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    for way in (Beta(0.5, 0.8), ByLength(0.3, 0.6, 1, 9)):
        few = MANY[:10]
        keep(few, way.rates(few, 0, generator()), generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(1.0), "rate must be at least 0 and below 1, got 1.0"),
        (lambda: Constant(math.nan), "rate must be at least 0 and below 1, got nan"),
        (lambda: Beta(0.8, 0.5), "rates must be 0 < mean < most < 1, got mean 0.8 and most 0.5"),
        (lambda: Beta(0.5, 1.0), "rates must be 0 < mean < most < 1, got mean 0.5 and most 1.0"),
        (lambda: ByLength(0.01, 0.5, 1, 9), "low must be at least 0.04 and below 0.96, .* got 0.01"),
        (lambda: ByLength(0.2, 0.5, 9, 9), "lengths must be 0 < shortest < longest, got 9 and 9"),
        (lambda: ByLength(0.2, 0.5, 1, 9, -1), "std must be at least 0, got -1"),
        (lambda: BySeen(5, 0), "middle and tau must be finite and tau not 0, got 5 and 0"),
        (lambda: BySeen(5, 1, 0.8, 0.2), "rates must be 0 <= low <= high < 1, got low 0.8 and high 0.2"),
        (lambda: keep(torch.tensor([0]), torch.tensor([0.5]), generator()), "lengths must be at least 1, got 0"),
        (lambda: keep(torch.tensor([3]), torch.tensor([1.5]), generator()), "rates must be .* below 1, got 1.5"),
        (lambda: keep(torch.tensor([3]), torch.tensor([math.nan]), generator()), "rates must be .* below 1, got nan"),
        (lambda: keep(torch.tensor([3]), torch.ones(2), generator()), r"shape \[n\], got \[1\] and \[2\]"),
        (lambda: keep(torch.tensor([3.0]), torch.ones(1), generator()), "lengths must be int32 or int64"),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
