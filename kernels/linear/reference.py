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


def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, needs_dx: bool, needs_dw: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of sum(y * grad): dx [M, K], dweight [N, K], dbias [N]; those not needed are empty."""
    g = grad if z is None else torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    dx = g @ weight if needs_dx else g.new_empty(0)
    dweight = g.t() @ x if needs_dw else g.new_empty(0)
    return dx, dweight, g.sum(0)
