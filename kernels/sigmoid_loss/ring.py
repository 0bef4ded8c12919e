"""The sigmoid loss of a batch that is spread over W ranks: the texts travel round a ring, the images stay.

A rank holds b pairs and computes W blocks [b, b] of the global matrix: its images against the texts of every rank.
While it works on one block the next texts are on their way. The gradient of each rank's texts follows one block behind
them, collects a share on every rank and comes home while its owner works on its own block, the last.
docs/distributed.md draws it and counts the bytes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._group import Group
from vlkern.kernels.sigmoid_loss import gradients_of_block, loss_of_block

#: (texts [b, D], their mask, are they this rank's own) -> loss [], or loss and gradients
_Block = Callable[[torch.Tensor, torch.Tensor | None, bool], Any]


class _Hop:
    """Tensors on their way to the next rank, and their like coming from the previous one; None stands for no mask."""

    def __init__(self, ring: "_Ring", tensors: tuple[torch.Tensor | None, ...]) -> None:
        self._sent = [None if t is None else t.contiguous() for t in tensors]
        self._arriving = [None if t is None else torch.empty_like(t) for t in self._sent]
        group = ring.group
        sends = [dist.P2POp(dist.isend, t, group=group, group_peer=ring.next) for t in self._sent if t is not None]
        receives = [
            dist.P2POp(dist.irecv, t, group=group, group_peer=ring.prev) for t in self._arriving if t is not None
        ]
        # One batch, which NCCL runs as a unit: two ranks that are each other's neighbour do not wait in a circle.
        self._works = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> list[Any]:
        """What has arrived, once ours has left, which is let go: two buffers of each kind are alive, not three."""
        for work in self._works:
            work.wait()
        arrived = self._arriving
        self._sent, self._arriving, self._works = [], [], []
        return arrived


class _Ring(Group):
    """The ranks of a group in a circle."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.next, self.prev = (self.rank + 1) % self.size, (self.rank - 1) % self.size

    def pass_on(self, *tensors: torch.Tensor | None) -> _Hop:
        """Start the next hop of these tensors."""
        return _Hop(self, tensors)


def _check_alike(ring: _Ring, image: torch.Tensor, masked: bool, differentiate: bool) -> None:
    """Ranks that disagree on what to send would wait for each other for ever: raise on all of them instead."""
    row = [*image.shape, _checks.FLOATS.index(image.dtype), masked, differentiate]
    shown = [
        {
            "image": f"[{b}, {d}] {_checks.FLOATS[dtype]}",
            "valid": "a mask" if has_mask else "None",
            "requires_grad": "True" if has_grad else "False",
        }
        for b, d, dtype, has_mask, has_grad in ring.gather(torch.tensor(row, device=image.device))
    ]
    for rank, other in enumerate(shown):
        for name, got in other.items():
            if got != shown[0][name]:
                raise ValueError(
                    f"{name} must be alike on every rank of group, got {shown[0][name]} on rank 0, {got} on rank {rank}"
                )


def _loss(ring: _Ring, block: _Block, text: torch.Tensor, text_valid: torch.Tensor | None) -> torch.Tensor:
    """This rank's loss []. The own block comes first, while the first texts are on their way."""
    shares: list[torch.Tensor] = []
    for left in reversed(range(ring.size)):
        arriving = ring.pass_on(text, text_valid) if left else None
        shares.append(block(text, text_valid, not shares))
        if arriving:
            text, text_valid = arriving.wait()
    return torch.stack(shares).sum()


def _gradients(
    ring: _Ring, block: _Block, text: torch.Tensor, text_valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's loss [] with its d_image [b, D], d_scale [], d_bias [], and d_text [b, D] of all ranks' losses.

    Shares are summed in float32. The own block comes last, while d_text is on its last hop.
    """
    arriving = ring.pass_on(text, text_valid) if ring.size > 1 else None
    sums: list[torch.Tensor] = []
    homeward = None
    for left in reversed(range(ring.size)):
        texts, mask = arriving.wait() if arriving else (text, text_valid)
        arriving = ring.pass_on(texts, mask) if left > 1 else None
        loss, d_image, d_text, d_scale, d_bias = block(texts, mask, left == 0)
        dtype, wide = d_image.dtype, torch.promote_types(d_image.dtype, torch.float32)
        shares = [loss, d_image, d_scale, d_bias]
        sums = [s.add_(share) for s, share in zip(sums, shares, strict=True)] if sums else [s.to(wide) for s in shares]
        d_text = homeward.wait()[0].add_(d_text) if homeward else d_text.to(wide)
        homeward = ring.pass_on(d_text) if left else None
        del shares, loss, d_image, d_scale, d_bias  # before the next block is computed
    loss, d_image, d_scale, d_bias = sums
    return loss, d_image.to(dtype), d_text.to(dtype), d_scale, d_bias


class _RingLoss(torch.autograd.Function):
    """All communication happens in the forward sweep; the backward only multiplies by grad_output."""

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        ring: _Ring,
        block: _Block,
        text_valid: torch.Tensor | None,
    ) -> torch.Tensor:
        loss, *gradients = _gradients(ring, block, text, text_valid)
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.ring = image.dtype, ring
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if _checks.values_may_be_read(grad):
            # d_text holds shares of all ranks' losses, but is multiplied by this rank's grad_output.
            grads = [row[0] for row in ctx.ring.gather(grad.reshape(1))]
            if len(set(map(str, grads))) > 1:  # as text, NaN equals NaN
                raise ValueError(f"the gradient of the loss must be the same on every rank of group, got {grads}")
        d_image, d_text, d_scale, d_bias = (g * grad for g in ctx.saved_tensors)
        return d_image.to(ctx.dtype), d_text.to(ctx.dtype), d_scale, d_bias, None, None, None


@torch.compiler.disable
def sigmoid_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    count: torch.Tensor,
    image_valid: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    group: Any,
    backend: str,
    differentiate: bool,
) -> torch.Tensor:
    """This rank's share L_r of the loss: the mean over ranks is the loss L of the global batch of B pairs.

        L_r = (W / B) sum over rank r's images and the texts of all ranks        L = (1 / W) sum_r L_r

    What rank r gets, as from open_clip's loss, so that averaging the gradients of parameters over ranks, as
    DistributedDataParallel does, gives those of L:

        image   dL_r/dimage     = W dL/dimage          scale   dL_r/dscale, whose mean over ranks is dL/dscale
        text    sum_s dL_s/dtext = W dL/dtext          bias    dL_r/dbias, likewise

    The text gradient takes it that every rank backpropagates the same grad_output (checked where values may be read).
    Compiled callers break their graph here: the ring is communication around ops that are compiled already.

    Raises:
        TypeError: group is no ProcessGroup.
        ValueError: group cannot be used; or, on every rank, ranks differ in shape, dtype, or the presence of masks or
            of gradients (CPU tensors, elsewhere with `vlkern.validate(True)`; unchecked, such ranks would hang).
    """
    ring = _Ring(group)
    masked = image_valid is not None
    if _checks.values_may_be_read(image):
        _check_alike(ring, image, masked, differentiate)
    weight = ring.size / ring.sum(count).clamp(min=1) if masked else 1 / count
    op = (gradients_of_block if differentiate else loss_of_block)[backend]

    def block(texts: torch.Tensor, mask: torch.Tensor | None, own: bool) -> Any:
        return op(image, texts, scale, bias, weight, image_valid, mask, own)

    if differentiate:
        result: torch.Tensor = _RingLoss.apply(image, text, scale, bias, ring, block, text_valid)
        return result
    return _loss(ring, block, text, text_valid)
