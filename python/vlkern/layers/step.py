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


def untouched(*modules: nn.Module) -> bool:
    """Does a call of these modules do what their classes say: are there no hooks, and no layers of another kind?

    A `Linear` that was replaced (LoRA, quantisation) or is being watched must be called as a module.
    """
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if type(module) is not RMSNorm and not (type(module) is Linear and module.bias is None is module.activation):
            return False
    return True
