"""A mask as a small SVG picture."""

from html import escape

from vlkern.masks._mask import Mask

#: Pixels of a token; large masks get smaller ones, so that a picture stays about this wide.
_CELL, _SIDE, _MARGIN = 16.0, 480, 22

# The greys lie halfway between black and white, so that the picture reads on a light and on a dark page.
_STYLE = """\
text { font: 11px sans-serif; fill: #808080 }
.field { fill: #808080; fill-opacity: .12 }
.row { fill: #3f7fd0 }
.own { fill: #f2a33a }
.segment { fill: none; stroke: #808080 }"""


def draw(mask: Mask, Nq: int, Nk: int | None = None) -> str:
    """The mask as an SVG picture: queries are rows, keys are columns.

    What a query sees is one bar, its own key an orange dot on it; documents are framed. Size O(Nq), whatever the keys.

    Args:
        mask: what to draw.
        Nq: number of queries.
        Nk: number of keys, as in `Mask.bounds`; `cross` needs it.

    Returns:
        An SVG document that reads on a light and on a dark page.

    Raises:
        TypeError, ValueError: as `Mask.check`, which reads all values.

    Example:
        >>> picture = masks.draw(masks.causal() & masks.window(3), 8)
        >>> picture.splitlines()[1]
        '<title>(causal() &amp; window(3, None))</title>'
    """
    mask.check(Nq, Nk)
    rows = mask._rows(Nq, Nk, None, True)
    keys = int(rows.keys)
    cell = min(_CELL, _SIDE / max(Nq, keys, 1))
    edge = _MARGIN + 0.5

    def box(kind: str, key: float, query: float, wide: float, high: float, more: str = "") -> str:
        x, y, w, h = edge + key * cell, edge + query * cell, wide * cell, high * cell
        return f'<rect class="{kind}" x="{x:.4g}" y="{y:.4g}" width="{w:.4g}" height="{h:.4g}"{more}/>'

    gap = 0.06
    bars, dots = [], []
    starts, stops, owns = (t.tolist() for t in (*mask.bounds(Nq, Nk), rows.own))
    for i, (start, stop, own) in enumerate(zip(starts, stops, owns, strict=True)):
        if start < stop:
            bars.append(box("row", start + gap, i + gap, stop - start - 2 * gap, 1 - 2 * gap, ' rx="2"'))
        if start <= own < stop:
            x, y = (edge + (at + 0.5) * cell for at in (own, i))
            dots.append(f'<circle class="own" cx="{x:.4g}" cy="{y:.4g}" r="{0.22 * cell:.4g}"/>')
    frames = []
    if (segments := mask._segments()) is not None:
        q, k = (cu.tolist() for cu in segments.source)
        frames = [box("segment", k[s], q[s], k[s + 1] - k[s], q[s + 1] - q[s]) for s in range(segments.count())]
    w, h = (round(edge + n * cell + 2) for n in (keys, Nq))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}">',
            f"<title>{escape(repr(mask))}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f'<text x="{edge:g}" y="14">keys</text>',
            f'<text x="{-edge:g}" y="14" text-anchor="end" transform="rotate(-90)">queries</text>',
            box("field", 0, 0, keys, Nq),
            *bars,
            *frames,
            *dots,
            "</svg>\n",
        ]
    )
