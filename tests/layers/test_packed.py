"""Packed attention and pooling against a loop over sequences and the dense layers."""

import pytest
import torch
import torch.nn.functional as F

from vlkern.layers import packed
from vlkern.layers.attention import SelfAttention
from vlkern.layers.packed import Attention, MapPooling, check_cu_seqlens
from vlkern.layers.pooling import MapHead

LENGTHS = [5, 1, 12, 7, 1]


def _cu(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def _bounds(lengths):
    cu = _cu(lengths)
    return tuple(ends.repeat_interleave(torch.tensor(lengths)) for ends in (cu[:-1], cu[1:]))


def _parts(x, lengths):
    return [part[None] for part in x.split(lengths)]


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_that_of_each_sequence(bias):
    torch.manual_seed(0)
    attention, dense = Attention(48, 3, bias=bias), SelfAttention(48, 3)
    dense.load_state_dict({name: torch.zeros_like(p) for name, p in dense.named_parameters()} | attention.state_dict())
    assert any("bias" in name for name, _ in attention.named_parameters()) == bias
    x = torch.randn(sum(LENGTHS), 48, requires_grad=True)
    y = torch.randn(sum(LENGTHS), 48)
    got = attention(x, *_bounds(LENGTHS))
    want = torch.cat([dense(part)[0] for part in _parts(x, LENGTHS)])
    torch.testing.assert_close(got, want)
    (dx,) = torch.autograd.grad((got * y).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad((want * y).sum(), x)[0], rtol=1e-4, atol=1e-5)


def test_pooling_is_that_of_each_sequence():
    torch.manual_seed(0)
    pool, dense = MapPooling(48, 64, 3), MapHead(48, 64, 3)
    dense.load_state_dict(pool.state_dict())
    x = torch.randn(sum(LENGTHS), 48, requires_grad=True)
    got = pool(x, _cu(LENGTHS))
    want = torch.cat([dense(part) for part in _parts(x, LENGTHS)])
    torch.testing.assert_close(got, want)
    y = torch.randn_like(got)
    leaves = [x, *pool.parameters()]
    gradients = torch.autograd.grad((got * y).sum(), leaves)
    for g, h in zip(gradients, torch.autograd.grad((want * y).sum(), [x, *dense.parameters()]), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4)


def test_a_dense_batch_is_a_special_case():
    pool, dense = MapPooling(16, 24, 2), MapHead(16, 24, 2)
    dense.load_state_dict(pool.state_dict())
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(pool(x.flatten(0, 1), _cu([4, 4, 4])), dense(x))


def test_autocast_and_other_dtypes():
    attention, bounds = Attention(32, 2), _bounds([3, 4])
    x = torch.randn(7, 32)
    want = attention(x, *bounds)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x, *bounds).dtype == torch.bfloat16
    half = attention.to(torch.bfloat16)(x.bfloat16(), *bounds)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0, atol=0.05)


def test_compiles_without_a_break():
    attention, pool, cu = Attention(16, 2), MapPooling(16, 24, 2), _cu([3, 2])

    def both(x, start, stop, cu):
        return pool(attention(x, start, stop), cu)

    x, bounds = torch.randn(5, 16), _bounds([3, 2])
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, *bounds, cu), both(x, *bounds, cu))


@pytest.mark.parametrize(
    ("cu", "kind", "message"),
    [
        (torch.tensor([0, 3, 6]), TypeError, "cu_seqlens must be int32, got torch.int64"),
        ([0, 3, 6], TypeError, "cu_seqlens must be a tensor, got list"),
        (_cu([]), ValueError, r"at least one sequence, got \[1\]"),
        (_cu([3, 3])[None], ValueError, r"at least one sequence, got \[1, 3\]"),
        (_cu([3, 2]), ValueError, "from 0 to the number of tokens, 6, got 0 to 5"),
        (_cu([3, 4]), ValueError, "from 0 to the number of tokens, 6, got 0 to 7"),
        (_cu([3, 3])[1:], ValueError, "from 0 to the number of tokens, 6, got 3 to 6"),
        (_cu([3, 0, 3]), ValueError, "must rise, got 3 and then 3 for sequence 1"),
        (_cu([4, -2, 4]), ValueError, "must rise, got 4 and then 2 for sequence 1"),
    ],
)
def test_segments_that_do_not_fit(cu, kind, message):
    with pytest.raises(kind, match=message):
        check_cu_seqlens(cu, 6)
    with pytest.raises(kind, match=message):
        MapPooling(16, 24, 2)(torch.randn(6, 16), cu)


@pytest.mark.parametrize(("width", "heads"), [(48, 5), (48, 4), (48, 0), (1024, 2)])
def test_heads_that_do_not_fit(width, heads):
    for make in (lambda: packed.Attention(width, heads), lambda: packed.MapPooling(width, 8, heads)):
        with pytest.raises(ValueError, match=f"multiple of 8 up to 256, got {heads} heads of width {width}"):
            make()


def test_bounds_that_do_not_fit():
    start, stop = _bounds([3, 3])
    with pytest.raises(ValueError, match="start must have shape"):
        Attention(16, 2)(torch.randn(5, 16), start, stop)
