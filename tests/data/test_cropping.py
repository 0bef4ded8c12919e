"""Random crops: at the picture's own scale or shrunk, drawn from a number alone; pictures without captions."""

import io
import itertools
import math

import numpy as np
import pytest
import shards
import torch
from PIL import Image

from vlkern.data import DataError, PairShards, RandomCrop, batches
from vlkern.recipes.autoencoders import NoWords

WIDTH, HEIGHT, SIDE = 40, 30, 16


def coordinates(width=WIDTH, height=HEIGHT):
    """A picture whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """Ten pictures whose blue is their number; the last has a caption."""
    members = {}
    for i in range(10):
        image = Image.merge("RGB", (*coordinates().split()[:2], Image.new("L", (WIDTH, HEIGHT), i)))
        members[f"{i}.png"] = png(image)
    members["9.txt"] = b"nine"
    return shards.write(tmp_path_factory.mktemp("crops") / "a.tar", members)


def test_a_crop_is_a_part_of_the_picture_and_every_place_comes_equally_often():
    image, crop = coordinates(), RandomCrop(SIDE)
    cuts = [crop.cut(image, draw) for draw in range(600)]
    lefts, tops = (torch.stack([cut[channel, 0, 0] for cut in cuts]).long() for channel in (0, 1))
    for cut, left, top in zip(cuts, lefts.tolist(), tops.tolist(), strict=True):
        assert torch.equal(cut[0], torch.arange(left, left + SIDE, dtype=torch.uint8).expand(SIDE, -1))
        assert torch.equal(cut[1, :, 0], torch.arange(top, top + SIDE, dtype=torch.uint8))
    for places, length in ((lefts, WIDTH), (tops, HEIGHT)):
        counts = places.bincount(minlength=length - SIDE + 1).double()
        assert len(counts) == length - SIDE + 1 and counts.min() > 0
        expected = 600 / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 4 * math.sqrt(2 * len(counts))
    assert torch.equal(RandomCrop(HEIGHT).cut(image, 3)[1, :, 0], torch.arange(HEIGHT, dtype=torch.uint8))


def test_a_shrunk_crop_shows_a_larger_part_up_to_all_of_the_shorter_side():
    """A slope of n / side from pixel to pixel says that the crop shows n pixels."""
    crop = RandomCrop(SIDE, 0.8)
    cuts = [crop.cut(coordinates(), draw).double() for draw in range(200)]
    shown = torch.stack([(cut[0, :, 12] - cut[0, :, 3]).mean() / 9 * SIDE for cut in cuts])
    assert shown.min() > SIDE / 0.8 - 1 and shown.max() < HEIGHT + 1
    middle = math.sqrt(SIDE / 0.8 * HEIGHT)  # half of the draws are below it
    assert 70 < (shown < middle).sum() < 130
    narrow = crop.cut(coordinates(18, 50), 1)[0]  # 0.8 of it would be less than the crop: it is shown as wide as it is
    assert narrow[:, 0].eq(0).all() and narrow[:, -1].eq(17).all()


def test_crops_depend_on_seed_and_step_alone(tar):
    pairs = PairShards(tar, RandomCrop(SIDE), captions=False)

    def take(count, **options):
        return [pixels for pixels, _ in itertools.islice(batches(pairs, 4, tokenizer=NoWords(), **options), count)]

    whole = take(5)
    assert whole[0].shape == (4, 3, SIDE, SIDE)
    assert torch.equal(take(1, start=4)[0], whole[4]) and torch.equal(take(1, workers=1)[0], whole[0])
    ranks = [take(2, rank=rank, world=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([ranks[0][1], ranks[1][1]]), whole[1])
    # The same picture in another pass is cut elsewhere.
    passes = {}
    for pixels in take(10):
        for picture in pixels:
            passes.setdefault(int(picture[2, 0, 0]), set()).add(tuple(picture[:2, 0, 0].tolist()))
    assert len(passes) == 10 and all(len(places) > 1 for places in passes.values())


def test_pictures_without_captions(tar):
    pairs = PairShards(tar, 8, captions=False)
    assert len(pairs) == 10 and pairs.skipped == []
    assert pairs[9].caption == "" and pairs.captions() == 10 * [""] and pairs.record(9) == {}
    assert len(PairShards(tar, 8)) == 1
    with pytest.raises(DataError, match=r"no pictures; the first: .*no image"):
        PairShards(shards.write(tar.with_name("b.tar"), {"0.txt": b"a"}), 8, captions=False)


def test_a_picture_that_is_too_small_is_left_out(tmp_path):
    path = shards.write(tmp_path / "a.tar", {"0.png": png(coordinates(40, 15)), "1.png": png(coordinates())})
    pairs = PairShards(path, RandomCrop(SIDE), captions=False)
    assert pairs[0].key == "1"
    assert pairs.skipped == [f"{path}: sample 0: 40 x 15 pixels, too small for a crop of 16 x 16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "side must be a whole number above 0, got 0"),
        ((16, 1.5), "shrink must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_crops(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomCrop(*arguments)
