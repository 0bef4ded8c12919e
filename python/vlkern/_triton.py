"""What the Triton launchers share: the chip that a configuration is picked for."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from vlkern._native import TRITON_INTERPRETS


@dataclass(frozen=True)
class Chip:
    """The limits that tile sizes depend on."""

    arch: int
    """Compute capability times ten: 80, 90, 100."""
    sms: int
    """Streaming multiprocessors."""
    shared: int
    """Bytes of shared memory that one program may use."""


A100 = Chip(80, 108, 163 << 10)
H200 = Chip(90, 132, 227 << 10)
B200 = Chip(100, 148, 227 << 10)

#: The chip where there is none: in the interpreter (CPU tensors) and for compilation ahead of time (meta tensors).
STAND_IN = [H200]


@lru_cache
def _of_gpu(index: int) -> Chip:
    found: Any = torch.cuda.get_device_properties(index)
    return Chip(10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)


def chip(device: torch.device) -> Chip:
    """The chip behind `device`."""
    if device.type != "cuda":
        return STAND_IN[0]
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


def _mend_interpreter() -> None:
    """Two repairs of Triton 3.6's interpreter.

    It turns arrays of one element to int, as in `range(tensor)`, by int(array), which NumPy 2.4 refuses. And it
    searches the modules of Triton's language at each call of a helper inside a kernel, a third of the whole time.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
    searched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in searched:
            searched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if TRITON_INTERPRETS:
    _mend_interpreter()
