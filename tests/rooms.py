"""Which rooms, samples, backends and dtypes the tests walk on this machine."""

import functools
import inspect
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vlkern
from vlkern._native import TRITON_INTERPRETS
from vlkern._op import BACKENDS, REGISTRY, Op
from vlkern.testing import Run, assert_as_good, assert_same_direction, differentiate, evaluate, in_float64, stack

ROOT = Path(__file__).parents[1]


def _tested() -> tuple[str, ...]:
    if chosen := os.environ.get("VLKERN_TEST_BACKENDS"):
        names = tuple(name.strip() for name in chosen.split(","))
        if unknown := set(names) - set(BACKENDS):
            raise pytest.UsageError(f"VLKERN_TEST_BACKENDS names {', '.join(unknown)}; there are {', '.join(BACKENDS)}")
        return names
    if TRITON_INTERPRETS:
        return ("triton",)  # a process of its own; the others have theirs
    return ("cpu", "triton", "cuda") if torch.cuda.is_available() else ("cpu",)


#: The kernels under test. The reference is the oracle and is always there.
KERNELS = _tested()


def device(backend: str) -> str:
    """Where the tensors of a backend's tests live."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not TRITON_INTERPRETS) else "cpu"


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    if TRITON_INTERPRETS and backend == "triton":
        return torch.float32, torch.float16  # the interpreter's bfloat16 dot returns garbage (triton #11584)
    return torch.float32, torch.bfloat16, torch.float16


def sample_dtypes(op: Op, backend: str) -> tuple[torch.dtype, ...]:
    """Those in which a room is tested; the samples of one that takes whole numbers have their own."""
    return dtypes(backend) if torch.float32 in op.dtypes else op.dtypes


def public(op: Op) -> Any:
    """The public function; of an op that writes into arguments, one that writes into copies and returns them, too."""
    function = getattr(vlkern.ops, op.public)
    schema = op.raw[next(iter(op.raw))]["reference"]._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    if not written:
        return function
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def pure(*args: Any, **kwargs: Any) -> Any:
        copies = [a.clone() if n in written else a for n, a in zip(names, args, strict=False)]
        named = {n: a.clone() if n in written else a for n, a in kwargs.items()}
        out = function(*copies, **named)
        given = (*zip(names, copies, strict=False), *named.items())
        return out, *(a for n, a in given if n in written)

    return pure


def samples(op: Op) -> ModuleType:
    return import_module(f"vlkern.kernels.{op.name}.samples")


def flops(op: Op, sample: Any) -> int:
    args, kwargs = samples(op).inputs(sample, torch.float32, "cpu")
    return vlkern.explain(op.public, *args, **kwargs).flops


def heavy(op: Op, sample: Any) -> bool:
    return flops(op, sample) > 1 << 24


def small(op: Op) -> list[Any]:
    """The samples that are for tests, in Triton's interpreter without what would take ten seconds; the others are for
    benchmarks."""
    found = [sample for sample in samples(op).SAMPLES if not sample.bench]
    return [sample for sample in found if flops(op, sample) < 1 << 28] if TRITON_INTERPRETS else found


def light(op: Op) -> list[Any]:
    """As small; in Triton's interpreter, where a heavy sample takes seconds a call, every third of the others."""
    if not TRITON_INTERPRETS:
        return small(op)
    return [sample for sample in small(op) if not heavy(op, sample)][::-3][::-1]


def few(op: Op) -> list[Any]:
    """As light, for what a kernel does whatever the sample; in Triton's interpreter the last two."""
    return light(op)[-2:] if TRITON_INTERPRETS else light(op)


def seeds(op: Op, sample: Any) -> range:
    """Enough random inputs for the largest error to be a property of the kernel; a large sample is cheap in draws.

    In Triton's interpreter one: it shows whether the lines are right, and a GPU how well they compute.
    """
    return range(1 if TRITON_INTERPRETS else 2 if heavy(op, sample) else 16)


def skip_unsupported(op: Op, backend: str, args: Any, kwargs: Any) -> None:
    """Skip what the room itself declares as a limit of a backend. A kernel that is merely missing must fail."""
    if op.limits:
        tensors = [t for t in tree_leaves(op.bind(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        if why := op.limits(backend, *tensors):
            pytest.skip(f"{op.name} on {backend}: {why}")


def run(op: Op, function: Callable[..., Any], args: Any, kwargs: Any, **options: Any) -> Run:
    """The public function, or something made of it, with all gradients that the op has."""
    return (differentiate if op.differentiable else evaluate)(function, args, kwargs, **options)


def call(op: Op, backend: str, args: Any, kwargs: Any, **options: Any) -> Run:
    """The public function on one backend, with all gradients that it has."""
    with vlkern.backend(f"{op.name}={backend}"):
        return run(op, public(op), args, kwargs, **options)


def agree(op: Op, backend: str, calls: list[Any]) -> None:
    """Results and gradients of a kernel are as good as the reference's, over calls with different data."""
    runs, magnitudes = [], []
    for args, kwargs in calls:
        ours, low = call(op, backend, args, kwargs), call(op, "reference", args, kwargs)
        exact = call(op, "reference", *in_float64((args, kwargs)), cotangents=ours.cotangents)
        runs.append((ours, low, exact))
        if hasattr(samples(op), "magnitudes"):
            magnitudes.append(samples(op).magnitudes(*ours.cotangents, *args, **kwargs))
    ours, low, exact = (stack(list(several)) for several in zip(*runs, strict=True))
    for results in zip(ours.outputs, low.outputs, exact.outputs, strict=True):
        assert_as_good(*results)
    summed = [None if m[0] is None else torch.stack(m) for m in zip(*magnitudes, strict=True)]
    for i, gradients in enumerate(zip(ours.gradients, low.gradients, exact.gradients, strict=True)):
        assert len({g is None for g in gradients}) == 1, "one backend has a gradient that another lacks"
        if gradients[0] is not None:
            assert_as_good(*gradients, magnitude=summed[i] if summed else None)
            assert_same_direction(*gradients)


def each(
    *,
    dtype: bool = False,
    sample: Callable[[Op], list[Any]] | None = None,
    reference: bool = False,
    differentiable: bool = False,
) -> Any:
    """Parametrise over rooms and the backends under test, optionally dtypes, samples (from a lister), the reference.

    differentiable: only the rooms that have gradients.

    In Triton's interpreter a heavy sample is tried in float16 alone: in float32, in smaller tiles, it takes several
    times as long, and what float32 is like the other samples show.
    """
    names, cases = ["op", "backend"] + ["dtype"] * dtype + ["sample"] * bool(sample), []
    for op in (op for op in REGISTRY.values() if op.differentiable or not differentiable):
        for backend in ("reference",) * reference + tuple(b for b in KERNELS if b in op.backends):
            for d in sample_dtypes(op, backend) if dtype else (None,):
                for s in sample(op) if sample else (None,):
                    if TRITON_INTERPRETS and d == torch.float32 and s and heavy(op, s):
                        continue
                    values = [op, backend, *([d] if dtype else []), *([s] if sample else [])]
                    label = [op.name, backend, *([str(d)[6:]] if dtype else []), *([s.name] if s else [])]
                    cases.append(pytest.param(*values, id="-".join(label)))
    return pytest.mark.parametrize(names, cases)
