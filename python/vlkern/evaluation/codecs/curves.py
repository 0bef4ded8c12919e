"""From points to curves, and from curves to what one codec saves beside another."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any, Literal

from vlkern.evaluation.codecs.bjontegaard import Curve, Method, bd_rate
from vlkern.evaluation.codecs.measure import Point

Measure = Literal["psnr", "ms_ssim"]
METHODS: tuple[Method, ...] = ("pchip", "cubic")
#: Bits per pixel up to which curves are compared besides the whole.
LOW = 0.5


def names(points: Sequence[Point]) -> list[str]:
    """The codecs, ours first."""
    return list(dict.fromkeys(point.codec for point in points))


def pictures(points: Sequence[Point]) -> list[str]:
    """The pictures, as they were measured."""
    return list(dict.fromkeys(point.picture for point in points))


def curve(points: Sequence[Point], codec: str, picture: str, measure: Measure = "psnr") -> Curve:
    """Of one codec on one picture, by quality; points without the measure are left out."""
    mine = sorted((p for p in points if (p.codec, p.picture) == (codec, picture)), key=lambda p: p.quality)
    found = [(p.bpp, value) for p in mine if (value := getattr(p, measure)) is not None]
    return Curve([rate for rate, _ in found], [value for _, value in found])


def mean_curve(points: Sequence[Point], codec: str, measure: Measure = "psnr") -> Curve:
    """At each quality the mean of the rates and the mean of the measure, over all pictures."""
    curves = [curve(points, codec, picture, measure) for picture in pictures(points)]
    curves = [c for c in curves if c.rates]
    return Curve(
        [mean(rates) for rates in zip(*(c.rates for c in curves), strict=True)],
        [mean(values) for values in zip(*(c.quality for c in curves), strict=True)],
    )


def _saving(anchor: Curve, test: Curve, most: float | None, method: Method) -> dict[str, Any]:
    try:
        found = bd_rate(anchor, test, most=most, method=method)
    except ValueError as error:
        return {"rate": None, "why": str(error)}
    return {"rate": found.rate, "psnr": [found.low, found.high]}


def _compare(anchor: Curve, test: Curve) -> dict[str, Any]:
    return {
        part: {method: _saving(anchor, test, most, method) for method in METHODS}
        for part, most in (("low", LOW), ("all", None))
    }


def savings(points: Sequence[Point], ours: str) -> dict[str, Any]:
    """BD-rate of `ours` against every other codec, over PSNR: of the mean curve, and of each picture.

    Returns:
        rival -> "mean" and "pictures" -> "low" (rates up to LOW) and "all" -> method -> "rate" (-0.2 is 20 % fewer
        bits) and "psnr", the range compared; or None and "why".
    """
    return {
        rival: {
            "mean": _compare(mean_curve(points, rival), mean_curve(points, ours)),
            "pictures": {
                picture: _compare(curve(points, rival, picture), curve(points, ours, picture))
                for picture in pictures(points)
            },
        }
        for rival in names(points)
        if rival != ours
    }


def times(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Codec -> medians of seconds over all its files, "encode" and "decode"."""
    return {
        codec: {way: median(getattr(p, way) for p in points if p.codec == codec) for way in ("encode", "decode")}
        for codec in names(points)
    }
