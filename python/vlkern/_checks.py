"""Argument checks with one voice: `name must ..., got ...`, raised before any memory is touched."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Settings:
    """Process-wide switches that the checks read."""

    validate: bool = False


SETTINGS = Settings()


def _is_readable(t: torch.Tensor) -> bool:
    return (t.is_cpu or SETTINGS.validate) and not (t.is_meta or isinstance(t, FakeTensor))


def values_may_be_read(*tensors: torch.Tensor) -> bool:
    """True when looking at values costs no hidden synchronisation: CPU tensors in eager mode, or `validate(True)`."""
    if torch.compiler.is_compiling():
        return False
    return all(map(_is_readable, tensors))


def tensor(name: str, value: Any) -> torch.Tensor:
    """`value`, which must be a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def floating(name: str, value: Any) -> torch.Tensor:
    """`value`, which must be a tensor of a floating-point dtype."""
    t = tensor(name, value)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
    return t


def same(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`value` must have the dtype and device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    on_device(name, value, other_name, other)


def on_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`value` must lie on the device of `other`."""
    if not (value.is_cpu and other.is_cpu) and value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def shape(name: str, value: torch.Tensor, expected: tuple[int, ...]) -> None:
    """`value` must have exactly this shape."""
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(value.shape)}")


def lengths(value: Any, ids: torch.Tensor) -> None:
    """`value`, named lengths, must be how many words [B] each of the texts [B, L] has: 1 to L of them."""
    t = tensor("lengths", value)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {t.dtype}")
    shape("lengths", t, (len(ids),))
    if values_may_be_read(t) and bool((wrong := (t < 1) | (t > ids.shape[1])).any()):
        raise ValueError(f"lengths must be from 1 to {ids.shape[1]}, got {int(t[wrong][0])}")


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """`value` as a finite Python float."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value == value and abs(value) != math.inf) or (positive and value <= 0):
        raise ValueError(f"{name} must be a {'positive ' if positive else ''}finite number, got {value}")
    return float(value)


def no_gradient(**tensors: torch.Tensor | None) -> None:
    """None of these tensors may ask for a gradient: the op has none, and a silent stop would be worse."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise ValueError(f"{name} must not require a gradient, this op has none: call it under torch.no_grad()")


def autocast_dtype(t: torch.Tensor) -> torch.dtype | None:
    """The dtype to which the autocast region around the call casts `t`; None outside, for float64 and meta tensors."""
    if t.is_meta:  # PyTorch 2.11 cannot compile a call of is_autocast_available
        return None
    device = "cpu" if t.is_cpu else t.device.type
    if not torch.is_autocast_enabled(device) or t.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)
