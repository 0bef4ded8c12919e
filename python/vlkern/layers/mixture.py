"""Mixtures of Gaussians as what a network says of a continuous token z [d]: layouts, densities, draws.

    scale = max(s(raw), 1e-6)     s(x) = (x + sqrt(x^2 + 4)) / 2, the squareplus; a softplus without exp

    "joint"         P = k (1 + 2 d): k logits, then [k, 2, d] means and raw scales
                    p(z) = sum_k pi_k prod_d N(z_d; mean_kd, scale_kd)
    "per_channel"   P = 3 k d: [3 d, k], cut into logits, means and raw scales [d, k]: a mixture for each channel
    "multivariate"  P = d^2 + d, k = 1: [d, d] raw, of which the lower triangle of s(raw), with at least 1e-6 on its
                    diagonal, is the Cholesky factor of the covariance; then d means. The factor has no negative entry.

Temperatures multiply the scales (the standard deviations) and the logits.

    B rows of any shape   d channels of a token   k components   P parameters of a token

Source: Tschannen et al., GIVT, 2023, and its released code.
"""

import math

import torch
from torch import nn

from vlkern import _mixture, ops
from vlkern.layers.linear import Linear

LAYOUTS = (*_mixture.LAYOUTS, "multivariate")
MIN_SCALE = 1e-6
#: Equal components have equal gradients and would stay equal for ever: their means start so far apart, in units of the
#: first scale. With 0.01 the first steps of Adam, which are as large for all, bring them together before they part.
SPREAD = 0.3


def parameters(layout: str, channels: int, components: int) -> int:
    """P.

    Raises:
        ValueError: no such layout, sizes that are not positive, or several components of a multivariate normal.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    for name, value in (("channels", channels), ("components", components)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if layout == "multivariate":
        if components != 1:
            raise ValueError(f"components must be 1 with layout multivariate, got {components}")
        return channels * (channels + 1)
    return components * (1 + 2 * channels if layout == "joint" else 3 * channels)


def squareplus(x: torch.Tensor) -> torch.Tensor:
    """(x + sqrt(x^2 + 4)) / 2, without cancellation where x is negative."""
    root = (x.square() + 4).sqrt()
    return torch.where(x > 0, (x + root) / 2, 2 / (root - x))


class MixtureHead(nn.Module):
    """The last linear layer, and the density that its outputs stand for.

    Args:
        width: D of what comes in.
        channels: d.
        components: k.
        layout: one of LAYOUTS.
        legacy: s(x) = x + sqrt(x^2 + 4) / 2, as in early code; where that is negative the scale is 1e-6.

    Raises:
        ValueError: no such layout or sizes.

    Example:
        >>> head = vlkern.layers.mixture.MixtureHead(64, channels=8, components=4)
        >>> head.nll(torch.randn(5, 64), torch.randn(5, 8)).shape
        torch.Size([5])
    """

    def __init__(
        self, width: int, channels: int, components: int, layout: str = "joint", *, legacy: bool = False
    ) -> None:
        super().__init__()
        self.channels, self.components, self.layout, self.legacy = channels, components, layout, legacy
        self.linear = Linear(width, parameters(layout, channels, components))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            nn.init.normal_(self._split(self.linear.bias)[1], std=SPREAD)

    @property
    def outputs(self) -> int:
        """P."""
        return self.linear.out_features

    def _split(self, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views: logits, means and raw scales; joint [B, k], [B, k, d], [B, k, d], per channel [B, d, k] each."""
        if self.layout != "multivariate":
            return _mixture.split(params, self.channels, self.layout)
        d = self.channels
        raw, loc = params.split([d * d, d], -1)
        return params[..., :0], loc, raw.unflatten(-1, (d, d))

    def _joined(self, logits: torch.Tensor, loc: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """Undoes `_split`, for mixtures."""
        if self.layout == "joint":
            return torch.cat([logits, torch.stack([loc, raw], -2).flatten(-3)], -1)
        return torch.stack([logits, loc, raw], -3).flatten(-3)

    def _scale(self, raw: torch.Tensor) -> torch.Tensor:
        return raw + (raw.square() + 4).sqrt() / 2 if self.legacy else squareplus(raw)

    def _factor(self, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means [B, d] and Cholesky factors [B, d, d] of multivariate normals."""
        _, loc, raw = self._split(params)
        floor = torch.eye(self.channels, dtype=raw.dtype, device=raw.device) * MIN_SCALE
        return loc, torch.maximum(self._scale(raw), floor).tril()

    def tempered(
        self, params: torch.Tensor, temperature: float = 1.0, mixture_temperature: float = 1.0
    ) -> torch.Tensor:
        """Parameters [B, P] of a mixture whose scales and logits are multiplied, as `ops.gmm_nll` reads them.

        They are float32 at least. Without temperatures, and unless the head is of the legacy form, nothing changes.
        """
        params = params.to(torch.promote_types(params.dtype, torch.float32))
        if temperature == mixture_temperature == 1.0 and not self.legacy:
            return params
        logits, loc, raw = self._split(params)
        scale = self._scale(raw).clamp(min=MIN_SCALE) * temperature
        return self._joined(logits * mixture_temperature, loc, scale - 1 / scale)  # the inverse of the squareplus

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, D] -> parameters [B, P], as in the layouts above."""
        return self.linear(hidden)

    def log_prob(
        self,
        params: torch.Tensor,
        z: torch.Tensor,
        *,
        temperature: float = 1.0,
        mixture_temperature: float = 1.0,
    ) -> torch.Tensor:
        """log p(z).

        Args:
            params: [B, P], what `forward` gave.
            z: [B, d].
            temperature: of the scales.
            mixture_temperature: of the logits.

        Returns:
            [B] float32; [B, d] for layout per_channel, whose sum over channels is that of the token.

        Raises:
            TypeError, ValueError: as `ops.gmm_nll`.
        """
        if self.layout != "multivariate":
            return -ops.gmm_nll(self.tempered(params, temperature, mixture_temperature), z, layout=self.layout)
        loc, factor = self._factor(params.to(torch.promote_types(params.dtype, torch.float32)))
        factor = factor * temperature
        white = torch.linalg.solve_triangular(factor, (z - loc).unsqueeze(-1), upper=False).squeeze(-1)
        volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -(white.square().sum(-1) + self.channels * math.log(2 * math.pi)) / 2 - volume

    def nll(self, hidden: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """-log p(z), in nats, from what comes into the layer.

        Args:
            hidden: [B, D].
            z: [B, d].

        Returns:
            [B] float32; per channel summed over them.

        Raises:
            TypeError, ValueError: as `ops.linear_gmm_nll`.
        """
        rows, target = hidden.flatten(0, -2), z.flatten(0, -2)
        if self.legacy or self.layout == "multivariate":
            found = -self.log_prob(self(rows), target)
        else:
            found = ops.linear_gmm_nll(rows, self.linear.weight, self.linear.bias, target, layout=self.layout)
        return (found.sum(-1) if self.layout == "per_channel" else found).unflatten(0, z.shape[:-1])

    def mode(self, params: torch.Tensor) -> torch.Tensor:
        """[B, P] -> [B, d]: the mean of the heaviest component."""
        logits, loc, _ = self._split(params)
        if self.layout == "multivariate":
            return loc
        heaviest = logits.argmax(-1, keepdim=True)
        if self.layout == "per_channel":
            return loc.gather(-1, heaviest).squeeze(-1)
        return loc.gather(-2, heaviest.unsqueeze(-1).expand(*heaviest.shape, self.channels)).squeeze(-2)

    def sample(
        self,
        params: torch.Tensor,
        *,
        temperature: float = 1.0,
        mixture_temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """A draw from each density, [B, P] -> [B, d] float32.

        Raises:
            TypeError, ValueError: as `ops.gmm_sample`.
        """
        if self.layout == "multivariate":
            loc, factor = self._factor(params.to(torch.promote_types(params.dtype, torch.float32)))
            noise = torch.empty_like(loc).normal_(generator=generator)
            return loc + temperature * (factor @ noise.unsqueeze(-1)).squeeze(-1)
        return ops.gmm_sample(
            self.tempered(params), dims=self.channels, layout=self.layout, temperature=temperature,
            mixture_temperature=mixture_temperature, generator=generator,
        )  # fmt: skip

    def guided_sample(
        self,
        params: torch.Tensor,
        unconditional: torch.Tensor,
        *,
        guidance: float,
        temperature: float = 1.0,
        mixture_temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """A draw from p(z)^(1 + guidance) / q(z)^guidance, [B, P] of p and of q -> [B, d] float32.

        Raises:
            TypeError, ValueError: as `ops.gmm_guided_sample`; the layout is multivariate.
        """
        if self.layout == "multivariate":
            raise ValueError(f"layout must be joint or per_channel for guidance, got {self.layout}")
        return ops.gmm_guided_sample(
            self.tempered(params), self.tempered(unconditional), dims=self.channels, guidance=guidance,
            layout=self.layout, temperature=temperature, mixture_temperature=mixture_temperature, generator=generator,
        )  # fmt: skip
