"""The menu: every public op, one line each."""

from vlkern.kernels.decode_attention import decode_attention
from vlkern.kernels.interval_attention import interval_attention, interval_attention_lse
from vlkern.kernels.linear import linear
from vlkern.kernels.rms_norm import rms_norm
from vlkern.kernels.sigmoid_loss import sigmoid_contrastive_loss

__all__ = [
    "decode_attention",
    "interval_attention",
    "interval_attention_lse",
    "linear",
    "rms_norm",
    "sigmoid_contrastive_loss",
]
