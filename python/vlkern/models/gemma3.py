"""Gemma 3 that sees (4B, 12B, 27B): a frozen SigLIP encoder at 896 pixels, 256 tokens an image, and the language model.

    encoder(image)  [64 x 64, W] -> mean of each 4 x 4 block -> RMS norm with the factor (1 + weight) -> times M [W, D]
    row = ... "\\n\\n" <start_of_image> [256 image tokens] <end_of_image> "\\n\\n" ...

Tokens see those up to their own, and the tokens of an image each other: a block between causal text. In local layers
the window counts for all of them. An image token has a position like any other.

    N images   I tokens of an image   T packed tokens   B rows   D width   W width of the encoder

Source: Gemma 3 Technical Report, 2025. The language model is `vlkern.models.gemma`, prompts are
`vlkern.data.gemma3_prompt` and `chat_prompt`.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from vlkern import _checks
from vlkern.layers.init import lecun_normal_
from vlkern.layers.norm import RMSNorm
from vlkern.layers.packed import check_cu_seqlens
from vlkern.models import gemma, siglip
from vlkern.models.gemma import GemmaConfig
from vlkern.models.multimodal import Multimodal, check_ids, row_of
from vlkern.models.siglip import VisionConfig


@dataclass(frozen=True)
class Gemma3Config:
    """The image encoder, the language model, and what an image is in a prompt.

    image_tokens: I, of each image.
    image_token: the placeholder, which each of them has in a prompt.
    start_of_image, end_of_image: the tokens around them.
    sampled_vocabulary: ids below it are the tokenizer's; of those above, which only pad the table, none is ever drawn.

    Raises:
        ValueError: the ids do not fit the vocabulary, or the patches do not make so many square blocks.
    """

    vision: VisionConfig
    language: GemmaConfig
    image_tokens: int = 256
    image_token: int = 262_144
    start_of_image: int = 255_999
    end_of_image: int = 256_000
    sampled_vocabulary: int = 262_144

    def __post_init__(self) -> None:
        check_ids(self)
        rows, columns = self.vision.grid
        side = math.isqrt(self.image_tokens) if type(self.image_tokens) is int and self.image_tokens > 0 else 0
        if side == 0 or side**2 != self.image_tokens or rows != columns or rows % side:
            raise ValueError(
                f"image_tokens must be a square number whose root divides a square grid of patches, got "
                f"{self.image_tokens!r} for {rows} x {columns} patches"
            )


_VISION = VisionConfig(*siglip.SIZES["so400m"], image_size=(896, 896), patch=14)
_TINY_VISION = VisionConfig(width=192, depth=4, heads=3, mlp=768, image_size=(64, 64), patch=8)
#: The released models that see, and one that trains on a laptop: 16 tokens an image, those of its tokenizer up to 2043.
PRESETS = {
    "gemma3-tiny-vision": Gemma3Config(_TINY_VISION, gemma.PRESETS["gemma3-tiny"], 16, 2044, 2042, 2043, 2044),
    **{
        f"gemma-3-{size}": Gemma3Config(_VISION, gemma.PRESETS[f"gemma-3-{size}-text"]) for size in ("4b", "12b", "27b")
    },
}


class Projector(nn.Module):
    """[N, patches, W] -> [N, I, D]: blocks of patches to their mean, normalised, times a matrix.

    Args:
        inputs: W.
        outputs: D.
        blocks: I, a square number; the patches are a square grid of as many square blocks, row by row.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.side = math.isqrt(blocks)
        # [W, D] and no Linear: released files hold it this way round.
        self.mm_input_projection_weight = nn.Parameter(torch.empty(inputs, outputs))
        self.mm_soft_emb_norm = RMSNorm(inputs)
        lecun_normal_(self.mm_input_projection_weight, fan_in=inputs)

    def pool(self, x_NPW: torch.Tensor) -> torch.Tensor:
        """[N, patches, W] -> [N, I, W]."""
        step = math.isqrt(x_NPW.shape[1]) // self.side
        return x_NPW.unflatten(1, (self.side, step, self.side, step)).mean((2, 4)).flatten(1, 2)

    def forward(self, x_NPW: torch.Tensor) -> torch.Tensor:
        """[N, patches, W] -> [N, I, D]."""
        return self.mm_soft_emb_norm(self.pool(x_NPW)) @ self.mm_input_projection_weight


class Gemma3(Multimodal):
    """Texts with images in them to the texts that follow.

    Args:
        config: sizes; `PRESETS` has those of the released models.

    Example:
        >>> model = vlkern.models.create("gemma3-tiny-vision")
        >>> ids = torch.tensor([2, 17, 2042, *[2044] * 16, 2043, 17, 5])
        >>> cu_seqlens = torch.tensor([0, 22], dtype=torch.int32)
        >>> until = model.until(ids, cu_seqlens)
        >>> until.tolist()[:5], until.tolist()[-5:]
        ([0, 1, 2, 18, 18], [18, 18, 19, 20, 21])
        >>> model.hidden(model.embed(ids, torch.zeros(1, 3, 64, 64)), cu_seqlens, until=until).shape
        torch.Size([22, 128])
    """

    config: Gemma3Config

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config, Projector(config.vision.width, config.language.width, config.image_tokens))

    def until(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """The last position within its row that each token sees: its own, or the end of the run of image tokens.

        Args:
            ids: [T] int32 or int64.
            cu_seqlens: [B + 1] int32: row b is the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
            prefix: None; only PaliGemma has prefixes.

        Returns:
            [T] int32.

        Raises:
            TypeError, ValueError: no such tensors.
        """
        if prefix is not None:
            raise ValueError("prefix must be None: only the tokens of an image see each other in Gemma 3")
        tokens = len(_checks.tensor("ids", ids))
        check_cu_seqlens(cu_seqlens, tokens, empty=True)
        row, position = row_of(cu_seqlens, tokens)
        seen = ids == self.config.image_token
        follows = torch.zeros_like(seen)
        follows[:-1] = seen[1:] & (row[1:] == row[:-1])
        # From behind, the nearest token after which no image token follows.
        last = torch.where(seen & follows, tokens, torch.arange(tokens, device=ids.device))
        end = last.flip(0).cummin(0).values.flip(0)
        return torch.where(seen, end - cu_seqlens[row], position).int()
