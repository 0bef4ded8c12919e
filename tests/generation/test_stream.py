"""Streamed text: whole characters, nothing of a stop string, and the same text however it is cut into tokens."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkern import data
from vlkern.generation.session import chunks
from vlkern.generation.stream import TextStream, check_stops

BYTES = data.load_vocabulary("bytes")


class Words:
    """A vocabulary whose tokens are these pieces."""

    blank = False

    def __init__(self, pieces):
        self.pieces = pieces

    def piece(self, token):
        return self.pieces[token]


def run(pieces, stops):
    """(text, what was shown in turn, after how many tokens it stopped)"""
    shown = []
    stream = TextStream(Words(pieces), stops, shown.append)
    count = next((i for i in range(len(pieces)) if stream.push(i)), None)
    if count is None:
        stream.end()
    return stream.text, shown, count


def cut(text, places):
    """The bytes of a text in pieces."""
    whole = text.encode()
    edges = sorted({0, len(whole), *(place % (len(whole) + 1) for place in places)})
    return [whole[a:b] for a, b in itertools.pairwise(edges)]


def reference(text, stops):
    """Reading character by character, cut before the first string to be complete; the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


LETTERS = st.text(alphabet="abé€🙂", max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=LETTERS, stops=st.lists(LETTERS.filter(bool), max_size=3), places=st.lists(st.integers(0, 60), max_size=8))
def test_text_does_not_depend_on_tokens(text, stops, places):
    found, shown, count = run(cut(text, places), stops)
    want, stopped = reference(text, stops)
    assert found == want == "".join(shown)
    assert (count is not None) == stopped
    assert all(shown) and "�" not in found


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "count"),
    [
        (["a", "b", "c"], ["bc"], ["a"], 2),
        (["a", "b", "x", "c"], ["bc"], ["a", "bx", "c"], None),  # held back, and then shown after all
        (["xEN", "Dy"], ["END"], ["x"], 1),
        (["ab"], ["abc", "b"], ["a"], 0),  # "b" is complete first, whatever could have become "abc"
        (["ab"], ["b", "ab"], [], 0),
        (["aab", "aac"], ["aabaac"], [], 1),
        (["aab", "aa"], ["aabaac"], ["aabaa"], None),
        (["STOP"], [], ["STOP"], None),
    ],
)
def test_stop_strings(pieces, stops, shown, count):
    assert run([piece.encode() for piece in pieces], stops) == ("".join(shown), shown, count)


def test_half_characters_wait():
    euro = "€".encode()
    assert run([b"1 ", euro[:1], euro[1:2], euro[2:], b"!"], []) == ("1 €!", ["1 ", "€", "!"], None)
    assert run([b"a", euro[:2], b"b"], []) == ("a�b", ["a", "�b"], None)
    assert run([b"a", euro[:2]], []) == ("a�", ["a", "�"], None)


def test_the_blank_before_a_text_is_not_part_of_it():
    shown = []
    stream = TextStream(BYTES, (), shown.append)
    for token in [BYTES.end, *BYTES.encode("a b"), BYTES.token("<loc0007>")]:
        stream.push(token)
    stream.end()
    assert stream.text == "".join(shown) == "a b<loc0007>"


def test_bad_stops():
    assert check_stops("ab") == ("ab",) and check_stops(["a", "b"]) == ("a", "b")
    with pytest.raises(ValueError, match="stop must be strings that are not empty"):
        check_stops(["a", ""])
    with pytest.raises(TypeError, match="stop must be strings, got int"):
        check_stops([3])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_chunks_cover_every_row_and_cut_no_block(data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    room = data.draw(st.integers(1, 12))
    untils = []
    for length in lengths:
        until = list(range(length))
        for first, last in data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=2)):
            for i in range(first, min(last + 1, length)):
                until[i] = max(until[i], min(last, length - 1))
        untils.append(until)
    given = data.draw(st.sampled_from([untils, None]))
    found = list(chunks(lengths, room, given))
    pieces = [piece for chunk in found for piece in chunk]
    for row, length in enumerate(lengths):
        mine = [(piece.start, piece.stop) for piece in pieces if piece.row == row]
        assert [a for a, _ in mine] == [0, *(b for _, b in mine[:-1])] and mine[-1][1] == length
        for start, stop in mine:
            assert stop > start
            if given:
                assert max(given[row][start:stop]) < stop
    for chunk in found:
        assert [piece.row for piece in chunk] == sorted({piece.row for piece in chunk})
        # More than the room only for one block that is larger.
        assert sum(stop - start for _, start, stop in chunk) <= room or (given and len(chunk) == 1)
    if given is None:
        assert len(found) == -(-sum(lengths) // room)
