"""Attention over packed tokens: sequences of any lengths lie one behind the other, and nothing is padded.

Sequence s is the tokens cu_seqlens[s] ... cu_seqlens[s + 1] - 1. A dense batch of B sequences of L tokens is the
special case cu_seqlens = [0, L, 2 L, ..., B L]. Everything is one call for all sequences; nothing waits for a GPU.

    T tokens of all sequences   S sequences   D width   K heads of C = D / K channels
"""

from collections.abc import Iterable

import torch
from torch import nn

from vlkern import _checks, ops
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.layers.mlp import Mlp
from vlkern.layers.pooling import ProbeAttention


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int, *, empty: bool = False) -> None:
    """Make sure that the sequences fill the tokens.

    Args:
        cu_seqlens: [S + 1] int32.
        tokens: T.
        empty: whether a sequence may be empty.

    Raises:
        TypeError: no int32 tensor.
        ValueError: not one dimension, no sequence, not from 0 to T, or not rising (an empty sequence has nothing to
            attend to). Values are looked at where that costs no wait for a GPU, see `vlkern.validate`.
    """
    cu = _checks.tensor("cu_seqlens", cu_seqlens)
    if cu.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu.dtype}")
    if cu.dim() != 1 or len(cu) < 2:
        raise ValueError(f"cu_seqlens must have shape [S + 1] with at least one sequence, got {list(cu.shape)}")
    if not _checks.values_may_be_read(cu):
        return
    if (first := int(cu[0])) != 0 or int(cu[-1]) != tokens:
        raise ValueError(f"cu_seqlens must go from 0 to the number of tokens, {tokens}, got {first} to {int(cu[-1])}")
    if bool((short := cu.diff() < (0 if empty else 1)).any()):
        i = int(short.nonzero()[0])
        raise ValueError(f"cu_seqlens must rise, got {int(cu[i])} and then {int(cu[i + 1])} for sequence {i}")


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(C)) V, in which token i sees the tokens start[i] <= j < stop[i].

    Parameters are named as in Hugging Face's attention: q_proj, k_proj, v_proj, out_proj.

    Args:
        width: D.
        heads: K; D / K must be a multiple of 8 up to 256.
        bias: of the four projections.

    Raises:
        ValueError: the heads have no such size.

    Example:
        >>> attention = vlkern.layers.packed.Attention(64, heads=4)
        >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> start, stop = vlkern.masks.documents(cu_seqlens).bounds(5)
        >>> attention(torch.randn(5, 64), start, stop).shape
        torch.Size([5, 64])
    """

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.q_proj = dense_(Linear(width, width, bias=bias))
        self.k_proj = dense_(Linear(width, width, bias=bias))
        self.v_proj = dense_(Linear(width, width, bias=bias))
        self.out_proj = dense_(Linear(width, width, bias=bias))

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, D] -> q, k, v, each [T, K, C]."""
        shape = (-1, self.heads, x_TD.shape[1] // self.heads)
        return self.q_proj(x_TD).view(shape), self.k_proj(x_TD).view(shape), self.v_proj(x_TD).view(shape)

    def forward(self, x_TD: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """[T, D] with start and stop [T] int32 -> [T, D]. A token that sees nothing gets the bias of out_proj."""
        return self.out_proj(ops.interval_attention(*self.project(x_TD), start, stop).flatten(1))


class Block(nn.Module):
    """x += Attention(LN(x));  x += MLP(LN(x)).

    Args:
        attention: takes [T, D], start and stop [T] int32, such as `Attention`.
        width: D.
        hidden: units of the MLP.
        bias: of the two LayerNorms.

    Example:
        >>> block = vlkern.layers.packed.Block(vlkern.layers.packed.Attention(64, heads=4), 64, hidden=128)
    """

    def __init__(self, attention: nn.Module, width: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6, bias=bias)
        self.self_attn = attention
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6, bias=bias)
        self.mlp = Mlp(width, hidden)

    def forward(self, x_TD: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """[T, D] with start and stop [T] int32 -> [T, D]."""
        x_TD = x_TD + self.self_attn(self.layer_norm1(x_TD), start, stop)
        return x_TD + self.mlp(self.layer_norm2(x_TD))


class Encoder(nn.Module):
    """Blocks one after the other; what follows the last one belongs to the model."""

    def __init__(self, layers: Iterable[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_TD: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """[T, D] with start and stop [T] int32 -> [T, D]."""
        for layer in self.layers:
            x_TD = layer(x_TD, start, stop)
        return x_TD


class MapPooling(nn.Module):
    """Attention pooling of each sequence by one learned query: h = Attention(probe, tokens);  out = h + MLP(LN(h)).

    Parameters are those of `vlkern.layers.pooling.MapHead`, the same for a dense batch, and named as in Hugging Face's
    SigLIP: probe, attention.in_proj_weight, ..., layernorm, mlp.

    Args:
        width: D.
        hidden: units of the MLP.
        heads: K; D / K must be a multiple of 8 up to 256.

    Raises:
        ValueError: the heads have no such size.

    Example:
        >>> pool = vlkern.layers.packed.MapPooling(64, hidden=128, heads=4)
        >>> pool(torch.randn(5, 64), torch.tensor([0, 3, 5], dtype=torch.int32)).shape
        torch.Size([2, 64])
    """

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.probe = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, width)))
        self.attention = ProbeAttention(width, heads)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x_TD: torch.Tensor, cu_seqlens: torch.Tensor, *, empty: bool = False) -> torch.Tensor:
        """[T, D] and cu_seqlens [S + 1] int32 -> [S, D]. With `empty`, slots without tokens get what is no picture's.

        Raises:
            TypeError, ValueError: as `check_cu_seqlens`.
        """
        check_cu_seqlens(cu_seqlens, len(x_TD), empty=empty)
        attention = self.attention
        shape = (-1, attention.heads, x_TD.shape[1] // attention.heads)
        q, k, v = (y.view(shape) for y in attention.project(self.probe[0], x_TD))
        q = q.expand(len(cu_seqlens) - 1, -1, -1)
        h_SD = attention.out_proj(ops.interval_attention(q, k, v, cu_seqlens[:-1], cu_seqlens[1:]).flatten(1))
        return h_SD + self.mlp(self.layernorm(h_SD))


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless `heads` heads of a size that `interval_attention` takes make up the width."""
    if heads < 1 or width % heads or (width // heads) % 8 or width // heads > 256:
        raise ValueError(
            f"heads must share the width in parts of a multiple of 8 up to 256, got {heads} heads of width {width}"
        )
