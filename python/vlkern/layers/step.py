"""When `ops.decode_linear` may stand in for linear layers and the norms around them."""

import torch
from torch import nn

from vlkern.kernels.decode_linear import MOST_ROWS
from vlkern.layers.linear import Linear
from vlkern.layers.norm import RMSNorm


def is_step(x_TD: torch.Tensor) -> bool:
    """A few tokens on the CPU, as in decoding: without a gradient, and outside of autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return x_TD.is_cpu and x_TD.shape[0] <= MOST_ROWS


def plain_weights(module: nn.Module, *containers: type[nn.Module]) -> dict[str, torch.Tensor] | None:
    """The weights of a module's norms and of its linear layers without bias, by the names of these; of containers' too.

    None if a call of one of them does more than its class says: somebody waits for what it gives (hooks), or has put
    something else in its place (LoRA, quantisation). Then it must be called as a module.
    """
    weights: dict[str, torch.Tensor] = {}
    # Module.__getattr__ would take a microsecond or two for each name, as long as many a kernel.
    for name, part in module._modules.items():
        if part is None:
            continue
        if part._forward_hooks or part._forward_pre_hooks:
            return None
        kind = type(part)
        if kind in containers:
            if (inner := plain_weights(part)) is None:
                return None
            weights |= inner
        elif kind is RMSNorm or (kind is Linear and part._parameters["bias"] is None is part.activation):
            weights[name] = part._parameters["weight"]  # type: ignore[assignment]
        else:
            return None
    return weights
