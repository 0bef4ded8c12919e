"""Decoding: every mode, both filters against an explicit one, and nothing but ValueError for damaged files."""

import io
import random

import numpy as np
import pytest
import shards
import torch
from PIL import Image

from vlkern.data import decode_image


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_height_comes_first():
    pixels = decode_image(png(np.zeros((10, 30, 3), np.uint8)), (4, 7))
    assert pixels.shape == (3, 4, 7) and pixels.is_contiguous()
    assert decode_image(png(np.zeros((10, 30, 3), np.uint8)), 5).shape == (3, 5, 5)


def triangle(x):
    return (1 - abs(x)).clip(0)


def cubic(x, a=-0.5):
    x = abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x < 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def weights(kernel, n, m):
    """[m, n]: the filter is as wide as the step between output pixels, or one pixel when enlarging (antialiasing)."""
    step = n / m
    centre = (np.arange(m) + 0.5) * step
    w = kernel((np.arange(n) + 0.5 - centre[:, None]) / max(step, 1))
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize(("resample", "kernel"), [("bilinear", triangle), ("bicubic", cubic)])
@pytest.mark.parametrize("size", [(16, 16), (7, 40), (33, 5)])
def test_filters(resample, kernel, size):
    source = np.random.default_rng(0).integers(70, 190, (24, 31, 3), np.uint8)  # Pillow clips between its two passes
    exact = np.einsum(
        "hi,wj,ijc->chw", weights(kernel, 24, size[0]), weights(kernel, 31, size[1]), source.astype(float)
    )
    pixels = decode_image(png(source), size, resample=resample).double().numpy()
    assert abs(pixels - exact).max() < 2
    other = decode_image(png(source), size, resample="bicubic" if resample == "bilinear" else "bilinear")
    assert abs(other.double().numpy() - exact).max() > 5


def test_like_the_image_processors_of_transformers():
    from transformers import SiglipImageProcessorPil

    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 41, 3), np.uint8))
    for resample, number in (("bilinear", 2), ("bicubic", 3)):
        processor = SiglipImageProcessorPil(size={"height": 24, "width": 20}, resample=number, do_rescale=False)
        processor.do_normalize = False
        theirs = torch.as_tensor(np.array(processor(source)["pixel_values"]))[0]
        ours = decode_image(png(np.array(source)), (24, 20), resample=resample)
        assert (ours.double() - theirs.double()).abs().max() <= 1


def test_a_photograph_is_turned_upright():
    """EXIF orientation 6: the camera was turned, the right-hand side of the stored picture is its lower edge."""
    stored = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(stored).save(out, "PNG", exif=exif)
    upright = np.ascontiguousarray(np.rot90(stored, -1))
    assert torch.equal(decode_image(out.getvalue(), (4, 6)), torch.from_numpy(upright).permute(2, 0, 1))


def test_16_bits_of_grey():
    """Their upper half, not white; what has more bits is refused, because nothing says what is white."""
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7), dtype=np.uint16)
    assert decode_image(png(values), (5, 7)).tolist() == [(values >> 8).tolist()] * 3
    out = io.BytesIO()
    Image.fromarray(values.astype(np.float32)).save(out, "TIFF")
    with pytest.raises(ValueError, match="expected channels of 8 or 16 bits, got mode F"):
        decode_image(out.getvalue(), 8)


def test_first_frame_of_a_moving_picture():
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(out.getvalue(), 2)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_files(kind):
    """Flipped and missing bytes: a picture or ValueError."""
    chance = random.Random(0)
    whole = shards.picture(size=(40, 30), kind=kind)
    failures = 0
    for _ in range(150):
        data = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(min(3, len(data))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert decode_image(bytes(data), 8).shape == (3, 8, 8)
        except ValueError as error:
            failures += 1
            assert str(error).startswith("no readable picture: ")
    assert failures > 10


def test_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"no readable picture: Image size .* exceeds limit"):
        decode_image(shards.picture(size=(200, 200)), 8)
