"""report.html of `vlkern eval pictures`: figures, sheets of pictures and the curve of the training; self-contained."""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from vlkern.demo.chart import Axis, Bar, Line, bars, draw
from vlkern.painting.base import Measures
from vlkern.painting.sheet import png
from vlkern.search.page import document, facts


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of the log of the run that a model came from; empty if there is none that can be read."""
    try:
        records = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
        return [(int(record["step"]), float(record["loss"])) for record in records]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _bits(ours: float, files: Mapping[str, float]) -> str:
    rows = [Bar("model", "ours", ours, f"{ours:.2f}")]
    rows += [Bar(name.replace("lossless ", ""), "rival", value, f"{value:.2f}") for name, value in files.items()]
    return f"""<section><h2>Bits for each sub-pixel</h2>
<p>How many bits the model needs, on average, to say which of 256 values a sub-pixel has: minus the logarithm of the
probability that it gives the held-out pictures. Beside it are the sizes of the same pictures as files without loss,
headers included. Fewer bits mean that more is known about what pictures look like.</p>
<div class="charts one">{bars("bits per sub-pixel", rows)}</div></section>"""


def _sheets(measures: Measures) -> str:
    parts = []
    for title, pictures in measures.sheets.items():
        uri = base64.b64encode(png(pictures)).decode()
        parts.append(f'<h3>{escape(title)}</h3><img src="data:image/png;base64,{uri}" alt="{escape(title)}">')
    return f"<section><h2>Pictures</h2>{''.join(parts)}</section>" if parts else ""


def _loss(points: list[tuple[int, float]]) -> str:
    if len(points) < 2:
        return ""
    steps, losses = zip(*points, strict=True)
    chart = draw([Line("", "ours", list(steps), list(losses))], Axis("step"), Axis("loss"))
    return f'<section><h2>Loss</h2><div class="charts one">{chart}</div></section>'


def page(
    about: Mapping[str, str], measures: Measures, files: Mapping[str, float], points: list[tuple[int, float]]
) -> str:
    """The whole page.

    Args:
        about: facts on model and data.
        measures: what the painter found.
        files: bits per sub-pixel of lossless formats, by name.
        points: the curve of the training.
    """
    header = """<h1>Pictures of a model</h1>
<p>What a model trained with vlkern makes of pictures that it never saw, and what it makes by itself.</p>"""
    shown = dict(about) | {name: f"{value:.4g}" for name, value in measures.numbers.items()}
    body = [facts(shown), _sheets(measures)]
    if measures.bits is not None:
        body.append(_bits(measures.bits, files))
    return document("vlkern eval pictures", header, "\n".join([*body, _loss(points)]))
