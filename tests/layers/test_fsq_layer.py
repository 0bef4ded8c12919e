"""The quantizer as a layer: round trips of random quantizers, projections, the histogram, bad arguments."""

import math

import pytest
import torch

from vlkern.layers import FSQ

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_round_trips_of_random_quantizers(data):
    levels = data.draw(st.lists(st.integers(2, 40), min_size=1, max_size=7))
    variant = data.draw(st.sampled_from(["official", "symmetric"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
    quantizer = FSQ(levels, variant=variant, count=math.prod(levels) < 1 << 20)
    z = 2 * torch.randn(*shape, len(levels), generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    codes, indices = quantizer(z)
    assert codes.shape == z.shape and codes.dtype == dtype and list(indices.shape) == shape
    assert torch.equal(quantizer.decode(indices, dtype), codes)
    assert ((indices >= 0) & (indices < math.prod(levels))).all() and (codes.abs() <= 1).all()
    if quantizer.counts is not None:
        assert torch.equal(quantizer.counts, indices.flatten().bincount(minlength=quantizer.codes))


def test_projections_lead_in_and_out_and_learn():
    torch.manual_seed(0)
    quantizer = FSQ([8, 5, 5, 5], dim=16)
    x = torch.randn(2, 50, 16)
    y, indices = quantizer(x)
    assert y.shape == x.shape and indices.shape == (2, 50)
    torch.testing.assert_close(quantizer.decode(indices), y)
    y.square().sum().backward()
    assert all(p.grad.any() for p in quantizer.parameters())
    assert set(quantizer.state_dict()) == {
        f"project_{way}.{name}" for way in ("in", "out") for name in ("weight", "bias")
    }


def test_usage_is_the_share_of_codes_that_came():
    quantizer = FSQ([2, 3])
    assert quantizer.usage() == 0
    quantizer(torch.tensor([[9.0, 9.0], [-9.0, -9.0], [9.0, 9.0], [float("nan"), 0.0]]))
    assert quantizer.counts.tolist() == [1, 0, 0, 0, 0, 2] and quantizer.usage() == pytest.approx(2 / 6)
    quantizer.reset_usage()
    assert quantizer.usage() == 0
    quantizer(torch.randn(4000, 2))
    assert quantizer.usage() == 1


def test_counting_can_be_left_out():
    quantizer = FSQ([1000, 1000, 1000], count=False)
    quantizer(torch.randn(3, 3))
    with pytest.raises(ValueError, match="count must be True for a histogram, got False"):
        quantizer.usage()


def test_compiles_in_one_graph():
    quantizer = FSQ([8, 6, 5], dim=7)
    x = torch.randn(6, 7)
    y, _ = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, quantizer(x)[0])
    assert int(quantizer.counts.sum()) == 12


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (ValueError, "levels must be between 2", ([8, 1],), {}),
        (TypeError, "dim must be an int or None, got float", ([8],), {"dim": 3.0}),
        (ValueError, "dim must be at least 1, got 0", ([8],), {"dim": 0}),
        (ValueError, "variant must be", ([8],), {"variant": "rounded"}),
        (ValueError, r"at most 2\^24 to be counted, got 1000000000: count=False", ([1000] * 3,), {}),
    ],
)
def test_bad_arguments(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        FSQ(*args, **kwargs)
