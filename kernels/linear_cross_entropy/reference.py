"""The vocabulary's cross-entropy in plain PyTorch: the definition. It holds the [T, V] logits; the kernels do not.

Classes are rows of `weight`. A target < 0 takes its token out (zeros, whatever its hidden state holds); a target >= V
is a class of another rank's slice of the vocabulary: the token counts, but none of these logits is its own.
"""

import torch

_Float = torch.Tensor


def _logits(
    hidden: _Float, weight: _Float, bias: _Float | None, target: torch.Tensor, softcap: float | None, scale: float
) -> tuple[_Float, _Float, _Float, torch.Tensor, torch.Tensor]:
    """float32 (float64 for float64) x [T, D], w [V, D], z [T, V]; whether own [T, V], whether it counts [T, 1]."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counts = target[:, None] >= 0
    x, w = hidden.to(wide).masked_fill(~counts, 0), weight.to(wide)
    z = x @ w.T if bias is None else x @ w.T + bias
    z = scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    own = torch.arange(w.shape[0], device=target.device) == target[:, None]
    return x, w, z, own, counts


def _sums(z: _Float, own: torch.Tensor, counts: torch.Tensor) -> tuple[_Float, _Float, _Float]:
    lse, of_target, total = z.logsumexp(1), z.masked_fill(~own, 0).sum(1), z.sum(1)
    skip = ~counts[:, 0]
    return lse.masked_fill(skip, 0), of_target.masked_fill(skip, 0), total.masked_fill(skip, 0)


def linear_cross_entropy(
    hidden: _Float, weight: _Float, bias: _Float | None, target: torch.Tensor, softcap: float | None, scale: float
) -> tuple[_Float, _Float, _Float]:
    """Of each token's logits z_tv: log sum_v exp(z_tv), that of its target, and sum_v z_tv.

    z = scale * (hidden weight^T + bias), after it softcap * tanh(z / softcap). hidden [T, D], weight [V, D], bias [V],
    target [T] int64. Returns three [T] float32.
    """
    _, _, z, own, counts = _logits(hidden, weight, bias, target, softcap, scale)
    return _sums(z, own, counts)


def linear_cross_entropy_grad(
    hidden: _Float,
    weight: _Float,
    bias: _Float | None,
    target: torch.Tensor,
    share: _Float,
    lse: _Float,
    softcap: float | None,
    scale: float,
    smoothing: float,
    classes: int | None,
    z_loss: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[_Float, _Float, _Float]:
    """Gradients of sum_t share_t loss_t, given share and lse [T]; by `classes` (None: V) smoothing is divided.

    loss_t = lse_t - (1 - smoothing) z_ty - smoothing / classes sum_v z_tv + z_loss lse_t^2.

    d_hidden [T, D] and d_weight [V, D] in the input's dtype, but float32 for float16, whose range they may leave; no
    rows where not asked for. d_bias [V] float32, without rows if there is no bias.
    """
    x, w, z, own, counts = _logits(hidden, weight, bias, target, softcap, scale)
    g = torch.exp(z - lse[:, None]) * (1 + 2 * z_loss * lse[:, None]) - (1 - smoothing) * own
    if smoothing:
        g = g - g.new_full((), smoothing) / (weight.shape[0] if classes is None else classes)
    g = (share[:, None] * g).masked_fill(~counts, 0)
    if softcap is not None:
        g = g * (1 - (z / softcap).square())
    g = scale * g
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    d_hidden = (g @ w if of_hidden else x[:0]).to(dtype)
    d_weight = (g.T @ x if of_weight else w[:0]).to(dtype)
    return d_hidden.contiguous(), d_weight.contiguous(), g.sum(0) if bias is not None else g.new_empty(0)


def linear_cross_entropy_sweep(
    hidden: _Float,
    weight: _Float,
    bias: _Float | None,
    target: torch.Tensor,
    share: _Float,
    softcap: float | None,
    scale: float,
    smoothing: float,
    classes: int | None,
    z_loss: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[_Float, _Float, _Float, _Float, _Float, _Float]:
    """The results of the two others, logits computed once: three matmuls where they take four."""
    sums = linear_cross_entropy(hidden, weight, bias, target, softcap, scale)
    rest = softcap, scale, smoothing, classes, z_loss, of_hidden, of_weight
    return *sums, *linear_cross_entropy_grad(hidden, weight, bias, target, share, sums[0], *rest)
