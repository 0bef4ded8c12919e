"""Chains of invertible steps: forward, back, training without stored activations, bits per dimension, round trips.

A step is a module such as `vlkern.models.jet.Coupling`:

    step(x, context) -> (y, logdet [B])           step.inverse(y, context) -> (x, logdet of the inverse)
    look(x)          the part that the step does not change, which tells all that it does
    predict(look(x), context) -> shift, raw       apply_to(x, shift, raw) -> (y, logdet)       undo(y, shift, raw)

`invertible` is `forward` whose backward keeps nothing but the chain's output: from the last step to the first, the
input of a step is computed from its output, then the gradients of that step alone. The network of a step runs once
more than in plain training, since what it looks at is the same before and after the step:

    memory   plain: the activations of all steps        invertible: of one step
    network  plain: forward + backward                  invertible: 2 forward + backward
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from vlkern import _checks

Pair = tuple[torch.Tensor, torch.Tensor]


class Step(Protocol):
    """What a chain is made of; see the head of this file."""

    def __call__(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        """Y and the log-determinant [B]."""

    def inverse(self, y: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        """X and the log-determinant of the inverse [B]."""

    def look(self, x: torch.Tensor) -> torch.Tensor:
        """What the step does not change, and which tells what it does."""

    def predict(self, half: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        """What it does: shift and raw scale."""

    def apply_to(self, x: torch.Tensor, shift: torch.Tensor, raw: torch.Tensor) -> Pair:
        """As the call, when shift and raw scale are known."""

    def undo(self, y: torch.Tensor, shift: torch.Tensor, raw: torch.Tensor) -> Pair:
        """As `inverse`, when they are known."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the network."""


def forward(steps: Iterable[Any], x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
    """All steps, one after the other.

    Args:
        steps: the chain.
        x: [B, ...].
        context: what every step may look at besides; None if they take none.

    Returns:
        z in the shape of x, and log |det dz/dx| [B] float32.

    Example:
        >>> flow = vlkern.models.jet.Jet(vlkern.models.jet.JetConfig(8, 2, depth=4, width=16, heads=2))
        >>> z, logdet = vlkern.flows.forward(flow.couplings, torch.randn(5, 16, 12))
    """
    total = torch.zeros(len(x), dtype=torch.float32, device=x.device)
    for step in steps:
        x, logdet = step(x, context)
        total = total + logdet
    return x, total


@torch.no_grad()
def inverse(steps: Sequence[Any], z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
    """All steps undone, the last one first. Without gradients.

    Returns:
        x in the shape of z, and log |det dx/dz| [B] float32.
    """
    total = torch.zeros(len(z), dtype=torch.float32, device=z.device)
    for step in reversed(steps):
        z, logdet = step.inverse(z, context)
        total = total + logdet
    return z, total


def invertible(steps: Sequence[Any], x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
    """As `forward`, with the activation memory of one step in training, however many there are.

    Gradients are those of `forward` up to the rounding of the inverse. They reach x, the context and the parameters
    of the steps; the parameters are inputs of the autograd node, so hooks on them (DistributedDataParallel) see their
    gradients, all of them when the backward of the whole chain is done. First-order gradients.

    Args:
        steps: the chain; their randomness, if any, is not repeated.
        x: [B, ...].
        context: as in `forward`.

    Returns:
        As `forward`.

    Example:
        >>> z, logdet = vlkern.flows.invertible(flow.couplings, x)
        >>> vlkern.flows.bits_per_dim(z, logdet).mean().backward()
    """
    parameters = [p for step in steps for p in step.parameters()]
    return _Chain.apply(steps, x, context, *parameters)


class _Chain(torch.autograd.Function):
    """Keeps the output of the chain and its context."""

    @staticmethod
    def forward(
        ctx: Any, steps: Sequence[Step], x: torch.Tensor, context: torch.Tensor | None, *parameters: torch.Tensor
    ) -> Pair:
        device = x.device.type
        ctx.steps, ctx.has_context = steps, context is not None
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        z, logdet = forward(steps, x, context)
        ctx.save_for_backward(z, *(() if context is None else (context,)))
        return z, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_z: torch.Tensor, g_logdet: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, *rest = ctx.saved_tensors
        context = rest[0].detach().requires_grad_(ctx.needs_input_grad[2]) if rest else None
        g_context = None
        g_parameters: list[torch.Tensor | None] = []
        enabled, dtype = ctx.autocast
        for step in reversed(ctx.steps):
            with torch.autocast(y.device.type, dtype=dtype, enabled=enabled):
                y, g_z, g_own, g_part = _undo(step, y, context, g_z, g_logdet)
            g_parameters[:0] = g_own
            if g_part is not None:
                g_context = g_part if g_context is None else g_context + g_part
        return None, g_z if ctx.needs_input_grad[1] else None, g_context, *g_parameters


def _undo(
    step: Step, y: torch.Tensor, context: torch.Tensor | None, g_y: torch.Tensor, g_logdet: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None], torch.Tensor | None]:
    """Input of a step from its output, and gradients of the input, the step's parameters and the context.

    What the step looks at is the same in y and in x, so one run of the network serves the inverse and the gradients.
    """
    with torch.enable_grad():
        seen = y.detach().requires_grad_()
        shift, raw = step.predict(step.look(seen), context)
        with torch.no_grad():
            x, _ = step.undo(y, shift, raw)
        x.requires_grad_()
        out, logdet = step.apply_to(x, shift, raw)
    parameters = [p for p in step.parameters() if p.requires_grad]
    extra = [context] if context is not None and context.requires_grad else []
    g_x, g_seen, *others = torch.autograd.grad(
        (out, logdet), (x, seen, *extra, *parameters), (g_y, g_logdet), allow_unused=True
    )
    g_part = others.pop(0) if extra else None
    found = dict(zip(map(id, parameters), others, strict=True))
    return x.detach(), g_x + g_seen, [found.get(id(p)) for p in step.parameters()], g_part


def bits_per_dim(z: torch.Tensor, logdet: torch.Tensor, *, step: float = 1 / 127.5) -> torch.Tensor:
    """Bits for each number of a picture, under a standard normal distribution of z.

        (sum(z^2 / 2 + log(2 pi) / 2 - log step) - logdet) / (d log 2)

    for data that are whole multiples of `step` plus U(0, step) noise (`dequantise`): a bound from above on the bits
    that a lossless coder with this model needs.

    Args:
        z: [B, ...], d numbers in each example, any floating dtype.
        logdet: [B], log |det dz/dx|.
        step: distance of two levels; 256 levels from -1 to 1 by default.

    Returns:
        [B] float32 (float64 if z is).

    Raises:
        TypeError, ValueError: no such tensors; a step that is not positive.

    Example:
        >>> vlkern.flows.bits_per_dim(torch.zeros(1, 4), torch.zeros(1))
        tensor([8.3201])
    """
    z = _checks.floating("z", z)
    if z.dim() < 2 or z[0:1].numel() == 0:
        raise ValueError(
            f"z must be [B, ...] with at least one number in each of at least one example, got {list(z.shape)}"
        )
    _checks.shape("logdet", logdet, (len(z),))
    step = _checks.number("step", step, positive=True)
    wide = z.flatten(1).to(torch.promote_types(z.dtype, torch.float32))
    each = 0.5 * math.log(2 * math.pi) - math.log(step)
    return (wide.square().mean(1) / 2 + each - logdet / wide.shape[1]) / math.log(2)


def dequantise(pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Levels 0 ... 255 as numbers in [-1, 1], plus uniform noise of one level: what `bits_per_dim` speaks of.

    Args:
        pixels: uint8.
        generator: of the noise, on the device of the pixels.

    Returns:
        float32 in [-1, 1 + 1 / 127.5).

    Raises:
        TypeError: the pixels are not uint8.
    """
    t = _checks.tensor("pixels", pixels)
    if t.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8, got {t.dtype}")
    noise = torch.rand(t.shape, generator=generator, device=t.device)
    return (t + noise) / 127.5 - 1


def quantise(x: torch.Tensor) -> torch.Tensor:
    """Undoes `dequantise`: the level below each number, as uint8."""
    return ((x.float() + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class RoundTrip:
    """How far inverse(flow(x)) is from x.

    largest, mean   of |inverse(flow(x)) - x|
    logdet          the largest |log-determinant of the flow + that of its inverse| of an example
    """

    largest: float
    mean: float
    logdet: float


@torch.no_grad()
def round_trip(
    flow: nn.Module,
    x: torch.Tensor,
    context: torch.Tensor | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16, torch.float16),
) -> dict[torch.dtype, RoundTrip]:
    """Errors of a flow and its inverse, with parameters and data in each of these dtypes.

    Args:
        flow: a model with `inverse_with_logdet`, such as `vlkern.models.jet.Jet`; is not changed.
        x: its input.
        context: its context, if it has one.
        dtypes: to try.

    Returns:
        dtype -> errors, measured in float64 from the input as that dtype holds it. A flow that overflows has errors
        that are not finite.

    Example:
        >>> errors = vlkern.flows.round_trip(flow, x)
        >>> errors[torch.float32].largest < 1e-4
        True
    """
    found = {}
    for dtype in dtypes:
        model: Any = copy.deepcopy(flow).to(dtype)
        start = x.to(dtype)
        given = None if context is None else context.to(dtype)
        z, logdet = model(start, given)
        back, undone = model.inverse_with_logdet(z, given)
        error = (back.double() - start.double()).abs()
        found[dtype] = RoundTrip(float(error.max()), float(error.mean()), float((logdet + undone).abs().max()))
    return found
