"""One thing to measure: an op on a named sample in a dtype on a device. Its inputs, its work and its contestants."""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

import vlkern
from vlkern._op import REGISTRY
from vlkern.bench.rivals import RACES, Contestant, Function

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: And those of ops that take whole numbers, which are timed once.
ALL_DTYPES = DTYPES | {"int32": torch.int32}
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
    """Arguments of the public call. Its floating tensors, the leaves, want gradients; grads are those of the outputs.

    An output that is a scalar, or no floating-point tensor, has None there.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: tuple[torch.Tensor | None, ...]

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

        kwargs = {name: moved(value) for name, value in self.kwargs.items()}
        result = Inputs(tuple(moved(a) for a in self.args), kwargs, tuple(moved(g) for g in self.grads))
        for leaf in result.leaves:
            leaf.requires_grad_()
        return result

    def run(self, function: Function, mode: str) -> list[torch.Tensor]:
        """The outputs, and with "forward+backward" the gradients of the leaves after them."""
        if mode == "forward":
            with torch.no_grad():
                return _several(function(*self.args, **self.kwargs))
        out = _several(function(*self.args, **self.kwargs))
        sent = {t: g for t, g in zip(out, self.grads, strict=True) if t.requires_grad}
        return [*(t.detach() for t in out), *torch.autograd.grad(list(sent), self.leaves, list(sent.values()))]


def _several(out: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out)


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
        """fp32, bf16, fp16 or int32."""
        return next(name for name, dtype in ALL_DTYPES.items() if dtype == self.dtype)

    @property
    def huge(self) -> bool:
        """Runs on request only, once, and without rivals, whose quadratic tensors do not fit."""
        return getattr(self.sample, "huge", False)

    def inputs(self) -> Inputs:
        """The sample's inputs; outputs that are no scalars get random gradients."""
        args, kwargs = samples_of(self.op).inputs(self.sample, self.dtype, self.device)
        with torch.no_grad():
            meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
            outputs = _several(_public(self.op)(*meta[0], **meta[1]))
        generator = torch.Generator().manual_seed(1)

        def gradient(out: torch.Tensor) -> torch.Tensor | None:
            if not (out.shape and out.is_floating_point()):
                return None
            return torch.randn(out.shape, generator=generator).to(self.device, out.dtype)

        return Inputs(args, kwargs, tuple(gradient(out) for out in outputs)).to()

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
        return [t for t in tree_leaves(bound) if isinstance(t, torch.Tensor)]
