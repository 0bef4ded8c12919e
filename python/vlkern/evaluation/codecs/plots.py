"""Rate-distortion curves as SVG and PNG."""

from collections.abc import Mapping, Sequence
from math import log10

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlkern.evaluation.codecs.bjontegaard import Curve, front
from vlkern.evaluation.codecs.curves import Measure, curve, mean_curve, names, pictures
from vlkern.evaluation.codecs.measure import Point
from vlkern.evaluation.plots import INK, OURS, RULE, File, files, style

#: Colours of rivals in the order in which they come.
_RIVALS = ("#5c6370", "#c2571a", "#7a5ea8", "#b08a1e")
#: Rates that are drawn.
_MOST = 1.5
_TITLES: dict[Measure, str] = {"psnr": "PSNR, dB", "ms_ssim": "MS-SSIM, dB"}


def decibels(value: float) -> float:
    """MS-SSIM as -10 log10(1 - value): differences near 1 can be seen. At most 60."""
    return -10 * log10(max(1 - value, 1e-6))


def _draw(axes: Axes, curves: Mapping[str, Curve], measure: Measure, ours: str) -> None:
    rivals = [name for name in curves if name != ours]
    seen: list[float] = []
    for name, found in curves.items():
        mine = name == ours
        color = OURS if mine else _RIVALS[rivals.index(name) % len(_RIVALS)]
        found = front(found)
        quality = [decibels(q) for q in found.quality] if measure == "ms_ssim" else found.quality
        inside = [q for rate, q in zip(found.rates, quality, strict=True) if rate <= _MOST]
        seen += inside
        width, size, above = (2, 4, 3) if mine else (1.2, 2.5, 2)
        axes.plot(found.rates, quality, "o-", color=color, lw=width, ms=size, label=name, zorder=above)
    axes.set_xlim(0, _MOST)
    if seen:
        room = 0.03 * (max(seen) - min(seen)) or 1.0
        axes.set_ylim(min(seen) - room, max(seen) + room)
    axes.grid(color=RULE, lw=0.6)


def _finish(figure: Figure, axes: Sequence[Axes], title: str, columns: int) -> None:
    for panel in axes:
        style(figure, panel, title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=columns, loc="outside lower center")


def mean_plot(points: Sequence[Point], ours: str) -> list[File]:
    """The mean curves over PSNR and, where the pictures are large enough, MS-SSIM."""
    codecs = names(points)
    curves = {m: {name: mean_curve(points, name, m) for name in codecs} for m in _TITLES}
    drawn = [m for m in _TITLES if any(found.rates for found in curves[m].values())]
    figure = Figure(figsize=(4.8 * len(drawn), 4.6), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, m in zip(panels, drawn, strict=True):
        _draw(axes, curves[m], m, ours)
        axes.set_title(_TITLES[m], loc="left", fontsize=9, color=INK)
        axes.set_xlabel("bits per pixel", fontsize=9, color=INK)
    _finish(figure, list(panels), f"Rate and distortion, mean of {len(pictures(points))} pictures\n", len(codecs))
    return files("rate_distortion", figure)


def picture_plot(points: Sequence[Point], ours: str) -> list[File]:
    """A small panel for each picture, over PSNR."""
    shown, codecs, columns = pictures(points), names(points), 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(9.6, 2.6 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, picture in zip(panels, shown, strict=False):
        _draw(axes, {name: curve(points, name, picture) for name in codecs}, "psnr", ours)
        axes.set_title(picture, loc="left", fontsize=8, color=INK)
    _finish(figure, list(panels[: len(shown)]), "PSNR in dB over bits per pixel\n", len(codecs))
    return files("pictures", figure)
