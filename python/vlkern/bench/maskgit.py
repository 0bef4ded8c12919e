"""`python -m vlkern.bench.maskgit`: pictures drawn by MaskGIT's parallel decoding, beside the official loop in PyTorch.

The rival is the same transformer of `nn.Linear`, `F.scaled_dot_product_attention`, `F.gelu` and `F.layer_norm`, and
the loop as published: the logits of the whole sequence and vocabulary in every step, softmax, multinomial, Gumbel
noise, sort. With guidance both ask twice a step. The pictures are of different classes, so that no step can be shared
between them. Tokens are chance, so what is checked against float64 before the race is what both models make of the same
half-filled picture. Results are written and shown like those of an op.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from vlkern.bench.models import Call, Event, add_arguments, run
from vlkern.generation.maskgit import Sampler, masked_counts, sample
from vlkern.models.maskgit import PRESETS, MaskGit, MaskGitConfig

NAME = "maskgit"


class _Block(nn.Module):
    def __init__(self, c: MaskGitConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q, self.k, self.v, self.out = (nn.Linear(c.width, c.width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(c.width, c.mlp), nn.Linear(c.mlp, c.width)
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, eps=1e-12) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class Plain(nn.Module):
    """The transformer and its decoding in plain PyTorch.

    Args:
        ours: whose parameters it takes.
    """

    def __init__(self, ours: MaskGit) -> None:
        super().__init__()
        c = self.config = ours.config
        self.embedding, self.positions = nn.Embedding(c.vocabulary, c.width), nn.Embedding(c.tokens + 1, c.width)
        self.norm = nn.LayerNorm(c.width, eps=1e-12)
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.depth))
        self.dense, self.head_norm = nn.Linear(c.width, c.width), nn.LayerNorm(c.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(c.vocabulary))
        theirs = ours.state_dict()
        names = {
            "embedding": "token_embedding", "positions": "position_embedding", "norm": "embedding_norm",
            "dense": "head", "head_norm": "head_norm", "bias": "head_bias",
        }  # fmt: skip
        state = {n: theirs[n.replace(n.split(".")[0], names[n.split(".")[0]], 1)] for n in self.state_dict()
                 if not n.startswith("blocks")}  # fmt: skip
        for i in range(c.depth):
            source, to = f"layers.{i}.", f"blocks.{i}."
            for kind in ("weight", "bias"):
                qkv = theirs[f"{source}attention.qkv_proj.{kind}"].chunk(3)
                state |= {f"{to}{name}.{kind}": part for name, part in zip("qkv", qkv, strict=True)}
                for one, other in (
                    ("out", "attention.out_proj"), ("fc1", "fc1"), ("fc2", "fc2"), ("norm1", "attention_norm"),
                    ("norm2", "mlp_norm"),
                ):  # fmt: skip
                    state[f"{to}{one}.{kind}"] = theirs[f"{source}{other}.{kind}"]
        self.load_state_dict(state)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Ids [B, N] and labels [B] -> logits of the codes [B, N, codes], cut out of those of everything."""
        sequence = torch.cat([(labels + self.config.codes)[:, None], ids], 1)
        x = self.norm(self.embedding(sequence) + self.positions.weight)
        for block in self.blocks:
            x = block(x)
        x = self.head_norm(F.gelu(self.dense(x), approximate="tanh"))
        return F.linear(x, self.embedding.weight, self.bias)[:, 1:, : self.config.codes]

    @torch.inference_mode()
    def sample(self, labels: torch.Tensor, steps: int, temperature: float, guidance: float) -> torch.Tensor:
        """The published loop -> ids [B, N]."""
        c = self.config
        ids = torch.full((len(labels), c.tokens), c.mask)
        nobody = torch.full_like(labels, c.classes)
        sampled = ids
        for t, count in enumerate(masked_counts(c.tokens, steps)):
            if guidance:
                logits, plain = self(ids.repeat(2, 1), torch.cat([labels, nobody])).float().chunk(2)
                logits = logits + guidance * t / (steps - 1) * (logits - plain)
            else:
                logits = self(ids, labels).float()
            p = logits.softmax(-1)
            drawn = p.flatten(0, 1).multinomial(1).view(ids.shape)
            unknown = ids == c.mask
            sampled = torch.where(unknown, drawn, ids)
            confidence = p.gather(-1, sampled[..., None])[..., 0].log().masked_fill(~unknown, math.inf)
            gumbel = -(-torch.rand(ids.shape).clamp(1e-20).log()).log()
            confidence = confidence + temperature * (1 - (t + 1) / steps) * gumbel
            cut = confidence.sort(-1).values[:, count, None]
            ids = torch.where(confidence < cut, c.mask, sampled)
        return sampled


def flops(c: MaskGitConfig, steps: int, batch: int, guided: bool) -> float:
    """Of the published loop: every token in every step, 2 FLOPs a weight."""
    length, weights = c.tokens + 1, c.depth * (4 * c.width**2 + 2 * c.width * c.mlp) + c.width**2
    once = 2 * length * (weights + c.vocabulary * c.width) + c.depth * 4 * length**2 * c.width
    return float(once * steps * batch * (2 if guided else 1))


def _call(
    model: nn.Module, dtype: torch.dtype, paint: Callable[[nn.Module], torch.Tensor], half: tuple[torch.Tensor, ...]
) -> Call:
    """The first call gives logits, which are compared; every other draws pictures, which is timed."""
    model = copy.deepcopy(model).to(dtype).eval()
    first = [True]

    def call() -> torch.Tensor:
        if first:
            first.clear()
            with torch.inference_mode():
                return model(*half)
        return paint(model)

    return call


def event(preset: str, batch: int, steps: int, guidance: float) -> Event:
    """All steps of `batch` pictures."""
    ours = MaskGit(PRESETS[preset])
    c, theirs = ours.config, Plain(ours)
    labels = torch.arange(batch) % c.classes
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(c.codes, (batch, c.tokens), generator=generator)
    half = (ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, c.mask), labels)
    sampler = Sampler(steps, guidance=guidance)

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: _call(ours, dtype, lambda m: sample(m, labels, sampler), half),  # type: ignore[arg-type]
            "eager": lambda: _call(theirs, dtype, lambda m: m.sample(labels, steps, 4.5, guidance), half),  # type: ignore[operator]
        }

    name = f"{preset} {steps} steps" + (f" guidance {guidance:g}" if guidance else "")
    work = flops(c, steps, batch, guidance > 0)
    return Event(
        name, [batch, c.tokens], "forward", work, enter, _call(theirs, torch.float64, lambda m: m(*half), half)
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the races, prints them and writes <out>/<hardware>/maskgit.json with its plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.maskgit", description=__doc__)
    parser.add_argument("--preset", default="maskgit-tiny", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="B", help="pictures at a time")
    parser.add_argument("--steps", type=int, default=12, metavar="T", help="of decoding")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 2.0], metavar="A", help="0 is without")
    add_arguments(parser)
    args = parser.parse_args(argv)
    events = [partial(event, args.preset, b, args.steps, a) for b in args.batch for a in args.guidance]
    return run(NAME, parser, args, (), events)


if __name__ == "__main__":
    sys.exit(main())
