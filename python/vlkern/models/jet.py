"""Jet: a normalizing flow of affine couplings, whose amounts a small vision transformer predicts.

    pixels [B, C, S, S] in [-1, 1] + U(0, 1 / 127.5)  ->  tokens x_0 [B, N, K]  ->  x_1  ->  ...  ->  x_L = z

    one coupling, kind "channels"        looks at half of the channels of every token, changes the other half
                  kind "spatial"         looks at half of the tokens, changes the others
        shift, raw = network(half)                          [B, N, K / 2] each
        other = (other + shift) * max_scale * sigmoid(raw)
        logdet += sum log(max_scale * sigmoid(raw))

    bits per dimension = (sum(z^2 / 2 + log(2 pi) / 2 + log 127.5) - logdet) / (N K log 2)

The half that a spatial coupling looks at, [B, N / 2, K], is read as [B, N, K / 2], each token as two, so every network
has the same shape. The network: linear + positions, optionally attention to a context, pre-LN transformer, LN, linear
whose parameters begin at zero but for the bias of raw, so that every coupling begins as the identity.

    B pictures   S side of a picture, P of a patch   N = (S / P)^2 tokens   K = P P C numbers of a token   D width
    L couplings   E width of a context of M tokens

Source: Kolesnikov et al., Jet: A Modern Transformer-Based Normalizing Flow, 2024.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks, flows, ops
from vlkern.layers.attention import merge_heads, split_heads
from vlkern.layers.flow import SPLITS, channel_order, cosines, to_pixels, to_tokens, token_order
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.models import siglip

KINDS = ("channels", "spatial")
BASES = ("pixels", "cosines")


@dataclass(frozen=True)
class JetConfig:
    """Size of a flow.

    image_size   S
    patch        P
    channels     C of the pictures
    depth        L, couplings
    block_depth  blocks of the transformer in each
    width        D
    heads        of its attention; its MLPs have 4 D units
    kinds        of the couplings: the first, the second, ..., and from the start again
    splits       likewise how the spatial ones among them split the tokens, see vlkern.layers.flow
    basis        of the numbers of a token: "pixels", or "cosines", their cosine transform (vlkern.layers.flow), which
                 changes no probability, but is easier to learn for a small flow
    max_scale    what a coupling multiplies with is below this
    context      E; None: there is no context
    invertible   train with the memory of one coupling: inputs are computed again from outputs, see vlkern.flows
    """

    image_size: int
    patch: int
    channels: int = 3
    depth: int = dataclasses.field(default=32, kw_only=True)
    block_depth: int = dataclasses.field(default=2, kw_only=True)
    width: int = dataclasses.field(default=512, kw_only=True)
    heads: int = dataclasses.field(default=8, kw_only=True)
    kinds: tuple[str, ...] = dataclasses.field(default=("channels",) * 4 + ("spatial",), kw_only=True)
    splits: tuple[str, ...] = dataclasses.field(default=SPLITS, kw_only=True)
    basis: str = dataclasses.field(default="pixels", kw_only=True)
    max_scale: float = dataclasses.field(default=2.0, kw_only=True)
    context: int | None = dataclasses.field(default=None, kw_only=True)
    invertible: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("image_size", "patch", "channels", "depth", "block_depth", "width", "heads", "context"):
            value = getattr(self, name)
            if not ((type(value) is int and value > 0) or (name == "context" and value is None)):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, allowed in (("kinds", KINDS), ("splits", SPLITS)):
            given = getattr(self, name)
            if not (isinstance(given, tuple) and given and all(kind in allowed for kind in given)):
                raise ValueError(f"{name} must be a tuple of {', '.join(allowed)}, got {given!r}")
        if self.basis not in BASES:
            raise ValueError(f"basis must be one of {', '.join(BASES)}, got {self.basis!r}")
        if not (isinstance(self.max_scale, int | float) and 0 < self.max_scale < math.inf):
            raise ValueError(f"max_scale must be a positive finite number, got {self.max_scale!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch, got {self.image_size} and {self.patch}")
        if self.token % 2:
            raise ValueError(f"patch and channels must give tokens of an even size, got {self.token}")
        if "spatial" in self.kinds and self.tokens % 2:
            raise ValueError(
                f"image_size and patch must give an even number of tokens to spatial couplings, got {self.tokens}"
            )

    @property
    def grid(self) -> int:
        """Rows, and columns, of tokens."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid**2

    @property
    def token(self) -> int:
        """K."""
        return self.patch**2 * self.channels

    def kind(self, i: int) -> str:
        """Of coupling i: "channels", or how it splits the tokens."""
        kind = self.kinds[i % len(self.kinds)]
        return kind if kind == "channels" else self.splits[self._spatial(i) % len(self.splits)]

    def _spatial(self, i: int) -> int:
        """How many spatial couplings come before coupling i."""
        return sum(self.kinds[j % len(self.kinds)] == "spatial" for j in range(i))


#: The flows of the paper for ImageNet at 64 px, and one for two cores.
PRESETS = {
    "jet-tiny": JetConfig(32, 8, depth=16, block_depth=1, width=128, heads=4, basis="cosines", max_scale=4.0),
    "jet-tiny-64": JetConfig(64, 8, depth=16, block_depth=1, width=128, heads=4, basis="cosines", max_scale=4.0),
    "jet-imagenet64-32x2": JetConfig(64, 4, depth=32, block_depth=2),
    "jet-imagenet64-64x5": JetConfig(64, 4, depth=64, block_depth=5),
}


class ContextAttention(nn.Module):
    """x + Attention(x, context), without a norm; the output projection begins at zero."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = dense_(Linear(width, width))
        self.k_proj = dense_(Linear(context, width))
        self.v_proj = dense_(Linear(context, width))
        self.out_proj = _zero(Linear(width, width))

    def forward(self, x_BND: torch.Tensor, context_BME: torch.Tensor) -> torch.Tensor:
        """[B, N, D], [B, M, E] -> [B, N, D]."""
        projected = (self.q_proj(x_BND), self.k_proj(context_BME), self.v_proj(context_BME))
        q, k, v = (split_heads(y, self.heads) for y in projected)
        return x_BND + self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class Network(nn.Module):
    """What a coupling adds and multiplies with, from the half that it looks at."""

    def __init__(self, c: JetConfig) -> None:
        super().__init__()
        self.init_proj = dense_(Linear(c.token // 2, c.width), lecun=True)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(c.tokens, c.width), std=1 / math.sqrt(c.width)))
        self.attention = None if c.context is None else ContextAttention(c.width, c.heads, c.context)
        self.encoder = siglip.Encoder(siglip.TowerConfig(c.width, c.block_depth, c.heads, 4 * c.width))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.final_proj = _zero(Linear(c.width, c.token))
        if c.max_scale > 1:  # the coupling begins as the identity: max_scale * sigmoid(raw) = 1
            nn.init.constant_(self.final_proj.bias[c.token // 2 :], -math.log(c.max_scale - 1))

    def forward(self, half_BNk: torch.Tensor, context_BME: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, K / 2] -> shift and raw scale, [B, N, K / 2] each; float32 even under autocast."""
        x_BND = self.init_proj(half_BNk) + self.positions
        if self.attention is not None and context_BME is not None:
            x_BND = self.attention(x_BND, context_BME)
        x_BND = self.norm(self.encoder(x_BND))
        # A flow has to be undone: an error of the scale is multiplied by every coupling behind this one.
        with torch.autocast(x_BND.device.type, enabled=False):
            shift, raw = self.final_proj(x_BND.to(self.final_proj.weight.dtype)).chunk(2, -1)
        return shift, raw


def _zero(linear: Linear) -> Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class Coupling(nn.Module):
    """One step of a flow, for `vlkern.flows`: see the head of this file.

    `order` [K] of channels or [N] of tokens, int32: the first half is looked at, the second half changed.
    """

    order: torch.Tensor

    def __init__(self, c: JetConfig, kind: str) -> None:
        super().__init__()
        self.kind, self._max_scale = kind, c.max_scale
        order = channel_order(c.token) if kind == "channels" else token_order(c.grid, c.grid, kind)
        self.register_buffer("order", torch.empty(len(order), dtype=torch.int32).copy_(order))
        self.network = Network(c)

    def look(self, x_BNK: torch.Tensor) -> torch.Tensor:
        """The half that stays as it is, as the network takes it: [B, N, K] -> [B, N, K / 2]."""
        first, _ = self.order.chunk(2)
        if self.kind == "channels":
            return x_BNK.index_select(2, first)
        return x_BNK.index_select(1, first).reshape(len(x_BNK), x_BNK.shape[1], -1)

    def predict(
        self, half_BNk: torch.Tensor, context_BME: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and raw scale, in the shape of what is changed: [B, N, K / 2] or [B, N / 2, K]."""
        shift, raw = self.network(half_BNk, context_BME)
        if self.kind == "channels":
            return shift, raw
        shape = (len(half_BNk), half_BNk.shape[1] // 2, 2 * half_BNk.shape[2])
        return shift.reshape(shape), raw.reshape(shape)

    def apply_to(
        self, x_BNK: torch.Tensor, shift: torch.Tensor, raw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, K] -> [B, N, K] and the log-determinant [B], float32."""
        return ops.affine_coupling(x_BNK, shift, raw, **self._part())

    def undo(self, y_BNK: torch.Tensor, shift: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `apply_to`, and the log-determinant of that."""
        return ops.affine_coupling_inverse(y_BNK, shift, raw, **self._part())

    def _part(self) -> dict[str, Any]:
        _, second = self.order.chunk(2)
        tokens, channels = (None, second) if self.kind == "channels" else (second, None)
        return {"tokens": tokens, "channels": channels, "max_scale": self._max_scale}

    def forward(
        self, x_BNK: torch.Tensor, context_BME: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, K] -> [B, N, K] and the log-determinant [B], float32."""
        return self.apply_to(x_BNK, *self.predict(self.look(x_BNK), context_BME))

    @torch.no_grad()
    def inverse(
        self, y_BNK: torch.Tensor, context_BME: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undoes `forward`; the log-determinant is that of the inverse. Without gradients."""
        return self.undo(y_BNK, *self.predict(self.look(y_BNK), context_BME))


def _product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x @ matrix in the dtype of x, under autocast too: these are the data."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ matrix.to(x.dtype)


class Jet(nn.Module):
    """The flow: x -> z with log |det dz/dx|, and back.

    Args:
        config: sizes; from PRESETS or your own.

    Example:
        >>> flow = vlkern.models.jet.Jet(vlkern.models.jet.JetConfig(8, 2, depth=4, width=16, heads=2))
        >>> x = flow.tokens(torch.rand(5, 3, 8, 8) * 2 - 1)
        >>> z, logdet = flow(x)
        >>> z.shape, logdet.shape, flow.bits(x).shape
        (torch.Size([5, 16, 12]), torch.Size([5]), torch.Size([5]))
        >>> (flow.inverse(z) - x).abs().max() < 1e-5
        tensor(True)
    """

    #: [K, K], whose rows are the waves; None for pixels.
    basis: torch.Tensor | None

    def __init__(self, config: JetConfig) -> None:
        super().__init__()
        self.config = config
        basis = cosines(config.patch, config.channels) if config.basis == "cosines" else None
        self.register_buffer("basis", None if basis is None else torch.empty(basis.shape).copy_(basis))
        self.couplings = nn.ModuleList(Coupling(config, config.kind(i)) for i in range(config.depth))

    def blocks(self) -> list[nn.Module]:
        """The parts whose parameters FSDP gathers one after the other: couplings."""
        return list(self.couplings)

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures [B, C, S, S] -> [B, N, K].

        Raises:
            TypeError, ValueError: no pictures of this flow's size.
        """
        c = self.config
        t = _checks.tensor("pixels", pixels)
        if t.dim() != 4 or tuple(t.shape[1:]) != (c.channels, c.image_size, c.image_size):
            raise ValueError(f"pixels must be [B, {c.channels}, {c.image_size}, {c.image_size}], got {list(t.shape)}")
        x_BNK = to_tokens(t, c.patch)
        return x_BNK if self.basis is None else _product(x_BNK, self.basis.t())

    def pixels(self, x_BNK: torch.Tensor) -> torch.Tensor:
        """[B, N, K] -> pictures [B, C, S, S]: undoes `tokens`."""
        c = self.config
        return to_pixels(x_BNK if self.basis is None else _product(x_BNK, self.basis), c.grid, c.grid, c.patch)

    def _check(self, name: str, value: torch.Tensor, context: torch.Tensor | None) -> None:
        c = self.config
        t = _checks.floating(name, value)
        if t.dim() != 3 or tuple(t.shape[1:]) != (c.tokens, c.token) or len(t) == 0:
            raise ValueError(f"{name} must be [B, {c.tokens}, {c.token}] with B > 0, got {list(t.shape)}")
        if (context is None) != (c.context is None):
            raise ValueError(f"context must be {'None' if c.context is None else f'[B, M, {c.context}]'} for this flow")
        if context is not None and (context.dim() != 3 or (len(context), context.shape[2]) != (len(t), c.context)):
            raise ValueError(f"context must be [{len(t)}, M, {c.context}], got {list(context.shape)}")

    def forward(
        self, x_BNK: torch.Tensor, context_BME: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Data to noise.

        Args:
            x_BNK: [B, N, K] of the parameters' dtype.
            context_BME: [B, M, E], with a flow that has a context.

        Returns:
            z [B, N, K], and log |det dz/dx| [B] float32.

        Raises:
            TypeError, ValueError: no such tensors.
        """
        self._check("x", x_BNK, context_BME)
        run = flows.invertible if self.config.invertible and torch.is_grad_enabled() else flows.forward
        return run(self.blocks(), x_BNK, context_BME)

    def inverse(self, z_BNK: torch.Tensor, context_BME: torch.Tensor | None = None) -> torch.Tensor:
        """Noise to data: undoes `forward`. Without gradients; run it in float32 or wider.

        Args:
            z_BNK: [B, N, K] of the parameters' dtype.
            context_BME: as in `forward`.

        Returns:
            x [B, N, K].

        Raises:
            TypeError, ValueError: no such tensors.
        """
        return self.inverse_with_logdet(z_BNK, context_BME)[0]

    def inverse_with_logdet(
        self, z_BNK: torch.Tensor, context_BME: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `inverse`, with log |det dx/dz| [B] float32."""
        self._check("z", z_BNK, context_BME)
        return flows.inverse(self.blocks(), z_BNK, context_BME)

    def bits(self, x_BNK: torch.Tensor, context_BME: torch.Tensor | None = None) -> torch.Tensor:
        """Bits per dimension [B] float32 of pictures of 256 levels in [-1, 1] with noise of one level on them."""
        z, logdet = self(x_BNK, context_BME)
        return flows.bits_per_dim(z, logdet)
