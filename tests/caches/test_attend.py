"""What comes out of the caches is attention over all tokens, however they were cut into chunks."""

import random

import pytest
import torch
from decoder import HEAD_DIM, KV_HEADS, Layer

import vlkern
from vlkern.caches import Caches, LinearCache, RingCache
from vlkern.testing import assert_as_good, record

SIZES = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def ring(batch, window, **options):
    return Caches([RingCache(batch, window, **SIZES, **options)])


def linear(batch, capacity, **options):
    return Caches([LinearCache(batch, capacity, **SIZES, **options)])


def cuts(rng, n, batch):
    """Numbers of tokens for each row and chunk until all rows have n: steps, prompts, rows that get nothing."""
    left = [n] * batch
    while any(left):
        if min(left) and rng.random() < 0.5:
            counts = [rng.randint(1, min(3, *left))] * batch
        else:
            counts = [min(some, rng.choice([0, 1, 2, 5, n])) for some in left]
        left = [some - new for some, new in zip(left, counts, strict=True)]
        yield counts


@pytest.mark.parametrize("window", [1, 2, 5, 8])
@pytest.mark.parametrize("slack", [0, 1, 4])
def test_every_chunking_gives_full_attention(window, slack):
    """Rings and linear caches, at every length up to three windows and five."""
    rng, n = random.Random(f"{window} {slack}"), 3 * window + 5
    for seed in range(3):
        batch = rng.choice([1, 3])
        layer = Layer(batch, n, softcap=rng.choice([None, 2.0]), seed=seed)
        expected = layer.oracle(window).float()
        for caches in (ring(batch, window, slack=slack), linear(batch, n, window=window)):
            layer.out.fill_(torch.nan)
            for counts in cuts(rng, n, batch):
                layer.extend(caches, counts)
            torch.testing.assert_close(layer.out, expected)
            assert caches.length.tolist() == [n] * batch


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("first", [0, 1, 9])
def test_token_by_token(window, first):
    """Steps of one token: the two ops of a step and no others, at every length up to three windows and five."""
    n = 3 * window + 5 + 9
    layer = Layer(2, n)
    caches = ring(2, window)
    layer.extend(caches, [first, min(first, 3)])
    for _ in range(n - first):
        chunk = caches.step()
        with record() as calls:
            layer.extend(caches, chunk=chunk)
        assert [call.op._schema.name for call in calls] == ["vlkern::rope_append", "vlkern::decode_attention"]
    expected = layer.oracle(window).float()
    torch.testing.assert_close(layer.out[0], expected[0])
    length = caches.length[1]
    torch.testing.assert_close(layer.out[1, :length], expected[1, :length])


def test_a_global_layer_sees_everything():
    layer = Layer(2, 40)
    caches = linear(2, 40)
    for counts in ([17, 3], [1, 1], [0, 20], [4, 4], [18, 12]):
        layer.extend(caches, counts)
    torch.testing.assert_close(layer.out, layer.oracle().float())


@pytest.mark.parametrize("make", [lambda: ring(2, 6), lambda: ring(2, 6, slack=5), lambda: linear(2, 60, window=6)])
def test_blocks_are_seen_as_a_whole(make):
    """Image blocks, shorter and longer than the window, in the middle of chunks that follow others."""
    layer = Layer(2, 60)
    for row, first, last in ((0, 5, 8), (0, 20, 34), (1, 0, 3), (1, 41, 50)):
        layer.until[row, first : last + 1] = last
    caches = make()
    for counts in ([3, 4], [16, 1], [1, 1], [20, 45], [20, 9]):
        layer.extend(caches, counts)
    torch.testing.assert_close(layer.out, layer.oracle(6).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_storage_costs_one_rounding_of_the_keys(dtype):
    layer = Layer(2, 29, dtype)
    whole = linear(2, 29, window=8)
    whole.layers[0].k, whole.layers[0].v = (t.to(dtype) for t in (whole.layers[0].k, whole.layers[0].v))
    with vlkern.backend("reference"):
        layer.extend(whole, [29, 29])
    low, exact = layer.out.clone(), layer.oracle(8)
    for caches in (ring(2, 8, dtype=dtype), linear(2, 29, window=8, dtype=dtype)):
        for counts in ([5, 0], [1, 1], [1, 1], [20, 3], [2, 24]):
            layer.extend(caches, counts)
        assert_as_good(layer.out, low, exact)


def test_rows_that_sit_out_a_step():
    """The shapes stay; nothing of theirs changes."""
    for make in (lambda: ring(3, 4), lambda: linear(3, 30), lambda: ring(3, 4, slack=3, dtype=torch.int8)):
        layer, caches = Layer(3, 30), make()
        layer.extend(caches, [6, 2, 0])
        active = torch.tensor([True, False, True])
        for tokens in (1, 1, 3):  # three at a time are no step for a ring without slack
            before = [t[1].clone() for t in caches.layers[0].tensors()]
            out = layer.extend(caches, chunk=caches.step(tokens, active))
            assert not out.unflatten(0, (3, tokens))[1].any()
            assert all(torch.equal(a, t[1]) for a, t in zip(before, caches.layers[0].tensors(), strict=True))
        assert caches.length.tolist() == [11, 2, 5]
        layer.extend(caches, chunk=caches.step())
        expected = layer.oracle(caches.layers[0].window).float()
        tolerance = {"atol": 0.05, "rtol": 0} if caches.layers[0].dtype == torch.int8 else {}
        for row, length in enumerate(caches.length.tolist()):
            torch.testing.assert_close(layer.out[row, :length], expected[row, :length], **tolerance)


def test_what_lies_in_unwritten_slots_does_not_matter():
    for caches in (ring(2, 6, slack=2), linear(2, 40, window=6), linear(2, 40)):
        for t in caches.layers[0].tensors():
            t.fill_(torch.nan)
        layer = Layer(2, 40)
        for counts in ([3, 1], [1, 1], [4, 0], [1, 1], [1, 1]):
            layer.extend(caches, counts)
        for row, length in enumerate(caches.length.tolist()):
            assert layer.out[row, :length].isfinite().all()


def test_a_chunk_without_tokens():
    for caches in (ring(2, 4), linear(2, 8), ring(2, 4, dtype=torch.int8)):
        layer = Layer(2, 8)
        layer.extend(caches, [0, 0])
        layer.extend(caches, [5, 5])
        assert layer.extend(caches, [0, 0]).shape == (0, 4, HEAD_DIM)
        assert caches.length.tolist() == [5, 5]


def test_caches_without_rows():
    for caches in (ring(0, 4), linear(0, 8)):
        assert Layer(0, 8).extend(caches, chunk=caches.step()).shape == (0, 4, HEAD_DIM)
        caches.rollback(1)
        assert caches.fork([]).batch == 0


def test_a_step_says_what_does_not_fit():
    """Though it calls the kernels directly."""
    caches, longer = linear(1, 4), linear(1, 40)
    longer.length.fill_(9)
    q, k, x = torch.randn(1, 4, HEAD_DIM), torch.randn(1, KV_HEADS, HEAD_DIM), torch.ones(1, HEAD_DIM // 2)
    wrong = {
        "k must have the dtype of q": (TypeError, (q, k.half(), k, caches.step(), x, x), {}),
        "cos must have shape": (ValueError, (q, k, k, caches.step(), x[:, 1:], x), {}),
        "q_weight must have shape": (ValueError, (q, k, k, caches.step(), x, x), {"q_weight": x[0]}),
        "length must be at most the 4 slots": (ValueError, (q, k, k, longer.step(), x, x), {}),
        "eps must be a positive": (ValueError, (q, k, k, caches.step(), x, x), {"eps": 0.0}),
        "scale must be a finite": (ValueError, (q, k, k, caches.step(), x, x), {"scale": float("nan")}),
        "softcap must be a positive": (ValueError, (q, k, k, caches.step(), x, x), {"softcap": -1.0}),
    }
    for message, (kind, arguments, options) in wrong.items():
        with pytest.raises(kind, match=message):
            caches.layers[0].attend(*arguments, **options)


def test_a_step_is_the_same_through_the_public_functions():
    """Which run where the kernels are not called directly, as under a choice of backends."""
    for caches in (ring(2, 6), linear(2, 9), ring(2, 6, dtype=torch.int8)):
        layer, outs = Layer(2, 9), []
        layer.extend(caches, [8, 5])
        for choice in ("auto", "rope_append=cpu,decode_attention=reference"):
            with vlkern.backend(choice):
                outs.append(layer.extend(caches, chunk=caches.step()))
            caches.rollback(1)
        torch.testing.assert_close(*outs)
