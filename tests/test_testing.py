"""The tests' own tools must be able to fail."""

import pytest
import torch

import vlkern
from vlkern.testing import (
    assert_as_good,
    assert_same_direction,
    differentiate,
    in_float64,
    poison,
    record,
    stack,
)


def three(dtype=torch.bfloat16):
    """Exact values, the same rounded once, and a copy of those."""
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return exact.to(dtype), exact.to(dtype), exact


def test_a_result_as_good_as_the_reference_passes():
    assert_as_good(*three())
    assert_same_direction(*three())
    empty = torch.empty(0)
    assert_as_good(empty, empty, empty.double())


def test_one_wrong_element_fails():
    ours, low, exact = three()
    ours[17] += 0.1
    with pytest.raises(AssertionError, match=r"error 1\.0\d*e-01 exceeds 2\.0"):
        assert_as_good(ours, low, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_fails(value):
    ours, low, exact = three()
    ours[3] = value
    with pytest.raises(AssertionError, match="1 of 1000 values are NaN or infinite"):
        assert_as_good(ours, low, exact)


def test_wrong_shape_or_dtype_fails():
    ours, low, exact = three()
    with pytest.raises(AssertionError, match="shape"):
        assert_as_good(ours[None], low, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_good(ours.float(), low, exact)


def test_more_noise_than_the_reference_fails():
    ours, low, exact = three(torch.float32)
    noisy = ours + 1e-5 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_good(noisy, low, exact)


def test_a_lost_term_below_the_largest_error_fails():
    """Here one element is so uncertain that losing 3 % of all others would pass unseen."""
    ours, low, exact = three()
    low[0] += 1
    ours = (ours.double() * 0.97).bfloat16()
    assert_as_good(ours, low, exact)
    ours, low, exact = ours[1:], low[1:], exact[1:]
    with pytest.raises(AssertionError, match="signed bias"):
        assert_same_direction(ours, low, exact)
    with pytest.raises(AssertionError, match="cosine"):
        assert_same_direction(ours.roll(1), low, exact)


def test_no_direction_is_asked_where_the_reference_has_none():
    ours, low, exact = three()
    assert_same_direction(ours.roll(1), low.roll(2), exact)
    assert_same_direction(ours, low, torch.zeros_like(exact))


def test_poison_fills_fresh_memory_and_stops():
    like = torch.ones(2)
    before = torch.are_deterministic_algorithms_enabled()
    with poison():
        for fresh in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty(3, dtype=torch.float16)):
            assert fresh.isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_kernel_that_leaves_memory_unwritten_fails():
    def forgetful(x):
        y = torch.empty_like(x)
        y[1:] = x[1:]
        return y + 0 * x

    run = differentiate(forgetful, (torch.ones(4),), {})
    assert run.outputs[0].isnan().tolist() == [True, False, False, False]


def test_record_sees_forward_and_backward_and_nothing_else():
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(3)
    with record() as calls, vlkern.backend("reference"):
        (vlkern.ops.rms_norm(x, weight) * 2).sum().backward()
    assert [str(call.op) for call in calls] == ["vlkern.rms_norm.default", "vlkern.rms_norm_backward.default"]
    assert all(call.backend == "reference" for call in calls)


def test_differentiate_returns_a_gradient_for_every_float_input():
    def function(x, indices, *, y, flag):
        return x[indices] * 2, (x * 0).sum()

    args, kwargs = (torch.arange(3.0), torch.tensor([0, 2])), {"y": torch.ones(2), "flag": True}
    run = differentiate(function, args, kwargs)
    assert [t.shape for t in run.outputs] == [(2,), ()]
    assert run.gradients[1] is None
    assert torch.equal(run.gradients[0][[0, 2]], 2 * run.cotangents[0]) and run.gradients[0][1] == 0
    again = differentiate(function, *in_float64((args, kwargs)), cotangents=run.cotangents)
    assert again.outputs[0].dtype == torch.float64
    torch.testing.assert_close(again.gradients[0].float(), run.gradients[0])
    assert stack([run, run]).outputs[0].shape == (2, 2) and stack([run, run]).gradients[1] is None
