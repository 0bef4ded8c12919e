"""How an op is registered: one schema, one overload per backend, one rule that picks among them.

`vlkern::x` is the reference (any device, any float dtype; also the shape function). `vlkern::x.cpu`, `.triton` and
`.cuda` have the same schema; C++ implements its overload with STABLE_TORCH_LIBRARY_IMPL, Triton's is a Python
launcher that is imported at the first call.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from vlkern._native import LIBRARIES, TRITON_INTERPRETS

BACKENDS = ("reference", "cpu", "triton", "cuda")
_RUN_ON = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
REGISTRY: dict[str, "Op"] = {}

_LIBRARY = torch.library.Library("vlkern", "FRAGMENT")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _lazy(module: str, name: str) -> Callable[..., Any]:
    def launcher(*args: Any) -> Any:
        return getattr(import_module(module), name)(*args)

    return launcher


_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _uncast(overload: Any) -> Callable[..., Any]:
    """Under autocast: the public function has cast already, and a matmul inside the kernel must not be cast again."""

    def redispatch(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return overload(*args)

    return redispatch


class Op:
    """One room: its raw ops (forward, backward), their backends, and the choice among them.

    name       folder under kernels/; also the name used in `vlkern.backend("name=...")`
    public     the function in vlkern.ops
    schemas    raw op -> schema without its name, e.g. {"rms_norm": "(Tensor x, ...) -> (Tensor, Tensor)"}
    reference  module that defines each raw op in plain PyTorch
    backends   those that exist, in order of preference
    bind       checks the public arguments and returns them as the raw op takes them, main tensors first
    work       the same tensors -> {"flops": ..., "bytes": ...}
    limits     (backend, *tensors) -> why this backend does not support the call, or None
    dtypes     of the first main tensor, for which there are kernels
    differentiable  False: the public function has no gradient and refuses tensors that ask for one
    """

    def __init__(
        self,
        name: str,
        *,
        public: str,
        schemas: dict[str, str],
        reference: ModuleType,
        backends: tuple[str, ...],
        bind: Callable[..., tuple[Any, ...]],
        work: Callable[..., dict[str, int]],
        limits: Callable[..., str | None] | None = None,
        dtypes: tuple[torch.dtype, ...] = _KERNEL_DTYPES,
        differentiable: bool = True,
    ) -> None:
        self.name, self.public, self.backends = name, public, backends
        self.dtypes, self.differentiable = dtypes, differentiable
        self.bind, self.work, self.limits = bind, work, limits
        self.forced: str | None = None
        self.raw: dict[str, dict[str, Any]] = {}
        for raw, schema in schemas.items():
            self._define(raw, schema, getattr(reference, raw))
        self.missing = {b: self._missing(b, next(iter(schemas))) for b in BACKENDS}
        # Those that run without being asked for. Triton's interpreter is for tests: slower than the reference.
        there = [b for b in self.backends if self.missing[b] is None]
        self._automatic = {kind: [b for b in there if b in names] for kind, names in _RUN_ON.items()}
        REGISTRY[name] = self

    def _define(self, raw: str, schema: str, reference: Callable[..., Any]) -> None:
        _LIBRARY.define(raw + schema)
        _LIBRARY.impl(raw, reference, "CompositeExplicitAutograd")
        for b in self.backends:
            _LIBRARY.define(f"{raw}.{b}{schema}")
            _LIBRARY.impl(f"{raw}.{b}", reference, "Meta")
            if b == "triton":
                launcher = _lazy(f"vlkern.kernels.{self.name}.triton", raw)
                for key in ("CUDA", "CPU") if TRITON_INTERPRETS else ("CUDA",):
                    _LIBRARY.impl(f"{raw}.triton", launcher, key)
        packet = getattr(torch.ops.vlkern, raw)
        self.raw[raw] = {"reference": packet.default, **{b: getattr(packet, b) for b in self.backends}}
        for overload in self.raw[raw].values():
            for key in _AUTOCAST_KEYS:
                _LIBRARY.impl(overload, _uncast(overload), key)

    def _missing(self, b: str, raw: str) -> str | None:
        """Why the backend is not there at all, whatever the call."""
        if b == "reference":
            return None
        if b not in self.backends:
            return f"{self.name} has no {b} kernel"
        if b == "triton":
            return None if find_spec("triton") else "triton is not installed"
        library = {"cpu": "_C", "cuda": "_C_cuda"}[b]
        if LIBRARIES[library]:
            return LIBRARIES[library]
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vlkern::{raw}.{b}", b.upper()):
            return f"{library} was built without {self.name}"
        return None

    def refusal(self, b: str, *tensors: torch.Tensor) -> str | None:
        """Why backend `b` cannot run a call with these tensors, or None when it can."""
        if b == "reference":
            return None
        if self.missing[b]:
            return self.missing[b]
        device = tensors[0].device.type
        if b == "cpu" and device != "cpu":
            return f"the tensors are on {device}"
        if b == "cuda" and device != "cuda":
            return f"the tensors are on {device}"
        if b == "triton" and device != "cuda" and not (TRITON_INTERPRETS and device == "cpu"):
            return f"the tensors are on {device} (Triton's interpreter needs TRITON_INTERPRET=1)"
        if tensors[0].dtype not in self.dtypes:
            *others, last = (str(d).removeprefix("torch.") for d in self.dtypes)
            names = f"{', '.join(others)} and {last}" if others else last
            return f"its kernels take {names}, not {tensors[0].dtype}"
        return self.limits(b, *tensors) if self.limits else None

    def choose(self, *tensors: torch.Tensor) -> str:
        """The backend for these tensors. Raises RuntimeError when the user's explicit choice cannot run."""
        if self.forced is not None:
            why = self.refusal(self.forced, *tensors)
            if why:
                raise RuntimeError(f"{self.public}: backend {self.forced!r} was chosen and cannot run: {why}")
            return self.forced
        first = tensors[0]
        if first.dtype in self.dtypes:
            for b in self._automatic.get("cpu" if first.is_cpu else first.device.type, ()):
                if self.limits is None or self.limits(b, *tensors) is None:
                    return b
        return "reference"
