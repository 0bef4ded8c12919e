"""Rolling back, forking, reusing and resetting rows, and what is refused."""

import random

import pytest
import torch
from decoder import HEAD_DIM, KV_HEADS, Layer, packed

from vlkern.caches import Caches, LinearCache, RingCache

SIZES = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def both(batch, window, slack, capacity=200, **options):
    """A ring and, as the other layer, a linear cache."""
    return Caches(
        [
            RingCache(batch, window, slack=slack, **SIZES, **options),
            LinearCache(batch, capacity, window=window, **SIZES, **options),
        ]
    )


def bits(caches):
    return [t.clone() for layer in caches.layers for t in layer.tensors()] + [
        caches.length.clone(),
        caches.high.clone(),
    ]


def is_as_full(layer, caches, window):
    expected = layer.oracle(window).float()
    for row, length in enumerate(caches.length.tolist()):
        torch.testing.assert_close(layer.out[row, :length], expected[row, :length])


@pytest.mark.parametrize(("window", "slack"), [(1, 0), (4, 0), (4, 2), (5, 7)])
def test_other_tokens_after_a_rollback(window, slack):
    """Random programs of chunks, steps and rollbacks: exact wherever it is allowed, refused only where it must be."""
    rng, refused, wrapped = random.Random(slack), 0, 0
    layer, caches = Layer(2, 90), Caches([RingCache(2, window, slack=slack, **SIZES)])
    high = [0, 0]
    for _ in range(60):
        length = caches.length.tolist()
        if max(length) > 70:
            break
        tokens = [rng.randint(0, min(some, slack + 3)) * rng.randint(0, 1) for some in length]
        left = [some - some_back for some, some_back in zip(length, tokens, strict=True)]
        # Of the last window - 1 tokens that are left none may have lost its slot to a later one.
        lost = [max(0, h - window - slack) for h in high]
        exact = all(n == 0 or window == 1 or max(0, n - window + 1) >= gone for n, gone in zip(left, lost, strict=True))
        if exact:
            caches.rollback(torch.tensor(tokens))
            for row in range(2):
                layer.draw_again(row, left[row])
                high[row] = high[row] if left[row] else 0
            wrapped += max(high) > window + slack and any(tokens)
        else:
            refused += 1
            with pytest.raises(ValueError, match="needs slack >="):
                caches.rollback(torch.tensor(tokens))
        counts = [rng.randint(0, 5), rng.randint(0, 5)] if rng.random() < 0.5 else [rng.randint(1, 2)] * 2
        layer.extend(caches, counts)
        high = [max(h, n) for h, n in zip(high, caches.length.tolist(), strict=True)]
        is_as_full(layer, caches, window)
    assert wrapped > 2 and (window == 1 or refused > 2)


@pytest.mark.parametrize("slack", [0, 1, 5])
def test_slack_and_one_more_can_be_rolled_back(slack):
    """Across the window's edge: the refusal names the slack that would do, and with that it works."""
    window, n = 6, 20
    for back in range(slack + 5):
        layer, caches = Layer(1, n + 8), both(1, window, slack)
        layer.extend(caches, [n])
        before = bits(caches)
        if back <= slack + 1:
            caches.rollback(back)
        else:
            message = (
                f"tokens must leave row 0 a full window: going back to {n - back} tokens after {n} needs "
                f"slack >= {back - 1}, the ring of window {window} has slack {slack}"
            )
            with pytest.raises(ValueError, match=message):
                caches.rollback(back)
            assert all(torch.equal(a, b) for a, b in zip(before, bits(caches), strict=True))
            caches = both(1, window, slack=back - 1)
            layer.extend(caches, [n])
            caches.rollback(back)
        assert caches.length.tolist() == [n - back]
        layer.draw_again(0, n - back)
        layer.extend(caches, [1])
        layer.extend(caches, [4])
        is_as_full(layer, caches, window)


def test_speculation_with_steps_of_several_tokens():
    """Four tokens at a time, of which some are rejected: with enough slack always by the two ops of a step."""
    rng, layer, caches = random.Random(0), Layer(3, 60), both(3, 8, slack=4)
    layer.extend(caches, [7, 1, 12])
    for _ in range(9):
        layer.extend(caches, chunk=caches.step(4))
        rejected = [rng.randint(0, 3) for _ in range(3)]
        caches.rollback(torch.tensor(rejected))
        for row, length in enumerate(caches.length.tolist()):
            layer.draw_again(row, length)
    layer.extend(caches, [1, 1, 1])
    is_as_full(layer, caches, 8)


def test_a_ring_that_is_not_full_forgets_nothing():
    layer, caches = Layer(2, 30), both(2, 6, slack=1)
    layer.extend(caches, [7, 5])
    caches.rollback(torch.tensor([6, 5]))
    for row, first in ((0, 1), (1, 0)):
        layer.draw_again(row, first)
    layer.extend(caches, [10, 10])
    is_as_full(layer, caches, 6)
    assert caches.high.tolist() == [11, 10]


def test_an_emptied_row_starts_anew():
    """Its ring is full of what was there before, and yet nothing is lost of what comes."""
    layer, caches = Layer(1, 30), both(1, 4, slack=0)
    layer.extend(caches, [20])
    caches.rollback(20)
    layer.draw_again(0, 0)
    layer.extend(caches, [3])
    caches.rollback(2)
    layer.draw_again(0, 1)
    layer.extend(caches, [9])
    is_as_full(layer, caches, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_fork_goes_on_as_each_row_would(dtype):
    layer, caches = Layer(2, 40), both(2, 6, slack=2, dtype=dtype)
    layer.extend(caches, [13, 3])
    rows = [1, 0, 0, 1, 1]
    forked = caches.fork(torch.tensor(rows))
    before = bits(caches)
    many = Layer(5, 40, seed=5)
    for row, source in enumerate(rows):
        n = int(caches.length[source])
        for t, s in ((many.q, layer.q), (many.k, layer.k), (many.v, layer.v)):
            t[row, :n] = s[source, :n]
    many.q_weight, many.k_weight = layer.q_weight, layer.k_weight
    expected = many.oracle(6).float()
    tolerance = {"atol": 0.06, "rtol": 0} if dtype == torch.int8 else {}
    for index in (0, 1):
        again = forked.fork(range(5))
        for counts in ([1] * 5, [4, 0, 9, 1, 1], [1] * 5):
            many.extend(again, counts, layer=index)
        for row, length in enumerate(again.length.tolist()):
            first = int(caches.length[rows[row]])
            torch.testing.assert_close(many.out[row, first:length], expected[row, first:length], **tolerance)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(caches), strict=True)), "the original has changed"


@pytest.mark.parametrize("length", [1, 3, 6, 9, 20])
def test_a_prefix_is_reused_in_caches_of_other_sizes(length):
    """A system prompt in small caches, linear where the window is not reached, starts rows of large ones."""
    window = 6
    short = max(length, 2)
    prefix = Caches([LinearCache(1, short, window=window, **SIZES), LinearCache(1, short, window=window, **SIZES)])
    layer = Layer(1, 60)
    layer.extend(prefix, [length])
    large, others = both(3, window, slack=3), Layer(3, 60, seed=2)
    others.extend(large, [15, 2, 9])
    large.copy_(prefix, rows=[2, 0])
    assert large.length.tolist() == [length, 2, length]
    for row in (0, 2):
        for t, s in ((others.q, layer.q), (others.k, layer.k), (others.v, layer.v)):
            t[row, :length] = s[0, :length]
    # Keys of the prefix were normed with its own weights.
    others.q_weight, others.k_weight = layer.q_weight, layer.k_weight
    if length > 2:
        large.rollback(torch.tensor([min(2, length - 1), 0, 0]))
    start = large.length.tolist()
    for index in (0, 1):
        again = large.fork([0, 1, 2])
        others.extend(again, [7, 0, 1], layer=index)
        others.extend(again, [1, 0, 1], layer=index)
        expected = others.oracle(window).float()
        for row in (0, 2):
            end = int(again.length[row])
            torch.testing.assert_close(others.out[row, start[row] : end], expected[row, start[row] : end])


def test_a_copied_ring_remembers_what_it_has_lost():
    """Into a larger ring nothing comes back, and a smaller one keeps less."""
    source = both(1, 6, slack=3)
    Layer(1, 40).extend(source, [30])
    for slack, allowed in ((0, 1), (3, 4), (9, 4)):
        for back in (allowed, allowed + 1):
            target = both(1, 6, slack=slack)
            target.copy_(source)
            if back > allowed:
                with pytest.raises(ValueError, match="slack"):
                    target.rollback(back)
            else:
                target.rollback(back)


def test_reset_empties_rows():
    layer, caches = Layer(3, 30), both(3, 4, slack=0)
    layer.extend(caches, [12, 5, 7])
    caches.reset([0, 2])
    assert caches.length.tolist() == [0, 5, 0] and caches.high.tolist() == [0, 5, 0]
    assert not any(t[[0, 2]].any() for cache in caches.layers for t in cache.tensors())
    layer.draw_again(0, 0)
    layer.draw_again(2, 0)
    layer.extend(caches, [9, 2, 4])
    is_as_full(layer, caches, 4)
    caches.reset()
    assert not any(t.any() for t in bits(caches))


def test_too_many_tokens_are_refused_and_nothing_is_written():
    layer, caches = Layer(2, 30), both(2, 4, slack=0, capacity=20)
    layer.extend(caches, [18, 3])
    before = bits(caches)
    for make in (lambda: caches.chunk(packed([3, 1])), lambda: caches.step(3)):
        with pytest.raises(
            ValueError, match="the chunk must fit the capacity of 20 tokens: row 0 has 18 and would get 3 more"
        ):
            make()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(caches), strict=True))
    layer.extend(caches, [2, 17])
    assert caches.length.tolist() == [20, 20]
    with pytest.raises(ValueError, match="row 0 has 20 and would get 1 more"):
        caches.step()
    caches.step(active=torch.tensor([False, False]))  # who sits out needs no room
    alone = Caches(caches.layers[:1])
    assert alone.capacity is None  # a ring never overflows


def test_a_block_must_lie_in_one_chunk():
    caches = both(2, 4, slack=0)
    Layer(2, 30).extend(caches, [5, 2])
    until = torch.tensor([7, 7, 7, 2, 6, 5, 5], dtype=torch.int32)
    with pytest.raises(
        ValueError, match="the block around position 3 of row 1 ends at 6, the row's part of the chunk at 5"
    ):
        caches.chunk(packed([3, 4]), until)
    caches.chunk(packed([3, 4]), until.masked_fill(until == 6, 5))


def test_a_chunk_serves_one_state():
    layer, caches = Layer(1, 30), both(1, 4, slack=0)
    chunk = caches.step()
    layer.extend(caches, chunk=chunk)
    with pytest.raises(ValueError, match=r"chunk must be made for the present lengths \[1\], got one for \[0\]"):
        caches.advance(chunk)


def test_gradients_are_refused():
    caches, layer = both(1, 4, slack=0), Layer(1, 30)
    layer.q.requires_grad_()
    with pytest.raises(ValueError, match="q_THC must not require a gradient"):
        layer.extend(caches, [3])
    with torch.no_grad():
        layer.extend(caches, [3])


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "capacity must be a positive integer, got 0", lambda: LinearCache(1, 0, 1, 8)),
        (ValueError, "window must be a positive integer, got 0", lambda: RingCache(1, 0, 1, 8)),
        (ValueError, "slack must be an integer that is not negative, got -1", lambda: RingCache(1, 4, 1, 8, slack=-1)),
        (ValueError, "head_dim must be a positive integer, got 2.5", lambda: RingCache(1, 4, 1, 2.5)),
        (TypeError, "dtype must be one of .*int8, got torch.int32", lambda: RingCache(1, 4, 1, 8, dtype=torch.int32)),
        (ValueError, "layers must hold at least one cache", lambda: Caches([])),
        (ValueError, "as many rows", lambda: Caches([RingCache(1, 4, 1, 8), RingCache(2, 4, 1, 8)])),
        (TypeError, "cu_seqlens must be a tensor, got list", lambda: both(1, 4, 0).chunk([0, 1])),
        (TypeError, "cu_seqlens must be int32, got torch.float32", lambda: both(1, 4, 0).chunk(torch.ones(2))),
        (ValueError, r"cu_seqlens must have shape \[3\], got \[2\]", lambda: both(2, 4, 0).chunk(packed([1]))),
        (ValueError, "start with 0 and not decrease", lambda: both(2, 4, 0).chunk(torch.tensor([0, 3, 2]))),
        (ValueError, "tokens must be the last", lambda: both(1, 4, 0).chunk(packed([3]), tokens=4)),
        (ValueError, "longest must be at least 3", lambda: both(1, 4, 0).chunk(packed([3]), longest=2)),
        (TypeError, "until must be int32", lambda: both(1, 4, 0).chunk(packed([3]), torch.arange(3))),
        (ValueError, r"until must have shape \[3\]", lambda: both(1, 4, 0).chunk(packed([3]), torch.arange(2).int())),
        (ValueError, "tokens must be a positive integer, got 0", lambda: both(1, 4, 0).step(0)),
        (TypeError, "active must be bool", lambda: both(1, 4, 0).step(active=torch.ones(1))),
        (ValueError, r"tokens must be 0 to 0, what row 0 has, got 1", lambda: both(1, 4, 0).rollback(1)),
        (ValueError, r"tokens must be 0 to 0, what row 0 has, got -1", lambda: both(1, 4, 0).rollback(-1)),
        (ValueError, "rows must be within 0 to 1, got 0 to 2", lambda: both(2, 4, 0).fork([0, 2])),
        (
            ValueError,
            "rows must be row numbers, got torch.bool",
            lambda: both(2, 4, 0).fork(torch.tensor([True, False])),
        ),
        (ValueError, "source_rows must be one or as many as rows", lambda: both(3, 4, 0).copy_(both(2, 4, 0))),
        (ValueError, "layer 0 of source must have heads, window", lambda: both(1, 4, 0).copy_(both(1, 5, 0))),
        (
            ValueError,
            "layer 0 of source must not be a ring",
            lambda: Caches([LinearCache(1, 4, 1, 8, window=2)]).copy_(Caches([RingCache(1, 2, 1, 8)])),
        ),
    ],
)
def test_bad_input(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_a_chunk_of_other_rows_is_refused():
    chunk = both(2, 4, 0).step()
    with pytest.raises(ValueError, match="chunk must be of 3 rows, got 2"):
        Layer(3, 9).extend(both(3, 4, 0), chunk=chunk)


def test_keys_of_another_dtype_are_refused():
    for counts in ([1], [20]):
        with pytest.raises(TypeError, match="must have the dtype"):
            Layer(1, 30).extend(both(1, 4, 0, dtype=torch.bfloat16), counts)


def test_a_prefix_must_fit():
    source, target = both(1, 4, 0), both(1, 4, 0, capacity=5)
    Layer(1, 30).extend(source, [9])
    with pytest.raises(ValueError, match="source must fit the capacity of 5 tokens, got 9"):
        target.copy_(source)
