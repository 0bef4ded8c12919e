"""One thing to measure: an op on a named sample in a dtype on a device. Its inputs, its work and its contestants."""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

import vlkern
from vlkern._op import REGISTRY
from vlkern.bench.rivals import RACES, Contestant, Function

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: The backends worth timing on a device; the reference takes part only where there is no other.
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def modes_of(op: str) -> tuple[str, ...]:
    """ "forward" and, where the op has gradients, "forward+backward"."""
    return tuple(RACES[op].share)


def samples_of(op: str) -> ModuleType:
    """The room's samples.py."""
    return import_module(f"vlkern.kernels.{op}.samples")


@dataclass(frozen=True)
class Inputs:
    """Arguments of the public call. Its floating tensors, the leaves, want gradients; grad is that of the output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: torch.Tensor | None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The floating tensors among the arguments."""
        return [a for a in self.args if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def to(self, dtype: torch.dtype | None = None) -> "Inputs":
        """Equal numbers in fresh memory, optionally in another dtype."""

        def moved(value: Any) -> Any:
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                return value
            return value.detach().to(dtype or value.dtype, copy=True)

        result = Inputs(tuple(moved(a) for a in self.args), self.kwargs, moved(self.grad))
        for leaf in result.leaves:
            leaf.requires_grad_()
        return result

    def run(self, function: Function, mode: str) -> list[torch.Tensor]:
        """The output, and with "forward+backward" the gradients of the leaves after it."""
        if mode == "forward":
            with torch.no_grad():
                return [function(*self.args, **self.kwargs)]
        out = function(*self.args, **self.kwargs)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)]


def _public(op: str) -> Function:
    function: Function = getattr(vlkern.ops, REGISTRY[op].public)
    return function


def _run_backend(op: str, backend: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    with vlkern.backend(f"{op}={backend}"):
        return _public(op)(*args, **kwargs)


def _make_backend(op: str, backend: str) -> Function:
    return partial(_run_backend, op, backend)


def backend_contestant(op: str, backend: str) -> Contestant:
    """The public op, forced on one backend."""
    return Contestant(f"vlkern {backend}", partial(_make_backend, op, backend), ours=True)


@dataclass(frozen=True)
class Case:
    """An op on one sample, in one dtype, on one device ("cpu" or "cuda")."""

    op: str
    sample: Any
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def dtype_name(self) -> str:
        """fp32, bf16 or fp16."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def huge(self) -> bool:
        """Runs on request only, once, and without rivals, whose quadratic tensors do not fit."""
        return getattr(self.sample, "huge", False)

    def inputs(self) -> Inputs:
        """The sample's inputs; an output that is no scalar gets a random gradient."""
        args, kwargs = samples_of(self.op).inputs(self.sample, self.dtype, self.device)
        with torch.no_grad():
            meta = {name: value.to("meta") for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
            shape = _public(self.op)(*(a.to("meta") for a in args), **{**kwargs, **meta}).shape
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(shape, generator=generator).to(self.device, self.dtype) if shape else None
        return Inputs(args, kwargs, grad).to()

    def work(self, inputs: Inputs, mode: str) -> dict[str, float]:
        """FLOPs and bytes of one run in this mode."""
        work = REGISTRY[self.op].work(*self._bound(inputs))
        return {name: RACES[self.op].share[mode] * count for name, count in work.items()}

    def contestants(self, inputs: Inputs) -> tuple[list[Contestant], dict[str, str]]:
        """Those that take part, ours first, and why our other backends for this device do not."""
        tensors = self._bound(inputs)
        refused = {b: REGISTRY[self.op].refusal(b, *tensors) for b in BACKENDS[self.device]}
        usable = [b for b, why in refused.items() if why is None] or ["reference"]
        rivals = () if self.huge else RACES[self.op].rivals
        ours = [backend_contestant(self.op, b) for b in usable]
        return [*ours, *rivals], {f"vlkern {b}": why for b, why in refused.items() if why}

    def _bound(self, inputs: Inputs) -> list[torch.Tensor]:
        bound = REGISTRY[self.op].bind(*inputs.args, **inputs.kwargs)
        return [t for t in bound if isinstance(t, torch.Tensor)]
