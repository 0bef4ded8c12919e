"""What a test of an op needs: tolerances taken from data, poisoned memory, a record of the kernels that ran.

The oracle is always the op's reference: in float64 it is taken as exact, in the test dtype it says how large an error
that dtype makes unavoidable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def assert_as_good(
    ours: torch.Tensor,
    low: torch.Tensor,
    exact: torch.Tensor,
    slack: float = 2.0,
    magnitude: torch.Tensor | None = None,
) -> None:
    """The largest error of `ours` is at most `slack` times (that of the reference in the same dtype + one rounding).

    Args:
        ours: the result under test.
        low: the reference's result from the same inputs in the same dtype; same shape and dtype as `ours`.
        exact: the reference's result in float64, from the same (rounded) inputs.
        slack: how many times the reference's error is allowed.
        magnitude: of what is rounded, by default of the exact values. For a sum whose terms cancel: the sum of |terms|.

    Raises:
        AssertionError: the error is larger, a value is NaN or infinite, or shape or dtype differ from `low`'s.
    """
    assert ours.shape == low.shape, f"shape {list(ours.shape)}, the reference has {list(low.shape)}"
    assert ours.dtype == low.dtype, f"dtype {ours.dtype}, the reference has {low.dtype}"
    if ours.numel() == 0:
        return
    if not is_float(ours):
        assert torch.equal(ours, low), "whole numbers differ from the reference's"
        return
    bad = ours.numel() - int(ours.isfinite().sum())
    assert bad == 0, f"{bad} of {ours.numel()} values are NaN or infinite"
    wide = exact.double()
    error, unavoidable = (ours.double() - wide).abs().max(), (low.double() - wide).abs().max()
    rounding = torch.finfo(ours.dtype).eps * (wide if magnitude is None else magnitude).abs().max()
    assert error <= slack * (unavoidable + rounding), (
        f"error {error:.3e} exceeds {slack} * (reference in {ours.dtype} {unavoidable:.3e} + rounding {rounding:.3e})"
    )


def direction(ours: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Cosine between two gradients and the signed bias sum(sign(exact) (ours - exact)) / sum |exact|."""
    a, b = ours.double().flatten(), exact.double().flatten()
    cosine = (a @ b) / (a.norm() * b.norm())
    bias = (b.sign() * (a - b)).sum() / b.abs().sum()
    return cosine.item(), bias.item()


def assert_same_direction(
    ours: torch.Tensor, low: torch.Tensor, exact: torch.Tensor, cosine: float = 0.999, bias: float = 0.02
) -> None:
    """A gradient points where the exact one points: a lost term can hide below the largest error, not from this.

    Where cancellation takes the direction from the reference itself in this dtype there is none to compare with.

    Raises:
        AssertionError: the cosine is below `cosine`, or the signed bias exceeds `bias`.
    """
    if not exact.any():
        return
    low_cosine, low_bias = direction(low, exact)
    if low_cosine < 1 - (1 - cosine) / 2 or abs(low_bias) > bias / 2:
        return
    our_cosine, our_bias = direction(ours, exact)
    assert our_cosine >= cosine, f"cosine with the exact gradient {our_cosine:.6f}, the reference has {low_cosine:.6f}"
    assert abs(our_bias) <= bias, f"signed bias {our_bias:+.4f}, the reference has {low_bias:+.4f}"


@contextmanager
def poison() -> Iterator[None]:
    """Fresh memory holds NaN (the largest integer for int dtypes), also where native kernels allocate it."""
    memory: Any = torch.utils.deterministic
    fill, enabled = memory.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


@dataclass(frozen=True)
class Call:
    """One raw op and what it was called with."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def backend(self) -> str:
        """`reference`, `cpu`, `triton` or `cuda`."""
        name: str = self.op._overloadname
        return "reference" if name == "default" else name


class record(TorchDispatchMode):
    """Context that keeps every call of a raw vlkern op, forward and backward.

    Example:
        >>> with vlkern.testing.record() as calls:
        ...     vlkern.ops.rms_norm(x, weight)
        >>> {call.backend for call in calls}
        {'cpu'}
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __enter__(self) -> list[Call]:
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for every op."""
        if func.namespace == "vlkern":
            self.calls.append(Call(func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Run:
    """Outputs of a call, the cotangents that were sent back, and the gradients of every float input (None: unused)."""

    outputs: list[torch.Tensor]
    cotangents: list[torch.Tensor]
    gradients: list[torch.Tensor | None]


def stack(runs: list[Run]) -> Run:
    """Several runs with different data as one, along a new first dimension.

    `assert_as_good` compares two largest errors. Those of a single number, the gradient of a scalar for instance, are
    one random draw each, and a lucky reference would condemn a good kernel.
    """
    transposed = zip(*(run.gradients for run in runs), strict=True)
    return Run(
        [torch.stack(list(t)) for t in zip(*(run.outputs for run in runs), strict=True)],
        [torch.stack(list(t)) for t in zip(*(run.cotangents for run in runs), strict=True)],
        [None if g[0] is None else torch.stack([t for t in g if t is not None]) for g in transposed],
    )


def is_float(leaf: Any) -> bool:
    """True for a tensor that can have a gradient."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def in_float64(arguments: Any) -> Any:
    """The same arguments, every float tensor in float64."""
    return tree_map(lambda leaf: leaf.double() if is_float(leaf) else leaf, arguments)


def evaluate(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cotangents: list[torch.Tensor] | None = None,
) -> Run:
    """Call a function that has no gradients, with poisoned memory; `cotangents` is there for `differentiate`'s sake.

    The outputs are its float tensors or, where it has none, the others.
    """
    with poison(), torch.no_grad():
        outputs = tree_flatten(function(*args, **kwargs))[0]
    return Run([t for t in outputs if is_float(t)] or outputs, cotangents or [], [])


def differentiate(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cotangents: list[torch.Tensor] | None = None,
    only: int | None = None,
) -> Run:
    """Call and backpropagate, with poisoned memory.

    Args:
        function: a public op; returns a tensor or several.
        args: its arguments; every float tensor gets a gradient.
        kwargs: likewise.
        cotangents: gradients of the outputs; by default random, fixed by a seed.
        only: position of the one float tensor, counted over args and kwargs, that needs a gradient.
    """
    leaves, tree = tree_flatten((args, kwargs))
    inputs = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    for position, i in enumerate(inputs):
        leaves[i] = leaves[i].detach().requires_grad_(only is None or position == only)
    args, kwargs = tree_unflatten(leaves, tree)
    with poison():
        outputs = [t for t in tree_flatten(function(*args, **kwargs))[0] if is_float(t)]
        if cotangents is None:
            g = torch.Generator().manual_seed(1)
            cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in outputs]
        wanted = [leaves[i] for i in inputs if leaves[i].requires_grad]
        sent = [c.to(t.dtype) for c, t in zip(cotangents, outputs, strict=True)]
        got = iter(torch.autograd.grad(outputs, wanted, sent, allow_unused=True))
    gradients = [next(got) if leaves[i].requires_grad else None for i in inputs]
    return Run([t.detach() for t in outputs], sent, gradients)
