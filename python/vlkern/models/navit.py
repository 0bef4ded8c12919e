"""NaViT: a vision transformer for pictures of any aspect ratio and resolution, many of them in one packed sequence.

    patches [T, P P 3] of all images -> linear + phi_y(y) + phi_x(x) -> blocks -> LN -> MAP head by image -> u_i
    ids     [T]        of all texts  -> token vectors + positions    -> blocks -> LN -> MAP head by text, linear -> w_j
    logit_ij = exp(logit_scale) <u_i / |u_i|, w_j / |w_j|> + logit_bias      (vlkern.ops.sigmoid_contrastive_loss)

A token attends to the tokens of its own image or text, so what an image gives does not depend on what it is packed
with; everything else works on single tokens. As in ViT-22B, queries and keys are normalised before their product, and
the projections to q, k and v and the LayerNorms have no bias. The paper does not say which other layers lack theirs:
here output projections, MLPs, patches and heads have one. The head of the texts is not described either.

    T tokens   n images, texts or slots   P patch side   D width   K heads of C channels   E width of the embeddings
    V vocabulary   G largest number of rows and of columns

Sources: Dehghani et al., Patch n' Pack: NaViT, 2023; Dehghani et al., Scaling Vision Transformers to 22 Billion
Parameters, 2023; Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks, masks, ops
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.layers.packed import Block, Encoder, MapPooling, check_cu_seqlens, check_heads
from vlkern.layers.positions import COORDINATES, FAMILIES, Positions
from vlkern.models import siglip

NORMS = ("layer", "rms")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class TowerConfig(siglip.TowerConfig):
    """Size of a transformer, and how its queries and keys are normalised.

    qk_norm  "layer" (LayerNorm without bias over the C channels of a head, as in ViT-22B) or "rms"; one scale [C] for
             all heads
    """

    qk_norm: str = field(default="layer", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads)
        _choice("qk_norm", self.qk_norm, NORMS)


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower: patches of `patch` x `patch` pixels.

    grid         G, rows of a learned table; with absolute coordinates also the most rows or columns of an image
    positions    family of phi: "learned", "sinusoidal" or "fourier"
    coordinates  what phi sees: "absolute", "fractional" or "aspect"; see vlkern.layers.positions
    """

    patch: int
    grid: int = field(default=64, kw_only=True)
    positions: str = field(default="learned", kw_only=True)
    coordinates: str = field(default="absolute", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("positions", self.positions, FAMILIES)
        _choice("coordinates", self.coordinates, COORDINATES)

    @property
    def longest(self) -> int | None:
        """The most rows or columns of an image; None when there is no limit."""
        return self.grid if self.coordinates == "absolute" else None


@dataclass(frozen=True)
class TextConfig(TowerConfig, siglip.TextConfig):
    """The text tower: at most `length` tokens out of `vocabulary`."""


@dataclass(frozen=True)
class NavitConfig:
    """Both towers. The embeddings have the width of the image tower."""

    vision: VisionConfig
    text: TextConfig


#: The sizes of the paper, with a text tower as large as the image tower, and two that train on a laptop.
PRESETS = {
    "navit-tiny": NavitConfig(
        VisionConfig(width=192, depth=4, heads=3, mlp=768, patch=8),
        TextConfig(width=192, depth=2, heads=3, mlp=768, vocabulary=2048, length=16),
    ),
    "navit-small": NavitConfig(
        VisionConfig(width=256, depth=6, heads=4, mlp=1024, patch=8),
        TextConfig(width=256, depth=4, heads=4, mlp=1024, vocabulary=2048, length=16),
    ),
    **{
        f"navit-{size}-patch{patch}": NavitConfig(
            VisionConfig(*siglip.SIZES[size], patch=patch),
            TextConfig(*siglip.SIZES[size], vocabulary=32_000, length=24),
        )
        for size, patch in (("base", 32), ("base", 16), ("large", 16), ("large", 14))
    },
}


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=False)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, by vlkern.ops.rms_norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return ops.rms_norm(x, self.weight, eps=1e-6)


class Attention(nn.Module):
    """softmax(norm(q) norm(k)^T / sqrt(C)) v in which token i sees start[i] <= j < stop[i]."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj = (dense_(Linear(c.width, c.width, bias=False)) for _ in range(3))
        norm = _norm if c.qk_norm == "layer" else RmsNorm
        self.q_norm, self.k_norm = norm(c.width // c.heads), norm(c.width // c.heads)
        self.out_proj = dense_(Linear(c.width, c.width))

    def forward(self, x_TD: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """[T, D] with start and stop [T] int32 -> [T, D]."""
        q, k, v = (project(x_TD).unflatten(1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        # Autocast gives the norms in float32; values stay as the projection made them.
        return self.out_proj(ops.interval_attention(q.to(v.dtype), k.to(v.dtype), v, start, stop).flatten(1))


def _encoder(c: TowerConfig) -> Encoder:
    return Encoder(Block(Attention(c), c.width, c.mlp, bias=False) for _ in range(c.depth))


class VisionEmbeddings(nn.Module):
    """A linear layer on each patch, plus the vector of its position."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = dense_(Linear(3 * c.patch**2, c.width), lecun=True)
        self.positions = Positions(c.width, c.grid, c.positions, c.coordinates)

    def forward(
        self, patches: torch.Tensor, cu_seqlens: torch.Tensor, yx: torch.Tensor, hw: torch.Tensor
    ) -> torch.Tensor:
        """[T, P P 3] in any floating dtype -> [T, D]."""
        x_TD = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        hw_T2 = hw.repeat_interleave(cu_seqlens.diff(), dim=0, output_size=len(patches))
        return x_TD + self.positions(yx, hw_T2).to(x_TD.dtype)


class VisionTower(nn.Module):
    """Packed images to pooled vectors; `tokens` gives the sequence before pooling."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.config = c
        self.embeddings = VisionEmbeddings(c)
        self.encoder = _encoder(c)
        self.post_layernorm = _norm(c.width)
        self.head = MapPooling(c.width, c.mlp, c.heads)

    def tokens(
        self, patches: torch.Tensor, cu_seqlens: torch.Tensor, yx: torch.Tensor, hw: torch.Tensor
    ) -> torch.Tensor:
        """As `Navit.encode_image` -> [T, D], after the final LN."""
        _check_images(self.config, patches, cu_seqlens, yx, hw)
        x_TD = self.embeddings(patches, cu_seqlens, yx, hw)
        return self.post_layernorm(self.encoder(x_TD, *masks.documents(cu_seqlens).bounds(len(x_TD))))

    def forward(
        self, patches: torch.Tensor, cu_seqlens: torch.Tensor, yx: torch.Tensor, hw: torch.Tensor
    ) -> torch.Tensor:
        """As `Navit.encode_image` -> [n, E], not normalised; E = D."""
        return self.head(self.tokens(patches, cu_seqlens, yx, hw), cu_seqlens, empty=True)


class TextEmbeddings(nn.Module):
    """One learned vector per token, plus one per place in the text."""

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocabulary, c.width)
        self.position_embedding = nn.Embedding(c.length, c.width)
        nn.init.normal_(self.token_embedding.weight, std=1 / math.sqrt(c.width))
        nn.init.normal_(self.position_embedding.weight, std=1 / math.sqrt(c.width))

    def forward(self, ids_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D]."""
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(ids_T))
        place = torch.arange(len(ids_T), device=ids_T.device) - starts
        return self.token_embedding(ids_T) + self.position_embedding(place)


class TextTower(nn.Module):
    """Packed texts to pooled vectors; `tokens` gives the sequence before pooling."""

    def __init__(self, c: TextConfig, out: int) -> None:
        super().__init__()
        self.config = c
        self.embeddings = TextEmbeddings(c)
        self.encoder = _encoder(c)
        self.final_layer_norm = _norm(c.width)
        self.pooling = MapPooling(c.width, c.mlp, c.heads)
        self.head = dense_(Linear(c.width, out), lecun=True)

    def tokens(self, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """As `Navit.encode_text` -> [T, D], after the final LN."""
        _check_texts(self.config, ids, cu_seqlens)
        bounds = masks.documents(cu_seqlens).bounds(len(ids))
        return self.final_layer_norm(self.encoder(self.embeddings(ids, cu_seqlens), *bounds))

    def forward(self, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """As `Navit.encode_text` -> [n, E], not normalised."""
        return self.head(self.pooling(self.tokens(ids, cu_seqlens), cu_seqlens, empty=True))


class Navit(nn.Module):
    """Both towers with the learned temperature and bias of the sigmoid loss, which start as SigLIP's.

    Example:
        >>> model = vlkern.models.create("navit-tiny")
        >>> packed = vlkern.data.pack_images([torch.zeros(3, 16, 40), torch.zeros(3, 24, 24)], patch=8)
        >>> model.encode_image(*packed).shape
        torch.Size([2, 192])
    """

    def __init__(self, config: NavitConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision)
        self.text_model = TextTower(config.text, out=config.vision.width)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def encode_image(
        self, patches: torch.Tensor, cu_seqlens: torch.Tensor, yx: torch.Tensor, hw: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings of n packed images, [n, E] of length 1, at least float32; `vlkern.data.pack_images` packs.

        Args:
            patches: [T, P P 3] in [-1, 1]; row by row, column by column and colour by colour in each patch. The patches
                of an image lie side by side, in any order, and some may have been dropped.
            cu_seqlens: [n + 1] int32, from 0 to T; image i has the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. An
                empty slot gives an embedding that no image had a part in: leave it out of the loss by `valid`.
            yx: [T, 2] int32 or int64, row and column of each patch in its image.
            hw: [n, 2] int32 or int64, rows and columns of each image.

        Raises:
            TypeError: an argument is no tensor, or of another dtype.
            ValueError: shapes or devices do not fit, cu_seqlens does not go from 0 to T, there is no image, one has no
                area, or a patch lies outside of its image or of the learned table.
        """
        return siglip.unit(self.vision_model(patches, cu_seqlens, yx, hw))

    def encode_text(self, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Embeddings of n packed texts, [n, E] of length 1, at least float32; `vlkern.data.pack_texts` packs.

        Args:
            ids: [T] int32 or int64, the texts without their pads.
            cu_seqlens: [n + 1] int32, as in `encode_image`.

        Raises:
            TypeError: an argument is no tensor, or of another dtype.
            ValueError: shapes do not fit, cu_seqlens does not go from 0 to T, there is no text, one is too long, or an
                id is not in the vocabulary (looked at where that costs no wait for a GPU).
        """
        return siglip.unit(self.text_model(ids, cu_seqlens))

    def forward(
        self,
        patches: torch.Tensor,
        cu_seqlens: torch.Tensor,
        yx: torch.Tensor,
        hw: torch.Tensor,
        ids: torch.Tensor,
        cu_texts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images as `encode_image`, texts as `encode_text` takes them -> the two embeddings, [n, E] each."""
        return self.encode_image(patches, cu_seqlens, yx, hw), self.encode_text(ids, cu_texts)


class NavitClassifier(nn.Module):
    """An image tower with a linear head: logits [n, classes]; trained with `sigmoid_cross_entropy`.

    The head starts at zero with bias -log(classes), so that at first about one class is thought to be present.

    Args:
        config: of the image tower, such as `PRESETS["navit-base-patch16"].vision`.
        classes: how many.

    Raises:
        ValueError: `classes` is no positive integer.

    Example:
        >>> model = NavitClassifier(PRESETS["navit-tiny"].vision, classes=10)
        >>> packed = vlkern.data.pack_images([torch.zeros(3, 16, 40), torch.zeros(3, 24, 24)], patch=8)
        >>> loss = sigmoid_cross_entropy(model(*packed), torch.eye(10)[:2])
    """

    def __init__(self, config: VisionConfig, classes: int) -> None:
        super().__init__()
        if type(classes) is not int or classes < 1:
            raise ValueError(f"classes must be a positive integer, got {classes!r}")
        self.config, self.classes = config, classes
        self.vision_model = VisionTower(config)
        self.head = Linear(config.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -math.log(classes))

    def forward(
        self, patches: torch.Tensor, cu_seqlens: torch.Tensor, yx: torch.Tensor, hw: torch.Tensor
    ) -> torch.Tensor:
        """As `Navit.encode_image` -> logits [n, classes]."""
        return self.head(self.vision_model(patches, cu_seqlens, yx, hw))


def sigmoid_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Every class is a yes-or-no question of its own: summed over classes, averaged over images.

        loss = (1 / n) sum_ic [softplus(logit_ic) - target_ic logit_ic]

    Args:
        logits: [n, classes].
        targets: [n, classes], 0 to 1; an image may have several classes.
        valid: [n] bool, the slots that hold an image; the others count for nothing. None is all.

    Returns:
        [] float32 (float64 for float64); 0 when no slot is valid.

    Raises:
        ValueError: shapes differ.
    """
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits and targets must have shape [n, classes], got {list(logits.shape)} and {list(targets.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = F.binary_cross_entropy_with_logits(wide, targets.to(wide.dtype), reduction="none").sum(1)
    if valid is None:
        return rows.mean()
    if tuple(valid.shape) != (len(logits),) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool of shape [{len(logits)}], got {valid.dtype} of {list(valid.shape)}")
    return torch.where(valid, rows, 0).sum() / valid.sum().clamp(min=1)


def _integers(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    _checks.tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    _checks.shape(name, value, shape)


def _check_images(
    c: VisionConfig, patches: torch.Tensor, cu_seqlens: torch.Tensor, yx: torch.Tensor, hw: torch.Tensor
) -> None:
    _checks.tensor("patches", patches)
    if not patches.is_floating_point():
        raise TypeError(f"patches must be floating-point numbers in [-1, 1], got {patches.dtype}")
    if patches.dim() != 2 or patches.shape[1] != 3 * c.patch**2:
        raise ValueError(f"patches must have shape [T, {3 * c.patch**2}], got {list(patches.shape)}")
    check_cu_seqlens(cu_seqlens, len(patches), empty=True)
    _integers("yx", yx, (len(patches), 2))
    _integers("hw", hw, (len(cu_seqlens) - 1, 2))
    for name, value in (("cu_seqlens", cu_seqlens), ("yx", yx), ("hw", hw)):
        _checks.on_device(name, value, "patches", patches)
    if not _checks.values_may_be_read(cu_seqlens, yx, hw):
        return
    if bool((none := (hw < 1).any(1)).any()):
        i = int(none.nonzero()[0])
        raise ValueError(f"hw must be at least 1 row and 1 column, got {hw[i].tolist()} for image {i}")
    inside = hw.repeat_interleave(cu_seqlens.diff(), dim=0)
    if bool((out := ((yx < 0) | (yx >= inside)).any(1)).any()):
        i = int(out.nonzero()[0])
        raise ValueError(
            f"yx must lie inside its image, got {yx[i].tolist()} for token {i} of an image of {inside[i].tolist()}"
        )
    if c.longest is not None and len(yx) and int(yx.max()) >= c.longest:
        raise ValueError(f"yx must be below the {c.longest} positions of the model, got {int(yx.max())}")


def _check_texts(c: TextConfig, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    siglip.check_ids(ids, c.vocabulary)
    _checks.shape("ids", ids, (len(ids),) if ids.dim() else (0,))
    check_cu_seqlens(cu_seqlens, len(ids), empty=True)
    _checks.on_device("cu_seqlens", cu_seqlens, "ids", ids)
    if _checks.values_may_be_read(cu_seqlens) and (longest := int(cu_seqlens.diff().max())) > c.length:
        raise ValueError(f"texts must have at most {c.length} tokens, got {longest}")
