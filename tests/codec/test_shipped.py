"""The weights that come with vlkern."""

import io

import pytest
from PIL import Image

from vlkern import codec, data
from vlkern.codec.codec import SHIPPED
from vlkern.codec.pictures import to_pixels
from vlkern.evaluation.codecs import psnr


def jpeg(picture, quality):
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True, subsampling="4:2:0")
    with Image.open(out) as opened:
        return len(out.getvalue()), psnr(to_pixels(opened), to_pixels(picture))


def test_size():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8e6
    assert codec.load().exactness == ("integer",)


@pytest.mark.parametrize("quality", [0, 10])
def test_smaller_than_jpeg(quality):
    """Every photograph, at no worse a PSNR; together by a fifth at least."""
    ours = theirs = 0
    for file in sorted((data.photos() / "eval").iterdir()):
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        compressed = codec.compress(picture, quality=quality)
        reached = psnr(to_pixels(codec.decompress(compressed)), to_pixels(picture))
        others = (jpeg(picture, q) for q in range(5, 96, 3))
        least = next(size for size, decibels in others if decibels >= reached)
        assert len(compressed) < least, file.name
        ours, theirs = ours + len(compressed), theirs + least
    assert ours < 0.8 * theirs


def test_more_bits_are_a_better_picture():
    file = next(iter(sorted((data.photos() / "eval").iterdir())))
    with Image.open(file) as opened:
        picture = opened.convert("RGB").crop((200, 100, 456, 356))
    files = [codec.compress(picture, quality=q) for q in (0, 7, 14, 20)]
    errors = [psnr(to_pixels(codec.decompress(f)), to_pixels(picture)) for f in files]
    assert sorted(map(len, files)) == list(map(len, files)) and sorted(errors) == errors
    assert errors[-1] > errors[0] + 3
