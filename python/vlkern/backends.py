"""Which backend runs an op: the user's choice, else the best one that supports the call, and why not the others.

    with vlkern.backend("triton"): ...          every op
    with vlkern.backend("rms_norm=reference"):  one op; the others stay automatic
    VLKERN_BACKEND=rms_norm=triton,*=auto       the same, for a whole process

An explicit choice never falls back: it runs, or says why it cannot.
"""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from vlkern._op import BACKENDS, REGISTRY, Op

_ENVIRONMENT = "VLKERN_BACKEND"


def parse(choice: str) -> dict[str, str]:
    """`triton` or `rms_norm=triton,*=auto` -> {op or "*": backend}. Raises ValueError for unknown names."""
    result: dict[str, str] = {}
    for part in choice.split(","):
        op, _, name = part.strip().rpartition("=")
        op = op or "*"
        if name not in (*BACKENDS, "auto"):
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or auto, got {name!r} in {choice!r}")
        if op != "*" and op not in REGISTRY:
            raise ValueError(f"backend names the op {op!r}; the ops are {', '.join(sorted(REGISTRY))}")
        result[op] = name
    return result


class _Setting(ABC):
    """Takes effect when called, is undone when used as a context manager (like torch.set_grad_enabled)."""

    _previous: Any

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    @abstractmethod
    def _restore(self) -> None:
        """Bring back what was before."""


class backend(_Setting):
    """Choose the backend, for all ops (`"triton"`) or op by op (`"rms_norm=triton,*=auto"`).

    `auto` undoes a choice. Raises ValueError for an unknown backend or op; the op itself raises RuntimeError when
    it is called and the chosen backend cannot run it. State is per process, not per thread.
    """

    def __init__(self, choice: str) -> None:
        table = parse(choice)
        self._previous = {name: op.forced for name, op in REGISTRY.items()}
        for name, op in REGISTRY.items():
            picked = table.get(name, table.get("*"))
            if picked is not None:
                op.forced = None if picked == "auto" else picked

    def _restore(self) -> None:
        for name, forced in self._previous.items():
            REGISTRY[name].forced = forced


class validate(_Setting):
    """`validate(True)`: check values (NaN scale, sums of lengths, ...) on GPU tensors and under compile too.

    Such a check waits for the GPU. On CPU tensors in eager mode values are always checked.
    """

    def __init__(self, on: bool) -> None:
        from vlkern import _checks

        self._previous = _checks.SETTINGS.validate
        _checks.SETTINGS.validate = bool(on)

    def _restore(self) -> None:
        from vlkern import _checks

        _checks.SETTINGS.validate = self._previous


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that would run, why the others would not, and the work of the call."""

    op: str
    backend: str
    refused: dict[str, str]
    flops: int
    bytes: int

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}   ({self.flops:,} FLOPs, {self.bytes:,} bytes)"]
        lines += [f"  not {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def _lookup(op: Any) -> Op:
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    for candidate in REGISTRY.values():
        if name in (candidate.name, candidate.public):
            return candidate
    raise ValueError(f"op must be a function of vlkern.ops or the name of one, got {op!r}")


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `op(*args, **kwargs)` would run on, why not the others, and its FLOPs and bytes. Runs nothing.

    Example:
        >>> print(vlkern.explain(vlkern.ops.rms_norm, x, weight))
    """
    found = _lookup(op)
    tensors = [t for t in tree_leaves(found.bind(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    chosen = found.choose(*tensors)
    refused = {}
    for name in BACKENDS:
        if name != chosen:
            refused[name] = found.refusal(name, *tensors) or (
                f"{found.forced} was chosen explicitly" if found.forced else f"{chosen} is preferred here"
            )
    work = found.work(*tensors)
    return Explanation(found.public, chosen, refused, work["flops"], work["bytes"])


def apply_environment() -> None:
    """Read VLKERN_BACKEND once, when the package is imported."""
    if choice := os.environ.get(_ENVIRONMENT):
        try:
            backend(choice)
        except ValueError as error:
            raise ValueError(f"{_ENVIRONMENT}: {error}") from None
