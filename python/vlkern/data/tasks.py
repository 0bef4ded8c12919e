"""Pictures with a question and an answer, made of image-text pairs: what PaliGemma learns from.

    caption   "caption en"           one of the picture's captions
    category  "answer en category"   its class
    detect    "detect all classes"   up to three pictures on a white canvas: a box and a class for each, from the top

Which example a number gives depends on that number alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlkern._random import draws
from vlkern.boxes import Box, Detection, to_text
from vlkern.data.augment import augment
from vlkern.data.images import check_size, to_unit
from vlkern.data.shards import PairShards

PREFIXES = {"caption": "caption en", "category": "answer en category", "detect": "detect all classes"}
#: Edges of pictures on a canvas are multiples of a 1 / GRID of its side.
GRID = 16
#: The longer side of a picture there, in such parts.
_SIDES = range(5, 10)
_MOST = 3
#: Attempts to find a place for a further picture.
_TRIES = 10
_UNKNOWN = "picture"
#: Where a record has the shape of its picture; without it a picture counts as square.
_SHAPE = ("height", "width")


class Example(NamedTuple):
    """A picture [3, H, W] uint8, the question and the answer; of a canvas also what lies where.

    `lines` say what could not be read, by the number of the pair; without anything readable `pixels` is None.
    """

    pixels: torch.Tensor | None
    prefix: str
    suffix: str
    objects: tuple[Detection, ...]
    lines: dict[int, str]


class Tasks:
    """Examples of several kinds.

    Args:
        pairs: captions and pictures.
        image_size: (H, W) of the model, or one number for both.
        kinds: names from `PREFIXES`, all equally frequent.
        class_key: where a pair's .json has its class; a path such as "food/fruit" counts up to its first slash. A pair
            without one has a caption instead, and is a "picture" on a canvas.
        augmented: whether pictures that fill the image are mirrored, turned, zoomed, shifted and tinted at random.

    Raises:
        ValueError: a kind is unknown, or there is none.

    Example:
        >>> tasks = Tasks(PairShards(clipart_mini() / "test.tar", 64), 64, kinds=["category"])
        >>> example = tasks(0, draw=1)
        >>> example.prefix, example.suffix, example.pixels.shape
        ('answer en category', 'computer', torch.Size([3, 64, 64]))
    """

    def __init__(
        self,
        pairs: PairShards,
        image_size: int | tuple[int, int],
        *,
        kinds: Sequence[str] = tuple(PREFIXES),
        class_key: str = "category",
        augmented: bool = False,
    ) -> None:
        if not kinds or not set(kinds) <= set(PREFIXES):
            raise ValueError(f"kinds must be some of {', '.join(PREFIXES)}, got {', '.join(kinds) or 'none'}")
        self.pairs, self.size, self.kinds = pairs, check_size(image_size), list(kinds)
        self.class_key, self.augmented = class_key, augmented

    def category(self, index: int) -> str | None:
        """The class of pair number `index` in words; None if it has none."""
        found = self.pairs.record(index).get(self.class_key)
        return found.partition("/")[0].replace("_", " ") if isinstance(found, str) and found else None

    def texts(self, index: int) -> list[str]:
        """All that the answers about pair number `index` may say besides places."""
        category = self.category(index)
        return [*self.pairs.captions_of(index), *([category] if category else [])]

    def __call__(self, index: int, draw: int) -> Example:
        """The example that pair number `index` and a `draw`, a number below 2^64, give."""
        numbers = [int(number) for number in draws(2 + _MOST * (1 + 3 * _TRIES), draw, 0)]
        kind = self.kinds[numbers[0] % len(self.kinds)]
        if kind == "detect":
            return self._canvas(index, numbers[1:])
        pair, lines = self.pairs.read(index, self.size)
        if pair is None:
            return Example(None, "", "", (), lines)
        category = self.category(self._read(index, lines)) if kind == "category" else None
        prefix = PREFIXES["caption" if category is None else kind]
        suffix = category or pair.captions[numbers[1] % len(pair.captions)]
        pixels = pair.pixels
        if self.augmented:
            changed = augment(to_unit(pixels)[None], torch.Generator().manual_seed(draw))[0]
            pixels = ((changed + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Example(pixels, prefix, suffix, (), lines)

    def _canvas(self, index: int, numbers: Sequence[int]) -> Example:
        """Pictures of all sizes that do not touch; the first is number `index`."""
        height, width = self.size
        canvas = torch.full((3, height, width), 255, dtype=torch.uint8)
        objects: list[Detection] = []
        taken = torch.zeros(GRID, GRID, dtype=torch.bool)
        lines: dict[int, str] = {}
        count, *rest = numbers
        for part in range(1 + count % _MOST):
            mine = rest[part * (1 + 3 * _TRIES) :]
            number = mine[0] % len(self.pairs) if part else index
            box = self._place(number, mine[1:], taken)
            if box is None:
                continue
            top, left, bottom, right = box
            rows = [round(edge * height / GRID) for edge in (top, bottom)]
            columns = [round(edge * width / GRID) for edge in (left, right)]
            pair, bad = self.pairs.read(number, (rows[1] - rows[0], columns[1] - columns[0]))
            lines |= bad
            if pair is None:
                return Example(None, "", "", (), lines)
            canvas[:, rows[0] : rows[1], columns[0] : columns[1]] = pair.pixels
            taken[top:bottom, left:right] = True
            objects.append(Detection(_fractions(box), self.category(self._read(number, bad)) or _UNKNOWN))
        objects.sort(key=lambda found: found.box)
        return Example(canvas, PREFIXES["detect"], to_text(objects), tuple(objects), lines)

    def _read(self, index: int, lines: dict[int, str]) -> int:
        """The pair that stood in for number `index` when these could not be read: the next one."""
        return (index + len(lines)) % len(self.pairs)

    def _place(self, number: int, numbers: Sequence[int], taken: torch.Tensor) -> tuple[int, int, int, int] | None:
        """Edges of a free place with the shape of picture `number`; None if there is none after some attempts."""
        record = self.pairs.record(number)
        sides = [side for side in map(record.get, _SHAPE) if isinstance(side, int) and side > 0]
        aspect = sides[0] / sides[1] if len(sides) == len(_SHAPE) else 1.0
        for attempt in range(_TRIES):
            size, y, x = numbers[3 * attempt : 3 * attempt + 3]
            side = _SIDES[size % len(_SIDES)]
            # A strip of less than two parts shows nothing.
            h, w = (max(2, round(side * ratio)) for ratio in (min(1.0, aspect), min(1.0, 1 / aspect)))
            top, left = y % (GRID - h + 1), x % (GRID - w + 1)
            if not taken[top : top + h, left : left + w].any():
                return top, left, top + h, left + w
        return None


def _fractions(edges: tuple[int, int, int, int]) -> Box:
    top, left, bottom, right = (edge / GRID for edge in edges)
    return top, left, bottom, right
