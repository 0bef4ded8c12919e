"""Initial values as in big_vision, whose models these are (flax names in the docstrings)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# A normal distribution cut at two standard deviations has this standard deviation.
_CUT_STD = 0.87962566103423978


def lecun_normal_(weight: torch.Tensor, fan_in: int) -> None:
    """flax `lecun_normal`: variance 1 / fan_in, cut at two standard deviations."""
    if weight.is_meta:  # nothing to draw; PyTorch 2.11 imports torch._dynamo to find that out, `shapes_only` or not
        return
    std = 1 / math.sqrt(fan_in) / _CUT_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def dense_(linear: nn.Linear, *, lecun: bool = False, bias_std: float = 0.0) -> nn.Linear:
    """Xavier-uniform kernel (or LeCun-normal, flax's default) and a bias, if it has one, of N(0, bias_std^2)."""
    if lecun:
        lecun_normal_(linear.weight, linear.in_features)
    else:
        nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.normal_(linear.bias, std=bias_std)
    return linear


class _Undrawn(TorchFunctionMode):
    """Leaves out what torch.nn.init would do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made inside are on the meta device and draw no numbers: their parameters come from elsewhere.

    (The meta device alone would do, but its first normal_ imports torch._dynamo, which takes seconds.)
    """
    with torch.device("meta"), _Undrawn():
        yield
