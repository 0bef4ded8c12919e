"""Caches under torch.compile: one graph, no look at values, and the state changed in place."""

import torch
from decoder import HEAD_DIM, KV_HEADS, ROPE, Layer, packed

from vlkern.caches import Caches, LinearCache, RingCache

SIZES = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def model_caches(batch, dtype=torch.float32):
    return Caches([RingCache(batch, 6, slack=1, **SIZES, dtype=dtype), LinearCache(batch, 40, **SIZES, dtype=dtype)])


def assert_same_state(a, b):
    for x, y in zip(a.layers, b.layers, strict=True):
        for s, t in zip(x.tensors(), y.tensors(), strict=True):
            torch.testing.assert_close(s, t)
    assert torch.equal(a.length, b.length) and torch.equal(a.high, b.high)


def forward(q, k, v, chunk, caches):
    cos, sin = ROPE(chunk.positions)
    outs = [layer.attend(q, k, v, chunk, cos, sin) for layer in caches.layers]
    caches.advance(chunk)
    return outs


def test_a_step_of_decoding_is_one_graph():
    """With rollback and rows that sit out; the second step and all others reuse it."""

    def step(q, k, v, caches, active, rejected):
        outs = forward(q, k, v, caches.step(2, active), caches)
        caches.rollback(rejected)
        return outs

    layer, active = Layer(2, 40), torch.tensor([True, True])
    eager, compiled = model_caches(2), model_caches(2)
    for caches in (eager, compiled):
        layer.extend(caches, [9, 2])
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(8):
        some = [torch.randn(4, heads, HEAD_DIM, generator=layer.g) for heads in (4, KV_HEADS, KV_HEADS)]
        active = torch.tensor([i != 3, True])
        rejected = torch.tensor([i == 4, i % 2], dtype=torch.int32)
        before = [t.data_ptr() for cache in compiled.layers for t in cache.tensors()]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            outs = graph(*some, compiled, active, rejected)
        for a, b in zip(outs, step(*some, eager, active, rejected), strict=True):
            torch.testing.assert_close(a, b)
        assert before == [t.data_ptr() for cache in compiled.layers for t in cache.tensors()]
        assert_same_state(eager, compiled)


def test_a_prompt_is_one_graph():
    """Of ragged rows with blocks, longer than the ring; int8."""

    def prefill(q, k, v, cu_seqlens, until, caches):
        chunk = caches.chunk(cu_seqlens, until, tokens=q.shape[0], longest=q.shape[0])
        return forward(q, k, v, chunk, caches)

    g = torch.Generator().manual_seed(0)
    eager, compiled = model_caches(2, torch.int8), model_caches(2, torch.int8)
    graph = torch.compile(prefill, fullgraph=True, backend="aot_eager")
    for counts in ([11, 3], [5, 9]):
        some = [torch.randn(14, heads, HEAD_DIM, generator=g) for heads in (4, KV_HEADS, KV_HEADS)]
        chunk = eager.chunk(packed(counts))
        until = torch.where(chunk.positions == chunk.before[chunk.rows] + 1, chunk.positions + 1, chunk.positions)
        arguments = (*some, packed(counts), until)
        for a, b in zip(graph(*arguments, compiled), prefill(*arguments, eager), strict=True):
            torch.testing.assert_close(a, b)
        assert_same_state(eager, compiled)
