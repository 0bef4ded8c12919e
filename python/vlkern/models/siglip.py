"""SigLIP and SigLIP 2: an image tower and a text tower, trained so that pairs agree and all others disagree.

    image [B, 3, H, W] -> P x P patches + positions -> blocks -> LN -> MAP head           -> u_i,  x_i = u_i / |u_i|
    text  [B, L]       -> token vectors + positions -> blocks -> LN -> last token, linear -> w_j,  y_j = w_j / |w_j|
    logit_ij = exp(logit_scale) <x_i, y_j> + logit_bias       (loss: vlkern.ops.sigmoid_contrastive_loss)

Both towers are pre-LN transformers; attention sees every token, pads included, in text too. There is no class token and
no image projection. Parameter names are those of Hugging Face's SiglipModel, so its checkpoints are `load_state_dict`.

    B pairs   H, W image height and width   P patch side   N patches   L text tokens   V vocabulary
    D width of a tower   E width of the embeddings, which is that of the image tower

Sources: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023; Tschannen et al., SigLIP 2, 2025.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks
from vlkern.layers.attention import SelfAttention
from vlkern.layers.init import dense_, lecun_normal_, shapes_only
from vlkern.layers.linear import Linear
from vlkern.layers.mlp import Mlp
from vlkern.layers.pooling import MapHead
from vlkern.models import resize


@dataclass(frozen=True)
class TowerConfig:
    """Size of a transformer: `width` D, `depth` blocks, `heads`, and `mlp` hidden units."""

    width: int
    depth: int
    heads: int
    mlp: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and value > 0):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower: pictures of `image_size` (H, W) pixels cut into patches of `patch` x `patch`."""

    image_size: tuple[int, int]
    patch: int

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.image_size
        if not (isinstance(size, tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            raise ValueError(f"image_size must be two positive integers (H, W), got {size!r}")
        if min(size) < self.patch:
            raise ValueError(f"image_size must be at least one patch of {self.patch} x {self.patch}, got {size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; an incomplete patch at the right or lower edge is left out."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def patches(self) -> int:
        """N."""
        return math.prod(self.grid)


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


#: Vocabulary of the multilingual models of SigLIP 1.
MULTILINGUAL = 250_000
# width, depth, heads, mlp
SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giant-opt": (1536, 40, 16, 6144),
}
# name ({}: side of the image), image tower, text tower, patch, sides, vocabulary, text length
_RELEASED = (
    ("siglip-base-patch16-{}", "base", "base", 16, (224, 256, 384, 512), 32_000, 64),
    ("siglip-base-patch16-{}-multilingual", "base", "base", 16, (256,), MULTILINGUAL, 64),
    ("siglip-large-patch16-{}", "large", "large", 16, (256, 384), 32_000, 64),
    ("siglip-so400m-patch14-{}", "so400m", "so400m", 14, (224,), 32_000, 16),
    ("siglip-so400m-patch14-{}", "so400m", "so400m", 14, (384,), 32_000, 64),
    ("siglip-so400m-patch16-{}-i18n", "so400m", "so400m", 16, (256,), MULTILINGUAL, 64),
    ("siglip2-base-patch32-{}", "base", "base", 32, (256,), 256_000, 64),
    ("siglip2-base-patch16-{}", "base", "base", 16, (224, 256, 384, 512), 256_000, 64),
    ("siglip2-large-patch16-{}", "large", "large", 16, (256, 384, 512), 256_000, 64),
    ("siglip2-so400m-patch14-{}", "so400m", "so400m", 14, (224, 384), 256_000, 64),
    ("siglip2-so400m-patch16-{}", "so400m", "so400m", 16, (256, 384, 512), 256_000, 64),
    ("siglip2-giant-opt-patch16-{}", "giant-opt", "so400m", 16, (256, 384), 256_000, 64),
)
#: The released models under their names on Hugging Face, and two that train on a laptop.
PRESETS = {
    "siglip-tiny": SiglipConfig(
        VisionConfig(width=192, depth=4, heads=3, mlp=768, image_size=(32, 32), patch=8),
        TextConfig(width=192, depth=2, heads=3, mlp=768, vocabulary=2048, length=16),
    ),
    "siglip-small": SiglipConfig(
        VisionConfig(width=256, depth=6, heads=4, mlp=1024, image_size=(64, 64), patch=8),
        TextConfig(width=256, depth=4, heads=4, mlp=1024, vocabulary=2048, length=16),
    ),
    **{
        name.format(side): SiglipConfig(
            VisionConfig(*SIZES[image], image_size=(side, side), patch=patch),
            TextConfig(*SIZES[text], vocabulary=vocabulary, length=length),
        )
        for name, image, text, patch, sides, vocabulary, length in _RELEASED
        for side in sides
    },
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
        """[B, 3, H, W] in any floating dtype -> [B, N, D], rows of patches from top to bottom."""
        patches_BDhw = self.patch_embedding(pixels_B3HW.to(self.patch_embedding.weight.dtype))
        return patches_BDhw.flatten(2).transpose(1, 2) + self.position_embedding.weight


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


class VisionEncoder(nn.Module):
    """Images to one vector per patch, without pooling: the eyes of a language model."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.config = c
        self.embeddings = VisionEmbeddings(c)
        self.encoder = Encoder(c)
        self.post_layernorm = nn.LayerNorm(c.width, eps=1e-6)

    def tokens(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, D], after the final LN."""
        expected = (3, *self.config.image_size)
        if pixels_B3HW.dim() != 4 or tuple(pixels_B3HW.shape[1:]) != expected:
            raise ValueError(
                f"pixels must have shape [B, 3, {expected[1]}, {expected[2]}], got {list(pixels_B3HW.shape)}"
            )
        if not pixels_B3HW.is_floating_point():
            raise TypeError(f"pixels must be floating-point numbers in [-1, 1], got {pixels_B3HW.dtype}")
        return self.post_layernorm(self.encoder(self.embeddings(pixels_B3HW)))

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, D]: `tokens`."""
        return self.tokens(pixels_B3HW)


class VisionTower(VisionEncoder):
    """Images to pooled vectors; `tokens` gives the sequence before pooling."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__(c)
        self.head = MapHead(c.width, c.mlp, c.heads)

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, E], not normalised; E = D."""
        return self.head(self.tokens(pixels_B3HW))


def check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    """Token ids, int32 or int64, from 0 to `vocabulary` - 1; values are looked at where that costs no wait for a GPU.

    Raises:
        TypeError: no tensor, or no integers.
        ValueError: an id is not in the vocabulary, as when a tokenizer belongs to another model.
    """
    if _checks.tensor("ids", ids).dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
    if _checks.values_may_be_read(ids) and ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"ids must be from 0 to {vocabulary - 1}, got {low if low < 0 else high}")


class TextTower(nn.Module):
    """Token ids to pooled vectors: the last position, whatever token stands there, speaks for the text.

    `tokens` gives the sequence before pooling.
    """

    def __init__(self, c: TextConfig, out: int) -> None:
        super().__init__()
        self.config = c
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c)
        self.final_layer_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = dense_(Linear(c.width, out), lecun=True)

    def tokens(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L] int32 or int64 -> [B, L, D], after the final LN."""
        check_ids(ids_BL, self.config.vocabulary)
        if ids_BL.dim() != 2 or ids_BL.shape[1] != self.config.length:
            raise ValueError(f"ids must have shape [B, {self.config.length}], got {list(ids_BL.shape)}")
        return self.final_layer_norm(self.encoder(self.embeddings(ids_BL)))

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L] int32 or int64 -> [B, E], not normalised."""
        return self.head(self.tokens(ids_BL)[:, -1])


class TwoTowers(nn.Module):
    """An image tower and a text tower with the learned temperature and bias of the loss.

    logit_scale, logit_bias: [1]; t' = log of the temperature factor, and b. They start at log 10 and -10, so that at
    first every pair is judged "not a match", which is true for all but one in B.
    """

    def __init__(self, vision_model: nn.Module, text_model: TextTower) -> None:
        super().__init__()
        self.vision_model, self.text_model = vision_model, text_model
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] (int32 or int64) -> embeddings [B, E] of length 1, at least float32.

        Raises:
            TypeError: the ids are no integers.
            ValueError: another shape, or an id is not in the vocabulary (looked at where that costs no wait for a GPU).
        """
        return unit(self.text_model(ids))


class Siglip(TwoTowers):
    """Both towers, for pictures of one size."""

    vision_model: VisionTower

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__(VisionTower(config.vision), TextTower(config.text, out=config.vision.width))
        self.config = config

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> embeddings [B, E] of length 1, at least float32."""
        return unit(self.vision_model(pixels))

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W] and ids [B, L] -> the two normalised embeddings, [B, E] each.

        Raises:
            ValueError: a shape is not the one of the configuration.
            TypeError: the pixels are no floating-point numbers, or the ids no integers.

        Example:
            >>> image, text = model(pixels, ids)
            >>> loss = vlkern.ops.sigmoid_contrastive_loss(image, text, model.logit_scale.exp(), model.logit_bias)
        """
        return self.encode_image(pixels), self.encode_text(ids)


def unit(u: torch.Tensor) -> torch.Tensor:
    """u / |u|, in float32 even when autocast ran the tower in bfloat16: logits are differences of these."""
    return F.normalize(u.to(torch.promote_types(u.dtype, torch.float32)), dim=-1, eps=1e-8)


def resized(
    model: Siglip,
    image_size: tuple[int, int] | int,
    patch: int | None = None,
    *,
    align_corners: bool = False,
) -> Siglip:
    """A copy of `model` for pictures of another size, and with patches of another size if `patch` is given.

    Learned positions are interpolated on their grid (`resize.positions`), the convolution that cuts the patches by the
    pseudo-inverse of the resizing of a patch (`resize.patches`); everything else is copied. The copy then wants some
    training at its size, in which SigLIP 2 spent its last 5 %.

    Args:
        model: shares no memory with the result.
        image_size: (H, W), or one number for both.
        patch: side P of a patch; None keeps it.
        align_corners: how positions are interpolated.

    Raises:
        ValueError: the image size is not positive or smaller than a patch.

    Example:
        >>> larger = vlkern.models.siglip.resized(model, image_size=(48, 64))
    """
    vision = resized_config(model.config.vision, image_size, patch)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resize_state(state, model.config.vision, vision, prefix="vision_model.", align_corners=align_corners)
    with shapes_only():
        copy = Siglip(dataclasses.replace(model.config, vision=vision))
    copy.load_state_dict(state, assign=True)
    return copy.train(model.training)


def resized_config(c: VisionConfig, image_size: tuple[int, int] | int, patch: int | None) -> VisionConfig:
    """`c` for another size of pictures and patches (None keeps the patch)."""
    size = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    return dataclasses.replace(c, image_size=cast("tuple[int, int]", size), patch=c.patch if patch is None else patch)


def resize_state(
    state: dict[str, torch.Tensor], old: VisionConfig, new: VisionConfig, *, prefix: str, align_corners: bool = False
) -> None:
    """Change the two tensors of an image tower's state that depend on the size of pictures and patches, in place."""
    positions, patches = (f"{prefix}embeddings.{part}_embedding.weight" for part in ("position", "patch"))
    state[positions] = resize.positions(state[positions], old.grid, new.grid, align_corners=align_corners)
    state[patches] = resize.patches(state[patches], new.patch)
