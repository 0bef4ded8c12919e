"""What checkpoints say about the size of a tower through the shapes of tensors, and what they leave unsaid."""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch

from vlkern.errors import UserError
from vlkern.models import naflex, siglip
from vlkern.models.state import Checkpoint, Source, need

AnyConfig = siglip.SiglipConfig | siglip.VisionConfig | naflex.NaflexConfig | naflex.NaflexVisionConfig
Config = TypeVar("Config", siglip.SiglipConfig, siglip.VisionConfig, naflex.NaflexConfig, naflex.NaflexVisionConfig)


@dataclass(frozen=True)
class Plan:
    """How to read a checkpoint.

    config: SiglipConfig or NaflexConfig for two towers, VisionConfig or NaflexVisionConfig for the image tower alone.
    sources: parameter of the model -> tensors of the file.
    root: what the names of the model's tensors begin with; others are left alone.
    """

    config: AnyConfig
    sources: dict[str, Source]
    root: str = ""


def given(checkpoint: Checkpoint, config: object, kind: type[Config]) -> Config | None:
    """The user's `config`, which must be of this kind.

    Raises:
        UserError: it is another.
    """
    if config is not None and not isinstance(config, kind):
        holds = "two towers" if kind in (siglip.SiglipConfig, naflex.NaflexConfig) else "the image tower alone"
        raise UserError(
            f"{checkpoint.path} holds {holds}: config must be a {kind.__name__}, got {type(config).__name__}"
        )
    return config


def no_head(checkpoint: Checkpoint, c: siglip.SiglipConfig, head: str, norm: str) -> dict[str, Source]:
    """An identity for the text head of siglip-so400m-patch16-256-i18n, which was trained without one.

    Args:
        checkpoint: in Hugging Face's form it has this identity.
        c: only a multilingual tower as wide as that of the images may lack its head: of others it is missing.
        head: what the names of the head's tensors would begin with.
        norm: name of the scale [D] of the tower's last LayerNorm.
    """
    lacks = not any(name.startswith(head) for name in checkpoint.shapes)
    if not lacks or c.text.vocabulary != siglip.MULTILINGUAL or c.text.width != c.vision.width:
        return {}
    return {
        "text_model.head.weight": Source((norm,), lambda scale: torch.eye(len(scale))),
        "text_model.head.bias": Source((norm,), lambda scale: torch.zeros(len(scale))),
    }


def heads(checkpoint: Checkpoint, width: int) -> int:
    """The number of heads, which no shape of fused projections tells: that of the presets with this width.

    Raises:
        UserError: no preset has a tower of this width.
    """
    for preset in siglip.PRESETS.values():
        for tower in (preset.vision, preset.text):
            if tower.width == width:
                return tower.heads
    raise UserError(f"{checkpoint.path}: does not say how many heads a tower of width {width} has: pass config=")


def image_size(checkpoint: Checkpoint, patches: int, patch: int) -> tuple[int, int]:
    """The square picture that has so many patches.

    Raises:
        UserError: the patches fill no square.
    """
    side = square(checkpoint, patches) * patch
    return side, side


def square(checkpoint: Checkpoint, patches: int) -> int:
    """The side of the square grid with so many patches.

    Raises:
        UserError: the patches fill no square.
    """
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(
            f"{checkpoint.path}: {patches} positions fill no square: pass config= to say which grid they fill"
        )
    return side


def vision_config(checkpoint: Checkpoint, patches: str, positions: str, fc1: str, *, depth: int) -> siglip.VisionConfig:
    """An image tower with patch convolution `patches` [D, 3, P, P], `positions` [.., N, D] and first layer [mlp, D].

    Raises:
        UserError: a tensor is missing or cannot be that tensor, or the shapes leave something open.
    """
    if patches in checkpoint.shapes and checkpoint.shapes[patches].dim() == 2:
        raise UserError(
            f"{checkpoint.path}: its patch embedding is linear, as in NaFlex models, which are read with the names of "
            "transformers or big_vision only"
        )
    dims = checkpoint.shapes[positions].dim() if positions in checkpoint.shapes else 2
    conv, table, hidden = need(checkpoint, {patches: 4, positions: max(dims, 2), fc1: 2})
    return siglip.VisionConfig(
        width=conv[0],
        depth=depth,
        heads=heads(checkpoint, conv[0]),
        mlp=hidden[0],
        image_size=image_size(checkpoint, table[-2], conv[2]),
        patch=conv[2],
    )


def naflex_vision_config(
    checkpoint: Checkpoint, patches: str, positions: str, fc1: str, *, depth: int
) -> naflex.NaflexVisionConfig:
    """A NaFlex image tower with patch weights `patches` [D, 3 P^2], `positions` [N, D] and first layer [mlp, D].

    Raises:
        UserError: a tensor is missing or cannot be that tensor, or the shapes leave something open.
    """
    linear, table, hidden = need(checkpoint, {patches: 2, positions: 2, fc1: 2})
    return naflex.NaflexVisionConfig(
        width=linear[0],
        depth=depth,
        heads=heads(checkpoint, linear[0]),
        mlp=hidden[0],
        patch=patch_side(checkpoint, linear[1]),
        side=square(checkpoint, table[0]),
    )


def patch_side(checkpoint: Checkpoint, numbers: int) -> int:
    """The side P of patches of 3 P^2 numbers.

    Raises:
        UserError: there is none.
    """
    side = math.isqrt(numbers // 3)
    if 3 * side**2 != numbers:
        raise UserError(f"{checkpoint.path}: patches of {numbers} numbers are no squares with three channels")
    return side


def text_config(checkpoint: Checkpoint, tokens: str, positions: str, fc1: str, *, depth: int) -> siglip.TextConfig:
    """A text tower with tables `tokens` [V, D] and `positions` [L, D] and first layer [mlp, D].

    Raises:
        UserError: a tensor is missing or cannot be that tensor, or the shapes leave something open.
    """
    table, places, hidden = need(checkpoint, {tokens: 2, positions: 2, fc1: 2})
    return siglip.TextConfig(
        width=table[1],
        depth=depth,
        heads=heads(checkpoint, table[1]),
        mlp=hidden[0],
        vocabulary=table[0],
        length=places[0],
    )
