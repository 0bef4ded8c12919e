"""GIVT: a transformer over sequences of real-valued vectors, such as the latents of a VAE, without a vocabulary.

    causal   [class, W z_1, ..., W z_(L-1)] + positions -> blocks, token i sees j <= i -> LN -> P numbers a token
    masked   [class, t_1, ..., t_L] + positions         -> blocks, all see all         -> LN, without the first
             t_i = W z_i, or where z_i is hidden a learned vector ("replace"); with "concat" half of the channels are
             those of a vector that says whether it is hidden, the other half of W z_i or of a learned vector
    block    x += Attention(N(x));  x += CrossAttention(N(x), pixels);  x += MLP(N(x))     cross-attention where there
             is an encoder of pixels

The P numbers are the parameters of a mixture of Gaussians (vlkern.layers.mixture): the density of the next vector, or
of the hidden one. The loss is its negative logarithm, in nats a token: where a language model has a table of words and
a softmax, GIVT has a linear layer and a density. The norms N have no bias, nor have the projections of attention.

A label 0, ..., C - 1 is an index into a table with further rows behind: a mask's, and one for "no label", which a part
of the examples gets in training, so that the model knows the density without the class, too: guidance needs both.

    B examples   L tokens of an example   N places: L, or L + 1 if masked   d channels of a token   D width
    H heads of C channels   T places of all examples   C classes   M patches of pixels   P parameters of a token

Source: Tschannen, Eastwood, Mentzer, GIVT: Generative Infinite-Vocabulary Transformers, 2023, and its released code,
which also drops out attention weights; here only what a block adds is dropped out.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlkern import _checks, masks
from vlkern.caches import Caches, LinearCache
from vlkern.layers.decoder import Block, Cached, Rows, Seen, padded
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.layers.mixture import MixtureHead, parameters
from vlkern.models.adaptor import Adaptor, AdaptorConfig
from vlkern.models.siglip import VisionConfig, VisionEncoder

STYLES = ("causal", "masked")
MASKS = ("concat", "replace")


@dataclass(frozen=True)
class GivtConfig:
    """What the models differ in.

    width D, depth blocks, heads H, mlp units of the MLP.
    length       L
    channels     d
    components   k of the mixture
    layout       of the mixture: "joint", "per_channel" or "multivariate"
    style        "causal" or "masked"
    mask         what a hidden token looks like: "concat" or "replace"
    labels       C; 0 for a model without classes
    unlabelled   whether there is a "no label"
    dropout      of what a block adds
    encoder      of pixels, with the width of the model, or None
    adaptor      between latents and tokens, or None
    legacy_scale scales of early checkpoints, see vlkern.layers.mixture
    image_size   side of the pictures whose latents these are

    Raises:
        ValueError: no model can have these sizes.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    length: int
    channels: int
    components: int = 16
    layout: str = "joint"
    style: str = "causal"
    mask: str = "concat"
    labels: int = 0
    unlabelled: bool = True
    dropout: float = 0.0
    encoder: VisionConfig | None = None
    adaptor: AdaptorConfig | None = None
    legacy_scale: bool = False
    image_size: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = 0 if field.name == "labels" else 1
            if field.type is int and not (type(value) is int and value >= low):
                raise ValueError(f"{field.name} must be an integer from {low} on, got {value!r}")
        for name, choices in (("style", STYLES), ("mask", MASKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and a multiple of the {self.heads} heads, got {self.width}")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        parameters(self.layout, self.channels, self.components)
        if self.encoder is not None and self.encoder.width != self.width:
            raise ValueError(f"encoder must have the width of the model, {self.width}, got {self.encoder.width}")
        a = self.adaptor
        if a is not None and (a.channels, math.prod(a.grid)) != (self.channels, self.length):
            raise ValueError(
                f"adaptor must have {self.length} tokens of {self.channels} channels, got {math.prod(a.grid)} of "
                f"{a.channels}"
            )

    @property
    def masked(self) -> bool:
        """Whether the style is "masked"."""
        return self.style == "masked"

    @property
    def places(self) -> int:
        """N."""
        return self.length + self.masked

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the table behind the labels: their names, and where they are."""
        names = ["mask"] * self.masked + ["shown", "hidden"] * (self.masked and self.mask == "concat")
        names += ["unlabelled"] * self.unlabelled
        return {name: max(self.labels, 1) + i for i, name in enumerate(names)}


# name, width, depth, heads, mlp, dropout
_SIZES = {"base": (768, 12, 12, 3072, 0.1), "default": (1024, 24, 16, 4096, 0.2), "large": (1536, 48, 16, 8192, 0.3)}


def _imagenet(size: str, *, dropout: float | None = None, **more: Any) -> GivtConfig:
    *sizes, rate = _SIZES[size]
    common = {"length": 256, "channels": 16, "labels": 1000, "dropout": rate if dropout is None else dropout}
    return GivtConfig(*sizes, **(common | more))  # type: ignore[arg-type]


#: The sizes of the paper, and two that train on a laptop.
PRESETS = {
    "givt-tiny": GivtConfig(128, 6, 4, 512, length=64, channels=4, components=16, labels=16, image_size=32),
    "givt-masked-tiny": GivtConfig(
        128, 6, 4, 512, length=64, channels=4, components=16, labels=16, style="masked", image_size=32
    ),
    "givt-causal-base-256": _imagenet("base"),
    "givt-causal-256": _imagenet("default"),
    "givt-causal-large-256": _imagenet("large"),
    "givt-causal-large-adaptor-256": _imagenet("large", adaptor=AdaptorConfig(16, (16, 16), 8, 64)),
    # Pairs of neighbours are one token.
    "givt-causal-large-adaptor-512": _imagenet(
        "large",
        dropout=0.1,
        length=512,
        channels=32,
        components=32,
        adaptor=AdaptorConfig(32, (32, 16), 8, 256),
        image_size=512,
    ),
    "givt-masked-256": _imagenet("default", dropout=0.4, style="masked"),
    "givt-masked-512": _imagenet("default", dropout=0.4, style="masked", length=1024, image_size=512),
    # Label maps of pictures, one Gaussian a channel.
    "givt-uvim-512": GivtConfig(
        1024, 24, 16, 4096, length=256, channels=16, components=1, layout="per_channel", unlabelled=False,
        image_size=512, encoder=VisionConfig(1024, 24, 16, 4096, image_size=(512, 512), patch=16),
    ),
}  # fmt: skip


class Givt(nn.Module):
    """The density of sequences of vectors. vlkern.generation.givt draws from it.

    Args:
        config: sizes; `PRESETS` has those of the paper.

    Example:
        >>> model = vlkern.models.create("givt-tiny")
        >>> tokens, labels = torch.randn(2, 64, 4), torch.tensor([3, 0])
        >>> model.nll(tokens, labels).shape
        torch.Size([2, 64])
    """

    def __init__(self, config: GivtConfig) -> None:
        super().__init__()
        c = self.config = config
        self.label_embedding = nn.Embedding(max(c.labels, 1) + len(c.rows), c.width)
        self.token_embedding = dense_(Linear(c.channels, c.width), lecun=True)
        self.position_embedding = nn.Parameter(torch.empty(c.places, c.width))
        self.encoder = None if c.encoder is None else VisionEncoder(c.encoder)
        self.layers = nn.ModuleList(
            Block(c.width, c.heads, c.mlp, cross=c.encoder is not None, dropout=c.dropout) for _ in range(c.depth)
        )
        self.final_layer_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = MixtureHead(c.width, c.channels, c.components, c.layout, legacy=c.legacy_scale)
        self.adaptor = None if c.adaptor is None else Adaptor(c.adaptor)
        nn.init.normal_(self.label_embedding.weight)
        nn.init.normal_(self.position_embedding, std=1 / math.sqrt(c.width))

    def blocks(self) -> Sequence[nn.Module]:
        """The parts whose parameters FSDP gathers one after the other."""
        return [*(self.encoder.encoder.layers if self.encoder is not None else ()), *self.layers]

    def tokens_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, L, d] of the autoencoder -> tokens [B, L, d]: by the adaptor, if there is one."""
        return latents if self.adaptor is None else self.adaptor(latents)

    def latents_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Undoes `tokens_of`."""
        return tokens if self.adaptor is None else self.adaptor.inverse(tokens)

    def begin(self, labels: torch.Tensor | int | None, drop: torch.Tensor | None = None) -> torch.Tensor:
        """What stands before the tokens, without its position.

        Args:
            labels: [B] int32 or int64; for models without classes the number of examples B.
            drop: [B] bool, the examples whose label is hidden from the model.

        Returns:
            [B, D].

        Raises:
            TypeError: no integers, or no bools.
            ValueError: wrong shapes; a label is unknown; or `drop` where the model has no "no label".
        """
        c, device = self.config, self.position_embedding.device
        if c.labels == 0:
            if type(labels) is not int:
                raise TypeError(f"labels must be the number of examples, as there are no classes, got {labels!r:.80}")
            rows = torch.zeros(labels, dtype=torch.int64, device=device)
        else:
            rows = _checks.tensor("labels", labels)
            if rows.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"labels must be int32 or int64, got {rows.dtype}")
            if rows.dim() != 1:
                raise ValueError(f"labels must have shape [B], got {list(rows.shape)}")
            if _checks.values_may_be_read(rows) and len(rows):
                low, high = (int(end) for end in rows.aminmax())
                if low < 0 or high >= c.labels:
                    raise ValueError(f"labels must be from 0 to {c.labels - 1}, got {low if low < 0 else high}")
        if drop is not None:
            if not c.unlabelled:
                raise ValueError("drop must be None: the model always has its label")
            if _checks.tensor("drop", drop).dtype != torch.bool:
                raise TypeError(f"drop must be bool, got {drop.dtype}")
            _checks.shape("drop", drop, tuple(rows.shape))
            rows = torch.where(drop, c.rows["unlabelled"], rows)
        return self.label_embedding(rows)

    def _row(self, name: str) -> torch.Tensor:
        return self.label_embedding.weight[self.config.rows[name]]

    def embed(self, tokens_BLd: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [..., d], of which those in `mask` [...] bool are hidden -> [..., D], without positions."""
        x = self.token_embedding(tokens_BLd.to(self.token_embedding.weight.dtype))
        if mask_BL is None:
            return x
        hidden = mask_BL[..., None]
        if self.config.mask == "replace":
            return torch.where(hidden, self._row("mask"), x)
        flag = torch.where(hidden, self._row("mask"), self._row("shown"))
        x = torch.where(hidden, self._row("hidden"), x)
        return torch.cat([flag[..., ::2], x[..., ::2]], -1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> [B, M, D], which `hidden` and `see` take.

        Raises:
            ValueError: the model has no encoder, or the pixels another shape.
        """
        if self.encoder is None:
            raise ValueError("pixels must be None: the model has no encoder")
        encoded: torch.Tensor = self.encoder(pixels)
        return encoded

    def see(self, encoded_BMD: torch.Tensor | None, places: int) -> list[Seen | None]:
        """What each layer sees of encoded pixels, for `places` places of each example."""
        if (encoded_BMD is None) != (self.encoder is None):
            raise ValueError(f"encoded must {'not ' if self.encoder is None else ''}be given for this model")
        if encoded_BMD is None:
            return [None] * len(self.layers)
        batch, patches, _ = encoded_BMD.shape
        example = torch.arange(batch * places, dtype=torch.int32, device=encoded_BMD.device) // places
        rows = Rows(example * patches, (example + 1) * patches)
        found: list[Seen | None] = []
        for layer in self.layers:
            assert isinstance(layer, Block)
            k, v = layer.cross_attn.keys(encoded_BMD.flatten(0, 1))
            found.append(Seen(k, v, rows))
        return found

    def hidden(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        encoded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head sees of whole sequences; differentiable.

        Args:
            tokens: [B, L, d]; what they are where they are hidden does not matter.
            labels: [B] int32 or int64, or None where there are no classes.
            mask: [B, L] bool, the hidden tokens; for masked models, and only for these.
            drop: [B] bool, the examples whose label is hidden.
            encoded: [B, M, D] of `encode`, for models with an encoder.

        Returns:
            [B, L, D], after the final norm.

        Raises:
            TypeError, ValueError: tensors of other shapes or dtypes, or such as the model does not take.
        """
        c = self.config
        _checks.floating("tokens", tokens)
        batch = tokens.shape[0] if tokens.dim() else 0
        _checks.shape("tokens", tokens, (batch, c.length, c.channels))
        if (mask is not None) != c.masked:
            raise ValueError(f"mask must {'be given' if c.masked else 'be None'} for style {c.style}")
        first = self.begin(batch if c.labels == 0 and labels is None else labels, drop)
        _checks.shape("labels", first, (batch, c.width))
        if mask is None:
            x_BLD = self.embed(tokens[:, :-1])
        else:
            if _checks.tensor("mask", mask).dtype != torch.bool:
                raise TypeError(f"mask must be bool, got {mask.dtype}")
            _checks.shape("mask", mask, (batch, c.length))
            x_BLD = self.embed(tokens, mask)
        x_BND = torch.cat([first[:, None], x_BLD], 1) + self.position_embedding
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=tokens.device) * c.places
        seen_by = masks.documents(cu_seqlens) if c.masked else masks.documents(cu_seqlens) & masks.causal()
        rows = Rows(*seen_by.bounds(batch * c.places))
        x_TD = x_BND.flatten(0, 1)
        for layer, seen in zip(self.layers, self.see(encoded, c.places), strict=True):
            x_TD = layer(x_TD, rows, seen)
        x_BND = self.final_layer_norm(x_TD).unflatten(0, (batch, c.places))
        return x_BND[:, 1:] if c.masked else x_BND

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        """As `hidden` -> parameters [B, L, P] of the density of every token."""
        return self.head(self.hidden(tokens, labels, **more))

    def nll(self, tokens: torch.Tensor, labels: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        """As `hidden` -> -log p of every token in nats, [B, L] float32; of masked models of interest where hidden."""
        return self.head.nll(self.hidden(tokens, labels, **more), tokens)

    def loss(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """The mean of `nll`; of masked models over the hidden tokens of the batch. As in the paper's code, densities
        per channel are averaged over channels, too.

        Args:
            tokens: [B, L, d].
            labels: [B].
            mask: [B, L] bool.
            count: [], by which the sum over hidden tokens is divided instead of their number: over several ranks, what
                a rank has on average.
            more: as `hidden`.

        Returns:
            [] float32.

        Raises:
            TypeError, ValueError: as `hidden`; there is no example.
        """
        if not len(tokens):
            raise ValueError("tokens must hold an example at least: the mean over none is not defined")
        nll_BL = self.nll(tokens, labels, mask=mask, **more)
        if self.config.layout == "per_channel":
            nll_BL = nll_BL / self.config.channels
        if mask is None:
            return nll_BL.mean()
        return torch.where(mask, nll_BL, 0).sum() / (mask.sum() if count is None else count)

    def new_caches(self, batch: int) -> Caches:
        """Empty caches for `extend`."""
        c, like = self.config, self.position_embedding
        if c.masked:
            raise ValueError("style must be causal: a masked model sees all of a sequence at once")
        channels = padded(c.width // c.heads)
        return Caches(
            LinearCache(batch, c.length, c.heads, channels, dtype=like.dtype, device=like.device) for _ in self.layers
        )

    @torch.no_grad()
    def extend(self, x_BD: torch.Tensor, caches: Caches, seen: Sequence[Seen | None] | None = None) -> torch.Tensor:
        """Append one place to every row: `begin` first, then `embed` of each token. No gradient.

        Args:
            x_BD: [B, D].
            caches: of `new_caches`.
            seen: of `see(encoded, 1)`.

        Returns:
            [B, D] after the final norm: `head` turns it into the density of the next token.

        Raises:
            ValueError: the rows are full, or their number is another.
        """
        _checks.shape("x_BD", x_BD, (caches.batch, self.config.width))
        chunk = caches.step()
        x_TD = x_BD + self.position_embedding[chunk.positions]
        seen = [None] * len(self.layers) if seen is None else seen
        for layer, cache, pixels in zip(self.layers, caches.layers, seen, strict=True):
            x_TD = layer(x_TD, Cached(cache, chunk), pixels)
        caches.advance(chunk)
        return self.final_layer_norm(x_TD)
