"""What only the CPU kernel of interval attention promises: a document's bits do not depend on its neighbours."""

import pytest
import torch

import vlkern
from vlkern.kernels.interval_attention.samples import Sample, inputs
from vlkern.testing import differentiate

pytestmark = pytest.mark.skipif("cpu" not in vlkern._op.REGISTRY["interval_attention"].backends, reason="no CPU kernel")

LENGTHS = (33, 150, 1, 70, 24, 200)


def run(q, k, v, start, stop, grad, **options):
    with vlkern.backend("interval_attention=cpu"):
        done = differentiate(
            lambda *qkv: vlkern.ops.interval_attention(*qkv, start, stop, **options), (q, k, v), {}, [grad]
        )
    return done.outputs + done.gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "prefix"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 4, 2)])
def test_a_document_has_the_bits_that_it_has_alone(dtype, mask, order):
    alone, packed = {}, []
    for document in order:
        sample = Sample("alone", (LENGTHS[document],), hq=4, hkv=2, d=24, dv=40, mask=mask, window=50)
        (q, k, v, start, stop), _ = inputs(sample, dtype, "cpu", seed=document)
        start[:2] = stop[:2]  # rows without keys at the edge of a document
        grad = torch.randn(len(q), 4, 40, generator=torch.Generator().manual_seed(document)).to(dtype)
        alone[document] = run(q, k, v, start, stop, grad)
        packed.append((q, k, v, start, stop, grad))
    offsets = torch.tensor([0] + [len(part[0]) for part in packed]).cumsum(0)[:-1]
    for part, offset in zip(packed, offsets, strict=True):
        part[3].add_(offset)
        part[4].add_(offset)
    together = run(*(torch.cat(tensors) for tensors in zip(*packed, strict=True)))
    for document, offset in zip(order, offsets, strict=True):
        for ours, whole in zip(alone[document], together, strict=True):
            assert torch.equal(ours, whole[offset : offset + LENGTHS[document]])


def test_queries_in_another_order_than_their_keys():
    """Documents are recognised by their keys, whatever the order of the rows: pooled queries, shuffled packs."""
    sample = Sample("cross", LENGTHS, hq=2, hkv=2, d=16, mask="cross")
    (q, k, v, start, stop), _ = inputs(sample, torch.float32, "cpu")
    grad = torch.randn(len(q), 2, 16, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    straight = run(q, k, v, start, stop, grad)
    shuffled = run(q[order], k, v, start[order], stop[order], grad[order])
    for i, per_query in enumerate((True, True, False, False)):
        assert torch.equal(straight[i][order] if per_query else straight[i], shuffled[i])


def test_keys_that_nobody_sees_get_zero_gradients():
    sample = Sample("some", (90,), hq=2, hkv=1, d=16)
    (q, k, v, start, stop), _ = inputs(sample, torch.float32, "cpu")
    start, stop = start + 20, stop - 30
    _, dq, dk, dv = run(q, k, v, start, stop, torch.ones(90, 2, 16))
    assert dq.any(1).any(1).all()
    for gradient in (dk, dv):
        assert not gradient[:20].any() and not gradient[60:].any() and gradient[20:60].any(1).any(1).all()
