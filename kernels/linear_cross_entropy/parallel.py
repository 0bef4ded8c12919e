"""The vocabulary's cross-entropy when the ranks of a group hold slices of its rows.

Every rank has all T hidden states and computes the logits of its own classes. A token's loss is made of three sums over
classes, so 3 T numbers travel: once to find the largest lse, once to add up. In the backward each rank's share of
d_hidden [T, D] is added up; the gradients of its own rows stay where they are. docs/distributed.md counts the bytes.
"""

from typing import Any

import torch
import torch.distributed as dist

from vlkern import _checks
from vlkern._group import Group
from vlkern.kernels.linear_cross_entropy import IGNORED, Tokens, check_range, losses_of, sums_of_tokens


class Slices(Group):
    """What one rank knows of the group."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.classes = 0  # of all ranks, once they are known

    def combine(
        self, lse: torch.Tensor, own: torch.Tensor, total: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three sums [T] of the whole vocabulary from those of the slices; zeros for tokens that do not count."""
        largest = lse.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        exps, own, total = self.sum(torch.stack([torch.exp(lse - largest), own, total]))
        return (largest + exps.log()).masked_fill(target < 0, 0), own, total


@torch.compiler.disable
def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    softcap: float | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    backend: str,
    differentiate: bool,
    group: Any,
) -> torch.Tensor:
    """The losses [T] over the whole vocabulary, the same on every rank; targets < 0 are ignored.

    The gradient of hidden takes it that every rank backpropagates the same grad_output. Compiled callers break their
    graph here: this is communication around ops that are compiled already.

    Raises:
        TypeError: group is no ProcessGroup.
        ValueError: group cannot be used; or, on every rank, ranks differ in hidden's shape or dtype or in the presence
            of gradients (unchecked, such ranks would hang), or a target is out of range.
    """
    across = Slices(group)
    row = [*hidden.shape, _checks.FLOATS.index(hidden.dtype), differentiate and hidden.requires_grad, weight.shape[0]]
    rows = across.gather(torch.tensor(row, device=hidden.device))
    for rank, other in enumerate(rows):
        if other[:4] != rows[0][:4]:
            one, two = (
                f"[{t}, {d}] {_checks.FLOATS[kind]}" + ", with grad" * grad for t, d, kind, grad, _ in (rows[0], other)
            )
            raise ValueError(f"hidden must be alike on every rank of group, got {one} on rank 0, {two} on rank {rank}")
    counts = [other[4] for other in rows]
    across.classes, first = sum(counts), sum(counts[: across.rank])
    check_range(target, across.classes, IGNORED)
    local = target - first
    elsewhere = (target >= 0) & ((local < 0) | (local >= weight.shape[0]))
    local = local.masked_fill(elsewhere, weight.shape[0]).masked_fill(target < 0, IGNORED)
    if differentiate:
        losses: torch.Tensor = Tokens.apply(
            hidden, weight, bias, local, softcap, scale, smoothing, z_loss, backend, across
        )
        return losses
    lse, own, total = sums_of_tokens[backend](hidden, weight, bias, local, softcap, scale)
    return losses_of(*across.combine(lse, own, total, local), smoothing, across.classes, z_loss)
