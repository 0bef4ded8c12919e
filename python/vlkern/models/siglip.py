"""SigLIP and SigLIP 2: an image tower and a text tower, trained so that pairs agree and all others disagree.

    image [B, 3, H, W] -> P x P patches + positions -> blocks -> LN -> MAP head           -> u_i,  x_i = u_i / |u_i|
    text  [B, L]       -> token vectors + positions -> blocks -> LN -> last token, linear -> w_j,  y_j = w_j / |w_j|
    logit_ij = exp(logit_scale) <x_i, y_j> + logit_bias       (loss: vlkern.ops.sigmoid_contrastive_loss)

Both towers are pre-LN transformers; attention sees every token, pads included, in text too. There is no class token and
no image projection. Parameter names are those of Hugging Face's SiglipModel, so its checkpoints are `load_state_dict`.

    B pairs   H, W image height and width   P patch side   N patches   L text tokens   V vocabulary
    D width of a tower   E width of the embeddings

Sources: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023; Tschannen et al., SigLIP 2, 2025.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.layers.attention import SelfAttention
from vlkern.layers.init import dense_, lecun_normal_
from vlkern.layers.mlp import Mlp
from vlkern.layers.pooling import MapHead


@dataclass(frozen=True)
class TowerConfig:
    """Size of a transformer: `width` D, `depth` blocks, `heads`, and `mlp` hidden units."""

    width: int
    depth: int
    heads: int
    mlp: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower: pictures of `image_size` (H, W) pixels cut into patches of `patch` x `patch`."""

    image_size: tuple[int, int]
    patch: int

    @property
    def patches(self) -> int:
        """N; an incomplete patch at the right or lower edge is left out."""
        return (self.image_size[0] // self.patch) * (self.image_size[1] // self.patch)


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower: exactly `length` tokens out of `vocabulary`."""

    vocabulary: int
    length: int


@dataclass(frozen=True)
class SiglipConfig:
    """Both towers. The embeddings have the width of the image tower."""

    vision: VisionConfig
    text: TextConfig


_BASE = {"width": 768, "depth": 12, "heads": 12, "mlp": 3072}
PRESETS = {
    "siglip-tiny": SiglipConfig(
        VisionConfig(width=192, depth=4, heads=3, mlp=768, image_size=(32, 32), patch=8),
        TextConfig(width=192, depth=2, heads=3, mlp=768, vocabulary=2048, length=16),
    ),
    "siglip2-base-patch16-256": SiglipConfig(
        VisionConfig(**_BASE, image_size=(256, 256), patch=16),
        TextConfig(**_BASE, vocabulary=256_000, length=64),
    ),
}


class Block(nn.Module):
    """x += Attention(LN(x));  x += MLP(LN(x))."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width, eps=1e-6)
        self.self_attn = SelfAttention(c.width, c.heads)
        self.layer_norm2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = Mlp(c.width, c.mlp)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD))
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class Encoder(nn.Module):
    """A stack of blocks; the final LN belongs to the tower."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(c) for _ in range(c.depth))

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD


class VisionEmbeddings(nn.Module):
    """Patches as a strided convolution, plus one learned vector per position."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, stride=c.patch)
        self.position_embedding = nn.Embedding(c.patches, c.width)
        lecun_normal_(self.patch_embedding.weight, fan_in=3 * c.patch**2)
        assert self.patch_embedding.bias is not None  # by default there is one
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.position_embedding.weight, std=1 / math.sqrt(c.width))

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, D], rows of patches from top to bottom."""
        return self.patch_embedding(pixels_B3HW).flatten(2).transpose(1, 2) + self.position_embedding.weight


class TextEmbeddings(nn.Module):
    """One learned vector per token, plus one per position."""

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocabulary, c.width)
        self.position_embedding = nn.Embedding(c.length, c.width)
        nn.init.normal_(self.token_embedding.weight, std=1 / math.sqrt(c.width))
        nn.init.normal_(self.position_embedding.weight, std=1 / math.sqrt(c.width))

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        return self.token_embedding(ids_BL) + self.position_embedding.weight


class VisionTower(nn.Module):
    """Images to pooled vectors; `tokens` gives the sequence before pooling."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.config = c
        self.embeddings = VisionEmbeddings(c)
        self.encoder = Encoder(c)
        self.post_layernorm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = MapHead(c.width, c.mlp, c.heads)

    def tokens(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, D], after the final LN."""
        expected = (3, *self.config.image_size)
        if pixels_B3HW.dim() != 4 or tuple(pixels_B3HW.shape[1:]) != expected:
            raise ValueError(
                f"pixels must have shape [B, 3, {expected[1]}, {expected[2]}], got {list(pixels_B3HW.shape)}"
            )
        return self.post_layernorm(self.encoder(self.embeddings(pixels_B3HW)))

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, E], not normalised; E = D."""
        return self.head(self.tokens(pixels_B3HW))


class TextTower(nn.Module):
    """Token ids to pooled vectors: the last position, whatever token stands there, speaks for the text."""

    def __init__(self, c: TextConfig, out: int) -> None:
        super().__init__()
        self.config = c
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c)
        self.final_layer_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = dense_(nn.Linear(c.width, out), lecun=True)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L] integers -> [B, E], not normalised."""
        if ids_BL.dim() != 2 or ids_BL.shape[1] != self.config.length:
            raise ValueError(f"ids must have shape [B, {self.config.length}], got {list(ids_BL.shape)}")
        return self.head(self.final_layer_norm(self.encoder(self.embeddings(ids_BL)))[:, -1])


class Siglip(nn.Module):
    """Both towers with the learned temperature and bias of the loss.

    logit_scale, logit_bias: [1]; t' = log of the temperature factor, and b. They start at log 10 and -10, so that at
    first every pair is judged "not a match", which is true for all but one in B.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision)
        self.text_model = TextTower(config.text, out=config.vision.width)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> embeddings [B, E] of length 1, at least float32."""
        return _unit(self.vision_model(pixels))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] (int32 or int64) -> embeddings [B, E] of length 1, at least float32."""
        return _unit(self.text_model(ids))

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W] and ids [B, L] -> the two normalised embeddings, [B, E] each.

        Raises:
            ValueError: a shape is not the one of the configuration.

        Example:
            >>> image, text = model(pixels, ids)
            >>> loss = vlkern.ops.sigmoid_contrastive_loss(image, text, model.logit_scale.exp(), model.logit_bias)
        """
        return self.encode_image(pixels), self.encode_text(ids)


def _unit(u: torch.Tensor) -> torch.Tensor:
    """u / |u|, in float32 even when autocast ran the tower in bfloat16: logits are differences of these."""
    return F.normalize(u.to(torch.promote_types(u.dtype, torch.float32)), dim=-1, eps=1e-8)
