"""What PaliGemma and Gemma 3 share: a SigLIP image encoder, a projector, and a Gemma that reads both.

    image tokens = projector(encoder(image))                     not multiplied by sqrt(D), as token vectors are
    x_t = next image token where ids_t is the placeholder, else sqrt(D) E[ids_t]

Parameter names are those of the released files on Hugging Face: vision_tower.vision_model, multi_modal_projector,
language_model.

    N images   I tokens of an image   T packed tokens   B rows   L tokens of a row   D width   V vocabulary
"""

from typing import Any, Protocol, cast

import torch
from torch import nn

from vlkern import _checks
from vlkern.models.gemma import Gemma, GemmaConfig
from vlkern.models.siglip import VisionConfig, VisionEncoder


class Config(Protocol):
    """Sizes, and the ids that mean something.

    image_token: the placeholder, which each token of an image has in a prompt.
    sampled_vocabulary: ids below it are the tokenizer's; of those above, which only pad the table, none is ever drawn.
    """

    @property
    def vision(self) -> VisionConfig:
        """Of the image encoder."""

    @property
    def language(self) -> GemmaConfig:
        """Of the language model."""

    @property
    def image_token(self) -> int:
        """The placeholder."""

    @property
    def sampled_vocabulary(self) -> int:
        """One more than the largest id of the tokenizer."""

    @property
    def image_tokens(self) -> int:
        """I."""


def check_ids(config: Config) -> None:
    """Raise ValueError unless the ids fit the vocabulary."""
    for name in ("image_token", "sampled_vocabulary"):
        value = getattr(config, name)
        if type(value) is not int or value <= 0:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if config.sampled_vocabulary > config.language.vocabulary:
        raise ValueError(
            f"sampled_vocabulary must be at most the vocabulary, {config.language.vocabulary}, "
            f"got {config.sampled_vocabulary}"
        )
    if config.image_token < config.sampled_vocabulary:
        raise ValueError(
            f"image_token must not be a token that is drawn, below {config.sampled_vocabulary}, "
            f"got {config.image_token}"
        )


class Multimodal(nn.Module):
    """The image encoder, the projector and the language model; which tokens see which is the subclass's."""

    def __init__(self, config: Config, projector: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = nn.ModuleDict({"vision_model": VisionEncoder(config.vision)})
        self.multi_modal_projector = projector
        self.language_model = Gemma(config.language)

    @property
    def vision(self) -> VisionEncoder:
        """The image encoder: to freeze it, `model.vision.requires_grad_(False)`."""
        return cast("VisionEncoder", self.vision_tower["vision_model"])

    @property
    def projector(self) -> nn.Module:
        """From the encoder's vectors to image tokens."""
        return self.multi_modal_projector

    @property
    def language(self) -> Gemma:
        """The language model."""
        return self.language_model

    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] -> [N, I, D].

        Raises:
            ValueError: another size than the configuration's.
            TypeError: the pixels are no floating-point numbers.
        """
        return self.projector(self.vision.tokens(pixels))

    def embed(self, ids: torch.Tensor, pixels: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors of a prompt's tokens, placeholders replaced by the images' tokens in their order.

        Args:
            ids: [T] int32 or int64, of all rows.
            pixels: [N, 3, H, W] in [-1, 1], the images of all rows; None if the ids have no placeholders.

        Returns:
            [T, D] in the dtype of the language model.

        Raises:
            ValueError: not I placeholders for each image (looked at where that costs no wait for a GPU), or as
                `image_tokens`.
            TypeError: the ids are no integers.
        """
        _checks.tensor("ids", ids)
        if ids.dim() != 1:
            raise ValueError(f"ids must have shape [T], got {list(ids.shape)}")
        places = ids == self.config.image_token
        count = 0 if pixels is None else len(_checks.tensor("pixels", pixels))
        if _checks.values_may_be_read(ids) and int(places.sum()) != count * self.config.image_tokens:
            raise ValueError(
                f"ids must have {self.config.image_tokens} placeholders ({self.config.image_token}) for each of the "
                f"{count} images, got {int(places.sum())} in all"
            )
        # Whatever vector the placeholder has, it is not used; a table without padding does not even have it.
        x_TD = self.language.embed(ids.masked_fill(places, 0))
        if pixels is None or not count:
            return x_TD
        seen = self.image_tokens(pixels).flatten(0, 1).to(x_TD.dtype)
        order = (places.cumsum(0) - 1).clamp(min=0, max=len(seen) - 1)
        return torch.where(places.unsqueeze(1), seen[order], x_TD)

    def until(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """The last position within its row that each token sees: [T] int32."""
        raise NotImplementedError

    def hidden(
        self, x_TD: torch.Tensor, cu_seqlens: torch.Tensor, *, until: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Whole rows without a cache, as `Gemma.hidden`; `until` is `self.until(...)`. Differentiable."""
        return self.language.hidden(x_TD, cu_seqlens, until=until)

    def extend(self, x_TD: torch.Tensor, chunk: Any, caches: Any) -> torch.Tensor:
        """Append a chunk to the caches, as `Gemma.extend`. Tokens that see each other belong into one chunk."""
        return self.language.extend(x_TD, chunk, caches)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V] float32, as `Gemma.logits`: ids from config.sampled_vocabulary on mean nothing."""
        return self.language.logits(hidden_TD)

    def new_caches(self, batch: int, capacity: int, **options: Any) -> Any:
        """As `Gemma.new_caches`."""
        return self.language.new_caches(batch, capacity, **options)

    def forward(
        self, ids: torch.Tensor, pixels: torch.Tensor | None = None, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids [B, L], the images of all rows, and `prefix` as `until` takes it -> logits [B, L, V] float32.

        Raises:
            TypeError, ValueError: as `embed` and `until`.
        """
        if _checks.tensor("ids", ids).dim() != 2:
            raise ValueError(f"ids must have shape [B, L], got {list(ids.shape)}")
        batch, length = ids.shape
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=ids.device) * length
        until = self.until(ids.flatten(), cu_seqlens, prefix)
        hidden_TD = self.hidden(self.embed(ids.flatten(), pixels), cu_seqlens, until=until)
        return self.logits(hidden_TD).unflatten(0, (batch, length))


def row_of(cu_seqlens: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of each token [T] int64, and its position there [T] int32."""
    place = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
    return row, place - cu_seqlens[row]
