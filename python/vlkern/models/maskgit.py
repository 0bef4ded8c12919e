"""MaskGIT: a bidirectional transformer that fills in the masked tokens of a picture, all at the same time.

    ids [B, N] and the class -> [class, t_1, ..., t_N] -> token vectors + positions -> LN -> blocks -> [B, N, D]
    block:  x = LN(x + Attention(x));  x = LN(x + MLP(x))          post-LN, biases everywhere, GELU in its tanh form
    head:   h = LN(gelu(linear(x)));  logits = h E^T + b           E [V, D] is the table of token vectors

One table holds everything: codes of pictures, then classes, then the mask, V = codes + classes + 1. A class that is
not known is the mask, so `labels` may be `classes` itself: that is what guidance starts from. The LayerNorms compute
in float32 whatever the dtype, as their eps of 1e-12 asks for. Dropout (0.1 in the original) is left out.

    B pictures   N tokens of a picture   M of them that are asked for   L = N + 1   D width   K heads of C channels
    V vocabulary

Sources: Chang et al., MaskGIT: Masked Generative Image Transformer, 2022; Mentzer et al., Finite Scalar Quantization,
2023 (classes that are dropped, guidance).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlkern import _checks, ops
from vlkern.layers.attention import attend
from vlkern.layers.linear import Linear, linear
from vlkern.layers.packed import check_heads

#: Standard deviation of what parameters start with at a width of 768, cut at two of them. It goes as 1 / sqrt(width):
#: with 0.02 at a width of 192 blocks hardly change what passes them, and learn nothing for long.
STD = 0.02


@dataclass(frozen=True)
class MaskGitConfig:
    """Size of the transformer, and the tokens that it fills in.

    tokens      N, of a picture
    codes       of the autoencoder: ids 0 ... codes - 1
    classes     ids codes ... codes + classes - 1; the mask is the last id
    image_size  side of the pictures in pixels
    """

    width: int
    depth: int
    heads: int
    mlp: int
    tokens: int
    codes: int
    classes: int
    image_size: int

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp", "tokens", "codes", "classes", "image_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        check_heads(self.width, self.heads)

    @property
    def vocabulary(self) -> int:
        """V: codes, classes and the mask."""
        return self.codes + self.classes + 1

    @property
    def mask(self) -> int:
        """The id of a token that is not known."""
        return self.codes + self.classes


#: The models of the paper, that of the FSQ paper (another tokenizer), and one that trains on two cores.
PRESETS = {
    "maskgit-tiny": MaskGitConfig(192, 6, 4, 768, tokens=64, codes=240, classes=16, image_size=32),
    "maskgit-imagenet256": MaskGitConfig(768, 24, 16, 3072, tokens=256, codes=1024, classes=1000, image_size=256),
    "maskgit-imagenet512": MaskGitConfig(768, 24, 16, 3072, tokens=1024, codes=1024, classes=1000, image_size=512),
    "maskgit-fsq-imagenet256": MaskGitConfig(768, 24, 16, 3072, tokens=256, codes=1000, classes=1000, image_size=256),
}


def _start(module: nn.Linear | nn.Embedding, width: int) -> None:
    std = STD * math.sqrt(768 / width)
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-12)  # PyTorch computes it in float32


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(C)) V over all L tokens, for all or some of them as queries."""

    def __init__(self, c: MaskGitConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.qkv_proj = Linear(c.width, 3 * c.width)
        self.out_proj = Linear(c.width, c.width)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.heads, self.out_proj.in_features // self.heads))

    def forward(self, x_BLD: torch.Tensor, queries_BMD: torch.Tensor | None) -> torch.Tensor:
        """[B, L, D] -> [B, L, D], or [B, M, D] for the tokens of `queries_BMD` alone."""
        if queries_BMD is None:
            q, k, v = self._split(self.qkv_proj(x_BLD)).unbind(2)
        else:
            width, weight, bias = x_BLD.shape[2], self.qkv_proj.weight, self.qkv_proj.bias
            (q,) = self._split(linear(queries_BMD, weight[:width], bias[:width])).unbind(2)
            k, v = self._split(linear(x_BLD, weight[width:], bias[width:])).unbind(2)
        return self.out_proj(attend(q, k, v).flatten(-2))


class Block(nn.Module):
    """x = LN(x + Attention(x));  x = LN(x + MLP(x))."""

    def __init__(self, c: MaskGitConfig) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(c), _norm(c.width)
        self.fc1 = Linear(c.width, c.mlp, activation="gelu_tanh")
        self.fc2, self.mlp_norm = Linear(c.mlp, c.width), _norm(c.width)

    def forward(self, x_BLD: torch.Tensor, queries_BMD: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L, D] -> [B, L, D], or [B, M, D] for the tokens of `queries_BMD` alone, which are some of x."""
        x = x_BLD if queries_BMD is None else queries_BMD
        x = self.attention_norm(x + self.attention(x_BLD, queries_BMD))
        return self.mlp_norm(x + self.fc2(self.fc1(x)))


class MaskGit(nn.Module):
    """The transformer; `vlkern.generation.maskgit.sample` draws pictures from it.

    Example:
        >>> model = vlkern.models.create("maskgit-tiny")
        >>> ids = torch.full((2, 64), model.config.mask)
        >>> model(ids, torch.tensor([3, 0])).shape
        torch.Size([2, 64, 240])
    """

    def __init__(self, config: MaskGitConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.tokens + 1, config.width)
        self.embedding_norm = _norm(config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Linear(config.width, config.width, activation="gelu_tanh")
        self.head_norm = _norm(config.width)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                _start(module, config.width)

    def blocks(self) -> Sequence[nn.Module]:
        """The layers, for FSDP."""
        return list(self.layers)

    def features(self, ids: torch.Tensor, labels: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """What the logits are products of.

        Args:
            ids: [B, N] int64, codes or the mask.
            labels: [B] int64, classes, or `config.classes` for none.
            places: [B, M] int64, the tokens that are asked for, from 0 to N - 1; None is all. Only these go through
                the queries and the MLP of the last block.

        Returns:
            h [B, M, D], M = N without `places`; the logits are h E^T + b.

        Raises:
            TypeError: a tensor is not int64.
            ValueError: shapes or devices do not fit, or an id is out of range (looked at where that costs no wait for a
                GPU).
        """
        c = self.config
        _check_ids("ids", ids, (None, c.tokens), c.codes, c.mask)
        _check_ids("labels", labels, (len(ids),), c.classes + 1)
        sequence = torch.cat([(labels + c.codes)[:, None], ids], 1)
        x_BLD = self.embedding_norm(self.token_embedding(sequence) + self.position_embedding.weight)
        for layer in self.layers[:-1]:
            x_BLD = layer(x_BLD)
        if places is None:
            queries = x_BLD[:, 1:]
        else:
            _check_ids("places", places, (len(ids), None), c.tokens)
            queries = x_BLD.gather(1, (places + 1)[..., None].expand(-1, -1, c.width))
        return self.head_norm(self.head(self.layers[-1](x_BLD, queries)))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """As `features` -> logits of the codes [B, M, codes]; the vocabulary's other ids are left out."""
        codes = self.config.codes
        return linear(self.features(ids, labels, places), self.token_embedding.weight[:codes], self.head_bias[:codes])

    def loss(
        self, ids: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, label_smoothing: float = 0.1
    ) -> torch.Tensor:
        """Cross-entropy of what is masked, over the whole vocabulary.

            loss_b = sum_n masked_bn CE_bn / sum_n masked_bn,    loss = mean_b loss_b

        Args:
            ids: [B, N] int64, all codes of the pictures.
            labels: [B] int64, as in `features`.
            masked: [B, N] bool, what the model does not see and has to find; a picture without any counts as 0.
            label_smoothing: the part of the target that is spread evenly over the vocabulary.

        Returns:
            [] float32 (float64 for float64).

        Raises:
            TypeError, ValueError: as `features`; `masked` is not bool of ids' shape; there is no picture.
        """
        if not len(ids):
            raise ValueError("ids must hold a picture at least: the mean over none is not defined")
        _checks.shape("masked", _checks.tensor("masked", masked), tuple(ids.shape))
        if masked.dtype != torch.bool:
            raise TypeError(f"masked must be bool, got {masked.dtype}")
        h_BND = self.features(ids.masked_fill(masked, self.config.mask), labels)
        target = ids.masked_fill(~masked, -100)
        losses = ops.linear_cross_entropy(
            h_BND.flatten(0, 1), self.token_embedding.weight, target.flatten(), bias=self.head_bias,
            label_smoothing=label_smoothing, reduction="none",
        )  # fmt: skip
        return (losses.view(ids.shape).sum(1) / masked.sum(1).clamp(min=1)).mean()


def _check_ids(name: str, value: torch.Tensor, shape: tuple[int | None, ...], below: int, or_: int = 0) -> None:
    """int64 of this shape, in [0, below) or `or_`."""
    if _checks.tensor(name, value).dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if len(value.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(value.shape)}")
    if not value.numel() or not _checks.values_may_be_read(value):
        return
    if bool((bad := ((value < 0) | (value >= below)) & (value != or_)).any()):
        also = f" or {or_}" if or_ else ""
        raise ValueError(f"{name} must be in [0, {below}){also}, got {int(value[bad][0])}")
