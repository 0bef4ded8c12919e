"""GeGLU in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [...] -> y [...] in their dtype."""
    return (F.gelu(_wide(gate), approximate="tanh") * _wide(up)).to(gate.dtype).contiguous()


def geglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sum(y * grad): dgate, dup [...]."""
    g, z = _wide(grad), _wide(gate)
    near = z.clamp(-16, 16)  # beyond, the slope is 0 or 1, and z^3 may be no float32
    dgate = torch.ops.aten.gelu_backward(g * _wide(up), near, approximate="tanh")
    dup = g * F.gelu(z, approximate="tanh")
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()
