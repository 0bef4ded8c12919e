"""Self-contained pages: pictures are data URIs, and nothing points outside."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from PIL import Image, ImageOps

from vlkern.search.style import STYLE

#: Formats that browsers show as they are.
_SHOWN = ("WEBP", "PNG", "JPEG", "GIF")
#: Longer side of a thumbnail: twice what the page shows, for fine screens.
SIDE = 256


class Card(NamedTuple):
    """A picture, what stands below it, and a figure in small print. Without `uri` the picture's place is empty."""

    uri: str
    caption: str
    note: str


def thumbnail(file: bytes, side: int = SIDE) -> str:
    """A picture's file as a data URI; what is larger than `side` becomes a WebP of that size, turned as its EXIF says.

    Raises:
        ValueError: Pillow cannot read it.
    """
    try:
        with Image.open(io.BytesIO(file)) as image:
            if max(image.size) <= side and image.format in _SHOWN:
                return f"data:{Image.MIME[image.format]};base64,{base64.b64encode(file).decode()}"
            small = ImageOps.exif_transpose(image)
            small = small.convert("RGBA" if small.has_transparency_data else "RGB")
            small.thumbnail((side, side))
            out = io.BytesIO()
            small.save(out, "WEBP", quality=80)
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise ValueError(f"no readable picture: {error or type(error).__name__}") from error
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def facts(pairs: Mapping[str, str]) -> str:
    """Boxes with a name and a value each."""
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in pairs.items())}</dl>"


def _card(card: Card) -> str:
    caption = escape(card.caption)
    image = f'<img src="{card.uri}" alt="{caption}">' if card.uri else ""
    return (
        f'<figure><div class="picture">{image}</div>'
        f"<figcaption>{caption}<span>{escape(card.note)}</span></figcaption></figure>"
    )


def answer(query: str, cards: Iterable[Card]) -> str:
    """A query and its pictures in a row."""
    return f'<h3 class="query">{escape(query)}</h3><div class="cards">{"".join(map(_card, cards))}</div>'


def document(title: str, header: str, body: str) -> str:
    """The whole page around `header` and `body`, which are HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>
<header>{header}</header>
{body}
</main></body></html>
"""


def hits_page(about: Mapping[str, str], answers: Sequence[tuple[str, Sequence[Card]]], skipped: Sequence[str]) -> str:
    """The page of `vlkern search`: facts, a row of pictures for each query, and what could not be read."""
    header = """<h1>Pictures found by words</h1>
<p>The closest pictures to each query, best first. Below each: how likely the model takes picture and words for a
pair, and their cosine, by which they are sorted.</p>"""
    rows = "".join(answer(query, cards) for query, cards in answers)
    parts = [facts(about), f"<section><h2>Searches</h2>{rows}</section>"]
    if skipped:
        lines = "\n".join(map(escape, skipped))
        parts.append(f"<section><h2>Left out</h2><p>{len(skipped)} could not be read.</p><pre>{lines}</pre></section>")
    return document("vlkern search", header, "\n".join(parts))
