"""Linear layer with an activation, in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] -> y [M, N]."""
    z = F.linear(x, weight, bias)
    return F.gelu(z, approximate="tanh") if gelu else z


def linear_training(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with GELU: y and what its backward needs, z [M, N]."""
    z = F.linear(x, weight, bias)
    return F.gelu(z, approximate="tanh"), z


def linear_slope(grad: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """G = grad * gelu'(z) [M, N] and its column sums [N], the gradient of the bias."""
    g = torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    return g, g.sum(0)


def linear_product(a: torch.Tensor, b: torch.Tensor, transposed: bool) -> torch.Tensor:
    """a b, or a^T b: what makes dx = G W and dW = G^T x."""
    return (a.t() if transposed else a) @ b
