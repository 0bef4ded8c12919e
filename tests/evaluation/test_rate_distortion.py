"""Measures of closeness, Bjøntegaard's rate, and evaluations of codecs whose result is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlkern import data
from vlkern.evaluation.codecs import Contestant, Curve, bd_rate, measure, ms_ssim, psnr
from vlkern.evaluation.codecs.bjontegaard import front, interpolate
from vlkern.evaluation.codecs.contestants import jpeg, rivals, webp
from vlkern.evaluation.codecs.crops import RATE, crops
from vlkern.evaluation.codecs.curves import curve, mean_curve
from vlkern.evaluation.codecs.evaluate import evaluate, write
from vlkern.evaluation.codecs.measure import Point, pixels_of

#: The example that came with the first public implementations.
ANCHOR = Curve([686.76, 309.58, 157.11, 85.95], [40.28, 37.18, 34.24, 31.42])
TEST = Curve([893.34, 407.8, 204.93, 112.75], [40.39, 37.21, 34.17, 31.24])


def photo(width, height):
    picture = Image.open(data.photos() / "eval" / "01-kingfisher.webp").convert("RGB")
    return picture.crop((200, 100, 200 + width, 100 + height))


def test_psnr():
    x = torch.full((3, 4, 5), 100, dtype=torch.uint8)
    assert psnr(x, x) == math.inf
    assert psnr(x, x + 1) == pytest.approx(20 * math.log10(255))
    dot = x.clone()
    dot[0, 0, 0] += 60
    assert psnr(x, dot) == pytest.approx(10 * math.log10(255**2 * 60 / 3600))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x // 16 * 16 + 8, 0.976554663),
        (lambda x: x // 64 * 64 + 32, 0.828041412),
        (lambda x: x.roll(1, 2), 0.950779856),
        (lambda x: 255 - x, 0.0),
    ],
    ids=["posterised to 16", "posterised to 4", "shifted", "inverted"],
)
def test_ms_ssim_as_pytorch_msssim(change, expected):
    """What pytorch_msssim 1.0.0 gives for the same pictures in double precision."""
    x = pixels_of(photo(304, 192))
    assert ms_ssim(x, change(x)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("closeness", [psnr, ms_ssim])
def test_closeness_says_what_it_wants(closeness):
    x = torch.zeros(3, 176, 176, dtype=torch.uint8)
    with pytest.raises(TypeError, match="second: expected uint8, got torch"):
        closeness(x, x.float())
    with pytest.raises(ValueError, match=r"second: expected the shape of first, \[3, 176, 176\], got \[3, 176, 175\]"):
        closeness(x, x[..., 1:])
    with pytest.raises(ValueError, match=r"first: expected \[C, H, W\]"):
        closeness(x[0], x[0])


def test_ms_ssim_needs_room_for_five_scales():
    small = torch.zeros(3, 175, 200, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 176 pixels for five scales, got 200 x 175"):
        ms_ssim(small, small)
    assert ms_ssim(small.new_zeros(1, 176, 176), small.new_zeros(1, 176, 176)) == 1


@pytest.mark.parametrize(("method", "expected"), [("cubic", 0.31397374054908656), ("pchip", 0.31379878202397627)])
def test_bd_rate_as_the_package_bjontegaard(method, expected):
    found = bd_rate(ANCHOR, TEST, method=method)
    assert found.rate == pytest.approx(expected, rel=1e-9)
    assert (found.low, found.high) == (31.42, 40.28)
    assert bd_rate(TEST, ANCHOR, method=method).rate == pytest.approx(1 / (1 + expected) - 1)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
def test_bd_rate_of_what_is_known(method):
    """Half the rate at every quality is a saving of 50 %, wherever the points of the curves are."""
    quality = np.linspace(25, 40, 16)
    rates = 0.1 * np.exp(0.2 * (quality - 25))
    fewer = Curve([0.05 * math.exp(0.2 * (q - 25)) for q in (24, 29, 33, 42)], [24, 29, 33, 42])
    anchor = Curve(list(rates), list(quality))
    assert bd_rate(anchor, fewer, method=method).rate == pytest.approx(-0.5)
    below = bd_rate(anchor, Curve(list(rates / 2), list(quality)), most=0.5, method=method)
    assert below.rate == pytest.approx(-0.5)
    # the anchor reaches 0.5 between two of its points
    assert below.high == pytest.approx(25 + math.log(5) / 0.2) if method == "pchip" else True
    # a point that others beat changes nothing
    worse = Curve([*anchor.rates, anchor.rates[9] * 1.01], [*anchor.quality, anchor.quality[9] - 1])
    assert bd_rate(worse, fewer, method=method) == bd_rate(anchor, fewer, method=method)


def test_front():
    found = front(Curve([3, 1, 2, 2, 4], [30, 10, 9, 20, math.inf]))
    assert found == Curve([1, 2, 3], [10, 20, 30])
    assert front(Curve([], [])) == Curve([], [])


def test_interpolation_goes_through_the_points_and_does_not_overshoot():
    x, y = [0.0, 1.0, 1.5, 4.0], [0.0, 0.1, 7.0, 7.05]
    assert [interpolate(x, y, at) for at in x] == pytest.approx(y)
    between = [interpolate(x, y, at) for at in np.linspace(0, 4, 101)]
    assert between == sorted(between)
    # scipy.interpolate.PchipInterpolator(x, y)
    assert [interpolate(x, y, at) for at in (0.5, 1.2, 3.0)] == pytest.approx(
        [0.02212746858168762, 2.5423916158990534, 7.044714810989464]
    )


@pytest.mark.parametrize(
    ("anchor", "arguments", "words"),
    [
        (Curve([1, 2], [30, 31, 32]), {}, "as many rates as qualities, got 2 and 3"),
        (Curve([0, 2], [30, 31]), {}, "finite rates above 0"),
        (Curve([1], [30]), {}, "anchor: expected at least 2 points with rates, got 1"),
        (Curve([1, 2, 3], [33, 34, 35]), {"method": "cubic"}, "anchor: expected at least 4 points"),
        (ANCHOR, {"most": 90}, "test: expected at least 2 points with rates of at most 90, got 0"),
        (Curve([1, 2], [10, 20]), {}, "the curves share no quality: one starts at 31.24, the other ends at 20"),
        (ANCHOR, {"method": "spline"}, "method: expected 'pchip' or 'cubic', got 'spline'"),
    ],
)
def test_bd_rate_says_what_is_wrong(anchor, arguments, words):
    with pytest.raises(ValueError, match=words):
        bd_rate(anchor, TEST, **arguments)


def test_codecs_take_turns_and_sizes_are_those_of_files():
    picture, calls, told = photo(48, 32), [], []

    def codec(name, qualities):
        def encode(given, quality):
            calls.append((name, quality))
            return bytes(quality)

        return Contestant(name, "", qualities, encode, lambda file: picture)

    points = measure("bird", picture, [codec("a", [10, 20, 30]), codec("b", [5, 6])], told.append)
    assert calls == [("a", 10), ("b", 5), ("a", 20), ("b", 6), ("a", 30)]
    assert told == [1, 2, 3, 4, 5]
    assert [point.bpp for point in points] == [8 * quality / (48 * 32) for _, quality in calls]
    assert {(point.psnr, point.ms_ssim, point.picture) for point in points} == {(math.inf, None, "bird")}

    cut = replace(codec("a", [1]), decode=lambda file: picture.crop((0, 0, 8, 8)))
    with pytest.raises(ValueError, match=r"a: bird came back with the size \(8, 8\), expected \(48, 32\)"):
        measure("bird", picture, [cut])


def test_rivals_keep_pictures_and_grow_with_quality():
    picture = photo(176, 176)
    found = rivals()
    assert found[0].name == "JPEG" and {codec.name for codec in found} <= {"JPEG", "WebP", "AVIF", "JPEG XL"}
    points = measure("bird", picture, [replace(c, qualities=[20, 90]) for c in found])
    for codec in found:
        low, high = (p for p in sorted(points, key=lambda p: p.quality) if p.codec == codec.name)
        assert low.size < high.size and low.psnr < high.psnr and low.ms_ssim < high.ms_ssim
        assert low.psnr > 20 and min(low.encode, low.decode) > 0


def test_curves_are_sorted_and_averaged():
    def point(picture, quality, bpp, db, similarity):
        return Point("a", picture, quality, 1, bpp, db, similarity, 1, 1)

    points = [point("x", 2, 0.5, 30, 0.9), point("x", 1, 0.25, 26, 0.8), point("y", 1, 0.75, 28, None)]
    points.append(point("y", 2, 1.5, 36, None))
    assert curve(points, "a", "x") == Curve([0.25, 0.5], [26, 30])
    assert mean_curve(points, "a") == Curve([0.5, 1.0], [27, 33])
    assert mean_curve(points, "a", "ms_ssim") == Curve([0.25, 0.5], [0.8, 0.9])


def test_crops_show_the_worst_part_of_files_of_one_size():
    """Ours spoils one corner, and asks for a size that JPEG has between the measured qualities."""
    picture, spoilt = photo(320, 256), photo(320, 256)
    spoilt.paste((255, 0, 255), (300, 240, 320, 256))
    size = len(jpeg().encode(picture, 47))
    assert abs(8 * size / (320 * 256) - RATE) < 1
    ours = Contestant("ours", "", [0], lambda given, quality: bytes(size), lambda file: spoilt)
    contestants = [ours, replace(jpeg(), qualities=[10, 40, 60])]
    original, first, second = crops(picture, measure("bird", picture, contestants), contestants)
    assert [original.codec, first.codec, second.codec] == ["original", "ours", "JPEG"]
    assert original.pixels.tobytes() == picture.crop((128, 64, 320, 256)).tobytes()
    assert first.pixels.getpixel((191, 191)) == (255, 0, 255)
    assert first.bpp == second.bpp == 8 * size / (320 * 256)
    assert second.psnr == psnr(pixels_of(picture), pixels_of(jpeg().decode(jpeg().encode(picture, 47))))
    assert original.uri().startswith("data:image/webp;base64,")


def test_a_codec_that_is_jpeg_saves_nothing(tmp_path):
    """The whole evaluation, with a codec whose result is known."""
    qualities = [5, 15, 30, 50, 70, 90]
    ours = replace(jpeg(), name="ours", qualities=qualities)
    pictures = {"a.png": photo(192, 176), "b.png": photo(64, 48)}
    contestants = [ours, replace(jpeg(), qualities=qualities), replace(webp(), qualities=[5, 30, 60, 95])]
    found = evaluate(pictures, contestants, side_by_side=True)
    saved = found.savings()
    assert saved["JPEG"]["mean"]["all"] == {
        method: {
            "rate": pytest.approx(0),
            "psnr": [pytest.approx(p) for p in saved["JPEG"]["mean"]["all"][method]["psnr"]],
        }
        for method in ("pchip", "cubic")
    }
    assert saved["WebP"]["pictures"]["a.png"]["all"]["pchip"]["rate"] > 0.1

    last = found.points[-1]  # pretend that it lost nothing
    found = found._replace(points=[*found.points[:-1], replace(last, psnr=math.inf)])
    names = write(found, "a model", "a folder", ["c.png: <broken>"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    plots = {f"{plot}.{kind}" for plot in ("rate_distortion", "pictures") for kind in ("svg", "png")}
    assert set(names) == {*plots, "report.html", "results.json"}
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert len(results["points"]) == 2 * (6 + 6 + 4)
    assert [p["psnr"] is None for p in results["points"]] == [False] * 31 + [True]
    assert results["curve"][0]["bpp"] == mean_curve(found.points, "ours").rates[0]
    assert results["settings"]["JPEG"] == "4:2:0, optimize" and results["skipped"] == ["c.png: <broken>"]
    page = (tmp_path / "report.html").read_text()
    assert "c.png: &lt;broken&gt;" in page and page.count("data:image/webp") == 2 * 4 and "<h3>b.png</h3>" in page
