"""How the parameters of a mixture of Gaussians lie in a row of P numbers, for k components of d dimensions.

"joint"        P = k (1 + 2 d)   [k logits][k, 2, d]: loc, then the raw scale, of one mixture over all dimensions
"per_channel"  P = 3 k d         [3 d, k]: logits [d, k], loc [d, k], raw scale [d, k] of d mixtures
"""

import torch

from vlkern import _checks

LAYOUTS = ("joint", "per_channel")


def components_of(numbers: int, dims: int, layout: str, name: str, got: torch.Size) -> int:
    """k for P = `numbers`; `name` is the argument whose shape, `got`, says so.

    Raises:
        TypeError: dims is no int.
        ValueError: no k gives this P; or there is no such layout.
    """
    if isinstance(dims, bool) or not isinstance(dims, int | torch.SymInt):
        raise TypeError(f"dims must be an int, got {type(dims).__name__}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'joint' or 'per_channel', got {layout!r}")
    if dims < 1:
        raise ValueError(f"dims must be at least 1, got {dims}")
    each, form = (1 + 2 * dims, "k (1 + 2 d)") if layout == "joint" else (3 * dims, "3 k d")
    if numbers < each or numbers % each:
        raise ValueError(f"{name} must hold P = {form} numbers, for d = {dims} a multiple of {each}, got {list(got)}")
    return numbers // each


def components(params: torch.Tensor, dims: int, layout: str = "joint") -> int:
    """k, which follows from the last dimension of `params` [..., P] and the number of dimensions.

    Raises:
        TypeError: params is no floating-point tensor, or dims no int.
        ValueError: no k gives this P; or there is no such layout.
    """
    _checks.floating("params", params)
    return components_of(params.shape[-1] if params.dim() else 0, dims, layout, "params", params.shape)


def split(params: torch.Tensor, dims: int, layout: str = "joint") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of `params` [..., P]: logits, loc and raw scale.

    "joint": [..., k], [..., k, d], [..., k, d]. "per_channel": three times [..., d, k].

    Raises:
        TypeError: as `components`.
        ValueError: as `components`.

    Example:
        >>> logits, loc, raw = _mixture.split(params, dims=16)
    """
    k, lead = components(params, dims, layout), params.shape[:-1]
    if layout == "per_channel":
        logits, loc, raw = params.reshape(*lead, 3, dims, k).unbind(-3)
        return logits, loc, raw
    loc, raw = params[..., k:].reshape(*lead, k, 2, dims).unbind(-2)
    return params[..., :k], loc, raw
