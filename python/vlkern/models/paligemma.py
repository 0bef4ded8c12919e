"""PaliGemma 1 and 2: a SigLIP image encoder and a Gemma that answers in text, boxes and masks.

    row = [image tokens][<bos> prompt "\\n"][answer <eos>]
          prefix: all of it sees all of it    causal, and sees the prefix

    image tokens = W encoder(image) + b, one for each patch; the layer W starts at zero

The prefix, the image among it, is bidirectional: image tokens see the question. Several images (video frames, pairs)
are encoded one by one and lie one behind the other. In the local layers of PaliGemma 2, which see `window` = 4096
tokens, a token of the prefix still sees the whole prefix.

    N images   I tokens of an image   T packed tokens   B rows   D width   V vocabulary

Sources: Beyer et al., PaliGemma, 2024; Steiner et al., PaliGemma 2, 2024.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlkern import _checks
from vlkern.layers.linear import Linear
from vlkern.layers.packed import check_cu_seqlens
from vlkern.models import gemma, siglip
from vlkern.models.gemma import GemmaConfig
from vlkern.models.multimodal import Multimodal, check_ids, row_of
from vlkern.models.siglip import VisionConfig


@dataclass(frozen=True)
class PaliGemmaConfig:
    """The image encoder, the language model, and two ids.

    image_token: the placeholder, which each token of an image has in a prompt.
    sampled_vocabulary: ids below it are the tokenizer's; of those above, which only pad the table, none is ever drawn.

    Raises:
        ValueError: the ids do not fit the vocabulary.
    """

    vision: VisionConfig
    language: GemmaConfig
    image_token: int
    sampled_vocabulary: int

    def __post_init__(self) -> None:
        check_ids(self)

    @property
    def image_tokens(self) -> int:
        """I."""
        return self.vision.patches

    def for_vocabulary(self, size: int) -> "PaliGemmaConfig":
        """The same model for a tokenizer of another size; the placeholder is the id behind the last.

        Example:
            >>> PRESETS["paligemma-tiny"].for_vocabulary(300).language.vocabulary
            320
        """
        language = replace(self.language, vocabulary=-(-(size + 2) // 64) * 64)
        return replace(self, language=language, image_token=size, sampled_vocabulary=size)


#: Gemma's 256,000 pieces, 1024 places and 128 codes of masks.
_VOCABULARY = 256_000 + 1024 + 128
_TINY_VISION = VisionConfig(width=192, depth=4, heads=3, mlp=768, image_size=(64, 64), patch=8)
_TINY: dict[str, Any] = {
    "kv_heads": 1,
    "head_dim": 32,
    "mlp": 512,
    "query_scalar": 32,
    "vocabulary": 2048,
    "context": 512,
}
_TINY_LANGUAGES = {
    "paligemma-tiny": GemmaConfig(width=128, depth=4, heads=4, version=1, **_TINY),
    "paligemma2-tiny": GemmaConfig(
        width=128, depth=4, heads=4, version=2, pattern="LG", window=256, attention_softcap=50.0, final_softcap=30.0,
        **_TINY,
    ),
}  # fmt: skip
_RELEASED = (
    ("paligemma-3b-{}", "gemma-2b"),
    ("paligemma2-3b-{}", "gemma-2-2b"),
    ("paligemma2-10b-{}", "gemma-2-9b"),
    ("paligemma2-28b-{}", "gemma-2-27b"),
)


def _preset(vision: VisionConfig, language: GemmaConfig, size: int) -> PaliGemmaConfig:
    language = replace(language, whole_prefix=language.version == 2)
    return PaliGemmaConfig(vision, language, size, 1).for_vocabulary(size)


#: The released sizes at their three resolutions, and two that train on a laptop (`for_vocabulary` fits them to a
#: tokenizer; as they are, they have the 1283 ids of `vlkern.data.load_vocabulary("bytes")`).
PRESETS = {
    **{name: _preset(_TINY_VISION, language, 1283) for name, language in _TINY_LANGUAGES.items()},
    **{
        name.format(side): _preset(
            VisionConfig(*siglip.SIZES["so400m"], image_size=(side, side), patch=14),
            gemma.PRESETS[language],
            _VOCABULARY,
        )
        for name, language in _RELEASED
        for side in (224, 448, 896)
    },
}


class Projector(nn.Module):
    """[..., vision width] -> [..., D]: a linear layer that starts at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., vision width] -> [..., D]."""
        return self.linear(x)


class PaliGemma(Multimodal):
    """Images and a question to an answer.

    Args:
        config: sizes; `PRESETS` has those of the released models.

    Example:
        >>> model = vlkern.models.create("paligemma-tiny")
        >>> ids = torch.tensor([model.config.image_token] * 64 + [2, 40, 13, 7, 1])  # a question, and the answer 7, 1
        >>> cu_seqlens, prefix = torch.tensor([0, 69], dtype=torch.int32), torch.tensor([67])
        >>> x = model.embed(ids, torch.zeros(1, 3, 64, 64))
        >>> hidden = model.hidden(x, cu_seqlens, until=model.until(ids, cu_seqlens, prefix))
        >>> model.logits(hidden[-3:-1]).shape  # what predicts 7 and 1
        torch.Size([2, 1344])
    """

    config: PaliGemmaConfig

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__(config, Projector(config.vision.width, config.language.width))

    def until(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """The last position within its row that each token sees: the end of the prefix, or behind it its own.

        Args:
            ids: [T], of which only the number counts.
            cu_seqlens: [B + 1] int32: row b is the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
            prefix: [B] int32 or int64, tokens of each row's question: images, prompt and newline. None: all of them, as
                in a prompt to be answered.

        Returns:
            [T] int32.

        Raises:
            TypeError, ValueError: no such tensors, or a prefix that is longer than its row (looked at where that costs
                no wait for a GPU).
        """
        tokens = len(_checks.tensor("ids", ids))
        check_cu_seqlens(cu_seqlens, tokens, empty=True)
        lengths = cu_seqlens.diff()
        if prefix is None:
            prefix = lengths
        elif _checks.tensor("prefix", prefix).dtype not in (torch.int32, torch.int64):
            raise TypeError(f"prefix must be int32 or int64, got {prefix.dtype}")
        _checks.shape("prefix", prefix, tuple(lengths.shape))
        if _checks.values_may_be_read(prefix, cu_seqlens) and bool(((prefix < 0) | (prefix > lengths)).any()):
            b = int(((prefix < 0) | (prefix > lengths)).int().argmax())
            raise ValueError(
                f"prefix must be at most the row's length, {int(lengths[b])}, got prefix[{b}] = {int(prefix[b])}"
            )
        row, position = row_of(cu_seqlens, tokens)
        return torch.maximum(position, prefix.int()[row] - 1)
