"""Bjøntegaard's comparison of two rate-distortion curves: how much rate one saves at equal quality."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Method = Literal["pchip", "cubic"]
_Array = npt.NDArray[np.float64]


class Curve(NamedTuple):
    """Points of one codec.

    rates    bits per pixel (or any other rate), each above 0
    quality  dB (or any other measure where more is better)
    """

    rates: Sequence[float]
    quality: Sequence[float]


class Saving(NamedTuple):
    """What a comparison found.

    rate  mean relative difference of the rate at equal quality: -0.2 is 20 % fewer bits
    low   least quality compared
    high  greatest
    """

    rate: float
    low: float
    high: float


def front(curve: Curve) -> Curve:
    """The points that no other point beats: rates and quality both strictly increase.

    Raises:
        ValueError: the curve is not one.
    """
    if len(curve.rates) != len(curve.quality):
        raise ValueError(f"curve: expected as many rates as qualities, got {len(curve.rates)} and {len(curve.quality)}")
    if not all(rate > 0 and math.isfinite(rate) for rate in curve.rates):
        raise ValueError("curve: expected finite rates above 0")
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(zip(curve.rates, curve.quality, strict=True), key=lambda point: (point[0], -point[1])):
        if math.isfinite(quality) and (not kept or quality > kept[-1][1]):
            kept.append((rate, quality))
    return Curve(*map(list, zip(*kept, strict=True))) if kept else Curve([], [])


def _slopes(x: _Array, y: _Array) -> _Array:
    """Slopes at the points of the interpolation of Fritsch and Carlson, for x and y that strictly increase.

    Inside: the weighted harmonic mean of the secants on both sides, with which no cubic piece overshoots. At an end:
    the slope of the parabola through three points, or 0 if that falls.
    """
    h, secant = np.diff(x), np.diff(y) / np.diff(x)
    if len(x) == 2:
        return np.repeat(secant, 2)
    left, right = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    inside = (left + right) / (left / secant[:-1] + right / secant[1:])
    first = ((2 * h[0] + h[1]) * secant[0] - h[0] * secant[1]) / (h[0] + h[1])
    last = ((2 * h[-1] + h[-2]) * secant[-1] - h[-1] * secant[-2]) / (h[-1] + h[-2])
    return np.concatenate([[max(first, 0.0)], inside, [max(last, 0.0)]])


def _pieces(x: _Array, y: _Array) -> list[np.polynomial.Polynomial]:
    """A cubic for each interval, in t = position - x[i]."""
    h, secant, slope = np.diff(x), np.diff(y) / np.diff(x), _slopes(x, y)
    squared = (3 * secant - 2 * slope[:-1] - slope[1:]) / h
    cubed = (slope[:-1] + slope[1:] - 2 * secant) / h**2
    return [np.polynomial.Polynomial(c) for c in zip(y[:-1], slope[:-1], squared, cubed, strict=True)]


def interpolate(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """The value at one place of the monotone piecewise cubic (PCHIP) through points with increasing x and y.

    Raises:
        ValueError: `at` lies outside of the points, or there are fewer than two.
    """
    if len(x) < 2 or not x[0] <= at <= x[-1]:
        raise ValueError(f"at: expected a place between at least two points, got {at}")
    places = np.asarray(x, np.float64)
    i = min(int(np.searchsorted(places, at, "right")) - 1, len(x) - 2)
    return float(_pieces(places, np.asarray(y, np.float64))[i](at - x[i]))


def _area(x: _Array, y: _Array, low: float, high: float, method: Method) -> float:
    """Integral of the curve through (or near) the points."""
    if method == "cubic":
        whole = np.polynomial.Polynomial.fit(x, y, 3).integ()
        return float(whole(high) - whole(low))
    total = 0.0
    for start, end, piece in zip(x[:-1], x[1:], _pieces(x, y), strict=True):
        a, b = max(low, start), min(high, end)
        if a < b:
            integral = piece.integ()
            total += float(integral(b - start) - integral(a - start))
    return total


def _below(curve: Curve, most: float) -> Curve:
    """The part of a front with rates of at most `most`; it ends there exactly if the front goes on beyond."""
    rates = [rate for rate in curve.rates if rate <= most]
    quality = list(curve.quality[: len(rates)])
    if 0 < len(rates) < len(curve.rates) and rates[-1] < most:
        logs = [math.log(rate) for rate in curve.rates]
        rates, quality = [*rates, most], [*quality, interpolate(logs, curve.quality, math.log(most))]
    return Curve(rates, quality)


def bd_rate(anchor: Curve, test: Curve, *, most: float | None = None, method: Method = "pchip") -> Saving:
    """Mean difference of the logarithm of the rate between two curves, over the quality that both reach.

    exp(1 / (q1 - q0) * integral from q0 to q1 of (log r_test(q) - log r_anchor(q)) dq) - 1, where log r(q) is either
    the monotone piecewise cubic through all points (`pchip`) or one cubic fitted to them by least squares (`cubic`,
    Bjøntegaard's first proposal; exact for four points). Points that another of the same curve beats in both rate and
    quality are left out.

    Args:
        anchor: the rival.
        test: ours.
        most: compare only the parts of both curves with rates of at most this.
        method: how a curve is drawn through its points; a cubic needs four, a piecewise one two.

    Raises:
        ValueError: too few points, or no quality that both curves reach.

    Source:
        Bjøntegaard: Calculation of average PSNR differences between RD-curves (VCEG-M33, 2001);
        Fritsch, Carlson: Monotone piecewise cubic interpolation (SIAM J. Numer. Anal. 17, 1980).

    Example:
        >>> jpeg = Curve([0.25, 0.5, 1.0, 2.0], [28.0, 31.0, 34.0, 37.0])
        >>> ours = Curve([0.2, 0.4, 0.8, 1.6], [28.0, 31.0, 34.0, 37.0])
        >>> round(bd_rate(jpeg, ours).rate, 6)
        -0.2
    """
    if method not in ("pchip", "cubic"):
        raise ValueError(f"method: expected 'pchip' or 'cubic', got {method!r}")
    curves = []
    for name, curve in (("anchor", anchor), ("test", test)):
        curve = front(curve)
        if most is not None:
            curve = _below(curve, most)
        least = 4 if method == "cubic" else 2
        if len(curve.rates) < least:
            of = "" if most is None else f" of at most {most:g}"
            raise ValueError(f"{name}: expected at least {least} points with rates{of}, got {len(curve.rates)}")
        curves.append(curve)
    low = max(curve.quality[0] for curve in curves)
    high = min(curve.quality[-1] for curve in curves)
    if low >= high:
        raise ValueError(f"the curves share no quality: one starts at {low:.4g}, the other ends at {high:.4g}")
    of_anchor, of_test = (
        _area(np.asarray(curve.quality, np.float64), np.log(curve.rates), low, high, method) for curve in curves
    )
    return Saving(math.expm1((of_test - of_anchor) / (high - low)), low, high)
