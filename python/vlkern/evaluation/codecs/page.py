"""report.html of `vlkern eval m2t`: what is saved, curves, crops side by side and times; self-contained."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vlkern.evaluation.codecs.crops import RATE, SIDE, Crop
from vlkern.evaluation.codecs.curves import LOW
from vlkern.evaluation.plots import File
from vlkern.evaluation.tables import Table
from vlkern.search.page import document, facts


def signed(rate: float | None) -> str:
    """Such as -12.3 %, or a dash."""
    return "-" if rate is None else f"{100 * rate:+.1f} %"


def _span(found: Mapping[str, Any]) -> str:
    return "-" if found["rate"] is None else "{:.1f} to {:.1f}".format(*found["psnr"])


def savings_table(savings: Mapping[str, Any]) -> Table:
    """A rival a line: BD-rate of the mean curves, by both methods, with the range of PSNR."""
    rows = []
    for rival, found in savings.items():
        low, whole = found["mean"]["low"], found["mean"]["all"]
        row = [f"against {rival}"]
        for part in (low, whole):
            row += [signed(part["pchip"]["rate"]), signed(part["cubic"]["rate"]), _span(part["pchip"])]
        rows.append(row)
    below = f"below {LOW:g} bpp"
    head = ["BD-rate", below, "cubic", "PSNR, dB", "all rates", "cubic", "PSNR, dB"]
    return Table("bits at equal PSNR, mean curves (less than 0: fewer bits)", head, rows)


def pictures_table(savings: Mapping[str, Any]) -> Table:
    """A picture a line: BD-rate up to LOW against each rival."""
    rivals = list(savings)
    shown = list(savings[rivals[0]]["pictures"]) if rivals else []
    rows = [
        [picture, *(signed(savings[rival]["pictures"][picture]["low"]["pchip"]["rate"]) for rival in rivals)]
        for picture in shown
    ]
    return Table(f"BD-rate below {LOW:g} bpp, by picture", ["picture", *(f"against {r}" for r in rivals)], rows)


def curve_table(curve: Sequence[Mapping[str, float | None]]) -> Table:
    """A quality of ours a line: means over the pictures."""
    rows = []
    for point in curve:
        similarity = "-" if point["ms_ssim"] is None else f"{point['ms_ssim']:.4f}"
        rows.append([f"{point['quality']:g}", f"{point['bpp']:.4f}", f"{point['psnr']:.2f}", similarity])
    return Table("mean of all pictures", ["quality", "bpp", "PSNR, dB", "MS-SSIM"], rows)


def times_table(times: Mapping[str, Mapping[str, float]], settings: Mapping[str, str]) -> Table:
    """A codec a line: medians."""
    rows = [
        [name, settings.get(name, ""), *(f"{1000 * found[way]:.1f} ms" for way in ("encode", "decode"))]
        for name, found in times.items()
    ]
    return Table("time of a file, median", ["codec", "settings", "encode", "decode"], rows)


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = (
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(c)}</td>' for c in row[1:])}</tr>" for row in table.rows
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _plot(files: Sequence[File], alt: str) -> str:
    svg = next(content for name, content in files if name.endswith(".svg"))
    return f'<img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" alt="{escape(alt)}">'


def _crop(crop: Crop) -> str:
    note = "" if crop.bpp is None else f"{crop.bpp:.3f} bpp, {crop.psnr:.2f} dB"
    name = escape(crop.codec)
    return f'<figure><img src="{crop.uri()}" alt="{name}"><figcaption>{name}<span>{note}</span></figcaption></figure>'


def _crops(crops: Mapping[str, Sequence[Crop]]) -> str:
    rows = (
        f'<h3>{escape(picture)}</h3><div class="crops">{"".join(map(_crop, row))}</div>'
        for picture, row in crops.items()
    )
    return f"""<section><h2>Side by side</h2>
<p>The files of each row are about equally large: ours at the quality that is closest to {RATE:g} bits per pixel, the
others at the quality whose file is closest to ours in bytes. Shown are {SIDE} x {SIDE} pixels, where the squared error
of ours is largest; rate and PSNR are of the whole picture.</p>{"".join(rows)}</section>"""


def _left_out(skipped: Sequence[str]) -> str:
    lines = "\n".join(map(escape, skipped))
    return f"<section><h2>Left out</h2><pre>{lines}</pre></section>" if skipped else ""


def page(
    about: Mapping[str, str],
    savings: Mapping[str, Any],
    tables: Sequence[Table],
    plots: Sequence[Sequence[File]],
    crops: Mapping[str, Sequence[Crop]],
    skipped: Sequence[str],
) -> str:
    """The whole page.

    Args:
        about: facts on model and data.
        savings: of `curves.savings`.
        tables: of our mean curve, and of times.
        plots: of the mean curves, and of each picture.
        crops: picture -> a row.
        skipped: a line for each picture that could not be read.
    """
    header = """<h1>Rate and distortion</h1>
<p>How small the files of a trained codec are, and how close to the original they come, beside the formats that
everybody has. Sizes are those of real files, headers included; PSNR is over red, green and blue.</p>"""
    curve, times = tables
    body = f"""{facts(about)}
<section><h2>Saved at equal PSNR</h2>
<p>Bjøntegaard's difference of the rate: the mean, over the PSNR that both codecs reach, of the logarithm of ours over
theirs, as a percentage. Curves are drawn by monotone piecewise cubics, or by one cubic fitted to all points.</p>
{_html(savings_table(savings))}</section>
<section><h2>Curves</h2>{_plot(plots[0], "mean curves")}{_html(curve)}</section>
{_crops(crops)}
<section><h2>Picture by picture</h2>{_html(pictures_table(savings))}{_plot(plots[1], "curves of each")}</section>
<section><h2>Time</h2><p>Medians over all pictures and qualities, in one process; codecs take turns.</p>
{_html(times)}</section>
{_left_out(skipped)}"""
    return document("vlkern eval m2t", header, body)
