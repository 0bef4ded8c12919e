"""linear_gmm_nll on a GPU: blocks of components, matmuls by cuBLAS, gmm_nll's Triton kernels over their parameters.

For each block cuBLAS writes float32 parameters [N, C]. In the forward a kernel reads them once and keeps log weights
[N, k]. In the backward a kernel writes G = dL/dparams in the input's dtype, which cuBLAS takes into d_weight (finished
with the block) and d_hidden (summed over the blocks in float32). float16 multiplies G in float32: its range is too
small for slopes of narrow components. Nothing waits for the GPU.
"""

from collections.abc import Iterator

import torch

from vlkern._triton_math import add_product
from vlkern.kernels.gmm_nll import triton as mixture

#: Parameters that exist at a time, at most; 64 MiB.
WAIT = 1 << 24


class _Head:
    """The parameters of one call, block by block."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, joint: bool
    ) -> None:
        self.x, self.w, self.bias = hidden.contiguous(), weight.contiguous(), bias
        self.target = target.contiguous()
        (self.n, self.width), self.d = hidden.shape, target.shape[1]
        self.k = weight.shape[0] // (1 + 2 * self.d if joint else 3 * self.d)

    def parameters(self, rows: slice) -> torch.Tensor:
        """[N, rows of the weight] float32."""
        z = self.x.new_empty(self.n, rows.stop - rows.start, dtype=torch.float32)
        add_product(z, self.x, self.w[rows].t(), beta=0)
        return z if self.bias is None else z.add_(self.bias[rows])

    def blocks(self, count: int, each: int) -> Iterator[slice]:
        """Ranges of `count` components or channels of `each` parameters."""
        step = max(1, WAIT // max(1, self.n) // each)
        return (slice(i, min(i + step, count)) for i in range(0, count, step))

    def parts(self, block: slice) -> slice:
        """Rows of the weight for the locations and raw scales of some components."""
        return slice(self.k + 2 * self.d * block.start, self.k + 2 * self.d * block.stop)

    def channels(self, block: slice) -> list[slice]:
        """Rows of the weight for logits, locations and raw scales of some channels."""
        return [slice((i * self.d + block.start) * self.k, (i * self.d + block.stop) * self.k) for i in range(3)]


def linear_gmm_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    joint: bool,
    min_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    head = _Head(hidden, weight, bias, target, joint)
    n, k, d = head.n, head.k, head.d
    nll = hidden.new_empty((n,) if joint else (n, d), dtype=torch.float32)
    log_weights = hidden.new_empty(n, k if joint else 0, dtype=torch.float32)
    if not n:
        return nll, log_weights
    if not joint:
        for block in head.blocks(d, 3 * k):
            logits, loc, raw = (head.parameters(rows) for rows in head.channels(block))
            mixture.channels((logits, loc, raw), head.target[:, block], nll[:, block], k, min_scale)
        return nll, log_weights
    logits = head.parameters(slice(0, k))
    for block in head.blocks(k, 2 * d):
        parts = head.parameters(head.parts(block))
        mixture.weights(logits[:, block], parts, head.target, log_weights[:, block], min_scale)
    return mixture.sums(logits, log_weights, d), log_weights


class _Gradients:
    """d_hidden, d_weight and d_bias, block by block."""

    def __init__(self, head: _Head, of_hidden: bool, of_weight: bool) -> None:
        self.head, x, w = head, head.x, head.w
        self.dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        self.of_hidden, self.of_weight = of_hidden, of_weight
        self.d_hidden = torch.zeros_like(x if of_hidden else x[:0], dtype=torch.float32)
        self.d_weight = torch.zeros_like(w if of_weight else w[:0])
        self.d_bias = w.new_zeros(0 if head.bias is None else w.shape[0], dtype=torch.float32)

    def like(self, parameters: torch.Tensor) -> torch.Tensor:
        """Room for G."""
        return torch.empty_like(parameters, dtype=self.dtype)

    def add(self, g: torch.Tensor, rows: slice) -> None:
        """G [N, rows of the weight]."""
        if self.of_hidden:
            add_product(self.d_hidden, g, self.head.w[rows].to(self.dtype), beta=1)
        if self.of_weight:
            self.d_weight[rows] = g.t() @ self.head.x.to(self.dtype)
        if self.d_bias.numel():
            self.d_bias[rows] = g.sum(0, dtype=torch.float32)


def linear_gmm_nll_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_weights: torch.Tensor,
    joint: bool,
    min_scale: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    head = _Head(hidden, weight, bias, target, joint)
    n, k, d = head.n, head.k, head.d
    grad, gradients = grad.contiguous(), _Gradients(head, of_hidden, of_weight)
    d_target = torch.zeros_like(head.target, dtype=torch.float32)
    if n and joint:
        rows = slice(0, k)
        logits = head.parameters(rows)
        g = gradients.like(logits)
        share = mixture.shares(grad, logits, log_weights.contiguous(), g, d)
        gradients.add(g, rows)
        for block in head.blocks(k, 2 * d):
            rows = head.parts(block)
            parts = head.parameters(rows)
            g = gradients.like(parts)
            d_target += mixture.slopes(share[:, block], parts, head.target, g, min_scale)
            gradients.add(g, rows)
    elif n:
        for block in head.blocks(d, 3 * k):
            places = head.channels(block)
            logits, loc, raw = (head.parameters(rows) for rows in places)
            of_logits, of_loc, of_raw = (gradients.like(part) for part in (logits, loc, raw))
            mixture.channel_slopes(
                grad[:, block], (logits, loc, raw), head.target[:, block], (of_logits, of_loc, of_raw),
                d_target[:, block], k, min_scale,
            )  # fmt: skip
            for rows, g in zip(places, (of_logits, of_loc, of_raw), strict=True):
                gradients.add(g, rows)
    return gradients.d_hidden.to(hidden.dtype), gradients.d_weight, gradients.d_bias, d_target.to(target.dtype)
