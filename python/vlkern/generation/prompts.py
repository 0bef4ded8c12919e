"""Texts become tokens as each model was trained.

Gemma      <bos> text
PaliGemma  [image tokens of all pictures] <bos> text "\\n"             the new line is encoded by itself
Gemma3     <bos> text, in which every <start_of_image> becomes "\\n\\n" <start_of_image> [image tokens] <end_of_image>
           "\\n\\n"; pictures that the text does not mention come before it
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkern.data.vocabulary import Vocabulary


_IMAGE = "<start_of_image>"


def prompt_tokens(
    model: Any, prompt: str | Sequence[int], tokenizer: "Vocabulary | None", images: int = 0
) -> list[int]:
    """The tokens of a prompt with `images` pictures.

    Args:
        model: Gemma, PaliGemma or Gemma3.
        prompt: a text, or tokens, which are only checked.
        tokenizer: for texts.
        images: how many pictures belong to it.

    Raises:
        TypeError, ValueError: nothing in it, tokens that the model does not have, a text without a tokenizer, or
            pictures that do not match the places for them.

    Example:
        >>> model = vlkern.models.create("gemma3-tiny")
        >>> prompt_tokens(model, "ab", vlkern.data.load_vocabulary("bytes"))
        [2, 35, 100, 101]
    """
    token = getattr(model.config, "image_token", None)
    count = 0 if token is None else model.config.image_tokens
    if images and token is None:
        raise ValueError(f"images must be None for {type(model).__name__}, which sees none, got {images}")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompts need a tokenizer where they are texts, got none")
        tokens = _text(model, prompt, tokenizer, images)
    else:
        tokens = [int(i) for i in prompt]
    if not tokens:
        raise ValueError("prompts must have at least one token, got an empty one")
    language = model.config if token is None else model.config.language
    high = max(language.vocabulary, -1 if token is None else token + 1)
    if min(tokens) < 0 or max(tokens) >= high:
        raise ValueError(f"prompts must have tokens from 0 to {high - 1}, got {min(tokens)} to {max(tokens)}")
    places = tokens.count(token) if token is not None else 0
    if places != images * count:
        raise ValueError(
            f"prompts must have {count} places ({token}) for each picture, got {places} for {images} pictures"
        )
    return tokens


def _text(model: Any, text: str, tokenizer: "Vocabulary", images: int) -> list[int]:
    from vlkern.models.gemma3 import Gemma3
    from vlkern.models.paligemma import PaliGemma

    start = [] if tokenizer.start is None else [tokenizer.start]
    if isinstance(model, PaliGemma):
        image = [model.config.image_token] * model.config.image_tokens
        return image * images + start + tokenizer.encode(text) + tokenizer.encode("\n")
    if isinstance(model, Gemma3):
        parts = (_IMAGE * max(0, images - text.count(_IMAGE)) + text).split(_IMAGE)
        image = [model.config.image_token] * model.config.image_tokens
        tokens = start + tokenizer.encode(parts[0] + ("\n\n" + _IMAGE if len(parts) > 1 else ""))
        for i, part in enumerate(parts[1:], 2):
            after = "<end_of_image>\n\n" + part + ("\n\n" + _IMAGE if i < len(parts) else "")
            tokens += image + tokenizer.encode(after)
        return tokens
    return start + tokenizer.encode(text)
