"""The language of PaliGemma's answers: four <locDDDD> for a box, sixteen <segDDD> for a mask, a label, `;` between.

    <loc0132><loc0168><loc0659><loc0986> cat ; <loc...><loc...><loc...><loc...><seg056>...<seg013> dog

A box is ymin, xmin, ymax, xmax in [0, 1], of the height and width of the picture. Its token is the nearest of 1024
evenly spaced numbers, 0 and 1 among them:

    bin(v) = clip(round(1023 v), 0, 1023)        v = bin / 1023        error at most 1 / 2046

The product is taken in float32 and halves go to the even neighbour, as in the models' training data.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LOCATIONS, CODES, CODES_OF_A_MASK = 1024, 128, 16
#: ymin, xmin, ymax, xmax; all between 0 and 1.
Box = tuple[float, float, float, float]

_TOKEN = re.compile(r"<(loc)(\d{4})>|<(seg)(\d{3})>")


@dataclass(frozen=True)
class Detection:
    """One object: where it is, what it is, and the sixteen codes of its mask if the model gave one.

    Raises:
        ValueError: the box is no four numbers between 0 and 1, or the codes are not sixteen below 128.
    """

    box: Box
    label: str = ""
    codes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.box) != 4 or not all(0 <= v <= 1 for v in self.box):
            raise ValueError(f"box must be ymin, xmin, ymax, xmax between 0 and 1, got {self.box!r}")
        if self.codes is not None and (
            len(self.codes) != CODES_OF_A_MASK or not all(0 <= code < CODES for code in self.codes)
        ):
            raise ValueError(f"codes must be {CODES_OF_A_MASK} numbers below {CODES}, got {self.codes!r}")

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The box in pixels of a picture: top, left, bottom, right; the lower right edge is outside the box."""
        sizes = torch.tensor([height, width, height, width], dtype=torch.float32)
        top, left, bottom, right = (torch.tensor(self.box, dtype=torch.float32) * sizes).round().int().tolist()
        return top, left, bottom, right


@dataclass(frozen=True)
class Answer:
    """What was found in a text.

    objects: in the order of the text.
    problems: what could not be read, one sentence each; empty when the text is well formed.
    """

    objects: tuple[Detection, ...]
    problems: tuple[str, ...]


def bins(boxes: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1], any shape -> int32 in 0 .. 1023: those of the `<loc>` tokens. What lies outside is clipped.

    Example:
        >>> bins(torch.tensor([0.0, 0.25, 1.0]))
        tensor([   0,  256, 1023], dtype=torch.int32)
    """
    return (boxes.float() * (LOCATIONS - 1)).round().clamp(0, LOCATIONS - 1).int()


def unbin(numbers: torch.Tensor) -> torch.Tensor:
    """0 .. 1023, any shape -> float64 in [0, 1]."""
    return numbers.double() / (LOCATIONS - 1)


def to_text(objects: Sequence[Detection]) -> str:
    """The answer that says this: what a model is trained to write. `parse` reads it back, to the nearest bin.

    Example:
        >>> to_text([Detection((0.0, 0.25, 0.5, 1.0), "cat")])
        '<loc0000><loc0256><loc0512><loc1023> cat'
    """
    return " ; ".join(_one_to_text(found) for found in objects)


def _one_to_text(found: Detection) -> str:
    box = "".join(f"<loc{number:04d}>" for number in bins(torch.tensor(found.box)).tolist())
    mask = "".join(f"<seg{code:03d}>" for code in found.codes or ())
    return f"{box}{mask} {found.label}".rstrip()


def parse(text: str) -> Answer:
    """Read the boxes, masks and labels out of what a model wrote. Nothing raises: models write all kinds of things.

    A box needs exactly four location tokens that span an area, ymin < ymax and xmin < xmax; what has no such box is
    left out and reported. A mask needs exactly sixteen codes; where it has not, the box is kept without it, and
    reported. A box that follows a label without `;` begins a new object, reported too. A text without any such token
    is an answer in words: no objects and no problems.

    Example:
        >>> answer = parse("<loc0000><loc0256><loc0512><loc1023> cat ; <loc0001> dog")
        >>> answer.objects
        (Detection(box=(0.0, 0.25024437927663734, 0.5004887585532747, 1.0), label='cat', codes=None),)
        >>> answer.problems
        ("object 2 ('dog') has 1 location tokens instead of 4",)
    """
    problems: list[str] = []
    pieces = _pieces(text, problems) if _TOKEN.search(text) else []
    objects = []
    for number, (locations, codes, label) in enumerate(pieces, 1):
        name = f"object {number} ({label!r})"
        if len(locations) != 4:
            problems.append(f"{name} has {len(locations)} location tokens instead of 4")
            continue
        if max(locations) >= LOCATIONS:
            problems.append(f"{name} has a location token above {LOCATIONS - 1}: {max(locations)}")
            continue
        ymin, xmin, ymax, xmax = locations
        if ymin >= ymax or xmin >= xmax:
            problems.append(f"{name} has an empty box: rows {ymin} to {ymax}, columns {xmin} to {xmax} of 1023")
            continue
        mask = tuple(codes) or None
        if mask and (len(mask) != CODES_OF_A_MASK or max(mask) >= CODES):
            problems.append(f"{name} has no readable mask: {len(mask)} codes up to {max(mask)}, not 16 below 128")
            mask = None
        y0, x0, y1, x1 = (value / (LOCATIONS - 1) for value in locations)
        objects.append(Detection((y0, x0, y1, x1), label, mask))
    return Answer(tuple(objects), tuple(problems))


def _pieces(text: str, problems: list[str]) -> list[tuple[list[int], list[int], str]]:
    """Location numbers, codes and label of each object of the text, well formed or not."""
    found = []
    for part in text.split(";"):
        locations: list[int] = []
        codes: list[int] = []
        words: list[str] = []
        end = 0
        for token in _TOKEN.finditer(part):
            words.append(part[end : token.start()].strip())
            end = token.end()
            if token[1] and (codes or any(words)):  # a new box, where nothing but a box may stand so far
                found.append((locations, codes, " ".join(filter(None, words))))
                if locations:
                    problems.append(f"object {len(found) + 1} begins without ';' before it")
                locations, codes, words = [], [], []
            (locations if token[1] else codes).append(int(token[2] or token[4]))
        words.append(part[end:].strip())
        if locations or codes or any(words):
            found.append((locations, codes, " ".join(filter(None, words))))
    return found
