"""A step of parallel decoding: sample what is masked, keep the surest, mask the rest; the maths is in README.md."""

from typing import Any

import torch

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.masked_decode_step import reference, samples


def _check_values(ids: torch.Tensor, count: torch.Tensor, noise: torch.Tensor) -> None:
    """Where looking costs no wait for a GPU."""
    if not (ids.numel() and _checks.values_may_be_read(ids, count, noise)):
        return
    if (least := int(count.min())) < 0:
        raise ValueError(f"count must be at least 0, got {least}")
    low, high = (float(v) for v in noise.detach().aminmax())
    if not (low >= 0 and high < 1):
        raise ValueError(f"noise must lie in [0, 1), got {low:g} to {high:g}")


def _bind(
    logits: Any,
    ids: Any,
    count: Any,
    noise: Any,
    *,
    mask: Any,
    temperature: Any = 0.0,
    unconditional: Any = None,
    guidance: Any = 0.0,
) -> tuple[Any, ...]:
    logits = _checks.floating("logits", logits)
    if logits.dim() != 3 or logits.shape[2] == 0:
        raise ValueError(f"logits must have shape [B, N, V] with at least one class, got {list(logits.shape)}")
    noise = _checks.floating("noise", noise)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if noise.dtype != wide:
        raise TypeError(f"noise must be {wide} for logits in {logits.dtype}, got {noise.dtype}")
    for name, value, shape in (("ids", ids, logits.shape[:2]), ("count", count, logits.shape[:1])):
        if _checks.tensor(name, value).dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}")
        _checks.shape(name, value, tuple(shape))
        _checks.on_device(name, value, "logits", logits)
    _checks.shape("noise", noise, (*logits.shape[:2], 2))
    _checks.on_device("noise", noise, "logits", logits)
    if unconditional is not None:
        _checks.shape("unconditional", _checks.floating("unconditional", unconditional), tuple(logits.shape))
        _checks.same("unconditional", unconditional, "logits", logits)
    if isinstance(mask, bool) or not isinstance(mask, int):
        raise TypeError(f"mask must be a whole number, got {type(mask).__name__}")
    if 0 <= mask < logits.shape[2]:
        raise ValueError(f"mask must be no class, below 0 or at least {logits.shape[2]}, got {mask}")
    guidance, temperature = _checks.number("guidance", guidance), _checks.number("temperature", temperature)
    if unconditional is None and guidance:
        raise ValueError(f"guidance must be 0 without unconditional logits, got {guidance:g}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature:g}")
    _check_values(ids, count, noise)
    return logits, ids, count, noise, unconditional, guidance, temperature, mask


_op = Op(
    "masked_decode_step",
    public="masked_decode_step",
    schemas={
        "masked_decode_step": "(Tensor logits, Tensor ids, Tensor count, Tensor noise, Tensor? unconditional,"
        " float guidance, float temperature, int mask) -> (Tensor, Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
    differentiable=False,
)
_forward = _op.raw["masked_decode_step"]


def masked_decode_step(
    logits: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor,
    noise: torch.Tensor,
    *,
    mask: int,
    temperature: float = 0.0,
    unconditional: torch.Tensor | None = None,
    guidance: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step of MaskGIT's decoding: draw a token wherever there is none, keep the surest, mask the others again.

        z = logits + guidance (logits - unconditional),    p = softmax(z)
        drawn = the first class at which the sum of p exceeds u,    u = noise[..., 0]
        confidence = log p_drawn - temperature log(-log(g)),    g = noise[..., 1]      where ids is mask
        masked again: the `count` tokens of a row with the smallest confidence (of equal ones the first)

    Tokens that are known, where ids is not mask, stay and are never masked. Nothing waits for a GPU.

    Args:
        logits: [B, N, V], float32, bfloat16 or float16 (float64 on the reference).
        ids: [B, N] int64, classes or `mask`.
        count: [B] int64, how many tokens of each row are masked afterwards; at most those that are masked now.
        noise: [B, N, 2] float32 (float64 with float64), uniform in [0, 1).
        mask: the id of a token that is not known; no class.
        temperature: of the Gumbel noise on the confidence, 0 for none.
        unconditional: [B, N, V] logits for guidance, in logits' dtype.
        guidance: how far to go on from them beyond logits.

    Returns:
        ids for the next step [B, N] int64; ids before some were masked again [B, N] int64, the result when this was
        the last step; log p of what was drawn [B, N] float32 (float64 for float64), 0 where the token was known. No
        gradient. A row of logits with NaN draws some class, with log p NaN, as the least confident.

    Raises:
        TypeError: an argument has no such type, or a tensor another dtype.
        ValueError: shapes or devices do not fit; mask is a class; temperature is negative; guidance has no
            unconditional logits; a tensor requires a gradient; count is negative or noise outside [0, 1) (looked at
            on the CPU, elsewhere with `vlkern.validate(True)`).

    Source: Chang et al., MaskGIT: Masked Generative Image Transformer, 2022.

    Example:
        >>> ids, noise = torch.full((2, 16), -1), torch.rand(2, 16, 2)
        >>> step = vlkern.ops.masked_decode_step(torch.randn(2, 16, 240), ids, torch.tensor([12, 12]), noise, mask=-1)
        >>> (step[0] == -1).sum(1)
        tensor([12, 12])
    """
    arguments = _bind(
        logits, ids, count, noise,
        mask=mask, temperature=temperature, unconditional=unconditional, guidance=guidance,
    )  # fmt: skip
    _checks.no_gradient(logits=logits, noise=noise, unconditional=unconditional)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _forward[_op.choose(*arguments[:4])](*arguments)
    return result
