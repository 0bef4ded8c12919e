"""Rotary position embedding: the angles. `ops.norm_rope` and `ops.rope_append` turn queries and keys by them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rope:
    """cos and sin of position / scale * base^(-2 j / head_dim), j < head_dim / 2.

    A layer turns the pairs (j, j + head_dim / 2) of every query and key by these angles. Layers with the same base
    share them: compute them once per forward.

    head_dim  channels of a head, even
    base      of the frequencies: 10000, or 1e6 in Gemma 3's global layers
    scale     positions are divided by it: 8 in the global layers of Gemma 3 4B and larger (linear interpolation)

    Raises ValueError when head_dim is not even and positive, or base or scale not positive.

    Source: Su et al., RoFormer, 2021; Chen et al., Extending Context Window via Positional Interpolation, 2023.

    Example:
        >>> cos, sin = Rope(64, base=10000.0)(torch.arange(5))
        >>> cos.shape
        torch.Size([5, 32])
    """

    head_dim: int
    base: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and positive, got {self.head_dim}")
        if not (self.base > 0 and self.scale > 0):
            raise ValueError(f"base and scale must be positive, got {self.base} and {self.scale}")

    def __call__(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [T], any integer dtype -> cos, sin [T, head_dim / 2] in float32.

        The angles are float64: in float32 those of position 100,000 would be off by 0.004.
        """
        j = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions_T.device)
        frequency = self.base ** (j / -self.head_dim) / self.scale
        angle = positions_T.double()[:, None] * frequency
        return angle.cos().float(), angle.sin().float()
