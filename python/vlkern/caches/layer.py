"""The storage of one layer, and what linear and ring caches have in common."""

import math
from abc import ABC, abstractmethod

import torch

from vlkern import _checks, ops
from vlkern._op import REGISTRY
from vlkern.caches.chunk import Chunk
from vlkern.kernels.decode_attention import LARGEST_HEAD
from vlkern.kernels.rope_append.reference import quantise

_APPEND, _DECODE = REGISTRY["rope_append"], REGISTRY["decode_attention"]
STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)


class LayerCache(ABC):
    """Keys [B, S, K, C] and values [B, S, K, Cv] of one layer: position p of a row lies in slot p mod S.

    How many tokens a row has is not known here: `Caches` keeps that for all layers. The slots start as zeros, so that
    nothing read before it is written can be NaN.

    k, v              the tensors, contiguous
    k_scale, v_scale  [B, S, K] float32 for int8, else None
    window            how many positions a query sees at most, its own included; None for all
    """

    def __init__(
        self,
        batch: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None,
        value_dim: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < (name != "batch"):
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if dtype not in STORED:
            raise TypeError(f"dtype must be one of {', '.join(str(d)[6:] for d in STORED)}, got {dtype}")
        self.window = window
        self.k = torch.zeros(batch, slots, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(batch, slots, kv_heads, value_dim, dtype=dtype, device=device)
        self.k_scale = self.v_scale = None
        if dtype == torch.int8:
            self.k_scale = torch.zeros(batch, slots, kv_heads, device=device)
            self.v_scale = torch.zeros(batch, slots, kv_heads, device=device)

    @property
    def batch(self) -> int:
        """B, rows."""
        return self.k.shape[0]

    @property
    def slots(self) -> int:
        """S, slots of a row."""
        return self.k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """As which keys and values are stored."""
        return self.k.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Keys, values, and the scales of int8."""
        return [t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]

    @property
    @abstractmethod
    def wraps(self) -> bool:
        """Do positions share slots?"""

    @abstractmethod
    def like(self, batch: int) -> "LayerCache":
        """An empty cache of this kind for another number of rows."""

    @abstractmethod
    def _attend_chunk(
        self,
        q_THC: torch.Tensor,
        k_TKC: torch.Tensor,
        v_TKC: torch.Tensor,
        chunk: Chunk,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
        offset: float,
        scale: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """As `attend`, for chunks that are no step."""

    def attend(
        self,
        q_THC: torch.Tensor,
        k_TKC: torch.Tensor,
        v_TKC: torch.Tensor,
        chunk: Chunk,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
        offset: float = 1.0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Norm and turn queries and keys, append keys and values, and attend to what each query sees. No gradient.

        Args:
            q_THC: [T, H, C], before norm and RoPE; in the cache's dtype, any float dtype for int8.
            k_TKC: [T, K, C], before norm and RoPE, likewise.
            v_TKC: [T, K, Cv], likewise.
            chunk: of `Caches.chunk` or `Caches.step`.
            cos: [T, C / 2] float32, of `Rope(...)(chunk.positions)`.
            sin: [T, C / 2] float32.
            q_weight: [C], of the norm of queries, None for no norm.
            k_weight: [C], of the norm of keys, None for no norm.
            eps: of the norms.
            offset: added to the norms' weights.
            scale: of the dot products; C ** -0.5 by default.
            softcap: bound of the scores, or None.

        Returns:
            [T, H, Cv] in q's dtype.

        Raises:
            TypeError, ValueError: as `ops.rope_append` and `ops.interval_attention`; the chunk has other rows.
        """
        if chunk.batch != self.batch:
            raise ValueError(f"chunk must be of {self.batch} rows, got {chunk.batch}")
        if torch.is_grad_enabled():
            _checks.no_gradient(q_THC=q_THC, k_TKC=k_TKC, v_TKC=v_TKC, q_weight=q_weight, k_weight=k_weight)
        tokens = chunk.longest
        if not chunk.is_step or (self.wraps and self.window is not None and self.window + tokens - 1 > self.slots):
            return self._attend_chunk(
                q_THC, k_TKC, v_TKC, chunk, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, offset=offset,
                scale=scale, softcap=softcap,
            )  # fmt: skip
        if _on_cpu_kernels(q_THC):
            try:
                return self._step_on_cpu(
                    q_THC, k_TKC, v_TKC, chunk, cos, sin, q_weight, k_weight, eps, offset, scale, softcap
                )
            except RuntimeError:  # the functions below say what is wrong, in more words; a slot may be written twice
                pass
        q = ops.rope_append(
            q_THC, k_TKC, v_TKC, cos, sin, chunk.rows, chunk.positions, self.k, self.v, q_weight=q_weight,
            k_weight=k_weight, k_scale=self.k_scale, v_scale=self.v_scale, eps=eps, offset=offset,
        )  # fmt: skip
        out = ops.decode_attention(
            q.view(self.batch, tokens, *q.shape[1:]), self.k, self.v, chunk.length, k_scale=self.k_scale,
            v_scale=self.v_scale, window=self.window, scale=scale, softcap=softcap,
        )  # fmt: skip
        return out.view(q.shape[0], *out.shape[2:])

    def _step_on_cpu(
        self,
        q_THC: torch.Tensor,
        k_TKC: torch.Tensor,
        v_TKC: torch.Tensor,
        chunk: Chunk,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
        offset: float,
        scale: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """The kernels without the public functions, whose checks take as long as these do in a short context.

        The storage is as it was made and a chunk is checked when it is; the rest the kernels check before they write.
        """
        if not self.wraps and max(chunk.length.tolist(), default=0) > self.slots:
            raise RuntimeError("the chunk is of longer caches")
        options = eps, 1.0 if softcap is None else softcap, offset, 0.0 if scale is None else scale
        if not all(map(math.isfinite, options)) or min(options[:2]) <= 0:
            raise RuntimeError("an option is out of range")
        if max(self.k.shape[3], self.v.shape[3]) > LARGEST_HEAD:
            raise RuntimeError("a head dim is too large")
        q = _APPEND.raw["rope_append"]["cpu"](
            q_THC, k_TKC, v_TKC, cos, sin, chunk.rows, chunk.positions, self.k, self.v, q_weight, k_weight,
            self.k_scale, self.v_scale, eps, offset,
        )  # fmt: skip
        tokens, heads, width = q.shape
        out: torch.Tensor = _DECODE.raw["decode_attention"]["cpu"](
            q.view(self.batch, chunk.longest, heads, width), self.k, self.v, chunk.length, self.k_scale, self.v_scale,
            self.window, width**-0.5 if scale is None else scale, softcap,
        )  # fmt: skip
        return out.view(tokens, heads, self.v.shape[3])

    def copy_rows(
        self, rows: torch.Tensor, source: "LayerCache", source_rows: torch.Tensor, length: torch.Tensor
    ) -> None:
        """Rows `rows` [R] become rows `source_rows` [R] of another cache, which have `length` [R] tokens.

        Slot by slot: each gets the last position that belongs there, from wherever the other cache keeps it.
        """
        last = length.long()[:, None] - 1
        held = last - torch.remainder(last - torch.arange(self.slots, device=rows.device), self.slots)  # [R, S]
        # Where a row has no such position any slot will do: nobody reads it before it is written.
        at = source_rows.long()[:, None] * source.slots + torch.remainder(held, source.slots)
        for mine, its in zip(self.tensors(), source.tensors(), strict=True):
            mine.index_copy_(0, rows.long(), its.flatten(0, 1)[at])

    def clear(self, rows: torch.Tensor | None) -> None:
        """Zero the storage of these rows, all by default."""
        for t in self.tensors():
            if rows is None:
                t.zero_()
            else:
                t.index_fill_(0, rows, 0)


def _on_cpu_kernels(q_THC: torch.Tensor) -> bool:
    """Would both ops of a step run on the CPU's kernels, and be called as they are?"""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not isinstance(q_THC, torch.Tensor):
        return False
    return _APPEND.choose(q_THC) == "cpu" == _DECODE.choose(q_THC)


def as_stored(x_TKC: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a cache of this dtype keeps of keys or values: the elements, and the scales of int8."""
    if dtype == torch.int8:
        return quantise(x_TKC)
    if x_TKC.dtype != dtype:
        raise TypeError(f"k and v must have the dtype of the cache, {dtype}, got {x_TKC.dtype}")
    return x_TKC, None


def as_read(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What attention sees of stored elements [..., C] and scales [...]."""
    return x if scale is None else (x * scale[..., None]).to(dtype)


def longest_row(lengths_B: torch.Tensor, most: int) -> int:
    """The largest of the lengths, or `most` where looking at them would wait for a device or break a graph."""
    if not lengths_B.numel() or not _checks.values_may_be_read(lengths_B):
        return most
    return min(int(lengths_B.max()), most)
