"""Prompts of models that see: texts and pictures to token ids and pixels, in the order in which they were trained.

    PaliGemma   <image> ... <image> <bos> text "\\n"  answer <eos>
    Gemma 3     <bos> text, and for every <start_of_image> in it
                "\\n\\n" <start_of_image> <image_soft_token> ... <image_soft_token> <end_of_image> "\\n\\n"
    a turn      <start_of_turn>user "\\n" text <end_of_turn> "\\n" <start_of_turn>model "\\n" answer <end_of_turn> "\\n"

The newline behind PaliGemma's prompt is a token by itself: it never merges with the text before it. In Gemma 3 what
stands between special tokens is tokenised together.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image

from vlkern.data.images import on_white, open_image, squeeze, to_unit
from vlkern.data.vocabulary import Vocabulary
from vlkern.errors import UserError

#: The contents of an image file, or an opened picture.
Picture = bytes | Image.Image
#: Who says it, "user" or "model", and what.
Turn = tuple[str, str]

_IMAGE, _START, _END = "<image>", "<start_of_image>", "<end_of_image>"
_TURN, _END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


class _Vision(Protocol):
    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""


class _Language(Protocol):
    @property
    def vocabulary(self) -> int:
        """Rows of the table of token vectors."""


class Model(Protocol):
    """What a prompt needs to know of a model: PaliGemmaConfig and Gemma3Config say it."""

    @property
    def vision(self) -> _Vision:
        """Its image encoder."""

    @property
    def language(self) -> _Language:
        """Its language model."""

    @property
    def image_token(self) -> int:
        """The placeholder."""

    @property
    def image_tokens(self) -> int:
        """How many placeholders an image has."""

    @property
    def sampled_vocabulary(self) -> int:
        """How many ids the tokenizer has."""


@dataclass(frozen=True)
class Prompt:
    """What goes into a model.

    ids: the tokens, placeholders of images among them.
    pixels: [N, 3, H, W] float32 in [-1, 1], or None without images.
    prefix: how many of the tokens are the question; what follows is the answer to learn, if there is one.
    """

    ids: tuple[int, ...]
    pixels: torch.Tensor | None
    prefix: int


def check_tokenizer(vocabulary: Vocabulary, model: Model) -> None:
    """Make sure that model and tokenizer have the same ids: each can be read, and each that is drawn can be written.

    Raises:
        UserError: the tokenizer has fewer ids than the model draws from, or more than it knows.
    """
    least, most = model.sampled_vocabulary, model.language.vocabulary
    if not least <= vocabulary.size <= max(least, most):
        raise UserError(
            f"the tokenizer must have {least} ids, those that the model draws from, or a few more up to {most}, got "
            f"{vocabulary.size}: take the tokenizer that belongs to the model"
        )


def pixels_of(images: Sequence[Picture], size: tuple[int, int]) -> torch.Tensor | None:
    """Pictures squeezed to (H, W) (bilinear, antialiased, the aspect ratio is not kept) -> [N, 3, H, W] in [-1, 1].

    Raises:
        UserError: a picture cannot be read; it is counted from 1.
        TypeError: it is neither an image nor bytes.
    """
    if not images:
        return None
    opened = [_open(image, number) for number, image in enumerate(images, 1)]
    return to_unit(torch.stack([squeeze(image, size, Image.Resampling.BILINEAR) for image in opened]))


def _open(image: Picture, number: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return on_white(image)
    if not isinstance(image, bytes):
        raise TypeError(f"image {number} must be a Pillow image or the contents of a file, got {type(image).__name__}")
    try:
        return open_image(image)
    except ValueError as error:
        raise UserError(f"image {number}: {error}") from error


def paligemma_prompt(
    model: Model, vocabulary: Vocabulary, text: str, images: Sequence[Picture] = (), *, suffix: str | None = None
) -> Prompt:
    """A question to PaliGemma, and the answer if it is there to learn.

    Args:
        model: its configuration.
        vocabulary: from `vlkern.data.load_vocabulary`.
        text: such as "caption en", "answer en what is it?", "detect cat ; dog", "segment cat". The images come first;
            `<image>` at the beginning of the text may say so, once for each.
        images: one; or several, such as the frames of a video.
        suffix: the answer.

    Raises:
        UserError: the tokenizer is not the model's, the text has another number of `<image>` than there are images or
            has them in its midst, or a picture cannot be read.

    Example:
        >>> from PIL import Image
        >>> from vlkern.models.paligemma import PRESETS
        >>> image, vocabulary = Image.new("RGB", (50, 40)), load_vocabulary("bytes")
        >>> prompt = paligemma_prompt(PRESETS["paligemma-tiny"], vocabulary, "caption en", [image], suffix="a cat")
        >>> len(prompt.ids), prompt.prefix, list(prompt.pixels.shape)
        (84, 77, [1, 3, 64, 64])
    """
    check_tokenizer(vocabulary, model)
    lead = text
    count = 0
    while lead.lstrip().startswith(_IMAGE):
        lead, count = lead.lstrip().removeprefix(_IMAGE), count + 1
    if _IMAGE in lead:
        raise UserError(f"{_IMAGE} must stand at the beginning of the prompt, got {text!r:.80}")
    _check_images(count, len(images), _IMAGE)
    begin = [] if vocabulary.start is None else [vocabulary.start]
    question = [*begin, *vocabulary.encode(lead), *vocabulary.encode("\n")]
    ids = [model.image_token] * (model.image_tokens * len(images)) + question
    answer = [] if suffix is None else [*vocabulary.encode(suffix), vocabulary.end]
    return _prompt(model, ids, answer, pixels_of(images, model.vision.image_size), len(images))


def gemma3_prompt(
    model: Model, vocabulary: Vocabulary, text: str, images: Sequence[Picture] = (), *, pan_and_scan: bool = False
) -> Prompt:
    """A text that Gemma 3 continues; for a conversation with a tuned model, `chat_prompt`.

    Args:
        model: its configuration.
        vocabulary: from `vlkern.data.load_vocabulary`.
        text: has `<start_of_image>` where an image stands; without any, the images come first.
        images: in the order of their places.
        pan_and_scan: show parts of an oblong picture as images of their own, too (`crops`): text in it stays readable.

    Raises:
        UserError: the tokenizer is not the model's, the text has another number of places than there are images, or a
            picture cannot be read.
    """
    check_tokenizer(vocabulary, model)
    if images and _START not in text:
        text = _START * len(images) + text
    opened = [_open(image, number) for number, image in enumerate(images, 1)]
    pieces = text.split(_START)
    _check_images(len(pieces) - 1, len(images), _START)
    shown: list[Image.Image] = []
    parts: list[str | int] = []
    for piece, image in itertools.zip_longest(pieces, opened):
        parts += _with_turns(vocabulary, piece)
        if image is None:
            continue
        shown.append(image)
        cut = crops(image.height, image.width) if pan_and_scan else []
        if not cut:
            parts += _image(model, vocabulary)
            continue
        shown += [image.crop((left, top, right, bottom)) for top, left, bottom, right in cut]
        parts += ["Here is the original image ", *_image(model, vocabulary)]
        parts += [" and here are some crops to help you see better "]
        for number in range(len(cut)):
            parts += [*([" "] if number else []), *_image(model, vocabulary)]
    ids = [] if vocabulary.start is None else [vocabulary.start]
    for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, str)):
        found = list(run)
        ids += vocabulary.encode("".join(map(str, found))) if is_text else map(int, found)
    return _prompt(model, ids, [], pixels_of(shown, model.vision.image_size), len(shown))


def chat_prompt(
    model: Model,
    vocabulary: Vocabulary,
    turns: Sequence[Turn],
    images: Sequence[Picture] = (),
    *,
    system: str | None = None,
    pan_and_scan: bool = False,
) -> Prompt:
    """A conversation with a tuned Gemma 3, whose turn it is: as `gemma3_prompt`, of `chat_text`.

    Images whose places no text says come before the first turn's text.

    Raises:
        UserError: as `gemma3_prompt` and `chat_text`.

    Example, with the tokenizer that belongs to the model:
        prompt = chat_prompt(model.config, vocabulary, [("user", "What is this?")], [image])
    """
    if images and turns and not any(_START in text for _, text in turns):
        (who, text), *rest = turns
        turns = [(who, _START * len(images) + text.strip()), *rest]
    return gemma3_prompt(model, vocabulary, chat_text(turns, system=system), images, pan_and_scan=pan_and_scan)


def chat_text(turns: Sequence[Turn], *, system: str | None = None) -> str:
    """A conversation as the text that Gemma's tuned models continue, without the start token.

    Args:
        turns: ("user", ...), ("model", ...) and so on in turn; the last one is the user's.
        system: instructions, which come before the first text: there is no role for them.

    Raises:
        UserError: the turns are not in this order.

    Example:
        >>> chat_text([("user", "Hello")])
        '<start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\n'
    """
    for number, (who, _) in enumerate(turns):
        if who != (expected := "model" if number % 2 else "user"):
            raise UserError(
                f"turns must alternate between user and model: turn {number + 1} must be of {expected}, got {who!r}"
            )
    if len(turns) % 2 == 0:
        raise UserError(f"turns must end with the user's, got {len(turns)} turns")
    texts = [text.strip() for _, text in turns]
    if system is not None:
        texts[0] = f"{system}\n\n{texts[0]}"
    said = (f"{_TURN}{who}\n{text}{_END_OF_TURN}\n" for (who, _), text in zip(turns, texts, strict=True))
    return "".join(said) + f"{_TURN}model\n"


def crops(
    height: int, width: int, *, smallest: int = 256, most: int = 4, ratio: float = 1.2
) -> list[tuple[int, int, int, int]]:
    """Pan & Scan: an oblong picture in a row of parts without overlap, about as many as it is longer than high.

    Args:
        height, width: of the picture.
        smallest: a part must not be shorter or narrower.
        most: parts.
        ratio: a picture that is less oblong is not cut.

    Returns:
        (top, left, bottom, right) of each part, or nothing; the last one may be shorter.

    Example:
        >>> crops(600, 1000)
        [(0, 0, 600, 500), (0, 500, 600, 1000)]

    Source: Gemma 3 Technical Report, 2025, section 2.1.
    """
    long, short = max(height, width), min(height, width)
    if long / short < ratio:
        return []
    count = min(most, max(2, min(long // smallest, math.floor(long / short + 0.5))))
    step = math.ceil(long / count)
    if min(step, short) < smallest:
        return []
    cuts = [(i * step, min((i + 1) * step, long)) for i in range(count)]
    if width >= height:
        return [(0, a, height, b) for a, b in cuts]
    return [(a, 0, b, width) for a, b in cuts]


def _image(model: Model, vocabulary: Vocabulary) -> list[str | int]:
    start, end = (_token(vocabulary, name) for name in (_START, _END))
    return ["\n\n", start, *[model.image_token] * model.image_tokens, end, "\n\n"]


def _with_turns(vocabulary: Vocabulary, text: str) -> list[str | int]:
    """The text with the ids of its turns' marks, which not every vocabulary finds in a text."""
    parts: list[str | int] = []
    for number, piece in enumerate(text.split(_TURN)):
        before, *rest = piece.split(_END_OF_TURN)
        parts += [*([_token(vocabulary, _TURN)] if number else []), before]
        for behind in rest:
            parts += [_token(vocabulary, _END_OF_TURN), behind]
    return [part for part in parts if part != ""]


def _token(vocabulary: Vocabulary, name: str) -> int:
    token = vocabulary.token(name)
    if token is None:
        raise UserError(
            f"the tokenizer must have {name}, got one without: take the tokenizer that belongs to the model"
        )
    return token


def _check_images(places: int, images: int, name: str) -> None:
    if places and places != images:
        raise UserError(f"images must be as many as {name} in the prompt, {places}, got {images}")


def _prompt(model: Model, ids: list[int], answer: list[int], pixels: torch.Tensor | None, images: int) -> Prompt:
    """Checked: no text can smuggle in a placeholder."""
    if (places := [*ids, *answer].count(model.image_token)) != images * model.image_tokens:
        raise UserError(
            f"the text must not contain the placeholder of images, token {model.image_token}, got {places} of them for "
            f"{images} images of {model.image_tokens} tokens"
        )
    return Prompt((*ids, *answer), pixels, len(ids))
