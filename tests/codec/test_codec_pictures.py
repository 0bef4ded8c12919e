"""What becomes of pictures of all kinds before they are compressed."""

import io

import numpy as np
import pytest
from PIL import Image

from vlkern.codec import pictures
from vlkern.codec.pictures import check_lossless, pack_picture, read_picture, to_pixels, to_rgb
from vlkern.errors import UserError


def rgb(width=6, height=4):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_modes_of_8_bits_are_converted_as_pillow_does(mode):
    image = rgb().convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_is_dropped_and_other_alpha_refused(mode):
    image = rgb().convert(mode)
    assert np.array_equal(to_rgb(image), rgb().convert("L" if mode == "LA" else "RGB").convert("RGB"))
    image.putalpha(Image.new("L", image.size, 254))
    with pytest.raises(ValueError, match="without transparent parts: lay it on a background"):
        to_rgb(image)


def test_a_transparent_colour_of_a_palette_is_refused(tmp_path):
    image = rgb().quantize(4)
    path = saved(tmp_path / "a.png", image, transparency=int(np.asarray(image)[0, 0]))
    with pytest.raises(UserError, match=r"a\.png: expected a picture without transparent parts"):
        read_picture(path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_channels_of_more_than_8_bits_are_refused(mode):
    with pytest.raises(ValueError, match=f"expected channels of 8 bits, got mode {mode}"):
        to_rgb(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_several_frames_are_refused(ending, tmp_path):
    path = saved(tmp_path / f"a.{ending}", rgb(), save_all=True, append_images=[rgb().rotate(180)])
    with pytest.raises(UserError, match="expected one picture, got 2 frames"):
        read_picture(path)


def test_the_previews_of_a_camera_are_left_out(tmp_path):
    path = saved(tmp_path / "a.mpo", rgb(64, 48), save_all=True, append_images=[rgb(8, 6)])
    assert Image.open(path).n_frames == 2
    assert read_picture(path).size == (64, 48)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.png", rgb(), exif=exif)
    assert np.array_equal(read_picture(path), np.rot90(np.asarray(rgb()), -1))
    assert tuple(to_pixels(Image.open(path)).shape) == (3, 6, 4)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: cannot be read \(No such file or directory\)"):
        read_picture(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_picture(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png: is no picture that Pillow can read"):
        read_picture(text)
    whole = io.BytesIO()
    rgb(64, 64).save(whole, "PNG")
    half = tmp_path / "half.png"
    half.write_bytes(whole.getvalue()[:4000])
    with pytest.raises(UserError, match=r"half\.png: is no readable picture"):
        read_picture(half)


def test_the_largest_picture_is_ours_not_that_of_pillow(tmp_path, monkeypatch, recwarn):
    path, usual = saved(tmp_path / "a.png", rgb(16, 16)), Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    assert read_picture(path).size == (16, 16) and not recwarn.list and Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", usual)
    monkeypatch.setattr(pictures, "LARGEST", 255)
    with pytest.raises(UserError, match=r"a\.png: a picture must have 1 to 255 pixels, got more"):
        read_picture(path)
    assert usual == Image.MAX_IMAGE_PIXELS


def test_pictures_without_pixels():
    with pytest.raises(ValueError, match="expected a picture with pixels, got 0 x 4"):
        to_rgb(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize("name", ["a.png", "a.PPM", "a.bmp", "a.tif", "a.webp"])
def test_pictures_are_written_without_loss(name, tmp_path):
    path = tmp_path / name
    check_lossless(path)
    path.write_bytes(pack_picture(rgb(), path))
    assert np.array_equal(Image.open(path).convert("RGB"), rgb())


def test_formats_with_loss_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg: expected a name that ends in \.png"):
        check_lossless(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.webp: cannot be written in this format"):
        pack_picture(rgb(20000, 1), tmp_path / "a.webp")
