"""Questions about pictures: functions of their numbers, true boxes, packed as a prefix-LM."""

import json

import pytest
import shards
import torch

from vlkern import data
from vlkern.boxes import parse
from vlkern.data import BytePieces, Layout, PairShards, Tasks, pack_examples, prefixed_batches
from vlkern.data.tasks import GRID

LAYOUT = Layout(BytePieces(), image_token=1283, image_count=4)
COLOURS = {"red/dark": (200, 0, 0), "green": (0, 200, 0), "blue_grey/light": (0, 0, 200)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Plain colours; every fourth has no class, one is no picture."""
    members = {}
    for i in range(12):
        name = list(COLOURS)[i % 3]
        record = {"captions": [f"{i} is one", f"{i} is two"], "category": name, "width": 20 + 5 * i, "height": 40}
        if i % 4 == 3:
            del record["category"]
        members[f"{i:03}.png"] = shards.picture(COLOURS[name], size=(20 + 5 * i, 40)) if i != 5 else b"nothing"
        members[f"{i:03}.json"] = json.dumps(record).encode()
    return PairShards(shards.write(tmp_path_factory.mktemp("data") / "train.tar", members), 32)


def test_kinds(pairs):
    seen = {}
    tasks = Tasks(pairs, 32)
    for draw in range(40):
        example = tasks(0, draw)
        seen.setdefault(example.prefix, set()).add(example.suffix)
    assert set(seen) == {"caption en", "answer en category", "detect all classes"}
    assert seen["caption en"] == {"0 is one", "0 is two"} and seen["answer en category"] == {"red"}
    assert {Tasks(pairs, 32, kinds=["category"])(i, 1).suffix for i in (2, 8)} == {"blue grey"}
    assert Tasks(pairs, 32, kinds=["category"])(3, 1).prefix == "caption en"  # it has no class
    # The next picture stands in for one that cannot be read, with its own class.
    assert Tasks(pairs, 32, kinds=["category"])(5, 1).suffix == "red"
    for kinds in ([], ["colour"]):
        with pytest.raises(ValueError, match="kinds must be some of caption, category, detect, got"):
            Tasks(pairs, 32, kinds=kinds)


def test_boxes_are_where_the_pictures_are(pairs):
    tasks, counts = Tasks(pairs, 64, kinds=["detect"]), set()
    for draw in range(60):
        example = tasks(draw % 3, draw)
        counts.add(len(example.objects))
        boxes = [found.box for found in example.objects]
        assert boxes == sorted(boxes)
        painted = torch.zeros(64, 64, dtype=torch.bool)
        for found in example.objects:
            edges = [edge * GRID for edge in found.box]
            assert edges == [round(edge) for edge in edges]
            top, left, bottom, right = found.pixels(64, 64)
            inside = example.pixels[:, top:bottom, left:right].flatten(1).float()
            colour = {"red": (200, 0, 0), "green": (0, 200, 0), "blue grey": (0, 0, 200)}.get(found.label)
            mean = inside.mean(1).tolist()
            assert found.label == "picture" or mean == pytest.approx(colour, abs=1)
            assert not painted[top:bottom, left:right].any()
            painted[top:bottom, left:right] = True
        assert (example.pixels[:, ~painted] == 255).all()
        answer = parse(example.suffix)
        assert not answer.problems and [found.label for found in answer.objects] == [f.label for f in example.objects]
        for read, made in zip(answer.objects, example.objects, strict=True):
            assert read.box == pytest.approx(made.box, abs=1 / 2046)
    assert counts == {1, 2, 3}


def test_examples_depend_on_their_numbers_alone(pairs):
    one, two = Tasks(pairs, 32, augmented=True), Tasks(pairs, 32, augmented=True)
    two(7, 99)
    for draw in (1, 2, 3, 2**64 - 1):
        a, b = one(4, draw), two(4, draw)
        assert torch.equal(a.pixels, b.pixels) and a[1:] == b[1:]
    assert not torch.equal(Tasks(pairs, 32, kinds=["caption"], augmented=True)(4, 1).pixels, one.pairs[4].pixels)


def test_packing():
    pixels = [torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(2)]
    batch = pack_examples(pixels, [("ab", "xyz"), ("a", "")], LAYOUT)
    words = LAYOUT.vocabulary
    prefix = [[1283] * 4 + [2, *words.encode(text), 13] for text in ("ab", "a")]
    suffix = [[*words.encode("xyz"), 1], [*words.encode(""), 1]]
    firsts = batch.cu_seqlens.tolist()
    weights = iter(zip(batch.places.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True))
    for row in range(2):
        ids = batch.ids[firsts[row] : firsts[row + 1]].tolist()
        until = batch.until[firsts[row] : firsts[row + 1]].tolist()
        n, m = len(prefix[row]), len(suffix[row])
        assert ids == [*prefix[row], *suffix[row][:-1]]
        # The prefix sees all of itself, the answer what came before: what predicts a token never sees it.
        assert until == [n - 1] * n + list(range(n, n + m - 1))
        for i, target in enumerate(suffix[row]):
            assert next(weights) == (firsts[row] + n - 1 + i, target, pytest.approx(1 / (2 * m)))
    assert next(weights, None) is None and batch.weights.sum().item() == pytest.approx(1)
    assert batch.pixels.shape == (2, 3, 8, 8)
    long = LAYOUT.suffix("x " * 200)
    assert len(long) == 64 and long[-1] == 1


def test_batches_of_ranks_and_steps(pairs):
    """Rank r of batch s, whatever came before, has the r-th part of what one rank has."""

    def batch(rank, world, start):
        return next(prefixed_batches(Tasks(pairs, 32), 4, layout=LAYOUT, seed=3, start=start, rank=rank, world=world))

    for start in (0, 1, 5):
        whole, parts = batch(0, 1, start), [batch(rank, 2, start) for rank in range(2)]
        assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))
        assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))
        assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
        torch.testing.assert_close(whole.weights, torch.cat([part.weights for part in parts]) / 2)
    assert not torch.equal(batch(0, 1, 0).ids, batch(0, 1, 1).ids)


def test_what_cannot_be_read_is_told(pairs):
    stream = prefixed_batches(Tasks(pairs, 32), 12, layout=LAYOUT)
    next(stream)
    assert [line for line in pairs.skipped if "005" in line]
    with pytest.raises(data.DataError, match="a batch of 13 needs at least as many pairs, got 12"):
        prefixed_batches(Tasks(pairs, 32), 13, layout=LAYOUT)
