"""The byte tokenizer: what fits comes back, what does not is cut before the end token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlkern.data import ByteTokenizer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.lists(texts, max_size=4), st.integers(1, 40))
def test_every_row_is_a_text_an_end_and_pads(batch, length):
    ids = ByteTokenizer(length)(batch)
    assert ids.shape == (len(batch), length)
    assert ids.dtype == torch.int64
    for row, text in zip(ids.tolist(), batch, strict=True):
        data = text.lower().encode()[: length - 1]
        assert row == [b + 2 for b in data] + [1] + [0] * (length - 1 - len(data))


@given(st.lists(texts, min_size=1, max_size=4))
def test_round_trip_of_what_fits(batch):
    longest = max(len(t.lower().encode()) for t in batch)
    tokenizer = ByteTokenizer(longest + 1)
    assert tokenizer.decode(tokenizer(batch)) == [t.lower() for t in batch]


@given(texts, st.integers(1, 20))
def test_a_cut_text_keeps_a_prefix(text, length):
    tokenizer = ByteTokenizer(length)
    (back,) = tokenizer.decode(tokenizer([text]))
    assert text.lower().startswith(back.rstrip("\ufffd")) or back == text.lower()


def test_known_ids():
    assert ByteTokenizer(6)(["Cat", "elephant"]).tolist() == [[101, 99, 118, 1, 0, 0], [103, 110, 103, 114, 106, 1]]
    assert ByteTokenizer(1)(["Cat"]).tolist() == [[1]]
    assert ByteTokenizer(3)([""]).tolist() == [[1, 0, 0]]


def test_lone_surrogate():
    assert ByteTokenizer(4).decode(ByteTokenizer(4)(["\ud800"])) == ["?"]


def test_ids_stay_inside_the_vocabulary():
    everything = "".join(map(chr, range(1, 0x800)))
    ids = ByteTokenizer(5000)([everything])
    assert ids.min() >= 0 and ids.max() < ByteTokenizer.vocabulary


def test_bad_input():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        ByteTokenizer(0)
    with pytest.raises(TypeError, match="texts must be a sequence of strings, got one string"):
        ByteTokenizer(8)("cat")
