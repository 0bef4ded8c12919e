"""Boxes in generated text: tokens of the papers' code, and texts that models should not write but do."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import ROOT

from vlkern.boxes import Detection, bins, masks, parse, text, to_text, unbin

GOLDEN = np.load(ROOT / "tests/golden/box_loc_table.npz")
BOX = "<loc0132><loc0168><loc0659><loc0986>"
MASK = "".join(f"<seg{code:03d}>" for code in range(16))


def test_golden_bins():
    assert torch.equal(bins(torch.from_numpy(GOLDEN["in/boxes"])), torch.from_numpy(GOLDEN["out/loc_bins"]))
    assert np.array_equal(unbin(torch.from_numpy(GOLDEN["out/loc_bins"])).numpy(), GOLDEN["out/boxes_decoded"])


def test_halves_go_to_the_even_neighbour():
    v = torch.tensor([2.5 / 1023, 3.5 / 1023])
    assert (v * 1023).tolist() == [2.5, 3.5]
    assert bins(v).tolist() == [2, 4]


def test_well_formed():
    answer = parse(f"{BOX} a cat ; {BOX}{MASK} dog;{BOX}")
    assert [(found.label, found.codes) for found in answer.objects] == [
        ("a cat", None),
        ("dog", tuple(range(16))),
        ("", None),
    ]
    assert answer.objects[0].box == (132 / 1023, 168 / 1023, 659 / 1023, 986 / 1023)
    assert answer.problems == ()


@pytest.mark.parametrize("text", ["", " ", "a cat; and a dog", "<loc12> <loc> <segment>", ";;"])
def test_words_are_no_problem(text):
    assert parse(text) == parse("")
    assert parse(text).problems == ()


@pytest.mark.parametrize(
    ("text", "labels", "problem"),
    [
        ("<loc0001><loc0002><loc0003> cat", [], "object 1 ('cat') has 3 location tokens instead of 4"),
        (f"{BOX}<loc0001> cat", [], "has 5 location tokens"),
        (f"{BOX} cat ; dog", ["cat"], "object 2 ('dog') has 0 location tokens"),
        ("<loc0001><loc0002><loc1024><loc0004> cat", [], "location token above 1023: 1024"),
        ("<loc0005><loc0002><loc0005><loc0004> cat", [], "empty box: rows 5 to 5, columns 2 to 4 of 1023"),
        ("<loc0001><loc0009><loc0005><loc0004> cat", [], "empty box: rows 1 to 5, columns 9 to 4"),
        (f"{BOX}<seg001><seg002> cat", ["cat"], "no readable mask: 2 codes up to 2"),
        (f"{BOX}{MASK.replace('015', '128')} cat", ["cat"], "no readable mask: 16 codes up to 128"),
        (f"{BOX} cat {BOX} dog", ["cat", "dog"], "object 2 begins without ';' before it"),
        (f"{BOX}{MASK}{BOX} dog", ["", "dog"], "object 2 begins without ';' before it"),
        (f"{MASK} cat", [], "0 location tokens"),
        (f"here: {BOX} cat", ["cat"], "object 1 ('here:') has 0 location tokens"),
        (f"{BOX} cat ; {BOX[:-3]}", ["cat"], "has 3 location tokens"),
    ],
)
def test_malformed_is_reported(text, labels, problem):
    answer = parse(text)
    assert [found.label for found in answer.objects] == labels
    assert len(answer.problems) == 1
    assert problem in answer.problems[0]


PIECES = st.sampled_from(
    ["<loc0001>", "<loc1023>", "<loc9999>", "<seg000>", "<seg999>", ";", "cat", "<", ">", "é", "\n"]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=20))
def test_nothing_crashes(pieces):
    answer = parse("".join(pieces))
    assert all(box.box[0] < box.box[2] and box.box[1] < box.box[3] for box in answer.objects)


number = st.floats(0, 1, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(number, number, number, number, st.sampled_from(["cat", "a dog", ""]), st.booleans()), max_size=4
    )
)
def test_there_and_back(rows):
    objects = []
    for y0, x0, y1, x1, label, mask in rows:
        found = Detection(
            (min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1)), label, tuple(range(16)) if mask else None
        )
        if found.box[2] - found.box[0] > 2e-3 and found.box[3] - found.box[1] > 2e-3:
            objects.append(found)
    answer = parse(to_text(objects))
    assert answer.problems == ()
    assert [(found.label, found.codes) for found in answer.objects] == [(o.label, o.codes) for o in objects]
    for got, wanted in zip(answer.objects, objects, strict=True):
        assert got.box == pytest.approx(wanted.box, abs=0.5 / 1023 + 1e-6)
    assert to_text(answer.objects) == to_text(objects)


@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0), (0.0, 0.0, 1.1, 1.0), (-0.1, 0.0, 1.0, 1.0), (float("nan"), 0, 1, 1)])
def test_bad_boxes(box):
    with pytest.raises(ValueError, match="box must be"):
        Detection(box)


@pytest.mark.parametrize("codes", [(1,) * 15, (128,) * 16, (-1,) * 16])
def test_bad_codes(codes):
    with pytest.raises(ValueError, match="codes must be"):
        Detection((0.0, 0.0, 1.0, 1.0), "", codes)


@pytest.mark.parametrize("module", [text, masks])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted > 2
    assert not found.failed
