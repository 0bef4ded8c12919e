"""Gemma 1, 2 and 3: decoder-only language models; the differences between them are in `GemmaConfig`.

    x_0  = E[token] * sqrt(D)                E is also the output layer; the factor is rounded to the model's dtype
    Gemma 1       h = x + Attention(N1(x))                           x' = h + Mlp(N2(h))
    Gemma 2, 3    h = x + N2(Attention(N1(x)))                       x' = h + N4(Mlp(N3(h)))
    Mlp(u)        W_down(gelu_tanh(W_gate u) * (W_up u))
    logits        N(x_depth) E^T                                     Gemma 2: c tanh(logits / c), c = 30

    Attention     q = R(W_q u)   k = R(W_k u)   v = W_v u            Gemma 3: q = R(N(W_q u)), k = R(N(W_k u)) by head
                  softmax over the visible keys of q . k / sqrt(query_scalar)    Gemma 2: 50 tanh(scores / 50)
                  query head h reads key head h // (H / K); out = W_o concat_h(softmax v)

N is an RMS norm with the factor (1 + weight), R rotates the halves of a head against each other by position * theta_j
(RoPE), theta_j = base^(-2j / C). Global layers see all tokens up to their own, local ones the last `window` of these
(the token itself counts). Gemma 1 has global layers only, in Gemma 2 every second layer is global, in Gemma 3 every
sixth; the first is local. Gemma 3's global layers have a base of their own, and from 4B on rotate `rope_factor` = 8
times slower. There is no bias anywhere.

Sequences are packed: rows of any lengths lie one behind the other and nothing is padded. `hidden` sees whole rows, for
training and scoring; `extend` appends a chunk of tokens to key/value caches, for generation. Parameter names are those
of Hugging Face's Gemma*ForCausalLM, so its checkpoints are `load_state_dict`.

    T tokens of all rows   B rows   L tokens of a row   V vocabulary   D width   F units of one branch of the MLP
    H query heads   K key heads   C channels of a head

Sources: Gemma: Open Models Based on Gemini Research and Technology, 2024; Gemma 2: Improving Open Language Models at a
Practical Size, 2024; Gemma 3 Technical Report, 2025.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks, masks, ops
from vlkern.caches import Caches, Chunk, LinearCache, RingCache
from vlkern.layers.gated_mlp import GatedMlp
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.layers.norm import RMSNorm
from vlkern.layers.packed import check_cu_seqlens
from vlkern.layers.rope import Rope
from vlkern.layers.rope_memory import Memory, Rows
from vlkern.layers.step import is_step, plain_weights


@dataclass(frozen=True)
class GemmaConfig:
    """What the models differ in.

    width D, depth layers, heads H, kv_heads K, head_dim C, mlp F.
    query_scalar: scores are divided by its square root.
    version: 1, 2 or 3. Gemma 2 and 3 also normalise what attention and MLP give, Gemma 3 also queries and keys.
    vocabulary V; context: tokens that the model was trained for.
    pattern: "L" for a local layer, "G" for a global one, repeated until there are `depth`.
    window: tokens that a local layer sees, its own among them.
    attention_softcap, final_softcap: bounds of the scores and of the logits, or None.
    rope_base, rope_factor: of global layers, whose angles are divided by the factor; local_rope_base: of local ones.
    whole_prefix: the tokens up to `until` of a row's first token see each other in local layers, too (PaliGemma 2);
        else the window counts for them (Gemma 3).

    Raises:
        ValueError: no model can have these sizes.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    query_scalar: float
    version: int
    vocabulary: int
    context: int
    pattern: str = "G"
    window: int | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    rope_base: float = 10_000.0
    rope_factor: float = 1.0
    local_rope_base: float = 10_000.0
    whole_prefix: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.type in (int, int | None) and not (type(value) is int and value > 0):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
            if field.type in (float, float | None) and not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")
        if self.version > 3:
            raise ValueError(f"version must be 1, 2 or 3, got {self.version}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, as RoPE rotates halves of it, got {self.head_dim}")
        if not (isinstance(self.pattern, str) and self.pattern and set(self.pattern) <= {"L", "G"}):
            raise ValueError(f"pattern must consist of L for local and G for global layers, got {self.pattern!r}")
        if self.window is None and "L" in self.kinds:
            raise ValueError("window must be given for local layers, got None")

    @property
    def kinds(self) -> str:
        """One letter for every layer: "L" local, "G" global."""
        return (self.pattern * self.depth)[: self.depth]


_GEMMA1 = {"version": 1, "vocabulary": 256_000, "context": 8192}
_GEMMA2 = {
    "version": 2, "vocabulary": 256_000, "context": 8192, "pattern": "LG", "window": 4096,
    "attention_softcap": 50.0, "final_softcap": 30.0,
}  # fmt: skip
_GEMMA3 = {"version": 3, "vocabulary": 262_144, "context": 32_768, "pattern": "LLLLLG", "window": 512, "rope_base": 1e6}
# Those that see: 64 rows more than the tokenizer has pieces, the first of them for images.
_GEMMA3_LARGE = _GEMMA3 | {"vocabulary": 262_208, "context": 131_072, "window": 1024, "rope_factor": 8.0}
_TINY = _GEMMA3 | {"vocabulary": 2048, "context": 512, "window": 32}
# name, what the generation has in common; width, depth, heads, kv_heads, head_dim, mlp, query_scalar
_MODELS: tuple[tuple[str, dict[str, Any], tuple[Any, ...]], ...] = (
    ("gemma3-tiny", _TINY, (128, 6, 4, 1, 32, 512, 32)),
    ("gemma-2b", _GEMMA1, (2048, 18, 8, 1, 256, 16_384, 256)),
    ("gemma-7b", _GEMMA1, (3072, 28, 16, 16, 256, 24_576, 256)),
    ("gemma-2-2b", _GEMMA2, (2304, 26, 8, 4, 256, 9216, 256)),
    ("gemma-2-9b", _GEMMA2, (3584, 42, 16, 8, 256, 14_336, 256)),
    ("gemma-2-27b", _GEMMA2, (4608, 46, 32, 16, 128, 36_864, 144)),
    ("gemma-3-270m", _GEMMA3, (640, 18, 4, 1, 256, 2048, 256)),
    ("gemma-3-1b", _GEMMA3, (1152, 26, 4, 1, 256, 6912, 256)),
    ("gemma-3-4b-text", _GEMMA3_LARGE, (2560, 34, 8, 4, 256, 10_240, 256)),
    ("gemma-3-12b-text", _GEMMA3_LARGE, (3840, 48, 16, 8, 256, 15_360, 256)),
    ("gemma-3-27b-text", _GEMMA3_LARGE, (5376, 62, 32, 16, 128, 21_504, 168)),
)
#: The released models, named as on Hugging Face (`-text`: the language model of one that also sees), and one that
#: trains on a laptop.
PRESETS = {name: GemmaConfig(*sizes, **common) for name, common, sizes in _MODELS}


class Attention(nn.Module):
    """Grouped-query attention; in Gemma 3 with an RMS norm of queries and keys, shared by the heads."""

    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.scale, self.softcap = c.query_scalar**-0.5, c.attention_softcap
        self.q_proj = dense_(Linear(c.width, c.heads * c.head_dim, bias=False), lecun=True)
        self.k_proj = dense_(Linear(c.width, c.kv_heads * c.head_dim, bias=False), lecun=True)
        self.v_proj = dense_(Linear(c.width, c.kv_heads * c.head_dim, bias=False), lecun=True)
        self.o_proj = dense_(Linear(c.heads * c.head_dim, c.width, bias=False), lecun=True)
        self.q_norm = RMSNorm(c.head_dim) if c.version == 3 else None
        self.k_norm = RMSNorm(c.head_dim) if c.version == 3 else None

    def forward(
        self, x_TD: torch.Tensor, memory: Memory, chunk: Chunk | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        tokens = x_TD.shape[0]
        q_THC = self.q_proj(x_TD).view(tokens, self.heads, self.head_dim)
        k_TKC = self.k_proj(x_TD).view(tokens, self.kv_heads, self.head_dim)
        v_TKC = self.v_proj(x_TD).view(tokens, self.kv_heads, self.head_dim)
        return self.o_proj(self.attend(q_THC, k_TKC, v_TKC, memory, chunk, cos, sin))

    def attend(
        self,
        q_THC: torch.Tensor,
        k_TKC: torch.Tensor,
        v_TKC: torch.Tensor,
        memory: Memory,
        chunk: Chunk | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Between the projections -> [T, H C]."""
        return memory.attend(
            q_THC,
            k_TKC,
            v_TKC,
            chunk,
            cos,
            sin,
            q_weight=None if self.q_norm is None else self.q_norm.weight,
            k_weight=None if self.k_norm is None else self.k_norm.weight,
            scale=self.scale,
            softcap=self.softcap,
        ).flatten(1)


class Layer(nn.Module):
    """Attention and MLP, each behind an RMS norm and added to its input; Gemma 2 and 3 normalise what is added."""

    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = GatedMlp(c.width, c.mlp)
        self.input_layernorm = RMSNorm(c.width)
        self.post_attention_layernorm = RMSNorm(c.width)
        self.sandwich = c.version > 1
        if self.sandwich:
            self.pre_feedforward_layernorm = RMSNorm(c.width)
            self.post_feedforward_layernorm = RMSNorm(c.width)

    def forward(
        self, x_TD: torch.Tensor, memory: Memory, chunk: Chunk | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        if is_step(x_TD) and (weights := plain_weights(self, Attention, GatedMlp)) is not None:
            return self._step(x_TD, weights, memory, chunk, cos, sin)
        attended_TD = self.self_attn(self.input_layernorm(x_TD), memory, chunk, cos, sin)
        if not self.sandwich:  # Gemma 1, whose second norm has a name that fits Gemma 2 better
            h_TD = x_TD + attended_TD
            return h_TD + self.mlp(self.post_attention_layernorm(h_TD))
        h_TD = x_TD + self.post_attention_layernorm(attended_TD)
        return h_TD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h_TD)))

    def _step(
        self,
        x_TD: torch.Tensor,
        w: dict[str, torch.Tensor],
        memory: Memory,
        chunk: Chunk | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` for a few tokens on the CPU, in four products: each with the norm and the sum next to it."""
        a, linear = self.self_attn, ops.decode_linear
        n2, n3, n4 = None, w["post_attention_layernorm"], None
        if self.sandwich:
            n2, n3, n4 = n3, w["pre_feedforward_layernorm"], w["post_feedforward_layernorm"]
        qkv_TF = linear(x_TD, w["q_proj"], w["k_proj"], w["v_proj"], before=w["input_layernorm"], offset=1.0)
        heads = (a.heads, a.kv_heads, a.kv_heads)
        q_THC, k_TKC, v_TKC = qkv_TF.view(x_TD.shape[0], sum(heads), a.head_dim).split(heads, 1)
        out_TF = a.attend(q_THC, k_TKC, v_TKC, memory, chunk, cos, sin)
        h_TD = linear(out_TF, w["o_proj"], after=n2, residual=x_TD, offset=1.0)
        u_TF = linear(h_TD, w["gate_proj"], w["up_proj"], before=n3, geglu=True, offset=1.0)
        return linear(u_TF, w["down_proj"], after=n4, residual=h_TD, offset=1.0)


class Decoder(nn.Module):
    """Embedding table, layers and final norm."""

    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.kinds = c.kinds
        self.ropes = {
            "L": Rope(c.head_dim, c.local_rope_base),
            "G": Rope(c.head_dim, c.rope_base, scale=c.rope_factor),
        }
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.depth))
        self.norm = RMSNorm(c.width)
        nn.init.normal_(self.embed_tokens.weight, std=c.width**-0.5)

    def forward(
        self, x_TD: torch.Tensor, positions: torch.Tensor, memories: Iterable[Memory], chunk: Chunk | None = None
    ) -> torch.Tensor:
        """[T, D] at `positions` [T] of their rows, and a memory for each layer -> [T, D], after the final norm."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        angles = {kind: [a.to(wide) for a in self.ropes[kind](positions)] for kind in set(self.kinds)}
        for layer, kind, memory in zip(self.layers, self.kinds, memories, strict=True):
            x_TD = layer(x_TD, memory, chunk, *angles[kind])
        return self.norm(x_TD)


class Gemma(nn.Module):
    """A language model: `embed` tokens, run them with `hidden` or `extend`, and turn rows of these into `logits`.

    Args:
        config: sizes; `PRESETS` has those of the released models.

    Example:
        >>> model = vlkern.models.create("gemma3-tiny")
        >>> ids = torch.tensor([2, 17, 5, 2, 9])  # two rows, of 3 and 2 tokens
        >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> model.logits(model.hidden(model.embed(ids), cu_seqlens)).shape
        torch.Size([5, 2048])
    """

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [...] (int32 or int64) -> [..., D], multiplied by sqrt(D) in the model's dtype.

        Raises:
            TypeError: the ids are no integers.
            ValueError: an id is not in the vocabulary (looked at where that costs no wait for a GPU).
        """
        weight = self.model.embed_tokens.weight
        if _checks.tensor("ids", ids).dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
        if _checks.values_may_be_read(ids, weight) and ids.numel():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= len(weight):
                raise ValueError(f"ids must be from 0 to {len(weight) - 1}, got {low if low < 0 else high}")
        # The models were trained with a factor of their activations' dtype: 25.25 for 25.298 in bfloat16.
        return F.embedding(ids, weight) * _rounded(math.sqrt(self.config.width), weight.dtype)

    def hidden(
        self, x_TD: torch.Tensor, cu_seqlens: torch.Tensor, *, until: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Whole rows, without a cache; differentiable.

        Args:
            x_TD: [T, D], the embedded tokens of all rows.
            cu_seqlens: [B + 1] int32: row b is the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
            until: [T] int32, the last position within its row that each token sees, for prefixes and blocks of image
                tokens; None, or less than the token's own position: the tokens up to its own.

        Returns:
            [T, D] after the final norm.

        Raises:
            TypeError, ValueError: tensors of other shapes or dtypes, rows that do not fill the tokens, `until` behind
                the end of a row.
        """
        tokens = x_TD.shape[0]
        check_cu_seqlens(cu_seqlens, tokens, empty=True)
        causal = masks.documents(cu_seqlens) & masks.causal()
        first, stop = causal.bounds(tokens)
        if until is not None:
            stop = torch.maximum(stop, _stop(until, first, cu_seqlens))
        positions = torch.arange(tokens, dtype=torch.int32, device=x_TD.device) - first
        memories = {"G": Rows(first, stop)}
        if self.config.window is not None:
            start = (causal & masks.window(self.config.window)).bounds(tokens)[0]
            if self.config.whole_prefix and until is not None:
                start = torch.where(positions <= until[first], first, start)
            memories["L"] = Rows(start, stop)
        return self.model(x_TD, positions, [memories[kind] for kind in self.config.kinds])

    @torch.no_grad()
    def extend(self, x_TD: torch.Tensor, chunk: Chunk, caches: Caches) -> torch.Tensor:
        """Append a chunk of each row to its cache, and run it. No gradient.

        Args:
            x_TD: [T, D], the embedded tokens of the chunk.
            chunk: `caches.chunk(cu_seqlens, until)`: which tokens are whose.
            caches: from `new_caches`; hold the chunk, too, afterwards.

        Returns:
            [T, D] after the final norm.

        Raises:
            ValueError: there are not as many tokens as in the chunk; the chunk is not the next one of these caches.
        """
        _checks.shape("x_TD", x_TD, (chunk.positions.shape[0], self.config.width))
        if self.config.whole_prefix:
            chunk = chunk._replace(whole=True)
        hidden_TD = self.model(x_TD, chunk.positions, caches.layers, chunk)
        caches.advance(chunk)
        return hidden_TD

    def new_caches(self, batch: int, capacity: int, *, slack: int = 0, dtype: torch.dtype | None = None) -> Caches:
        """Empty caches for `extend`: a slot for every position in global layers, rings in local ones.

        Args:
            batch: rows B.
            capacity: the most tokens that a row will have.
            slack: slots of a ring beyond the window, by which rows can be rolled back.
            dtype: float32, bfloat16, float16 or int8 (with scales); None takes that of the parameters.

        Raises:
            TypeError, ValueError: no such sizes or dtype.

        Example:
            >>> model = vlkern.models.create("gemma3-tiny")
            >>> caches = model.new_caches(batch=1, capacity=100)
            >>> chunk = caches.chunk(torch.tensor([0, 3], dtype=torch.int32))
            >>> hidden = model.extend(model.embed(torch.tensor([2, 17, 5])), chunk, caches)
        """
        c, like = self.config, self.model.embed_tokens.weight
        dtype = like.dtype if dtype is None else dtype

        def layer(window: int | None) -> LinearCache | RingCache:
            if window is None or capacity <= window:  # nothing is ever overwritten
                return LinearCache(
                    batch, capacity, c.kv_heads, c.head_dim, window=window, dtype=dtype, device=like.device
                )
            spare = min(slack, capacity - window)
            return RingCache(batch, window, c.kv_heads, c.head_dim, slack=spare, dtype=dtype, device=like.device)

        return Caches([layer(c.window if kind == "L" else None) for kind in c.kinds])

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V] float32, with Gemma 2's bound. Take only the rows that you need: V is large."""
        logits = ops.linear(hidden_TD, self.model.embed_tokens.weight).float()
        c = self.config.final_softcap
        return logits if c is None else torch.tanh(logits / c) * c

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] (int32 or int64) -> logits [B, L, V] float32; token i sees its row's tokens up to i.

        Raises:
            TypeError, ValueError: no such ids, or one is not in the vocabulary.
        """
        if _checks.tensor("ids", ids).dim() != 2:
            raise ValueError(f"ids must have shape [B, L], got {list(ids.shape)}")
        batch, length = ids.shape
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=ids.device) * length
        return self.logits(self.hidden(self.embed(ids.flatten()), cu_seqlens)).unflatten(0, (batch, length))


def _rounded(number: float, dtype: torch.dtype) -> float:
    """The nearest number of this dtype, half to even; without a tensor, which compiled graphs would have to hold."""
    step = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(number))
    return round(number / step) * step


def _stop(until: torch.Tensor, first: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[T] int32: one past the last token that each token sees, counted over all rows."""
    if _checks.tensor("until", until).dtype != torch.int32:
        raise TypeError(f"until must be int32, got {until.dtype}")
    _checks.shape("until", until, tuple(first.shape))
    stop = first + until + 1
    if _checks.values_may_be_read(until, cu_seqlens):
        lengths = cu_seqlens.diff()
        length = lengths.repeat_interleave(lengths)
        if bool((behind := until >= length).any()):
            i = int(behind.int().argmax())
            raise ValueError(
                f"until must lie inside the row, {int(length[i])} tokens, got until[{i}] = {int(until[i])}"
            )
    return stop
