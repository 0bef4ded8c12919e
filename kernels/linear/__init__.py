"""A linear layer with its activation; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.linear import reference, samples

ACTIVATIONS = (None, "gelu_tanh")


def _bind(x: Any, weight: Any, bias: Any = None, *, activation: Any = None) -> tuple[Any, ...]:
    x, weight = _checks.floating("x", x), _checks.floating("weight", weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape [N, K] with K >= 1, got {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have shape [..., {weight.shape[1]}], got {list(x.shape)}")
    if bias is not None:
        _checks.shape("bias", _checks.floating("bias", bias), (weight.shape[0],))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'gelu_tanh', got {activation!r}")
    if (dtype := _checks.autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    _checks.same("weight", weight, "x", x)
    if bias is not None:
        _checks.same("bias", bias, "x", x)
    return x, weight, bias, activation is not None


#: Which 16-bit dtypes PyTorch multiplies fast on this CPU. Asked once: torch.compile cannot trace the question.
_NATIVE = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


#: Up to so many rows, as in decoding, the layer is bound by reading its weight, whatever the dtype (few_rows.h).
FEW_ROWS = 16


def _limits(backend: str, x: torch.Tensor, *rest: torch.Tensor) -> str | None:
    if backend == "cpu" and x.numel() > FEW_ROWS * x.shape[-1] and _NATIVE.get(x.dtype, False):
        return f"this CPU multiplies {str(x.dtype)[6:]} natively, and PyTorch's matmul does that faster"
    return None


_op = Op(
    "linear",
    public="linear",
    schemas={
        "linear": "(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
        "linear_training": "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
        "linear_slope": "(Tensor grad, Tensor z) -> (Tensor, Tensor)",
        "linear_product": "(Tensor a, Tensor b, bool transposed) -> Tensor",
    },
    reference=reference,
    backends=("cpu",),
    bind=_bind,
    work=samples.work,
    limits=_limits,
)
_forward, _training = _op.raw["linear"], _op.raw["linear_training"]
_slope, _product = _op.raw["linear_slope"], _op.raw["linear_product"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool, backend: str
    ) -> Any:
        z = None
        if gelu:
            y, z = _training[backend](x, weight, bias)
        else:
            y = _forward[backend](x, weight, bias, False)
        ctx.save_for_backward(x, weight, z)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, z = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        g, dbias = (grad, grad.sum(0) if needs_db else None) if z is None else _slope[ctx.backend](grad, z)
        dx = _product[ctx.backend](g, weight, False) if needs_dx else None
        dweight = _product[ctx.backend](g, x, True) if needs_dw else None
        return dx, dweight, dbias if needs_db else None, None, None


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str | None = None
) -> torch.Tensor:
    """A linear layer with its bias and activation in one pass over the output.

        y = act(x weight^T + bias),    act(z) = z   or   z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))

    For CPUs: there the separate passes of bias and GELU cost a tenth of a transformer's time; a CPU without bfloat16
    instructions multiplies bfloat16 and float16 ten to a hundred times slower in PyTorch than this op, which widens
    them to float32; and up to 16 rows, as in decoding, it takes the time that reading the weight takes. On a GPU, and
    for more rows of a 16-bit dtype that the CPU multiplies natively, PyTorch's own ops run.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the reference).
        weight: [N, K], same dtype and device.
        bias: [N], same dtype and device, or None.
        activation: None or "gelu_tanh".

    Returns:
        [..., N] in x's dtype; under autocast in autocast's. Sums run in float32. Differentiable once in x, weight and
        bias; with GELU the backward keeps x W^T + b besides x.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, or the activation is unknown.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016 (the tanh form).

    Example:
        >>> y = vlkern.ops.linear(torch.randn(4, 8), torch.randn(32, 8), torch.zeros(32), activation="gelu_tanh")
    """
    x, weight, bias, gelu = _bind(x, weight, bias, activation=activation)
    backend = _op.choose(x, weight)
    if backend == "reference" and _op.forced is None:
        return reference.linear(
            x, weight, bias, gelu
        )  # plain PyTorch, which torch.compile can fuse with its neighbours
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        result: torch.Tensor = _Linear.apply(rows, weight, bias, gelu, backend)
    else:
        result = _forward[backend](rows, weight, bias, gelu)
    return result if x.dim() == 2 else result.view(*x.shape[:-1], weight.shape[0])
