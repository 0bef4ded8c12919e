"""M2T and MT: an image codec whose probabilities come from a transformer with masked tokens.

    pixels -> analysis -> times gain(level) -> y [B, C, h, w] -> round -> symbols -> times ungain(level) -> synthesis
    tile     w x w tokens of C symbols; tiles know nothing of each other
    input    embed(y / 5) + slot + quality(level);  a token that is not known is the learned vector `mask` instead of y
    block    x = x + Attention(LN(x));  x = x + MLP(LN(x))             biases everywhere, GELU in its tanh form
    head     Dense(LN(x)) -> for each channel the logits, means and log scales of K Gaussians (see ops.mixture_bits)

M2T  The order of the tokens is fixed, in S groups. Slots of group i hold the tokens of group i - 1 and then masks;
     they predict the tokens of group i, and see the slots of groups 1 ... i: one pass in training, and one over n_i
     slots a step with cached keys and values.
MT   Slots are places. All tokens see all; a step predicts all that is masked, and S passes over N tokens are needed.

One model serves all rates: gains, their inverses and the quality vector are interpolated between a few anchors, each
with a weight lambda of the distortion: loss = bits per pixel + lambda 255^2 MSE of sub-pixels in [0, 1].

    B pictures   T tiles   N = w^2 tokens of a tile   n of a step   S steps   C channels   K Gaussians   D width

Sources: Mentzer, Agustsson, Tschannen, M2T: Masking Transformers Twice for Faster Decoding, 2023; He et al., ELIC,
2022; Cui et al., Asymmetric Gained Deep Image Compression, 2021 (one model for all rates).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import ops
from vlkern.layers.attention import attend
from vlkern.layers.init import dense_, lecun_normal_
from vlkern.layers.linear import Linear
from vlkern.layers.packed import check_heads
from vlkern.models.elic import DOWNSAMPLING, Analysis, ElicConfig, Synthesis
from vlkern.models.schedules import groups, low_discrepancy

#: What symbols are divided by before they are embedded.
DELTA = 5.0
#: Levels of quality from one anchor to the next.
BETWEEN = 4


@dataclass(frozen=True)
class M2TConfig:
    """Size of the codec.

    channels       C of the latents
    width, depth, heads, mlp   of the transformer
    tile           tokens along the side of a tile
    steps, alpha   S, and how slowly the groups grow
    components     K, Gaussians of a symbol
    lambdas        weights of the distortion at the anchors of quality, increasing
    transforms     size of analysis and synthesis
    bidirectional  MT instead of M2T
    """

    channels: int = 192
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    tile: int = 24
    steps: int = 12
    alpha: float = 2.2
    components: int = 3
    lambdas: tuple[float, ...] = (0.00125, 0.0025, 0.005, 0.01, 0.02)
    transforms: ElicConfig = field(default_factory=ElicConfig)
    bidirectional: bool = False

    def __post_init__(self) -> None:
        for name in ("channels", "width", "depth", "heads", "mlp", "tile", "steps", "components"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        check_heads(self.width, self.heads)
        rates = self.lambdas
        if not (isinstance(rates, tuple) and len(rates) > 1 and rates[0] > 0 and list(rates) == sorted(set(rates))):
            raise ValueError(f"lambdas must be at least two increasing positive numbers, got {rates!r}")
        groups(self.tokens, self.steps, self.alpha)

    @property
    def tokens(self) -> int:
        """N: of a tile."""
        return self.tile**2

    @property
    def levels(self) -> int:
        """Of quality, counted from 0."""
        return BETWEEN * (len(self.lambdas) - 1) + 1

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Tokens of each step."""
        return groups(self.tokens, self.steps, self.alpha)

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """For each of the N slots of M2T, how many slots it sees: those of its group and of the groups before."""
        ends = accumulate(self.groups)
        return tuple(end for end, n in zip(ends, self.groups, strict=True) for _ in range(n))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Places row * w + column of the N tokens, as they are coded."""
        return tuple(row * self.tile + column for row, column in low_discrepancy(self.tile))

    def distortion_weight(self, level: float) -> float:
        """Lambda of a level: geometric between the anchors."""
        i = min(int(level) // BETWEEN, len(self.lambdas) - 2)
        low, high = self.lambdas[i : i + 2]
        return float(low * (high / low) ** (level / BETWEEN - i))


#: The paper's (M2T, and MT with the same size), one that a laptop runs, and one for tests.
PRESETS = {
    "m2t-base": M2TConfig(),
    "mt-base": M2TConfig(bidirectional=True),
    "m2t-small": M2TConfig(
        channels=128, width=192, depth=6, heads=6, mlp=768, tile=16, steps=8,
        lambdas=(0.0012, 0.0025, 0.005, 0.01, 0.02, 0.04),
        transforms=ElicConfig((24, 64, 128), (1, 1, 2), attention=False),
    ),
    "m2t-tiny": M2TConfig(
        channels=16, width=32, depth=2, heads=2, mlp=64, tile=4, steps=3, lambdas=(0.0025, 0.01),
        transforms=ElicConfig((8, 12, 16), (1, 1, 1), attention=False),
    ),
}  # fmt: skip


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)), on tokens [T, n, D]."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = dense_(Linear(width, 3 * width))
        self.out_proj = dense_(Linear(width, width))
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = dense_(Linear(width, mlp))
        self.fc2 = dense_(Linear(mlp, width))

    def project(self, x_TnD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [T, n, heads, D / heads]."""
        q, k, v = self.qkv(self.norm1(x_TnD)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def finish(self, x_TnD: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What attention saw [T, n, heads, D / heads] -> the block's result [T, n, D]."""
        x_TnD = x_TnD + self.out_proj(attended.flatten(-2))
        return x_TnD + self.fc2(F.gelu(self.fc1(self.norm2(x_TnD)), approximate="tanh"))


class EntropyTransformer(nn.Module):
    """How probable symbols are: see the head of this file.

    Args:
        config: of the codec.
    """

    def __init__(self, config: M2TConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.width
        self.embed = dense_(Linear(c.channels, width), lecun=True)
        self.mask = nn.Parameter(nn.init.normal_(torch.empty(c.channels), std=0.02))
        self.slot = nn.Parameter(nn.init.normal_(torch.empty(c.tokens, width), std=0.02))
        self.quality = nn.Parameter(torch.zeros(len(c.lambdas), width))
        self.layers = nn.ModuleList(Block(width, c.heads, c.mlp) for _ in range(c.depth))
        self.norm = nn.LayerNorm(width)
        self.head = dense_(Linear(width, 3 * c.components * c.channels))
        lecun_normal_(self.head.weight, 100 * width)
        # The Gaussians of a symbol start apart: at equal places they would stay one.
        for i, means in enumerate(self.head.bias.detach().view(3, c.components, c.channels)[1]):
            nn.init.constant_(means, 2 * i / max(c.components - 1, 1) - 1)

    def blocks(self) -> Sequence[Block]:
        """The transformer's."""
        return [cast(Block, layer) for layer in self.layers]

    def vectors(self, tokens_TnC: torch.Tensor, slots: slice, quality: torch.Tensor) -> torch.Tensor:
        """What the first block takes [T, n, D], for the tokens of n slots; `quality` [T, D] or [D]."""
        return self.embed(tokens_TnC / DELTA) + self.slot[slots] + quality.unsqueeze(-2)

    def predict(self, x_TnD: torch.Tensor) -> torch.Tensor:
        """What the last block gave [T, n, D] -> parameters [T, n, 3, K, C] for ops.mixture_bits."""
        c = self.config
        return self.head(self.norm(x_TnD)).unflatten(-1, (3, c.components, c.channels))

    def inputs(self, tokens_TNC: torch.Tensor, known_TN: torch.Tensor | None) -> torch.Tensor:
        """The tokens in the M2T slots: those of the group before, and masks -> [T, N, C]; tokens in coding order."""
        parts, sizes, end = [], self.config.groups, 0
        for n, before in zip(sizes, (0, *sizes), strict=False):
            previous = slice(end - before, end)
            taken = tokens_TNC[:, previous]
            if known_TN is not None:
                taken = torch.where(known_TN[:, previous, None], taken, self.mask)
            parts += [taken, self.mask.expand(len(tokens_TNC), n - before, -1)]
            end += n
        return torch.cat(parts, 1)

    def forward(
        self, tokens_TNC: torch.Tensor, quality: torch.Tensor, known_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Parameters of all tokens by one pass, given all of them: M2T's training.

        Args:
            tokens_TNC: symbols in coding order, floating-point.
            quality: [T, D] of `M2T.interpolate`, or [D].
            known_TN: bool, whether a token is there; those outside the picture are masks. None: all are.

        Returns:
            [T, N, 3, K, C].
        """
        x = self.vectors(self.inputs(tokens_TNC, known_TN), slice(None), quality)
        tiles, count = x.shape[:2]
        first = torch.arange(tiles, dtype=torch.int32, device=x.device).unsqueeze(1) * count
        seen = torch.tensor(self.config.seen, dtype=torch.int32, device=x.device)
        start, stop = first.expand(tiles, count).flatten(), (first + seen).flatten()
        for block in self.blocks():
            q, k, v = (part.flatten(0, 1) for part in block.project(x))
            x = block.finish(x, ops.interval_attention(q, k, v, start, stop).unflatten(0, (tiles, count)))
        return self.predict(x)

    def forward_masked(self, tokens_TNC: torch.Tensor, quality: torch.Tensor, known_TN: torch.Tensor) -> torch.Tensor:
        """Parameters of all tokens, given those that are known: MT.

        Args:
            tokens_TNC: symbols, slot by slot, floating-point; what is not known may be anything finite.
            quality: [T, D] or [D].
            known_TN: bool.

        Returns:
            [T, N, 3, K, C]; those of the known tokens mean nothing.
        """
        x = self.vectors(torch.where(known_TN.unsqueeze(-1), tokens_TNC, self.mask), slice(None), quality)
        for block in self.blocks():
            x = block.finish(x, attend(*block.project(x)))
        return self.predict(x)


class StepCache:
    """M2T's steps, one after the other, with the keys and values of the slots that were.

    Args:
        model: the transformer.
        tiles: T.
        quality: [D] of the level.
    """

    def __init__(self, model: EntropyTransformer, tiles: int, quality: torch.Tensor) -> None:
        c = model.config
        shape = (c.depth, 2, tiles, c.tokens, c.heads, c.width // c.heads)
        self.model, self.tiles, self.quality = model, tiles, quality
        self.cached = torch.empty(shape, device=quality.device, dtype=quality.dtype)
        self.step = self.end = 0

    @torch.no_grad()
    def advance(self, tokens_TnC: torch.Tensor | None, known_Tn: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens of the group before, None at first -> parameters [T, n, 3, K, C] of the next group.

        Args:
            tokens_TnC: floating-point symbols.
            known_Tn: bool, False for tokens that are not there. None: all are.
        """
        model, n = self.model, self.model.config.groups[self.step]
        masks = n
        parts = []
        if tokens_TnC is not None:
            masks -= tokens_TnC.shape[1]
            tokens_TnC = tokens_TnC.to(model.mask.dtype)
            parts.append(
                tokens_TnC if known_Tn is None else torch.where(known_Tn.unsqueeze(-1), tokens_TnC, model.mask)
            )
        inputs = torch.cat([*parts, model.mask.expand(self.tiles, masks, -1)], 1)
        slots = slice(self.end, self.end + n)
        x = model.vectors(inputs, slots, self.quality)
        for block, (keys, values) in zip(model.blocks(), self.cached, strict=True):
            q, k, v = block.project(x)
            keys[:, slots], values[:, slots] = k, v
            x = block.finish(x, attend(q, keys[:, : slots.stop], values[:, : slots.stop]))
        self.step, self.end = self.step + 1, slots.stop
        return model.predict(x)


class M2T(nn.Module):
    """The codec: transforms, gains and the transformer.

    Example:
        >>> model = vlkern.models.create("m2t-tiny")
        >>> y = model.analysis(torch.zeros(1, 3, 64, 64), level=2)
        >>> y.shape, model.synthesis(y.round(), level=2).shape
        (torch.Size([1, 16, 4, 4]), torch.Size([1, 3, 64, 64]))
    """

    def __init__(self, config: M2TConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Analysis(config.transforms, config.channels)
        self.decoder = Synthesis(config.transforms, config.channels)
        # With an orthonormal transform of 256 grey values the best step of quantization is 5 / sqrt(lambda).
        # Python's numbers: on the meta device, arithmetic of tensors would import PyTorch's compiler, for seconds.
        gain = [math.log(255 / 2 / 5 * math.sqrt(weight)) for weight in config.lambdas]
        self.log_gain, self.log_ungain = (
            nn.Parameter(torch.tensor([[value] * config.channels for value in row]))
            for row in (gain, [-g for g in gain])
        )
        self.entropy = EntropyTransformer(config)

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's."""
        return self.entropy.blocks()

    def interpolate(self, anchors: torch.Tensor, level: torch.Tensor | int) -> torch.Tensor:
        """Rows [anchors, ...] of parameters at a level, or at those of B pictures -> [...] or [B, ...]."""
        at = torch.as_tensor(level, device=anchors.device, dtype=anchors.dtype) / BETWEEN
        low = at.long().clamp(max=len(anchors) - 2)
        part = (at - low).unsqueeze(-1)
        return anchors[low] * (1 - part) + anchors[low + 1] * part

    def quality(self, level: torch.Tensor | int) -> torch.Tensor:
        """The transformer's vector of a level: [D], or [B, D] for levels [B]."""
        return self.interpolate(self.entropy.quality, level)

    def analysis(self, pixels: torch.Tensor, level: torch.Tensor | int) -> torch.Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> y [B, C, H / 16, W / 16]; rounded, they are the symbols.

        Args:
            pixels: H and W are multiples of 16.
            level: of quality, from 0 (the smallest file) to config.levels - 1; or one for each picture [B].

        Raises:
            ValueError: the shape is another, or the level out of range.
        """
        if (
            pixels.dim() != 4
            or pixels.shape[1] != 3
            or pixels.shape[2] % DOWNSAMPLING
            or pixels.shape[3] % DOWNSAMPLING
        ):
            raise ValueError(f"pixels must be [B, 3, H, W] with sides that 16 divides, got {list(pixels.shape)}")
        self._check_level(level)
        y = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return y * self.interpolate(self.log_gain, level).exp()[..., None, None]

    def synthesis(self, symbols: torch.Tensor, level: torch.Tensor | int) -> torch.Tensor:
        """Symbols [B, C, h, w], floating-point -> pixels [B, 3, 16 h, 16 w], about [-1, 1], which nothing bounds."""
        self._check_level(level)
        y = symbols * self.interpolate(self.log_ungain, level).exp()[..., None, None]
        return self.decoder(y.contiguous(memory_format=torch.channels_last))

    def _check_level(self, level: torch.Tensor | int) -> None:
        if isinstance(level, int) and not 0 <= level < self.config.levels:
            raise ValueError(f"level must be from 0 to {self.config.levels - 1}, got {level}")

    def tiles(self, y_BChw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A grid of latents -> tokens [T, N, C] in coding order, T = B tiles(h) tiles(w), and whether they are there.

        Tiles that the picture's edge cuts are filled up with zeros, which are not `known` [T, N].
        """
        w = self.config.tile
        batch, channels, rows, columns = y_BChw.shape
        inside = torch.ones(batch, 1, rows, columns, device=y_BChw.device, dtype=y_BChw.dtype)
        both = F.pad(torch.cat([y_BChw, inside], 1), (0, -columns % w, 0, -rows % w))
        both = both.unflatten(3, (-1, w)).unflatten(2, (-1, w)).permute(0, 2, 4, 3, 5, 1)
        order = torch.tensor(self.config.order, device=both.device)
        tokens = both.reshape(-1, w * w, channels + 1)[:, order]
        return tokens[..., :channels], tokens[..., channels] > 0

    def forward(
        self, pixels: torch.Tensor, level: torch.Tensor, noise: torch.Tensor, known: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training: the reconstruction, and the bits of noisy latents.

        Args:
            pixels: [B, 3, H, W] in [-1, 1], H and W multiples of 16.
            level: [B].
            noise: [B, C, h, w] of U(-1/2, 1/2), which stands for rounding where bits are counted.
            known: MT only: [T, N] bool, the tokens that are not masked, T tiles of all pictures.

        Returns:
            pixels [B, 3, H, W], rounded latents passing the gradient on as if they were not; and bits [T, N], those
            of MT's known tokens 0. Tokens outside of the pictures have none.
        """
        y = self.analysis(pixels, level)
        rounded = y + (y.round() - y).detach()
        tokens, inside = self.tiles(rounded)
        noisy, _ = self.tiles(y + noise)
        quality = self.quality(level).repeat_interleave(len(tokens) // len(pixels), 0)
        if self.config.bidirectional:
            if known is None:
                raise ValueError("known must be given for MT: which tokens are not masked")
            params = self.entropy.forward_masked(tokens, quality, known & inside)
            counted = inside & ~known
        else:
            params, counted = self.entropy(tokens, quality, inside), inside
        bits = ops.mixture_bits(noisy, params).sum(-1)
        return self.synthesis(rounded, level), bits * counted
