"""One update of the parameters: forward, backward, clipping, optimizer. The same on one process and on many."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of one that FSDP cut into parts; others as they are. Called on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def update(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    batch: tuple[torch.Tensor, ...],
    *,
    clip: float,
    autocast: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on this batch.

    Args:
        objective: called with the batch, gives the loss []; wrapped by DDP or FSDP where there are several ranks.
        optimizer: its groups have a "multiple" of the learning rate.
        rate: learning rate of this step.
        batch: this rank's part.
        clip: the gradient, over all parameters and ranks, is scaled down to this norm.
        autocast: run the objective in bfloat16 where that is safe.

    Returns:
        Loss [] before the update, and norm [] of the gradient before clipping; float32, on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiple"]
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=autocast):
        loss = objective(*batch)
    optimizer.zero_grad()
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    return loss.detach(), whole(norm)
