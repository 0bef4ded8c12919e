"""Packed batches of pictures at native aspect ratios: functions of the seed and the step, whoever reads them."""

import itertools

import pytest
import shards
import torch

from vlkern import data
from vlkern.data.dropping import Beta, BySeen
from vlkern.data.patches import cumulate
from vlkern.layers.patches import unpatchify

SIZES = [(20, 10), (10, 20), (64, 8), (33, 33), (7, 50)]  # width, height
VIEWS = data.Views(4, data.Resolutions(8, 24))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    members = {}
    for i in range(15):
        members[f"{i:04}.png"] = shards.picture(color=(16 * i, 100, 200), size=SIZES[i % len(SIZES)])
        members[f"{i:04}.json"] = f'{{"captions": ["picture {i}", "number {i} of all"]}}'.encode()
    return data.PairShards(shards.write(tmp_path_factory.mktemp("data") / "a.tar", members), 8)


def steps(pairs, count, views=VIEWS, batch=6, **more):
    tokenizer = data.load_tokenizer("bytes", 16)
    stream = data.native_batches(pairs, batch, views, tokenizer=tokenizer, seed=3, **more)
    return [(*images, *texts) for images, texts in itertools.islice(stream, count)]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_contents(pairs):
    """Aspect ratios stay, resolutions vary inside their range, captions are those of the pictures."""
    patches, cu, yx, hw, ids, cu_texts = steps(pairs, 1)[0]
    assert patches.dtype == torch.uint8 and patches.shape == (int(cu[-1]), 48)
    assert torch.equal(cu, cumulate(hw.prod(1)))
    assert bool(((hw.prod(1) >= 1) & (hw.prod(1) <= 36)).all()) and len(hw.prod(1).unique()) > 2
    texts = [bytes((t - 2).tolist()).decode() for t in (part[:-1] for part in ids.split(cu_texts.diff().tolist()))]
    for i, text in enumerate(texts):
        number = int(next(word for word in text.split() if word.isdigit()))
        width, height = SIZES[number % len(SIZES)]
        h, w = hw[i].tolist()
        assert (h <= w) if height <= width else (w <= h)
        picture = unpatchify(patches[cu[i] : cu[i + 1]], h, w)
        assert picture.flatten(1).unique(dim=1).T.tolist() == [[16 * number, 100, 200]]
        assert torch.equal(yx[cu[i] : cu[i + 1]], torch.cartesian_prod(torch.arange(h), torch.arange(w)).int())


def test_function_of_seed_and_step(pairs):
    views = data.Views(4, data.Resolutions(8, 24), Beta(0.4, 0.7), augmented=True)
    whole = steps(pairs, 6, views)
    assert all(same(a, b) for a, b in zip(whole[3:], steps(pairs, 3, views, start=3), strict=True))
    assert all(same(a, b) for a, b in zip(whole[:3], steps(pairs, 3, views, workers=2), strict=True))
    assert not same(whole[0], whole[2])
    parts = [steps(pairs, 6, views, rank=rank, world=2) for rank in (0, 1)]
    for step, (left, right) in zip(whole, zip(*parts, strict=True), strict=True):
        for which in (0, 2, 3, 4):
            assert torch.equal(torch.cat([left[which], right[which]]), step[which])
        assert torch.equal(torch.cat([left[1].diff(), right[1].diff()]), step[1].diff())


def test_views_differ_from_pass_to_pass(pairs):
    first, second = (sorted(map(tuple, batch[3].tolist())) for batch in steps(pairs, 2, batch=15))
    assert first != second


def test_dropping(pairs):
    """The share that is dropped follows the pictures seen; positions are those of the patches that stay."""
    falling = data.Views(4, data.Resolutions(24, 24), BySeen(30, -2, 0.1, 0.7))
    found = steps(pairs, 10, falling)
    shares = [1 - len(batch[0]) / int(batch[3].prod(1).sum()) for batch in found]
    assert shares[0] == pytest.approx(0.7, abs=0.05) and shares[-1] == pytest.approx(0.1, abs=0.05)
    assert all(same(a, b) for a, b in zip(found[6:], steps(pairs, 4, falling, start=6), strict=True))
    for patches, cu, yx, hw, *_ in found:
        assert len(patches) == len(yx) == int(cu[-1])
        number = yx[:, 0] * hw[:, 1].repeat_interleave(cu.diff()) + yx[:, 1]
        for part in number.split(cu.diff().tolist()):
            assert torch.equal(part, part.unique())


def test_unreadable_pictures_are_told(tmp_path):
    members = {f"{i}.png": shards.picture(size=(9, 9)) if i != 2 else b"no picture" for i in range(6)}
    members |= {f"{i}.txt": b"x" for i in range(6)}
    found = data.PairShards(shards.write(tmp_path / "a.tar", sorted(members.items())), 8)
    ((_, _, _, hw, *_),) = steps(found, 1)
    assert len(hw) == 6 and len(found.skipped) == 1 and "sample 2" in found.skipped[0]


def test_packing_by_hand():
    a, b = torch.arange(3 * 4 * 6).reshape(3, 4, 6), torch.zeros(3, 2, 2, dtype=torch.int64)
    packed = data.pack_images([a, b], 2, kept=[torch.tensor([0, 4]), None])
    assert packed.cu_seqlens.tolist() == [0, 2, 3] and packed.yx.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert packed.hw.tolist() == [[2, 3], [1, 1]]
    assert packed.patches[1].tolist() == [a[c, y, x].item() for y in (2, 3) for x in (2, 3) for c in range(3)]
    with pytest.raises(ValueError, match="pictures must hold at least one, got none"):
        data.pack_images([], 2)
    with pytest.raises(ValueError, match="sides that are multiples of the patch 2, got"):
        data.pack_images([torch.zeros(3, 2, 3)], 2)
    with pytest.raises(ValueError, match="not empty"):
        data.pack_images([torch.zeros(3, 0, 2)], 2)
    with pytest.raises(ValueError, match="kept must have an entry for each of 2 pictures, got 1"):
        data.pack_images([a, b], 2, kept=[None])


def test_texts_by_hand():
    packed = data.pack_texts(torch.tensor([[5, 1, 1, 1], [5, 6, 1, 0], [7, 7, 7, 7], [1, 0, 0, 0]]), end=1)
    assert packed.ids.tolist() == [5, 1, 5, 6, 1, 7, 7, 7, 7, 1] and packed.cu_seqlens.tolist() == [0, 2, 5, 9, 10]
    with pytest.raises(ValueError, match=r"ids must have shape \[n, L\] with at least one text, got \[0, 4\]"):
        data.pack_texts(torch.zeros(0, 4, dtype=torch.long), 1)
