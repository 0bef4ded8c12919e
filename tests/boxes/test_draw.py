"""Frames, veils and labels on a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlkern import boxes
from vlkern.boxes import Detection


def test_draw(tmp_path):
    image = Image.new("RGB", (200, 100), "white")
    objects = [Detection((0.2, 0.1, 0.9, 0.5), "cat"), Detection((0.0, 0.6, 1.0, 1.0), "dog"), Detection((0, 0, 1, 1))]
    mask = torch.zeros(100, 200, dtype=torch.bool)
    mask[40:60, 150:170] = True
    shown = boxes.draw(image, objects[:2], masks=[None, mask])
    assert image.getpixel((20, 50)) == (255, 255, 255)  # the picture itself is as it was
    assert shown.size == (200, 100)
    pixels = np.array(shown)
    frame = tuple(pixels[50, 20])
    assert frame != (255, 255, 255)
    assert tuple(pixels[89, 60]) == frame == tuple(pixels[50, 99])  # the last row and column inside the box
    assert tuple(pixels[50, 100]) == tuple(pixels[90, 60]) == (255, 255, 255)
    assert tuple(pixels[50, 120]) != frame  # another label, another colour
    assert tuple(pixels[50, 160]) != (255, 255, 255)
    assert tuple(pixels[70, 160]) == (255, 255, 255)
    name = pixels[:20, :60].reshape(-1, 3)
    assert (name == frame).all(1).any()  # the label lies above its box
    shown.save(tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").format == "PNG"
    one = np.array(boxes.draw(image, objects[2:]))
    assert {tuple(pixel) for pixel in one[2:-2, 2:-2].reshape(-1, 3)} == {(255, 255, 255)}  # no label: a frame alone


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_modes_and_tiny_pictures(mode):
    for size in ((1, 1), (3, 200)):
        shown = boxes.draw(Image.new(mode, size), [Detection((0.0, 0.0, 0.001, 0.001), "a very long label é\n日本")])
        assert (shown.mode, shown.size) == ("RGB", size)


def test_bad_masks():
    image = Image.new("RGB", (8, 4))
    found = [Detection((0.0, 0.0, 1.0, 1.0))]
    with pytest.raises(ValueError, match="one for each of the 1 objects, got 2"):
        boxes.draw(image, found, masks=[None, None])
    with pytest.raises(ValueError, match=r"shape \[4, 8\], got \[8, 4\]"):
        boxes.draw(image, found, masks=[torch.zeros(8, 4, dtype=torch.bool)])
