"""The menu: every public op, one line each."""

from vlkern.kernels.linear import linear
from vlkern.kernels.rms_norm import rms_norm
from vlkern.kernels.sigmoid_loss import sigmoid_contrastive_loss

__all__ = ["linear", "rms_norm", "sigmoid_contrastive_loss"]
