"""JetFormer: pictures and texts in one decoder, on the raw pixels that a normalizing flow turns into tokens.

    x        patches of the picture + U(0, 1 / 127.5), [B, N, K]        z, logdet = flow(x)
    soft     z[..., :d], which the decoder models        rest = z[..., d:], N(0, 1) of its own
    rows     [bos, text, boi, soft_1 ... soft_N]  or  [boi, soft_1 ... soft_N, bos, text],  without the last element
    decoder  Gemma 1 on E_text[token] (not scaled) and W soft + b
    p(soft_t | before) = sum_i pi_i N(soft_t; mu_i, diag(s_i^2)), all from a linear head; the next word by a softmax

    bits     (sum_t -log p(soft_t | before) - sum log N(rest; 0, 1) - logdet + S S 3 log 127.5) / (S S 3 log 2)
    nats     mean over the text of -log p(word | before)

A text may be repeated R times, each time with a table of its own: a class is one word. Texts of a batch may differ in
length: rows lie one behind the other and nothing is padded. In the place of its text a row may have `no_label`
(`unlabelled`), for guidance.

    B pictures   S side, P side of a patch   N = (S / P)^2 tokens   K = P P 3 numbers of a token, d of them modelled
    k components of the mixture   D width   V words, three of them special   L words of a text   T tokens of all rows

Source: Tschannen et al., JetFormer: An Autoregressive Generative Model of Raw Images and Text, 2024.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks, ops
from vlkern.layers.flow import to_pixels, to_tokens
from vlkern.layers.init import dense_
from vlkern.layers.linear import Linear
from vlkern.layers.mixture import SPREAD
from vlkern.layers.norm import RMSNorm
from vlkern.models.gemma import Gemma, GemmaConfig
from vlkern.models.jet import Jet, JetConfig
from vlkern.models.patch_pca import PatchPca, PatchPcaConfig

#: Words of the vocabulary that no text has: begin of a text, begin of a picture, no label.
SPECIAL = 3


@dataclass(frozen=True)
class JetFormerConfig:
    """Sizes and options.

    flow           a Jet on the grid of N tokens: image_size S / P, patch 1, channels K
    patch          P
    modelled       d
    mixtures       k
    width, depth, heads, head_dim, mlp   of the decoder, whose heads share one head of keys
    vocabulary     V; the last three are bos, boi and no_label
    text_length    L, of a text at most, and of a row without a label
    repeats        R
    boi_token      whether there is a boi at all
    tied           whether the words' table is the output layer as well
    causal_prefix  False: the elements before the second modality see each other
    shared_norm    False: outputs for pictures and for texts are normalised with weights of their own
    dropout        of what attention and MLPs give, in training
    pca            components of the patches, on which the flow then works instead of the pixels; K are their number
    """

    flow: JetConfig
    patch: int
    modelled: int
    mixtures: int
    width: int
    depth: int
    heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    text_length: int = 64
    repeats: int = 1
    boi_token: bool = True
    tied: bool = False
    causal_prefix: bool = True
    shared_norm: bool = True
    dropout: float = 0.0
    pca: PatchPcaConfig | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if self.vocabulary <= SPECIAL:
            raise ValueError(f"vocabulary must have more than the {SPECIAL} special words, got {self.vocabulary}")
        if self.flow.patch != 1 or self.flow.channels != self.numbers:
            raise ValueError(
                f"flow must have patch 1 and {self.numbers} channels, got {self.flow.patch} and {self.flow.channels}"
            )
        if self.modelled > self.numbers:
            raise ValueError(f"modelled must be at most the {self.numbers} numbers of a token, got {self.modelled}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.pca is not None and (self.pca.patch != (self.patch, self.patch) or self.pca.groups != 1):
            raise ValueError(f"pca must have patches of {self.patch} x {self.patch} in one group, got {self.pca}")

    @property
    def image_size(self) -> int:
        """S."""
        return self.flow.image_size * self.patch

    @property
    def tokens(self) -> int:
        """N."""
        return self.flow.tokens

    @property
    def numbers(self) -> int:
        """K."""
        return 3 * self.patch**2 if self.pca is None else self.pca.components

    @property
    def bos(self) -> int:
        """The word that begins a text, or a row; behind it are boi, which begins a picture, and no_label."""
        return self.vocabulary - SPECIAL

    @property
    def head(self) -> int:
        """Parameters of a mixture."""
        return self.mixtures * (1 + 2 * self.modelled)

    @property
    def specials(self) -> int:
        """Of a row: bos, and boi if there is one."""
        return 1 + self.boi_token

    def decoder(self) -> GemmaConfig:
        """The transformer."""
        return GemmaConfig(
            width=self.width, depth=self.depth, heads=self.heads, kv_heads=1, head_dim=self.head_dim, mlp=self.mlp,
            query_scalar=self.head_dim, version=1, vocabulary=self.vocabulary * self.repeats,
            context=self.text_length * self.repeats + self.tokens + self.specials,
        )  # fmt: skip


def _paper(depth: int, width: int, block_depth: int, classes: bool) -> JetFormerConfig:
    flow = JetConfig(16, 1, 768, depth=32, block_depth=block_depth, width=512, heads=8, kinds=("channels",))
    text: dict[str, Any] = (
        {"vocabulary": 1003, "text_length": 1, "repeats": 16, "tied": True} if classes else {"vocabulary": 32_003}
    )
    return JetFormerConfig(
        flow, 16, 128, 1024, width=width, depth=depth, heads=16, head_dim=width // 16, mlp=4 * width, dropout=0.1,
        **text,
    )  # fmt: skip


# Pictures of 32 px, two cores: the flow works on principal components, so that the numbers that the decoder models are
# the important ones from the first step on.
_TINY = JetFormerConfig(
    JetConfig(8, 1, 48, depth=8, block_depth=1, width=64, heads=4, kinds=("channels",)),
    4, 16, 32, width=128, depth=4, heads=4, head_dim=32, mlp=512, vocabulary=1024 + SPECIAL, text_length=12,
    pca=PatchPcaConfig((4, 4), 48, noise_std=0.0),
)  # fmt: skip
# Of 64 px: as many tokens, of patches four times as large.
_TINY_64 = replace(
    _TINY, flow=replace(_TINY.flow, channels=192, width=96), patch=8, modelled=32,
    pca=PatchPcaConfig((8, 8), 192, noise_std=0.0),
)  # fmt: skip
#: The models of the paper at 256 px, for ImageNet's classes and for texts; small ones for captions or classes.
PRESETS = {
    "jetformer-tiny": _TINY,
    "jetformer-tiny-64": _TINY_64,
    "jetformer-tiny-classes": replace(_TINY, text_length=1, repeats=4, vocabulary=64 + SPECIAL, tied=True),
    **{
        f"jetformer-{size}{suffix}": _paper(depth, width, block_depth, classes)
        for size, depth, width, block_depth in (("350m", 24, 1024, 4), ("750m", 24, 1536, 5), ("1.3b", 48, 1536, 6))
        for suffix, classes in (("-imagenet256", True), ("-text256", False))
    },
}


class Layout(NamedTuple):
    """Rows of a batch, one behind the other.

    source      [T] int64, what lies there: an element of [words of the texts, soft tokens, bos, boi]
    cu_seqlens  [B + 1] int32
    until       [T] int32, the last place of its row that each element sees; None: its own
    image       [B, N] int64, the places whose output predicts the soft tokens
    text        [B, L] int64, likewise the words; beyond the text any place of the row
    """

    source: torch.Tensor
    cu_seqlens: torch.Tensor
    until: torch.Tensor | None
    image: torch.Tensor
    text: torch.Tensor


class Outputs(NamedTuple):
    """What the decoder says before each soft token [B, N, D] and each word [B, L, D], normalised."""

    image: torch.Tensor
    text: torch.Tensor


def _drop(rate: float, module: nn.Module, _: object, out: torch.Tensor) -> torch.Tensor:
    return F.dropout(out, rate, module.training)


class JetFormer(nn.Module):
    """Flow, decoder and heads.

    Args:
        config: sizes; from PRESETS or your own.

    Example:
        >>> model = vlkern.models.create("jetformer-tiny")
        >>> pixels, texts = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randint(1024, (2, 12))
        >>> bits, nats = model(pixels, texts)
        >>> bits.shape, nats.shape
        (torch.Size([2]), torch.Size([2]))
    """

    def __init__(self, config: JetFormerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.pca = None if c.pca is None else PatchPca(c.pca)
        self.flow = Jet(c.flow)
        self.language = Gemma(c.decoder())
        nn.init.normal_(self.language.model.embed_tokens.weight)
        self.embed_image = dense_(Linear(c.modelled, c.width), lecun=True)
        if not c.shared_norm:
            self.language.model.norm = nn.Identity()  # type: ignore[assignment]
            self.image_norm, self.text_norm = RMSNorm(c.width), RMSNorm(c.width)
        self.image_head = Linear(c.width, c.head)
        nn.init.zeros_(self.image_head.weight)
        nn.init.zeros_(self.image_head.bias)
        # Components that begin alike would get the same gradients for ever: their means begin a little apart.
        nn.init.normal_(self.image_head.bias[c.mixtures :].view(c.mixtures, 2, -1)[:, 0].detach(), std=SPREAD)
        self.text_head = None if c.tied else Linear(c.width, c.vocabulary)
        if self.text_head is not None:
            nn.init.normal_(self.text_head.weight)
            nn.init.zeros_(self.text_head.bias)
        if c.dropout:
            for name, part in self.language.named_modules():
                if name.endswith(("self_attn", "mlp")):
                    part.register_forward_hook(partial(_drop, c.dropout))

    def blocks(self) -> list[nn.Module]:
        """The couplings of the flow and the layers of the decoder."""
        return [*self.flow.couplings, *self.language.model.layers]

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures to tokens.

        Args:
            pixels: [B, 3, S, S] in [-1, 1], plus noise of one level where likelihoods are asked for.

        Returns:
            tokens [B, N, K], of which the decoder models the first d numbers, and log |det| [B] float32.

        Raises:
            TypeError, ValueError: no pictures of this size.
        """
        c, t = self.config, _checks.floating("pixels", pixels)
        if t.dim() != 4 or len(t) == 0 or tuple(t.shape[1:]) != (3, c.image_size, c.image_size):
            raise ValueError(f"pixels must be [B, 3, {c.image_size}, {c.image_size}], B > 0, got {list(t.shape)}")
        with torch.autocast(t.device.type, enabled=False):  # a flow has to be undone
            if self.pca is None:
                return self.flow(to_tokens(t, c.patch))
            tokens, logdet = self.flow(self.pca.encode(t)[0])
            return tokens, logdet + c.tokens * self.pca.logdet

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, K] -> pictures [B, 3, S, S] in [-1, 1].

        Raises:
            TypeError, ValueError: no such tokens.
        """
        c = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            patches = self.flow.inverse(tokens)
            if self.pca is not None:
                return self.pca.decode(patches, c.image_size, c.image_size)
            return to_pixels(patches, c.flow.grid, c.flow.grid, c.patch).clamp(-1, 1)

    def unlabelled(self, count: int) -> torch.Tensor:
        """[count, L] int64, what stands where a text would be."""
        c, device = self.config, self.image_head.weight.device
        return torch.full((count, c.text_length), c.bos + 2, device=device)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Words [...] of the first table -> [..., D]."""
        return F.embedding(ids, self.language.model.embed_tokens.weight)

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        """Words [B, L] as they stand in rows, each repeat in the words of its own table: [B, R L].

        Raises:
            TypeError: no integers.
            ValueError: not [B, L], longer than texts may be, or an id that is no word (looked at where that costs no
                wait for a GPU).
        """
        c, t = self.config, _checks.tensor("ids", ids)
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64, got {t.dtype}")
        if t.dim() != 2 or not 0 < t.shape[1] <= c.text_length:
            raise ValueError(f"ids must be [B, L] with L from 1 to {c.text_length}, got {list(t.shape)}")
        if _checks.values_may_be_read(t) and t.numel():
            low, high = (int(end) for end in t.aminmax())
            if low < 0 or high >= c.vocabulary:
                raise ValueError(f"ids must be from 0 to {c.vocabulary - 1}, got {low if low < 0 else high}")
        return torch.cat([t.long() + repeat * c.vocabulary for repeat in range(c.repeats)], 1)

    def layout(self, length: int, lengths: torch.Tensor | None, text_first: torch.Tensor) -> Layout:
        """Where everything lies.

        Args:
            length: L of this batch.
            lengths: [B] int64, words of each text; None: L.
            text_first: [B] bool: the text comes before the picture.
        """
        c, batch, device = self.config, len(text_first), text_first.device
        n = torch.full((batch,), length, device=device) if lengths is None else lengths
        m = n * c.repeats
        rows = m + c.tokens + c.specials - 1  # the last element is not read
        cu = F.pad(rows.cumsum(0), (1, 0))
        total = batch * (length * c.repeats + c.tokens + c.specials - 1) if lengths is None else int(cu[-1])
        row = torch.arange(batch, device=device).repeat_interleave(rows, output_size=total)
        place = torch.arange(total, device=device) - cu[row]
        prefix, first = torch.where(text_first, m, c.tokens)[row], text_first[row]

        before, after = (place > 0) & (place <= prefix), place >= prefix + c.specials
        element = torch.where(before, place - 1, place - prefix - c.specials)
        width = n[row].clamp(min=1)  # repeats of a shorter text follow each other, too
        word = row * length * c.repeats + element // width * length + element % width
        words, soft = batch * length * c.repeats, batch * c.tokens
        special = words + soft + ((place > 0) == first if c.boi_token else torch.zeros_like(first)).long()
        index = torch.where((before & first) | (after & ~first), word, words + row * c.tokens + element)
        index = torch.where(before | after, index, special)

        start = cu[:-1, None]
        image = start + torch.where(text_first, m + c.specials - 1, 0)[:, None] + torch.arange(c.tokens, device=device)
        i = torch.minimum(torch.arange(length, device=device), n[:, None] - 1).clamp(min=0)
        text = start + torch.where(text_first, 0, c.tokens + c.specials - 1)[:, None] + i
        until = None if c.causal_prefix else torch.maximum(place, prefix * (place <= prefix)).int()
        return Layout(index, cu.int(), until, image, text)

    def outputs(
        self,
        soft_BNd: torch.Tensor,
        ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        text_first: torch.Tensor | None = None,
    ) -> Outputs:
        """Run the decoder on whole rows.

        Args:
            soft_BNd: [B, N, d].
            ids: [B, L] words.
            lengths: [B] int32 or int64, how many of them each text has, at least one; None: all.
            text_first: [B] bool; None: everywhere.

        Raises:
            TypeError, ValueError: no such tensors.
        """
        c, words = self.config, self.words(ids)
        _checks.shape("soft", soft_BNd, (len(ids), c.tokens, c.modelled))
        if lengths is not None:
            _checks.lengths(lengths, ids)
        if text_first is None:
            text_first = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        _checks.shape("text_first", text_first, (len(ids),))
        if text_first.dtype != torch.bool:
            raise TypeError(f"text_first must be bool, got {text_first.dtype}")
        layout = self.layout(ids.shape[1], None if lengths is None else lengths.long(), text_first)
        parts = (self.embed(words).flatten(0, 1), self.embed_image(soft_BNd).flatten(0, 1), self.special())
        # Autocast gives the projection in bfloat16; the sums of the layers stay in the dtype of the parameters.
        x_TD = torch.cat([part.to(parts[0].dtype) for part in parts])[layout.source]
        hidden = self.language.hidden(x_TD, layout.cu_seqlens, until=layout.until)
        return Outputs(self.normed(hidden[layout.image], "image"), self.normed(hidden[layout.text], "text"))

    def special(self) -> torch.Tensor:
        """The embeddings of bos and, if there is one, boi: [2, D] or [1, D]."""
        c = self.config
        return self.language.model.embed_tokens.weight[c.bos : c.bos + c.specials]

    def normed(self, hidden: torch.Tensor, kind: str) -> torch.Tensor:
        """What the decoder gives, [..., D], for "image" or "text": normalised, where it is not already."""
        if self.config.shared_norm:
            return hidden
        return (self.image_norm if kind == "image" else self.text_norm)(hidden)

    def mixture(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs for soft tokens [..., D] -> parameters of their mixtures [..., k (1 + 2 d)], float32."""
        return self.image_head(hidden).float()

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs for words [..., D] -> logits [..., V], tied [..., V R], float32."""
        return self.language.logits(hidden) if self.text_head is None else self.text_head(hidden).float()

    def image_bits(self, hidden: torch.Tensor, tokens: torch.Tensor, logdet: torch.Tensor) -> torch.Tensor:
        """Bits for each number of a picture, [B] float32.

        Args:
            hidden: [B, N, D], outputs for soft tokens.
            tokens: [B, N, K].
            logdet: [B], of the flow.
        """
        c = self.config
        with torch.autocast(hidden.device.type, enabled=False):
            soft, rest = tokens.split([c.modelled, c.numbers - c.modelled], -1)
            head = self.image_head
            flat = hidden.to(head.weight.dtype).flatten(0, 1)
            nll = ops.linear_gmm_nll(flat, head.weight, head.bias, soft.flatten(0, 1)).view(soft.shape[:2]).sum(1)
            gauss = rest.square().sum((1, 2)) / 2 + rest[0].numel() * math.log(2 * math.pi) / 2
            return ((nll + gauss - logdet) / (3 * c.image_size**2) + math.log(127.5)) / math.log(2)

    def text_nats(self, hidden: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Nats for a word, the mean over each text, [B] float32.

        Args:
            hidden: [B, L, D], outputs for words.
            ids: [B, L].
            lengths: [B]; None: L.
        """
        batch, length = ids.shape
        n = torch.full((batch,), length, device=ids.device) if lengths is None else lengths
        inside = torch.arange(length, device=ids.device) < n[:, None]
        target = ids.long().masked_fill(~inside, -100).flatten()
        head = self.text_head
        weight = self.language.model.embed_tokens.weight if head is None else head.weight
        losses = ops.linear_cross_entropy(
            hidden.flatten(0, 1), weight, target, bias=None if head is None else head.bias, reduction="none"
        )
        return losses.view(batch, length).sum(1) / n.clamp(min=1)

    def forward(
        self,
        pixels: torch.Tensor,
        ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        text_first: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures as `encode`, texts as `outputs` takes them -> bits [B] and nats [B] of both modalities.

        The bits are those of the pictures as they are: add noise of one level first (`vlkern.flows.dequantise`).
        """
        tokens, logdet = self.encode(pixels)
        out = self.outputs(tokens[..., : self.config.modelled], ids, lengths, text_first)
        return self.image_bits(out.image, tokens, logdet), self.text_nats(out.text, ids, lengths)
