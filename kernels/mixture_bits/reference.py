"""The bits of symbols under mixtures of Gaussians in plain PyTorch: the definition."""

import math

import torch

#: The range of the logarithms of scales.
LOWEST, HIGHEST = math.log(0.11), math.log(256)
#: The least probability, and its bits.
LEAST = 1e-9
MOST_BITS = -math.log2(LEAST)
#: Bounds of a distance in units of its scale: in slopes, and in weights, where its square must be a float32.
STEEP, FARTHEST = 128.0, 1e9


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


class Terms:
    """All that bits and gradients are made of, [N, K, C]: Phi((y + 1/2 - mu) / s) - Phi((y - 1/2 - mu) / s) and so on.

    The difference does not change with the sign of y - mu. With d = |y - mu| / s and h = 1 / (2 s) it is
    Q(d - h) - Q(d + h), Q(x) = Phi(-x) = exp(-x^2 / 2) R(x), both of them small where the difference is:

        a = d - h > 0:   exp(-a^2 / 2) (R(a) - exp(-2 d h) R(b)),  b = d + h
        else:            (erf(b / sqrt 2) - erf(a / sqrt 2)) / 2
    """

    def __init__(self, symbols: torch.Tensor, params: torch.Tensor) -> None:
        wide = _wide(params)
        logits, means, self.raw = wide.unbind(1)
        self.inverse = (-self.raw.clamp(LOWEST, HIGHEST)).exp()
        away = symbols.to(wide.dtype)[:, None] - means
        self.side, h, root = away.sign(), 0.5 * self.inverse, math.sqrt(0.5)
        far = (away.abs() * self.inverse).clamp(max=FARTHEST)
        d = far.clamp(max=STEEP)
        self.a, self.b, self.fall = d - h, d + h, torch.expm1(-2 * d * h)
        inside = self.a < 0
        ratio = torch.special.erfcx(self.a.abs() * root) - (1 + self.fall) * torch.special.erfcx(self.b * root)
        self.density = 0.5 * torch.where(inside, torch.erf(self.b * root) - torch.erf(self.a * root), ratio)
        self.exponent = torch.where(inside, 0, 0.5 * (far - h).square())
        #: phi(a) / (Phi(b) - Phi(a))
        edge = torch.where(inside, torch.exp(-0.5 * self.a.square()), 1) / math.sqrt(2 * math.pi)
        self.edge = edge / self.density
        self.log_weights = logits.log_softmax(1)
        self.log_shares = self.log_weights + self.density.log() - self.exponent


def mixture_bits(symbols: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """-log2 max(P, 1e-9) in float32, float64 for float64. symbols [N, C], params [N, 3, K, C] -> [N, C]."""
    if params.is_meta:  # a compiler would think for seconds about what the definition does
        return symbols.new_empty(symbols.shape, dtype=torch.promote_types(params.dtype, torch.float32))
    log_p = Terms(symbols, params).log_shares.logsumexp(1)
    return (log_p * -math.log2(math.e)).clamp(0, MOST_BITS)


def mixture_bits_backward(
    grad: torch.Tensor, symbols: torch.Tensor, params: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sum(-grad log2 P): d_symbols [N, C] and d_params [N, 3, K, C], each in the dtype of its tensor."""
    if params.is_meta:
        return symbols.new_empty(symbols.shape), params.new_empty(params.shape)
    t = Terms(symbols, params)
    g = -math.log2(math.e) * grad.to(t.a.dtype)[:, None]
    share = g * t.log_shares.softmax(1)
    d_logits = share - g * t.log_weights.exp()
    pull = share * t.side * t.inverse * t.fall * t.edge
    d_raw = share * (t.a - (1 + t.fall) * t.b) * t.edge
    outward = ((t.raw < LOWEST) & (d_raw >= 0)) | ((t.raw > HIGHEST) & (d_raw <= 0))
    d_params = torch.stack([d_logits, -pull, d_raw.masked_fill(outward, 0)], 1)
    return pull.sum(1).to(symbols.dtype), d_params.to(params.dtype)
