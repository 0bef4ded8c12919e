"""Shapes on which masked_decode_step is tested, measured and tuned; names say where they come from."""

from dataclasses import dataclass
from typing import Any

import torch

MASK = 100_000


@dataclass(frozen=True)
class Sample:
    """logits [b, n, v]; with guidance there are as many of the unconditional model."""

    name: str
    b: int
    n: int
    v: int
    guidance: float = 0.0
    temperature: float = 1.0
    contiguous: bool = True
    bench: bool = False


SAMPLES = [
    Sample("empty", 0, 4, 5),
    Sample("one", 1, 1, 1),
    Sample("below_a_block", 2, 3, 63),
    Sample("above_a_block", 3, 5, 65),
    Sample("above_a_tile", 2, 70, 1030),
    Sample("part_of_a_vocabulary", 2, 6, 40, contiguous=False),
    Sample("guided", 2, 9, 33, guidance=1.5),
    Sample("maskgit_tiny_step", 16, 64, 240, temperature=4.5, bench=True),
    Sample("maskgit_256_step", 16, 256, 1024, temperature=4.5, bench=True),
    Sample("maskgit_256_guided_step", 16, 256, 1024, guidance=2.0, temperature=4.5, bench=True),
]


def _draw(shape: tuple[int, ...], part: bool, g: torch.Generator) -> torch.Tensor:
    """Logits, with `part` the first of some more classes."""
    z = 2 * torch.randn(*shape[:-1], shape[-1] + (3 if part else 0), generator=g)
    return z[..., : shape[-1]]


def _inside(z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """[B, N]: numbers that draw the same tokens as u, or the likeliest where that is hardly likely, but lie in the
    middle of their shares: no rounding of the sums can change the token."""
    p = z.double().softmax(-1)
    sums = p.cumsum(-1)
    token = torch.searchsorted(sums, u.double()[..., None]).clamp(max=z.shape[-1] - 1)
    token = torch.where(p.gather(-1, token) < 1e-3, p.argmax(-1, keepdim=True), token)
    return (sums - p / 2).gather(-1, token)[..., 0]


def inputs(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public call; fixed by the seed, the same on every device. About half of the ids are known."""
    g = torch.Generator().manual_seed(seed)
    shape, part = (sample.b, sample.n, sample.v), not sample.contiguous
    logits = _draw(shape, part, g).to(dtype)
    z = logits.double()
    kwargs: dict[str, Any] = {"mask": MASK, "temperature": sample.temperature}
    if sample.guidance:
        other = _draw(shape, part, g).to(dtype)
        z = z + sample.guidance * (z - other.double())
        kwargs |= {"unconditional": other.to(device), "guidance": sample.guidance}
    ids = torch.randint(0, sample.v, shape[:2], generator=g)
    unknown = torch.rand(shape[:2], generator=g) < 0.6
    noise = torch.rand(*shape[:2], 2, generator=g)
    noise[..., 0] = _inside(z, noise[..., 0])
    count = torch.randint(0, max(1, sample.n // 2), shape[:1], generator=g)
    noise = noise.to(torch.promote_types(dtype, torch.float32))
    return (logits.to(device), ids.masked_fill(unknown, MASK).to(device), count.to(device), noise.to(device)), kwargs


def work(
    logits: torch.Tensor, ids: torch.Tensor, count: torch.Tensor, noise: torch.Tensor, *unconditional: torch.Tensor
) -> dict[str, int]:
    """About 10 FLOPs a logit; the logits are read, and for every token 8 bytes of noise, 8 of id and 20 of results."""
    return {
        "flops": 10 * logits.numel() * (1 + len(unconditional)),
        "bytes": logits.nbytes * (1 + len(unconditional)) + 36 * ids.numel(),
    }
