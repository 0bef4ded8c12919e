"""The tokenizer: what fits comes back, what does not is cut before the end token; merges only make texts shorter."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlkern import data
from vlkern.data import ByteTokenizer, learn_merges

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
batches = st.lists(texts, min_size=1, max_size=4)


@given(st.lists(texts, max_size=4), st.integers(1, 40))
def test_every_row_is_a_text_an_end_and_pads(batch, length):
    ids = ByteTokenizer(length)(batch)
    assert ids.shape == (len(batch), length)
    assert ids.dtype == torch.int64
    for row, text in zip(ids.tolist(), batch, strict=True):
        content = (" " + text.lower()).encode()[: length - 1]
        assert row == [b + 2 for b in content] + [1] + [0] * (length - 1 - len(content))


@given(batches, batches, st.integers(0, 20))
def test_round_trip_of_what_fits(learned_from, batch, count):
    merges = learn_merges(learned_from, count)
    longest = max(len(t.lower().encode()) for t in batch)
    tokenizer = ByteTokenizer(longest + 2, merges)
    ids = tokenizer(batch)
    assert tokenizer.decode(ids) == [t.lower() for t in batch]
    assert ids.max() < tokenizer.vocabulary == 258 + len(merges)


@given(texts, st.integers(1, 20))
def test_a_cut_text_keeps_a_prefix(text, length):
    tokenizer = ByteTokenizer(length)
    (back,) = tokenizer.decode(tokenizer([text]))
    assert text.lower().startswith(back.rstrip("\ufffd")) or back == text.lower()


def test_known_ids():
    expected = [[34, 101, 99, 118, 1, 0], [34, 103, 110, 103, 114, 1]]
    assert ByteTokenizer(6)(["Cat", "elephant"]).tolist() == expected
    assert ByteTokenizer(1)(["Cat"]).tolist() == [[1]]
    assert ByteTokenizer(3)([""]).tolist() == [[34, 1, 0]]
    assert ByteTokenizer(3)([]).shape == (0, 3)


def test_merges_by_hand():
    # "low" 5 times, "lower" twice, "new" 6 times, each after a blank
    merges = learn_merges(["low low low low low", "lower lower", "new new new new new new"], 4)
    b = {c: ord(c) + 2 for c in " lowernw"}
    # The pairs (l, o), (o, w) and (blank, l) come 7 times; the smallest ids win, and (blank, l) is smallest.
    assert merges[0] == (b[" "], b["l"])
    assert merges[1] == (b["o"], b["w"])  # (o, w) 7 times; (blank l, o) 7 times has the larger first id
    assert merges[2] == (258, 259)  # blank l + ow
    assert merges[3] == (b[" "], b["n"])  # 6 times, as (e, w) and (n, e)
    assert ByteTokenizer(4, merges)(["low"]).tolist() == [[260, 1, 0, 0]]


def test_merges_stop_when_nothing_repeats():
    assert learn_merges(["abc"], 10) == []
    assert learn_merges([], 10) == []
    assert learn_merges(["aaa bbb aaa"], 0) == []


def test_merges_do_not_depend_on_the_order_of_the_texts():
    captions = list(itertools.chain(*data.load_pairs([data.clipart_mini() / "test.tar"], 8).captions))
    merges = learn_merges(captions, 200)
    assert merges == learn_merges(captions[::-1], 200)
    assert len(merges) == 200
    whole, cut = ByteTokenizer(300), ByteTokenizer(300, merges)
    count = lambda t: int((t(captions) != 0).sum())  # noqa: E731
    assert count(cut) < 0.6 * count(whole)


def test_lone_surrogate():
    assert ByteTokenizer(4).decode(ByteTokenizer(4)(["\ud800"])) == ["?"]


def test_bad_input():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        ByteTokenizer(0)
    with pytest.raises(TypeError, match="texts must be a sequence of strings, got one string"):
        ByteTokenizer(8)("cat")
