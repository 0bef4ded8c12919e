"""All that an evaluation of a codec finds, and the files that it leaves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlkern._files import write_file
from vlkern.evaluation.codecs import plots
from vlkern.evaluation.codecs.contestants import Contestant
from vlkern.evaluation.codecs.crops import Crop, crops
from vlkern.evaluation.codecs.curves import LOW, mean_curve, savings, times
from vlkern.evaluation.codecs.measure import Point, measure
from vlkern.evaluation.codecs.page import curve_table, page, pictures_table, savings_table, signed, times_table
from vlkern.evaluation.progress import Bar
from vlkern.evaluation.tables import Table


class Evaluation(NamedTuple):
    """What was measured.

    contestants  ours first
    points       of all pictures
    crops        picture -> parts side by side; empty if not asked for
    """

    contestants: Sequence[Contestant]
    points: Sequence[Point]
    crops: Mapping[str, Sequence[Crop]]

    @property
    def ours(self) -> Contestant:
        """The codec that is evaluated."""
        return self.contestants[0]

    def savings(self) -> dict[str, Any]:
        """See `curves.savings`."""
        return savings(self.points, self.ours.name)

    def curve(self) -> list[dict[str, float | None]]:
        """Our mean curve: quality, bpp, psnr, ms_ssim."""
        over_psnr, over_similarity = (mean_curve(self.points, self.ours.name, m) for m in ("psnr", "ms_ssim"))
        nowhere: list[float | None] = [None] * len(over_psnr.quality)
        similar = over_similarity.quality or nowhere
        rows = zip(self.ours.qualities, *over_psnr, similar, strict=True)
        return [dict(zip(("quality", "bpp", "psnr", "ms_ssim"), row, strict=True)) for row in rows]

    def settings(self) -> dict[str, str]:
        """Codec -> how it was set."""
        return {codec.name: codec.about for codec in self.contestants}

    def tables(self) -> list[Table]:
        """For a terminal, what matters most last."""
        saved = self.savings()
        times_of_all = times_table(times(self.points), self.settings())
        return [curve_table(self.curve()), times_of_all, pictures_table(saved), savings_table(saved)]


def evaluate(
    pictures: Mapping[str, Image.Image], contestants: Sequence[Contestant], *, side_by_side: bool
) -> Evaluation:
    """Measure all codecs on all pictures.

    Args:
        pictures: name -> RGB.
        contestants: ours first.
        side_by_side: whether parts are wanted for the page.
    """
    points: list[Point] = []
    shown: dict[str, list[Crop]] = {}
    ours = contestants[0]
    ours.decode(ours.encode(next(iter(pictures.values())), ours.qualities[0]))  # the first call loads what it needs
    each = sum(len(codec.qualities) for codec in contestants)
    with Bar("files", len(pictures) * each) as bar:
        for number, (name, picture) in enumerate(pictures.items()):

            def show(done: int, before: int = number * each) -> None:
                bar.update(before + done)

            found = measure(name, picture, contestants, show)
            points += found
            if side_by_side:
                shown[name] = crops(picture, found, contestants)
    return Evaluation(contestants, points, shown)


def _plain(value: Any) -> Any:
    """As JSON can say it, which knows nothing infinite, such as the PSNR of equal pixels: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write(found: Evaluation, model: str, data: str, skipped: Sequence[str], folder: Path) -> list[str]:
    """Plots, report.html and, last of all, results.json; each is there completely or not at all.

    Args:
        found: what was measured.
        model: which one it is.
        data: where the pictures come from.
        skipped: a line for each that could not be read.
        folder: where the files go.

    Returns:
        The names of the files.

    Raises:
        UserError: the folder takes no file.
    """
    saved, pictures = found.savings(), list(dict.fromkeys(point.picture for point in found.points))
    drawn = [plots.mean_plot(found.points, found.ours.name), plots.picture_plot(found.points, found.ours.name)]
    against = {
        f"BD-rate against {rival} below {LOW:g} bpp": signed(s["mean"]["low"]["pchip"]["rate"])
        for rival, s in saved.items()
    }
    about = {"model": model, "data": f"{data}, {len(pictures)} pictures"} | against
    results: dict[str, Any] = {
        "schema": 1, "model": model, "data": data, "pictures": pictures, "skipped": list(skipped),
        "settings": found.settings(), "savings": saved, "seconds": times(found.points), "curve": found.curve(),
        "points": [asdict(point) for point in found.points],
    }  # fmt: skip
    curve, seconds, *_ = found.tables()
    files = [
        *(file for plot in drawn for file in plot),
        ("report.html", page(about, saved, (curve, seconds), drawn, found.crops, skipped).encode()),
        ("results.json", (json.dumps(_plain(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()),
    ]
    for name, content in files:
        write_file(folder / name, content)
    return [name for name, _ in files]
