"""vlkern.masks against matrices filled by definition, one (query, key) pair at a time."""

import doctest
import random
from itertools import pairwise

import pytest
import torch

from vlkern import masks, validate
from vlkern.masks import _kinds, _mask


def dense(mask, Nq, Nk=None):
    """[Nq, Nk] bool: what the bounds let through."""
    start, stop = mask.bounds(Nq, Nk)
    n = Nq if Nk is None else Nk
    assert start.dtype == stop.dtype == torch.int32 and start.shape == stop.shape == (Nq,)
    assert start.is_contiguous() and stop.is_contiguous()
    assert bool(((start >= 0) & (start <= stop) & (stop <= n)).all())
    j = torch.arange(n)
    return (j >= start[:, None]) & (j < stop[:, None])


def cumulative(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


class Case:
    """Random documents (none, square or cross) and random trees of masks, each with its matrix by definition."""

    def __init__(self, seed):
        self.random = r = random.Random(seed)
        self.kind = r.choice(["none", "none", "documents", "documents", "documents", "cross"])
        k_lengths = [r.choice([0, 1, 2, 3, 5, 8]) for _ in range(r.randrange(5))]
        q_lengths = [r.choice([0, 1, 2, 4, 7]) for _ in k_lengths] if self.kind == "cross" else k_lengths
        self.Nq, self.Nk = sum(q_lengths), sum(k_lengths)
        if self.kind == "none":
            self.Nk = r.randrange(12)
            self.Nq = r.choice([self.Nk, self.Nk, r.randrange(12)])
            q_lengths, k_lengths = [self.Nq], [self.Nk]
        self.cu_q, self.cu_k = cumulative(q_lengths), cumulative(k_lengths)
        dtype = r.choice([torch.int32, torch.int64])
        cu_q, cu_k = (torch.tensor(cu, dtype=dtype) for cu in (self.cu_q, self.cu_k))
        self.segments = masks.documents(cu_q) if self.kind == "documents" else masks.cross(cu_q, cu_k)
        self.segment = [s for s, n in enumerate(q_lengths) for _ in range(n)]
        self.own = [self.cu_k[s + 1] - (self.cu_q[s + 1] - i) for i, s in enumerate(self.segment)]
        self.gap = False

    def matrix(self, sees):
        return (
            torch.tensor([[sees(i, j) for j in range(self.Nk)] for i in range(self.Nq)]).reshape(self.Nq, self.Nk) > 0
        )

    def leaf(self):
        r, own = self.random, self.own
        first = [self.cu_k[s] for s in self.segment]
        kind = r.choice(["causal", "window", "window", "prefix", "spans", "groups"])
        if kind == "causal":
            return masks.causal(), self.matrix(lambda i, j: j <= own[i] or j < first[i])
        if kind == "window":
            left, right = (r.choice([None, 1, 2, 3, 100, 2**31 - 1]) for _ in range(2))
            return masks.window(left, right), self.matrix(
                lambda i, j: (left is None or j > own[i] - left) and (right is None or j < own[i] + right)
            )
        if kind == "prefix":
            lengths = [r.randint(0, b - a) for a, b in pairwise(self.cu_k)]
            return masks.prefix(torch.tensor(lengths, dtype=torch.int32)), self.matrix(
                lambda i, j: first[i] <= j < first[i] + lengths[self.segment[i]]
            )
        cuts = sorted(r.randint(0, self.Nk) for _ in range(2 * r.randrange(4)))
        if kind == "spans":
            starts, stops = cuts[::2], cuts[1::2]
            pairs = list(zip(starts, stops, strict=True))
            return masks.spans(*(torch.tensor(t, dtype=torch.int32) for t in (starts, stops))), self.matrix(
                lambda i, j: any(a <= own[i] < b and a <= j < b for a, b in pairs)
            )
        ends = [0, *cuts, self.Nk]
        sizes = [b - a for a, b in pairwise(ends)]
        end = [next((e for e in ends if e > o), self.Nk) if o >= 0 else 0 for o in own]
        return masks.groups(torch.tensor(sizes)), self.matrix(lambda i, j: j < max(end[i], first[i]))

    def segments_leaf(self):
        return self.segments, self.matrix(lambda i, j: self.cu_k[self.segment[i]] <= j < self.cu_k[self.segment[i] + 1])

    def tree(self, depth):
        r = self.random
        if depth == 0 or r.random() < 0.2:
            return self.segments_leaf() if self.kind != "none" and r.random() < 0.2 else self.leaf()
        return self.join(r.choice("&|"), self.tree(depth - 1), self.tree(depth - 1))

    def join(self, symbol, a, b):
        if symbol == "&":
            return a[0] & b[0], a[1] & b[1]
        both = a[1] | b[1]
        self.gap |= bool((both.int().diff(dim=1) == 1).sum(1).add(both[:, :1].sum(1)).gt(1).any())
        return a[0] | b[0], both

    def mask(self):
        mask, matrix = self.tree(self.random.randrange(4))
        if self.kind == "none":
            return mask, matrix
        # The documents take part in every mask, so that prefix() and the queries of cross() know theirs.
        pair = [(mask, matrix), self.segments_leaf()]
        self.random.shuffle(pair)
        return self.join("|" if self.random.random() < 0.2 else "&", *pair)


@pytest.mark.parametrize("block", range(8))
def test_random_masks_are_their_definition(block):
    """Either every union is an interval, and bounds are the matrix, or one has a gap, and bounds and check say so."""
    gaps = proved = 0
    for seed in range(400 * block, 400 * (block + 1)):
        case = Case(seed)
        mask, matrix = case.mask()
        try:
            ours = dense(mask, case.Nq, case.Nk)
            mask.check(case.Nq, case.Nk)
        except ValueError as error:
            assert case.gap and "is no interval" in str(error), f"{seed}: {mask}: {error}"
            with pytest.raises(ValueError, match="is no interval"):
                mask.check(case.Nq, case.Nk)
            gaps += 1
        else:
            assert not case.gap and torch.equal(ours, matrix), f"{seed}: {mask}"
            proved += "|" in repr(mask)
    assert gaps > 1 and proved > 50  # both kinds occur


PROVED = [
    lambda d, s, p, g: d & (masks.causal() | s) & masks.window(3),
    lambda d, s, p, g: d & (masks.causal() | p | s),
    lambda d, s, p, g: d & (p | masks.causal()),
    lambda d, s, p, g: (d & masks.causal() & masks.window(2)) | s,
    lambda d, s, p, g: (s | masks.window(2, 2)) & d,
    lambda d, s, p, g: d & (g | p | s | masks.window(4, 4)),
    lambda d, s, p, g: (d & s) | (d & masks.causal()),
    lambda d, s, p, g: d | masks.causal(),
]


@pytest.mark.parametrize("number", range(len(PROVED)))
def test_these_unions_need_no_look_at_values(number):
    """Tensors on the meta device have no values: whatever needs them would raise."""

    def mask(device):
        cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
        starts, stops = torch.tensor([1, 5], device=device), torch.tensor([3, 8], device=device)
        spans, prefix = masks.spans(starts, stops), masks.prefix(torch.tensor([2, 0, 3], device=device))
        return PROVED[number](masks.documents(cu), spans, prefix, masks.groups(torch.tensor([2, 2, 5], device=device)))

    start, stop = mask("meta").bounds(9)
    assert start.is_meta and start.shape == stop.shape == (9,) and start.dtype == stop.dtype == torch.int32
    mask("cpu").check(9)
    assert not unproved(mask("cpu"))


def unproved(mask):
    """Whether some union in the mask must be looked at."""
    if isinstance(mask, _mask._Or) and not mask.left._touches & mask.right._touches:
        return True
    return isinstance(mask, _mask._Pair) and (unproved(mask.left) or unproved(mask.right))


def test_a_union_with_a_gap_names_its_first_row():
    mask = masks.window(2, 1) | masks.prefix(torch.tensor([2]))
    message = (
        r"window\(2, 1\) \| prefix\(1 lengths\) is no interval: query 4 sees keys \[3, 5\) by the first and \[0, 2\) by"
        " the second, with a gap between them; merge two calls of interval_attention_lse instead"
    )
    with pytest.raises(ValueError, match=message):
        mask.bounds(6)
    with pytest.raises(ValueError, match=message):
        mask.check(6)
    assert mask.bounds(4)[0].tolist() == [0, 0, 0, 0]  # no gap among the first four


def test_a_side_that_may_be_empty_proves_nothing():
    """The first operand sees nothing, so that it does not bridge the gap between the two others."""
    nothing = masks.causal() & masks.prefix(torch.tensor([0]))
    mask = nothing | masks.spans(torch.tensor([3]), torch.tensor([5])) | masks.prefix(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"query 3 sees keys \[3, 5\) by the first and \[0, 1\) by the second"):
        mask.bounds(5)


def test_more_queries_than_keys_in_a_segment():
    """The first two of the second segment's three queries stand before its only key, 4."""
    cross = masks.cross(torch.tensor([0, 1, 4]), torch.tensor([0, 4, 5]))
    for mask in (masks.causal(), masks.groups(torch.tensor([1, 1, 1, 1, 1]))):
        start, stop = (cross & mask).bounds(4)
        assert (stop - start).tolist() == [4, 0, 0, 1]
        assert (mask | cross).bounds(4)[1].tolist() == [4, 5, 5, 5]
        assert (mask | cross & masks.window(1, 1)).bounds(4)[1].tolist() == [4, 4, 4, 5]


def test_the_masks_of_the_design():
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    images = masks.spans(torch.tensor([1, 5]), torch.tensor([3, 8]))
    start, stop = (masks.documents(cu) & (masks.causal() | images) & masks.window(3)).bounds(9)
    assert start.tolist() == [0, 0, 0, 1, 4, 4, 4, 5, 6]
    assert stop.tolist() == [1, 3, 3, 4, 5, 8, 8, 8, 9]


def test_a_chunk_behind_its_cache():
    """Two new tokens behind five cached ones: without documents, and as a segment."""
    for mask in (masks.causal(), masks.cross(torch.tensor([0, 2]), torch.tensor([0, 7])) & masks.causal()):
        start, stop = (mask & masks.window(4)).bounds(2, 7)
        assert start.tolist() == [2, 3] and stop.tolist() == [6, 7]


def test_keys_of_cross_end_where_its_segments_end():
    start, stop = masks.cross(torch.tensor([0, 1, 3]), torch.tensor([0, 5, 9])).bounds(3)
    assert start.tolist() == [0, 5, 5] and stop.tolist() == [5, 9, 9]


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]])
def test_nothing(cu):
    documents = masks.documents(torch.tensor(cu, dtype=torch.int32))
    empty, lengths = torch.zeros(0, dtype=torch.int32), torch.zeros(len(cu) - 1, dtype=torch.int32)
    mask = documents & (masks.causal() | masks.spans(empty, empty) | masks.prefix(lengths) | masks.groups(empty))
    for bounds in (documents.bounds(0), mask.bounds(0), masks.causal().bounds(0), masks.spans(empty, empty).bounds(0)):
        assert [t.shape for t in bounds] == [(0,), (0,)]


def test_spans_that_are_empty():
    """Also before and behind one that is not, as padding to a fixed number of spans."""
    spans = masks.spans(torch.tensor([0, 2, 2, 5, 6, 6]), torch.tensor([0, 2, 5, 5, 6, 6]))
    start, stop = spans.bounds(6)
    assert (stop - start).tolist() == [0, 0, 3, 3, 3, 0] and start[2:5].tolist() == [2, 2, 2]


def test_devices():
    assert masks.causal().bounds(3, device="meta")[0].is_meta
    cu = torch.tensor([0, 3])
    assert masks.documents(cu).bounds(3, device="cpu")[0].device.type == "cpu"
    with pytest.raises(ValueError, match="device must be that of the mask's tensors, cpu, got meta"):
        masks.documents(cu).bounds(3, device="meta")
    with pytest.raises(ValueError, match="the masks' tensors must be on one device, got cpu and meta"):
        (masks.documents(cu) & masks.prefix(torch.zeros(1, dtype=torch.int32, device="meta"))).bounds(3)


def full(cu, starts, stops, lengths, sizes, n):
    documents = masks.documents(cu)
    mask = documents & (masks.causal() | masks.spans(starts, stops) | masks.prefix(lengths)) & masks.window(5)
    return (mask | (documents & masks.window(2, 2)) | (documents & masks.groups(sizes))).bounds(n)


def test_compiles_into_one_graph():
    compiled = torch.compile(full, fullgraph=True, backend="aot_eager", dynamic=True)
    for cu, spans, lengths, sizes in (
        ([0, 4, 4, 9], ([1, 5], [3, 8]), [1, 0, 2], [2, 5, 2]),
        ([0, 7, 10, 12], ([2, 9], [6, 12]), [3, 2, 0], [1, 3, 8]),
    ):
        arguments = [torch.tensor(t) for t in (cu, *spans, lengths, sizes)]
        for ours, theirs in zip(full(*arguments, cu[-1]), compiled(*arguments, cu[-1]), strict=True):
            assert torch.equal(ours, theirs) and theirs.dtype == torch.int32


def test_a_mask_may_come_from_outside_the_compiled_function():
    mask = masks.documents(torch.tensor([0, 4, 9])) & masks.causal()
    bounds = torch.compile(lambda: mask.bounds(9), fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(a, b) for a, b in zip(bounds, mask.bounds(9), strict=True))


def test_memory_is_linear():
    """A quarter of a million tokens: a matrix of them would have 64 G entries."""
    n = 2**18
    cu = torch.arange(0, n + 1, 64, dtype=torch.int32)
    start, stop = (masks.documents(cu) & masks.causal() & masks.window(7)).bounds(n)
    i = torch.arange(n)
    assert torch.equal(start, torch.maximum(i // 64 * 64, i - 6).int()) and torch.equal(stop, (i + 1).int())


T = torch.tensor
BAD_MASKS = [
    (lambda: masks.documents([0, 3]), TypeError, "cu_seqlens must be a tensor, got list"),
    (lambda: masks.documents(T([0.0, 3.0])), TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    (lambda: masks.documents(T([[0, 3]])), ValueError, r"cu_seqlens must have one dimension, got shape \[1, 2\]"),
    (lambda: masks.documents(T([], dtype=torch.int32)), ValueError, r"cu_seqlens must have shape \[segments \+ 1\]"),
    (lambda: masks.documents(T([1, 3])), ValueError, "cu_seqlens must start with 0, got 1"),
    (lambda: masks.documents(T([0, 3, 2])), ValueError, r"cu_seqlens must not decrease, got 3 before 2 \(entry 1\)"),
    (lambda: masks.cross(T([0, 2]), T([0, 2, 3])), ValueError, r"cu_k must have shape \[2\], got \[3\]"),
    (lambda: masks.cross(T([0, 2]), T([1, 2])), ValueError, "cu_k must start with 0, got 1"),
    (lambda: masks.window(0), ValueError, "left counts the query itself and must be between 1 and 2147483647, got 0"),
    (lambda: masks.window(3, -1), ValueError, "right counts the query itself and must be between 1 and .*, got -1"),
    (lambda: masks.window(2**31), ValueError, "left counts .*, got 2147483648"),
    (lambda: masks.window(2.0), TypeError, "left must be an integer or None, got float"),
    (lambda: masks.window(True), TypeError, "left must be an integer or None, got bool"),
    (lambda: masks.prefix(T(3)), ValueError, r"lengths must have one dimension, got shape \[\]"),
    (lambda: masks.prefix(T([2, -1])), ValueError, r"lengths must not be negative, got lengths\[1\] = -1"),
    (lambda: masks.spans(T([0, 2]), T([2])), ValueError, r"stops must have shape \[2\], got \[1\]"),
    (lambda: masks.spans(T([-1]), T([2])), ValueError, r"starts must not be negative, got starts\[0\] = -1"),
    (lambda: masks.spans(T([3]), T([2])), ValueError, "stops must not lie before starts, got span 0 from 3 to 2"),
    (lambda: masks.spans(T([0, 3]), T([4, 5])), ValueError, "spans must not overlap, .* stops at 4 before .* at 3"),
    (lambda: masks.spans(T([4, 0]), T([5, 2])), ValueError, "starts must ascend"),
    (lambda: masks.groups(T([2, -2])), ValueError, r"sizes must not be negative, got sizes\[1\] = -2"),
    (lambda: masks.documents(T([0, 3])) & masks.documents(T([0, 3])), ValueError, "a mask has one set of documents"),
    (lambda: masks.causal() & 3, TypeError, "unsupported operand"),
    (lambda: masks.causal() | None, TypeError, "unsupported operand"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_MASKS)
def test_bad_masks(make, error, message):
    with pytest.raises(error, match=message):
        make()


BAD_BOUNDS = [
    (masks.causal(), (2.5,), TypeError, "Nq must be an integer, got float"),
    (masks.causal(), (True,), TypeError, "Nq must be an integer, got bool"),
    (masks.causal(), (-1,), ValueError, "Nq must not be negative, got -1"),
    (masks.causal(), (2, -1), ValueError, "Nk must not be negative, got -1"),
    (masks.documents(T([0, 3])), (4,), ValueError, "cu_seqlens must end with Nq, 4, got 3"),
    (masks.documents(T([0, 3])), (3, 4), ValueError, "Nk must be Nq, 3, for documents, got 4"),
    (masks.documents(T([0])), (4,), ValueError, "cu_seqlens must end with Nq, 4, got 0"),
    (masks.cross(T([0, 1]), T([0, 3])), (2, 3), ValueError, "cu_q must end with Nq, 2, got 1"),
    (masks.cross(T([0, 1]), T([0, 3])), (1, 4), ValueError, "cu_k must end with Nk, 4, got 3"),
    (masks.prefix(T([1, 2])), (3,), ValueError, r"lengths must have shape \[1\], one: without documents .* got \[2\]"),
    (
        masks.documents(T([0, 1, 3])) & masks.prefix(T([1])),
        (3,),
        ValueError,
        r"lengths must have shape \[2\], one for each document, got \[1\]",
    ),
    (
        masks.documents(T([0, 1, 3])) & (masks.causal() | masks.prefix(T([1, 3]))),
        (3,),
        ValueError,
        r"lengths must not exceed the document, 2 keys, got lengths\[1\] = 3",
    ),
    (masks.spans(T([1]), T([4])), (3,), ValueError, r"stops must not exceed Nk, 3, got stops\[0\] = 4"),
    (masks.groups(T([1, 1])), (3,), ValueError, "sizes must add up to Nk, 3, got 2"),
]


@pytest.mark.parametrize(("mask", "sizes", "error", "message"), BAD_BOUNDS)
def test_bad_bounds(mask, sizes, error, message):
    with pytest.raises(error, match=message):
        mask.bounds(*sizes)
    with pytest.raises(error, match=message):
        mask.check(*sizes)


def test_check_looks_where_bounds_may_not(monkeypatch):
    """As on a GPU: without a look at values bad ones stay inside the keys, `check` and `validate` find them."""
    monkeypatch.setattr("vlkern._checks.values_may_be_read", lambda *tensors: False)
    for mask, n, message in (
        (masks.documents(T([0, 3, 2])), 5, "cu_seqlens must not decrease"),
        (masks.documents(T([2, 9])), 5, "cu_seqlens must start with 0"),
        (masks.documents(T([0, 3])), 5, "cu_seqlens must end with Nq"),
        (masks.documents(T([0])) & masks.causal(), 5, "cu_seqlens must end with Nq"),
        (masks.spans(T([3]), T([9])), 5, "stops must not exceed"),
        (masks.causal() & masks.groups(T([], dtype=torch.int32)), 5, "sizes must add up"),
        (masks.prefix(T([7])), 5, "lengths must not exceed"),
        (masks.window(1, 1) | masks.prefix(T([1])), 5, "is no interval: query 2"),
    ):
        start, stop = mask.bounds(n)
        assert int(start.min()) >= 0 and int(stop.max()) <= n and bool((start <= stop).all())
        with pytest.raises(ValueError, match=message):
            mask.check(n)


def test_validate_reads_values_on_request():
    with validate(True), pytest.raises(ValueError, match="cu_seqlens must end with Nq, 4, got 3"):
        masks.documents(T([0, 3])).bounds(4)


def test_masks_say_what_they_are():
    cu = torch.tensor([0, 2, 5])
    mask = masks.documents(cu) & (masks.causal() | masks.spans(T([0]), T([2]))) & masks.window(4)
    assert repr(mask) == "((documents(2 segments) & (causal() | spans(1))) & window(4, None))"


@pytest.mark.parametrize("module", [_kinds, _mask])
def test_examples_of_the_docstrings(module):
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch, "masks": masks})
    assert tried > 2 and failed == 0
