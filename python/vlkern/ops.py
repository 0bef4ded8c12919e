"""The menu: every public op, one line each."""

from vlkern.kernels.coupling import affine_coupling, affine_coupling_inverse
from vlkern.kernels.decode_attention import decode_attention
from vlkern.kernels.decode_linear import decode_linear
from vlkern.kernels.fsq import fsq_dequantize, fsq_quantize
from vlkern.kernels.geglu import geglu
from vlkern.kernels.gmm_nll import gmm_nll
from vlkern.kernels.gmm_sample import gmm_guided_sample, gmm_sample
from vlkern.kernels.interval_attention import interval_attention, interval_attention_lse
from vlkern.kernels.linear import linear
from vlkern.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from vlkern.kernels.linear_gmm_nll import linear_gmm_nll
from vlkern.kernels.masked_decode_step import masked_decode_step
from vlkern.kernels.mixture_bits import mixture_bits
from vlkern.kernels.mixture_cdf import mixture_cdf, mixture_window
from vlkern.kernels.norm_rope import norm_rope
from vlkern.kernels.rms_norm import rms_norm
from vlkern.kernels.rope_append import rope_append
from vlkern.kernels.sigmoid_loss import sigmoid_contrastive_loss

__all__ = [
    "affine_coupling",
    "affine_coupling_inverse",
    "decode_attention",
    "decode_linear",
    "fsq_dequantize",
    "fsq_quantize",
    "geglu",
    "gmm_guided_sample",
    "gmm_nll",
    "gmm_sample",
    "interval_attention",
    "interval_attention_lse",
    "linear",
    "linear_cross_entropy",
    "linear_gmm_nll",
    "linear_log_probs",
    "masked_decode_step",
    "mixture_bits",
    "mixture_cdf",
    "mixture_window",
    "norm_rope",
    "rms_norm",
    "rope_append",
    "sigmoid_contrastive_loss",
]
