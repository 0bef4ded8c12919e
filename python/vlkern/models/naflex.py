"""SigLIP 2 NaFlex: SigLIP for pictures of any shape and number of patches, packed instead of padded.

    pictures  -> h x w patches each, as many as there may be at its aspect ratio        (vlkern.layers.patches)
    patches   [T, 3 P^2], one picture behind the other -> linear + positions -> blocks -> LN -> MAP head     -> u_s
              positions: a learned 16 x 16 grid, resized to each picture's h x w; attention stays inside a picture
    text      as in SigLIP                                                                                  -> w_s

transformers computes the same on a batch padded to the longest picture, with masks; here there is nothing to mask.
Parameter names are those of its Siglip2Model, so its checkpoints are `load_state_dict`.

    S pictures   T patches of all pictures   h, w rows and columns of patches   P patch side   L text tokens
    D width of a tower   E width of the embeddings, which is that of the image tower

Source: Tschannen et al., SigLIP 2, 2025, section 2.4.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vlkern import _checks
from vlkern.layers.init import lecun_normal_, shapes_only
from vlkern.layers.linear import Linear
from vlkern.layers.packed import Attention, Block, Encoder, MapPooling, check_heads
from vlkern.layers.patches import Places, check_shapes, pack_pictures, places, resize_within
from vlkern.models import resize
from vlkern.models.siglip import SIZES, Siglip, TextConfig, TextTower, TowerConfig, TwoTowers, unit


@dataclass(frozen=True)
class NaflexVisionConfig(TowerConfig):
    """The image tower: patches of `patch` x `patch` pixels, and learned positions on a square grid with `side`."""

    patch: int
    side: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads)

    @property
    def patches(self) -> int:
        """How many positions there are, and the most patches of a picture where nothing else is asked for."""
        return self.side**2


@dataclass(frozen=True)
class NaflexConfig:
    """Both towers. The embeddings have the width of the image tower."""

    vision: NaflexVisionConfig
    text: TextConfig


#: The released models under their names on Hugging Face, and two that train on a laptop.
PRESETS = {
    "naflex-tiny": NaflexConfig(
        NaflexVisionConfig(width=192, depth=4, heads=3, mlp=768, patch=8, side=4),
        TextConfig(width=192, depth=2, heads=3, mlp=768, vocabulary=2048, length=16),
    ),
    "naflex-small": NaflexConfig(
        NaflexVisionConfig(width=256, depth=6, heads=4, mlp=1024, patch=8, side=8),
        TextConfig(width=256, depth=4, heads=4, mlp=1024, vocabulary=2048, length=16),
    ),
    **{
        f"siglip2-{size}-patch16-naflex": NaflexConfig(
            NaflexVisionConfig(*SIZES[size], patch=16, side=16), TextConfig(*SIZES[size], vocabulary=256_000, length=64)
        )
        for size in ("base", "so400m")
    },
}


class NaflexEmbeddings(nn.Module):
    """One linear map of all patches, plus the positions of each picture's grid."""

    def __init__(self, c: NaflexVisionConfig) -> None:
        super().__init__()
        self.side = c.side
        self.patch_embedding = Linear(3 * c.patch**2, c.width)
        self.position_embedding = nn.Embedding(c.patches, c.width)
        lecun_normal_(self.patch_embedding.weight, fan_in=3 * c.patch**2)
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.position_embedding.weight, std=1 / math.sqrt(c.width))

    def forward(self, patches_TC: torch.Tensor, at: Places) -> torch.Tensor:
        """[T, 3 P^2] in any floating dtype -> [T, D]."""
        x_TD = self.patch_embedding(patches_TC.to(self.patch_embedding.weight.dtype))
        return x_TD + resize.positions_of(self.position_embedding.weight, self.side, at)


class NaflexVisionTower(nn.Module):
    """Packed pictures to pooled vectors; `tokens` gives the sequence before pooling.

    Example:
        >>> tower = NaflexVisionTower(PRESETS["naflex-tiny"].vision)
        >>> tower(torch.randn(7, 192), torch.tensor([[2, 3], [1, 1]])).shape
        torch.Size([2, 192])
    """

    def __init__(self, c: NaflexVisionConfig) -> None:
        super().__init__()
        self.config = c
        self.embeddings = NaflexEmbeddings(c)
        self.encoder = Encoder(Block(Attention(c.width, c.heads), c.width, c.mlp) for _ in range(c.depth))
        self.post_layernorm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = MapPooling(c.width, c.mlp, c.heads)

    def tokens(self, patches: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        """Patches [T, 3 P^2] and shapes [S, 2] -> [T, D], after the final LN. Errors as `Naflex.encode_image`."""
        return self._tokens(patches, self._places(patches, shapes))

    def forward(self, patches: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        """Patches [T, 3 P^2] and shapes [S, 2] -> [S, E], not normalised; E = D. Errors as `Naflex.encode_image`."""
        at = self._places(patches, shapes)
        return self.head(self._tokens(patches, at), at.cu_seqlens)

    def _tokens(self, patches_TC: torch.Tensor, at: Places) -> torch.Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(patches_TC, at), at.start, at.stop))

    def _places(self, patches: torch.Tensor, shapes: torch.Tensor) -> Places:
        _checks.floating("patches", patches)
        channels = 3 * self.config.patch**2
        if patches.dim() != 2 or patches.shape[1] != channels:
            raise ValueError(f"patches must have shape [T, {channels}], got {list(patches.shape)}")
        check_shapes(shapes, len(patches))
        _checks.on_device("shapes", shapes, "patches", patches)
        return places(shapes, len(patches))


class Naflex(TwoTowers):
    """Both towers, for pictures of any shape."""

    vision_model: NaflexVisionTower

    def __init__(self, config: NaflexConfig) -> None:
        super().__init__(NaflexVisionTower(config.vision), TextTower(config.text, out=config.vision.width))
        self.config = config

    def encode_image(self, patches: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        """Packed pictures -> embeddings [S, E] of length 1, at least float32.

        Args:
            patches: [T, 3 P^2] floating point in [-1, 1], the patches of all pictures one behind the other, each
                row by row, column by column, channel by channel.
            shapes: [S, 2] int32 or int64, rows and columns of patches of each picture.

        Raises:
            TypeError: the patches are no floating-point numbers, or the shapes no integers.
            ValueError: a shape does not fit: patches of another length, no picture, a picture without area, or shapes
                that have not as many patches as there are.

        Example:
            >>> image = model.encode_image(torch.randn(7, 192), torch.tensor([[2, 3], [1, 1]]))
        """
        return unit(self.vision_model(patches, shapes))

    def encode_pictures(self, pictures: Sequence[Any], *, max_patches: int | None = None) -> torch.Tensor:
        """Pictures as they are -> embeddings [S, E] of length 1, at least float32, on the model's device.

        Each is resized by `vlkern.layers.patches.grid_within`, which keeps its aspect ratio up to whole patches.

        Args:
            pictures: at least one, each a uint8 tensor [3, H, W] or a PIL image.
            max_patches: the most patches of a picture; by default as many as there are learned positions.

        Raises:
            TypeError: one is neither, or no uint8.
            ValueError: there is none, one has no area, or max_patches is below 1.

        Example:
            >>> wide, tall = torch.zeros(3, 20, 90, dtype=torch.uint8), torch.zeros(3, 64, 30, dtype=torch.uint8)
            >>> image = model.encode_pictures([wide, tall])
        """
        v = self.config.vision
        most = v.patches if max_patches is None else max_patches
        resized = [resize_within(_pixels(i, picture), v.patch, most) for i, picture in enumerate(pictures)]
        patches, shapes = pack_pictures(resized, v.patch)
        device = self.logit_scale.device
        return self.encode_image(patches.to(device) / 127.5 - 1, shapes.to(device))

    def forward(
        self, patches: torch.Tensor, shapes: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed pictures and ids [S, L] -> the two normalised embeddings, [S, E] each. Errors as `encode_image`.

        Example:
            >>> image, text = model(patches, shapes, ids)
            >>> loss = vlkern.ops.sigmoid_contrastive_loss(image, text, model.logit_scale.exp(), model.logit_bias)
        """
        return self.encode_image(patches, shapes), self.encode_text(ids)


def from_siglip(model: Siglip) -> Naflex:
    """A fixed-resolution SigLIP as a NaFlex model that gives the same for pictures of its size.

    The convolution that cuts patches becomes a linear map; positions of a grid that is no square are interpolated on
    one with as many rows as its longer side. Shares no memory with `model`. SigLIP 2 NaFlex begins with such a model,
    after nine tenths of its training.

    Args:
        model: with heads of a multiple of 8 channels up to 256.

    Raises:
        ValueError: its heads have other sizes.

    Example:
        >>> flexible = vlkern.models.naflex.from_siglip(vlkern.models.create("siglip-tiny"))
    """
    c, v = model.config, model.config.vision
    side = max(v.grid)
    vision = NaflexVisionConfig(v.width, v.depth, v.heads, v.mlp, patch=v.patch, side=side)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    conv, table = (f"vision_model.embeddings.{part}_embedding.weight" for part in ("patch", "position"))
    state[conv] = state[conv].permute(0, 2, 3, 1).flatten(1)
    state[table] = resize.positions(state[table], v.grid, (side, side))
    with shapes_only():
        flexible = Naflex(NaflexConfig(vision, c.text))
    flexible.load_state_dict(state, assign=True)
    return flexible.train(model.training)


def _pixels(index: int, picture: Any) -> torch.Tensor:
    """A picture as uint8 [3, H, W]."""
    if hasattr(picture, "convert"):  # PIL, which need not be installed
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    if not isinstance(picture, torch.Tensor) or picture.dtype != torch.uint8:
        what = f"a {picture.dtype} tensor" if isinstance(picture, torch.Tensor) else type(picture).__name__
        raise TypeError(f"pictures[{index}] must be a uint8 tensor [3, H, W] or a PIL image, got {what}")
    return picture
