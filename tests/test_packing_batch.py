"""Packed batches of examples of several kinds of data, and streams of them."""

import doctest
import io
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlkern import data, masks
from vlkern.packing import METHODS, Example, PackedBatch, batch, packed_batches, stream


def example(seed, n=None):
    """A text with images: ids, labels, where the images stand, their patches, the prefix and a name."""
    r = np.random.default_rng(seed)
    n = int(r.integers(1, 12)) if n is None else n
    cuts = np.sort(r.choice(n + 1, size=min(2 * int(r.integers(0, 3)), (n + 1) // 2 * 2), replace=False))
    return Example(
        {"ids": torch.tensor(r.integers(0, 100, n)), "weights": torch.tensor(r.random((n, 2)), dtype=torch.float32)},
        {"images": torch.tensor(cuts.reshape(-1, 2))},
        {"patches": [torch.tensor(r.random((int(r.integers(1, 5)), 3))) for _ in range(len(cuts) // 2)]},
        {"prefix": int(r.integers(0, n + 1)), "grid": torch.tensor([2, n]), "name": f"example {seed}", "loss": 0.5},
    )


def assert_same(ours, theirs):
    for name, x in theirs.tokens.items():
        assert torch.equal(ours.tokens[name], x) and ours.tokens[name].dtype == x.dtype
    assert torch.equal(ours.spans["images"], theirs.spans["images"].int())
    assert len(ours.parts["patches"]) == len(theirs.parts["patches"])
    assert all(torch.equal(a, b) for a, b in zip(ours.parts["patches"], theirs.parts["patches"], strict=True))
    assert torch.equal(ours.values["grid"], theirs.values["grid"]) and ours.values["name"] == theirs.values["name"]
    assert int(ours.values["prefix"]) == theirs.values["prefix"] and float(ours.values["loss"]) == 0.5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_unpack_undoes_of(seeds):
    examples = [example(seed) for seed in seeds]
    packed = PackedBatch.of(examples)
    assert len(packed) == len(examples) and packed.total == sum(map(len, examples))
    assert packed.cu_seqlens.dtype == packed.positions.dtype == torch.int32
    assert packed.positions.tolist() == [i for e in examples for i in range(len(e))]
    assert [len(x) for x in packed.split(packed.tokens["weights"])] == [len(e) for e in examples]
    for ours, theirs in zip(packed.unpack(), examples, strict=True):
        assert_same(ours, theirs)
    for again, theirs in zip(PackedBatch.of(packed.unpack()).unpack(), examples, strict=True):
        assert_same(again, theirs)


def test_a_mask_of_everything_in_a_batch():
    """What a model of packed texts with images does: the mask of each document alone stands on the diagonal."""
    examples = [example(seed) for seed in range(12)]
    packed = PackedBatch.of(examples)

    def mask(b):
        images, prefix = b.spans["images"], b.values["prefix"]
        ours = masks.causal() | masks.spans(images.starts, images.stops) | masks.prefix(prefix)
        return (masks.documents(b.cu_seqlens) & ours).bounds(b.total)

    starts, stops = mask(packed)
    for d, e in enumerate(examples):
        a, b = packed.cu_seqlens[d : d + 2].tolist()
        start, stop = mask(PackedBatch.of([e]))
        assert torch.equal(starts[a:b], start + a) and torch.equal(stops[a:b], stop + a)


def test_parts_are_a_packed_batch_of_their_own():
    packed = PackedBatch.of([example(seed) for seed in range(8)])
    patches = packed.parts["patches"]
    assert patches.values.shape == (int(patches.cu_seqlens[-1]), 3)
    assert len(patches.cu_seqlens) - 1 == int(patches.cu_parts[-1]) == len(packed.spans["images"].starts)
    masks.documents(patches.cu_seqlens).check(len(patches.values))


def test_no_document_has_a_part():
    texts = [Example({"ids": torch.arange(3)}, parts={"patches": []}) for _ in range(2)]
    packed = PackedBatch.of(texts)
    assert packed.parts["patches"].values.shape == (0,) and packed.parts["patches"].cu_seqlens.tolist() == [0]
    assert [e.parts["patches"] for e in packed.unpack()] == [[], []]


def test_values_are_stacked_where_they_can_be():
    def of(*values):
        return PackedBatch.of([Example({"ids": torch.zeros(1)}, values={"v": v}) for v in values]).values["v"]

    assert torch.equal(of(1, 2), torch.tensor([1, 2])) and torch.equal(of(True, False), torch.tensor([True, False]))
    assert torch.equal(of(0.5, 1.5), torch.tensor([0.5, 1.5]))
    assert of(torch.zeros(2), torch.ones(2)).shape == (2, 2)
    assert of("a", "b") == ("a", "b") and of(1, 2.0) == (1, 2.0)
    ragged = of(torch.zeros(2), torch.zeros(3))
    assert isinstance(ragged, tuple) and [len(x) for x in ragged] == [2, 3]


def tensors(b):
    yield from (b.cu_seqlens, *b.tokens.values())
    for group in (*b.spans.values(), *b.parts.values()):
        yield from group
    yield from (x for x in b.values.values() if isinstance(x, torch.Tensor))


def test_to_moves_every_tensor():
    packed = PackedBatch.of([example(1), example(2)])
    moved = packed.to("meta")
    assert len(list(tensors(moved))) == 12 and all(t.is_meta for t in tensors(moved))
    assert moved.values["name"] == packed.values["name"] and not packed.cu_seqlens.is_meta
    assert moved.positions.is_meta  # no values are looked at


def test_pin_memory_reaches_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t.to("meta"))  # there may be no GPU to pin for
    pinned = PackedBatch.of([example(1), example(2)]).pin_memory()
    assert all(t.is_meta for t in tensors(pinned))


def test_it_is_a_collate_function_and_crosses_processes():
    loader = torch.utils.data.DataLoader(
        [example(seed) for seed in range(4)], batch_size=2, collate_fn=PackedBatch.of, num_workers=1
    )
    batches = list(loader)
    assert [len(b) for b in batches] == [2, 2]
    assert_same(batches[1].unpack()[1], example(3))


T = torch.tensor
BAD_EXAMPLES = [
    ({"tokens": {}}, ValueError, "tokens must have at least one field, got none"),
    ({"tokens": {"a": [1]}}, TypeError, r"tokens\['a'\] must be a tensor, got list"),
    ({"tokens": {"a": T(1)}}, ValueError, r"tokens\['a'\] must have shape \[n, \.\.\.\] with n > 0, got \[\]"),
    ({"tokens": {"a": torch.zeros(0, 3)}}, ValueError, r"tokens\['a'\] must have shape .* n > 0, got \[0, 3\]"),
    ({"tokens": {"a": T([1, 2]), "b": T([1])}}, ValueError, r"tokens\['b'\] must have 2 tokens .*, got 1"),
    ({"spans": {"s": T([[0.0, 1.0]])}}, TypeError, r"spans\['s'\] must be int32 or int64, got torch.float32"),
    ({"spans": {"s": T([0, 1])}}, ValueError, r"spans\['s'\] must have shape \[m, 2\], got \[2\]"),
    ({"spans": {"s": T([[0, 3]])}}, ValueError, r"spans\['s'\] must be ranges inside the 2 tokens, got \[\[0, 3\]\]"),
    ({"spans": {"s": T([[2, 1]])}}, ValueError, r"must be ranges inside"),
    ({"spans": {"s": T([[-1, 1]])}}, ValueError, r"must be ranges inside"),
    ({"parts": {"p": [torch.zeros(0, 3)]}}, ValueError, r"parts\['p'\]\[0\] must have shape \[k, .*, got \[0, 3\]"),
    ({"parts": {"p": [T([1]), None]}}, TypeError, r"parts\['p'\]\[1\] must be a tensor, got NoneType"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_EXAMPLES)
def test_bad_examples(arguments, error, message):
    with pytest.raises(error, match=message):
        Example(**({"tokens": {"a": T([1, 2])}} | arguments))


def of(**arguments):
    return Example(**({"tokens": {"a": T([1, 2])}} | arguments))


BAD_BATCHES = [
    ([], ValueError, "examples must hold at least one example, got none"),
    ([of(), {"a": T([1])}], TypeError, "examples must hold Examples, got dict at 1"),
    ([of(), of(tokens={"b": T([1])})], ValueError, r"the same tokens, \['a'\] as the first one, got \['b'\] at 1"),
    ([of(), of(values={"v": 1})], ValueError, r"examples must have the same values, \[\] .*, got \['v'\] at 1"),
    (
        [of(), of(tokens={"a": T([1.0])})],
        ValueError,
        r"tokens\['a'\] must be torch.int64 .*, got torch.float32 .* at 1",
    ),
    ([of(), of(tokens={"a": T([[1]])})], ValueError, r"tokens\['a'\] must be torch.int64"),
]


@pytest.mark.parametrize(("examples", "error", "message"), BAD_BATCHES)
def test_bad_batches(examples, error, message):
    with pytest.raises(error, match=message):
        PackedBatch.of(examples)


def test_split_wants_all_tokens():
    with pytest.raises(ValueError, match=r"x must have shape \[4, 3\], got \[5, 3\]"):
        PackedBatch.of([of(), of()]).split(torch.zeros(5, 3))


@pytest.mark.parametrize("buffer", [1, 5, 100])
@pytest.mark.parametrize("method", METHODS)
def test_a_stream_loses_nothing(method, buffer):
    examples = [example(seed) for seed in range(40)]
    batches = list(packed_batches(iter(examples), 16, method=method, buffer=buffer))
    names = [name for b in batches for name in b.values["name"]]
    assert sorted(names) == sorted(e.values["name"] for e in examples)
    assert all(0 < b.total <= 16 for b in batches)
    by_name = {e.values["name"]: e for e in examples}
    for b in batches:
        for e in b.unpack():
            assert_same(e, by_name[e.values["name"]])
    place = [int(name.split()[1]) for name in names]
    for b in batches:
        inside = [int(name.split()[1]) for name in b.values["name"]]
        assert inside == sorted(inside)
    if method != "first_fit":  # whose batches leave when they are full
        firsts = [int(b.values["name"][0].split()[1]) for b in batches]
        assert firsts == sorted(firsts)  # in the order of the stream
    if method == "in_order" or buffer == 1:
        assert place == list(range(40))


def test_a_stream_is_read_as_far_as_needed():
    def endless():
        while True:
            yield Example({"ids": torch.arange(3)})

    batches = packed_batches(endless(), 10, buffer=7)
    assert [next(batches).total for _ in range(5)] == [9, 9, 3, 9, 9]


def greedy(lengths, capacity, buffer):
    """The examples of each batch by the words of the docs: while the stream lasts, and what is held at its end."""
    left, opened = [], []
    for i, length in enumerate(lengths):
        if sum(map(len, opened)) == buffer:
            fullest = max(opened, key=lambda batch: sum(lengths[i] for i in batch))  # the first of several
            opened.remove(fullest)
            left.append(fullest)
        room = [batch for batch in opened if sum(lengths[i] for i in batch) + length <= capacity]
        if not room:
            opened.append([])
            room = opened[-1:]
        room[0].append(i)
        if sum(lengths[i] for i in room[0]) == capacity:
            opened.remove(room[0])
            left.append(room[0])
    return left, sorted(i for batch in opened for i in batch)


@pytest.mark.parametrize("buffer", [1, 2, 7, 30, 1000])
def test_first_fit_of_a_stream_is_the_naive_one(buffer):
    lengths = np.random.default_rng(buffer).integers(1, 17, 200).tolist()
    examples = [Example({"a": torch.zeros(n)}, values={"i": i}) for i, n in enumerate(lengths)]
    ours = [b.values["i"].tolist() for b in packed_batches(examples, 16, method="first_fit", buffer=buffer)]
    left, held = greedy(lengths, 16, buffer)
    assert ours[: len(left)] == left
    rest = packed_batches([examples[i] for i in held], 16)  # packed anew, longest first
    assert ours[len(left) :] == [b.values["i"].tolist() for b in rest]


def test_first_fit_holds_no_more_than_it_says():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Example({"ids": torch.arange(7)})  # no two of them fit

    batches = packed_batches(endless(), 10, method="first_fit", buffer=5)
    assert [next(batches).total for _ in range(3)] == [7, 7, 7]
    assert read == 5 + 3


def test_an_empty_stream():
    for method in METHODS:
        assert list(packed_batches([], 10, method=method)) == []


BAD_STREAMS = [
    (([of()] * 3 + [of(tokens={"a": torch.arange(9)})], 8), {"buffer": 2}, ValueError, "at most 8 tokens.* got 9 at 3"),
    (([of(), None], 8), {}, TypeError, "examples must hold Examples, got NoneType at 1"),
    (([], 0), {}, ValueError, "capacity must be between 1 and 2147483647, got 0"),
    (([], 8.5), {}, TypeError, "capacity must be an integer, got float"),
    (([], 8), {"buffer": 0}, ValueError, "buffer must be above 0, got 0"),
    (([], 8), {"buffer": "x"}, TypeError, "buffer must be an integer, got str"),
    (([], 8), {"method": "best_fit"}, ValueError, "method must be one of first_fit_decreasing, .* got 'best_fit'"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_STREAMS)
def test_bad_streams(arguments, options, error, message):
    with pytest.raises(error, match=message):
        list(packed_batches(*arguments, **options))


def clipart_sizes(shard):
    """(width, height) of every picture of a shard."""
    with tarfile.open(shard) as tar:
        for member in tar:
            if not member.name.endswith((".json", ".txt")):
                yield Image.open(io.BytesIO(tar.extractfile(member).read())).size


def patches(sizes, seed=0):
    """Tokens of pictures whose area is R x R, R ~ U(64, 256), at their aspect ratio, in patches of 16 x 16."""
    sides = np.random.default_rng(seed).uniform(64, 256, len(sizes))
    ratio = np.sqrt([w / h for w, h in sizes])
    return np.maximum(sides * ratio // 16, 1).astype(int) * np.maximum(sides / ratio // 16, 1).astype(int)


def test_padding_of_the_clipart_set_is_below_two_percent():
    """The pictures that come with vlkern, in sequences of 256 tokens, streamed in order."""
    sizes = list(clipart_sizes(data.clipart_mini() / "test.tar"))
    assert len(sizes) >= 400
    lengths = patches(sizes * 5)  # five epochs: every time another resolution
    examples = [Example({"i": torch.zeros(n)}) for n in lengths.tolist()]
    padding = {}
    for method in METHODS:
        batches = list(packed_batches(examples, 256, method=method))
        padding[method] = 1 - lengths.sum() / (256 * len(batches))
    assert 0 <= padding["first_fit_decreasing"] < 0.02
    assert 0 <= padding["first_fit"] < 0.02
    assert padding["in_order"] > 0.2


@pytest.mark.parametrize("module", [batch, stream])
def test_examples_of_the_docstrings(module):
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 1 and failed == 0
