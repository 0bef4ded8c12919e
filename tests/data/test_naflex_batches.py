"""Batches for NaFlex models: functions of the seed and the step, whoever reads them."""

import itertools

import pytest
import shards
import torch

from vlkern import data
from vlkern.layers.patches import grid_within, unpatchify

SIZES = [(20, 10), (10, 20), (64, 8), (33, 33), (7, 50)]  # width, height


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    members = {}
    for i in range(15):
        members[f"{i:04}.png"] = shards.picture(color=(16 * i, 100, 200), size=SIZES[i % len(SIZES)])
        members[f"{i:04}.json"] = f'{{"captions": ["picture {i}", "number {i} of all"]}}'.encode()
    return data.PairShards(shards.write(tmp_path_factory.mktemp("data") / "a.tar", members), 8)


def steps(pairs, count, most=(20,), batch=6, **more):
    tokenizer = data.load_tokenizer("bytes", 20)
    stream = data.naflex_batches(pairs, batch, 4, most, tokenizer=tokenizer, seed=3, **more)
    return list(itertools.islice(stream, count))


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_contents(pairs):
    """Every picture has the size of the rule, and its own caption."""
    patches, shapes, ids = steps(pairs, 1)[0]
    assert patches.dtype == torch.uint8 and patches.shape == (int(shapes.prod(1).sum()), 48)
    assert shapes.dtype == torch.int32 and ids.shape == (6, 20)
    parts = patches.split(shapes.prod(1).tolist())
    for text, part, (h, w) in zip(data.load_tokenizer("bytes", 20).decode(ids), parts, shapes.tolist(), strict=True):
        number = next(int(word) for word in text.split() if word.isdigit())
        width, height = SIZES[number % len(SIZES)]
        assert (h, w) == grid_within(height, width, 4, 20)
        assert unpatchify(part, h, w).flatten(1).unique(dim=1).T.tolist() == [[16 * number, 100, 200]]


def test_the_pairs_of_a_step_are_those_of_batches(pairs):
    for ours, (_, ids) in zip(
        steps(pairs, 4), data.batches(pairs, 6, tokenizer=data.load_tokenizer("bytes", 20), seed=3), strict=False
    ):
        assert torch.equal(ours[2], ids)


@pytest.mark.parametrize("augmented", [False, True])
def test_function_of_seed_and_step(pairs, augmented):
    whole = steps(pairs, 6, (4, 9, 16), augmented=augmented)
    assert same(whole[3:], steps(pairs, 3, (4, 9, 16), start=3, augmented=augmented))
    assert same(whole[:3], steps(pairs, 3, (4, 9, 16), workers=2, augmented=augmented))
    parts = [steps(pairs, 6, (4, 9, 16), rank=rank, world=2, augmented=augmented) for rank in (0, 1)]
    assert same(whole, [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)])


def test_one_number_of_patches_for_a_step(pairs):
    """All numbers come, and each holds for the whole batch."""
    found = []
    for _, shapes, _ in steps(pairs, 40, (4, 9, 64)):
        largest = int(shapes.prod(1).max())
        (most,) = [n for n in (4, 9, 64) if largest <= n and largest > n // 2]
        found.append(most)
    assert set(found) == {4, 9, 64} and min(map(found.count, (4, 9, 64))) > 5


def test_sizes_for_other_readers(pairs, tmp_path):
    size = data.NaflexSize(4, 20)
    native = data.PairShards(pairs.paths, size)
    for pair, (width, height) in zip(native, SIZES, strict=False):
        h, w = grid_within(height, width, 4, 20)
        assert pair.pixels.shape == (3, 4 * h, 4 * w)


def test_bad_arguments(pairs):
    for most in ((0,), (9, -1)):
        with pytest.raises(ValueError, match="max_patches must be a whole number above 0"):
            steps(pairs, 1, most)
    with pytest.raises(ValueError, match="max_patches must be at least one number, got none"):
        steps(pairs, 1, ())
    with pytest.raises(ValueError, match="patch must be a whole number above 0"):
        data.NaflexSize(0, 4)
    with pytest.raises(data.DataError, match="needs at least as many pairs"):
        steps(pairs, 1, batch=16)


def test_pictures_that_cannot_be_read(tmp_path):
    good = {"a.png": shards.picture(), "a.txt": b"good", "c.png": shards.picture(), "c.txt": b"fine"}
    pairs = data.PairShards(shards.write(tmp_path / "a.tar", {**good, "b.png": b"none", "b.txt": b"bad"}), 8)
    for patches, shapes, ids in steps(pairs, 2, batch=3):
        assert len(shapes) == len(ids) == 3 and len(patches) == int(shapes.prod(1).sum())
    assert len(pairs.skipped) == 1 and "sample b" in pairs.skipped[0]
    bad = data.PairShards(shards.write(tmp_path / "b.tar", {"b.png": b"none", "b.txt": b"bad"}), 8)
    with pytest.raises(data.DataError, match="no picture can be read"):
        steps(bad, 1, batch=1)
