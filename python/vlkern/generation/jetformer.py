"""Pictures of texts, and texts of pictures, from a JetFormer: one element of every row at a time, on key/value caches.

pictures   [bos, text, boi] into the caches, then N times: mixture -> soft token -> caches; then N(0, 1) for the
           numbers that the decoder does not model, and the flow backwards, once
texts      [boi, soft tokens, bos] into the caches, then a word at a time
guidance   rows with and without their text in one batch; a soft token is drawn from p(with)^(1 + w) / p(without)^w
           (`vlkern.ops.gmm_guided_sample`) and continues both

B pictures   N tokens of K numbers, d of them modelled   L words   R rows in the caches, B or 2 B   D width
"""

from typing import Any

import torch
import torch.nn.functional as F

from vlkern import _checks, ops
from vlkern.caches import Caches
from vlkern.models.jetformer import JetFormer


def _prompts(
    model: JetFormer, ids: torch.Tensor, lengths: torch.Tensor | None, guided: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[bos, text, boi] of all rows: embedded [T, D], cu_seqlens [R + 1], and what each element sees."""
    c = model.config
    if lengths is not None:
        _checks.lengths(lengths, ids)
    if guided:
        n = torch.full((len(ids),), ids.shape[1], device=ids.device) if lengths is None else lengths
        free = model.unlabelled(len(ids)).to(ids.dtype)
        ids = torch.cat([F.pad(ids, (0, c.text_length - ids.shape[1])), free])
        lengths = torch.cat([n, torch.full_like(n, c.text_length)])
    words = model.words(ids)
    layout = model.layout(
        ids.shape[1], None if lengths is None else lengths.long(), torch.ones(len(ids), dtype=torch.bool).to(ids.device)
    )
    soft = len(ids) * c.tokens
    text = (layout.source < words.numel()) | (layout.source >= words.numel() + soft)
    index = layout.source[text]
    x_TD = torch.cat([model.embed(words).flatten(0, 1), model.special()])[
        torch.where(index < words.numel(), index, index - soft)
    ]
    rows = layout.cu_seqlens.diff() - (c.tokens - 1)
    until = None if layout.until is None else layout.until[text]
    return x_TD, F.pad(rows.cumsum(0), (1, 0)).int(), until


def _begin(
    model: JetFormer, x_TD: torch.Tensor, cu_seqlens: torch.Tensor, until: torch.Tensor | None, more: int
) -> tuple[Caches, torch.Tensor]:
    """Caches that hold the prompts and have room for `more` elements; outputs after the last of each, [R, D]."""
    longest = int(cu_seqlens.diff().max())
    caches = model.language.new_caches(len(cu_seqlens) - 1, longest + more)
    hidden = model.language.extend(x_TD, caches.chunk(cu_seqlens, until), caches)
    return caches, hidden[cu_seqlens[1:].long() - 1]


@torch.no_grad()
def sample_tokens(
    model: JetFormer,
    ids: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    guidance: float = 0.0,
    temperature: float = 1.0,
    mixture_temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The tokens of new pictures.

    Args:
        model: in evaluation mode, float32.
        ids: [B, L] int32 or int64, their texts, or `model.unlabelled(B)`.
        lengths: [B] int32 or int64, words of each text; None: L.
        guidance: w; 0 does without.
        temperature: multiplies the scales of the mixtures.
        mixture_temperature: multiplies the logits of their components.
        generator: of all draws, on the device of the model.

    Returns:
        [B, N, K] float32.

    Raises:
        TypeError, ValueError: no such texts or numbers.
    """
    c = model.config
    if not _checks.number("guidance", guidance) >= 0:
        raise ValueError(f"guidance must be at least 0, got {guidance}")
    if not len(_checks.tensor("ids", ids)):
        raise ValueError(f"ids must be [B, L] with B > 0, got {list(ids.shape)}")
    options: dict[str, Any] = {
        "dims": c.modelled, "temperature": temperature, "mixture_temperature": mixture_temperature,
        "generator": generator,
    }  # fmt: skip
    caches, hidden = _begin(model, *_prompts(model, ids, lengths, guidance > 0), c.tokens - 1)
    soft: list[torch.Tensor] = []
    while True:
        params = model.mixture(model.normed(hidden, "image"))
        if guidance:
            with_text, without = params.chunk(2)
            soft.append(ops.gmm_guided_sample(with_text, without, guidance=guidance, **options))
        else:
            soft.append(ops.gmm_sample(params, **options))
        if len(soft) == c.tokens:
            break
        x_BD = model.embed_image(soft[-1].to(model.embed_image.weight.dtype))
        x_RD = torch.cat([x_BD, x_BD]) if guidance else x_BD
        hidden = model.language.extend(x_RD, caches.step(), caches)
    rest = torch.randn(
        len(ids), c.tokens, c.numbers - c.modelled, generator=generator, device=hidden.device, dtype=torch.float32
    )
    return torch.cat([torch.stack(soft, 1), rest], 2)


def sample(
    model: JetFormer,
    ids: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    guidance: float = 0.0,
    temperature: float = 1.0,
    mixture_temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """New pictures [B, 3, S, S] in [-1, 1]; arguments as `sample_tokens`.

    Example:
        >>> model = vlkern.models.create("jetformer-tiny").eval()
        >>> sample(model, model.unlabelled(2)).shape
        torch.Size([2, 3, 32, 32])
    """
    tokens = sample_tokens(
        model, ids, lengths, guidance=guidance, temperature=temperature, mixture_temperature=mixture_temperature,
        generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        return model.decode(tokens)


@torch.no_grad()
def caption(
    model: JetFormer,
    pixels: torch.Tensor,
    words: int | None = None,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Texts of pictures, for a model that has learned them.

    Args:
        model: in evaluation mode, without repeats.
        pixels: [B, 3, S, S] in [-1, 1].
        words: of each text, also those behind its end; None: as many as a text has at most.
        temperature: divides the logits; 0 takes the best word.
        generator: on the device of the model.

    Returns:
        [B, words] int64.

    Raises:
        TypeError, ValueError: no such pictures or numbers, or a model of classes.
    """
    c = model.config
    if c.repeats > 1:
        raise ValueError(f"model must have texts that stand once in a row, got {c.repeats} repeats of classes")
    if _checks.number("temperature", temperature) < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    count = c.text_length if words is None else words
    soft = model.embed_image(model.encode(pixels)[0][..., : c.modelled]).flatten(0, 1)
    # A row of one word lacks that word: it is what comes next.
    layout = model.layout(1, None, torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device))
    x_TD = torch.cat([soft, model.special()])[layout.source - len(pixels)]
    caches, hidden = _begin(model, x_TD, layout.cu_seqlens, layout.until, count)
    found: list[torch.Tensor] = []
    while True:
        logits = model.text_logits(model.normed(hidden, "text"))
        if temperature:
            p = (logits / temperature).softmax(-1)
            found.append(torch.multinomial(p, 1, generator=generator)[:, 0])
        else:
            found.append(logits.argmax(-1))
        if len(found) >= count:
            return torch.stack(found, 1)
        hidden = model.language.extend(model.embed(found[-1]), caches.step(), caches)
