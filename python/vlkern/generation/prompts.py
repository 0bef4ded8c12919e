"""What stands before an answer: a text as the model was trained on it, tokens, or a `vlkern.data.Prompt`."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlkern.errors import UserError

if TYPE_CHECKING:
    from vlkern.data.prompts import Picture, Prompt
    from vlkern.data.vocabulary import Vocabulary

#: A language model and its tokenizer may differ by less than this many ids: tables are rounded up to a multiple of 128,
#: and the tokenizer of all sizes of Gemma 3 has an id for image tokens, which those without eyes do not know.
SPARE = 128


def prompt_of(
    model: Any,
    prompt: "str | Sequence[int] | Prompt",
    tokenizer: "Vocabulary | None",
    images: "Sequence[Picture]" = (),
) -> "Prompt":
    """The tokens of a prompt and its pictures.

    Args:
        model: Gemma, PaliGemma or Gemma3.
        prompt: a text: for Gemma it follows the start token, for the others it becomes `vlkern.data.paligemma_prompt`
            or `gemma3_prompt`. Tokens and a `Prompt` are only checked.
        tokenizer: for texts.
        images: for texts.

    Raises:
        TypeError, ValueError: nothing in it, tokens that the model does not have, a text without a tokenizer, a
            tokenizer or pictures that do not fit.

    Example:
        >>> model = vlkern.models.create("gemma3-tiny")
        >>> prompt_of(model, "ab", vlkern.data.load_vocabulary("bytes")).ids
        (2, 35, 100, 101)
    """
    from vlkern.data.prompts import Prompt

    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompts need a tokenizer where they are texts, got none")
        found = _of_text(model, prompt, tokenizer, images)
    elif images:
        raise ValueError("images belong to texts; prompts of tokens bring theirs along as a vlkern.data.Prompt")
    else:
        found = prompt if isinstance(prompt, Prompt) else Prompt(tuple(map(_id, prompt)), None, len(prompt))
    _check(model, found)
    return found


def _id(token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise TypeError(f"prompts must be texts, whole numbers or Prompts, got {type(token).__name__}") from None


def _of_text(model: Any, text: str, tokenizer: "Vocabulary", images: "Sequence[Picture]") -> "Prompt":
    from vlkern.data.prompts import Prompt, gemma3_prompt, paligemma_prompt
    from vlkern.models.gemma3 import Gemma3
    from vlkern.models.paligemma import PaliGemma

    if isinstance(model, PaliGemma):
        return paligemma_prompt(model.config, tokenizer, text, images)
    if isinstance(model, Gemma3):
        return gemma3_prompt(model.config, tokenizer, text, images)
    if images:
        raise UserError(f"images: {type(model).__name__} sees none, got {len(images)}")
    if tokenizer.size - model.config.vocabulary >= SPARE:
        raise UserError(
            f"the tokenizer must have about the {model.config.vocabulary} ids of the model, got {tokenizer.size}: "
            "take the tokenizer that belongs to the model"
        )
    ids = [*([] if tokenizer.start is None else [tokenizer.start]), *tokenizer.encode(text)]
    return Prompt(tuple(ids), None, len(ids))


def _check(model: Any, prompt: "Prompt") -> None:
    if not prompt.ids:
        raise ValueError("prompts must have at least one token, got an empty one")
    token = getattr(model.config, "image_token", None)
    language = model.config if token is None else model.config.language
    places = 0 if token is None else prompt.ids.count(token)
    images = 0 if prompt.pixels is None else len(prompt.pixels)
    if images and token is None:
        raise ValueError(f"images: {type(model).__name__} sees none, got {images}")
    if token is not None and places != images * model.config.image_tokens:
        raise ValueError(
            f"prompts must have {model.config.image_tokens} places ({token}) for each picture, got {places} for "
            f"{images} pictures"
        )
    texts = [i for i in prompt.ids if i != token]
    if texts and not 0 <= min(texts) <= max(texts) < language.vocabulary:
        raise ValueError(
            f"prompts must have tokens from 0 to {language.vocabulary - 1}, got {min(texts)} to {max(texts)}"
        )
