"""What every room promises, tested on every sample with every backend that this machine has."""

import inspect

import pytest
import torch
from rooms import ROOT, agree, call, device, each, few, light, public, samples, seeds, skip_unsupported, small
from torch.utils._pytree import tree_flatten, tree_map

import vlkern
from vlkern._op import REGISTRY
from vlkern.testing import (
    assert_as_good,
    in_float64,
    is_float,
    poison,
    record,
)

every_room = pytest.mark.parametrize("op", REGISTRY.values(), ids=list(REGISTRY))


def same_bits(one, other):
    for a, b in zip(one.outputs + one.gradients, other.outputs + other.gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@each(reference=True)
def test_kernel_is_there_and_runs(op, backend):
    """First of all: with a universal fallback, a kernel that is not loaded would be compared with itself."""
    assert op.missing[backend] is None
    overload = "" if backend == "reference" else f".{backend}"
    key = "CompositeExplicitAutograd" if backend == "reference" else device(backend).upper()
    for raw in op.raw:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vlkern::{raw}{overload}", key), raw
    args, kwargs = samples(op).inputs(light(op)[-1], torch.float32, device(backend))
    skip_unsupported(op, backend, args, kwargs)
    with record() as calls:
        call(op, backend, args, kwargs)
    assert calls and {c.backend for c in calls} == {backend}


@each(dtype=True, sample=small)
def test_forward_and_backward_agree_with_the_reference(op, backend, dtype, sample):
    skip_unsupported(op, backend, *samples(op).inputs(sample, dtype, device(backend)))
    agree(op, backend, [samples(op).inputs(sample, dtype, device(backend), seed) for seed in seeds(op, sample)])


@each(dtype=True, sample=light, differentiable=True)
def test_forward_alone_agrees_with_the_reference(op, backend, dtype, sample):
    args, kwargs = samples(op).inputs(sample, dtype, device(backend))
    skip_unsupported(op, backend, args, kwargs)

    def forward(name, args, kwargs):
        with vlkern.backend(f"{op.name}={name}"), poison(), torch.no_grad():
            return [t for t in tree_flatten(public(op)(*args, **kwargs))[0] if is_float(t)]

    ours, low = forward(backend, args, kwargs), forward("reference", args, kwargs)
    exact = forward("reference", *in_float64((args, kwargs)))
    for results in zip(ours, low, exact, strict=True):
        assert_as_good(*results)


@each(dtype=True)
def test_same_bits_every_time_whatever_the_thread_count(op, backend, dtype):
    threads = torch.get_num_threads()
    for sample in few(op):
        args, kwargs = samples(op).inputs(sample, dtype, device(backend))
        first = call(op, backend, args, kwargs)
        try:
            for other in (threads, 1, 2, 3) if backend == "cpu" else (threads,):
                torch.set_num_threads(other)
                same_bits(call(op, backend, args, kwargs), first)
        finally:
            torch.set_num_threads(threads)


@each(reference=True, differentiable=True)
def test_gradient_of_one_input_alone(op, backend):
    for sample in few(op):
        args, kwargs = samples(op).inputs(sample, torch.float32, device(backend))
        everything = call(op, backend, args, kwargs).gradients
        for i, expected in enumerate(everything):
            if expected is None:
                continue
            alone = call(op, backend, args, kwargs, only=i).gradients
            assert torch.equal(alone[i], expected)
            assert all(g is None for j, g in enumerate(alone) if j != i)


@each(sample=light)
def test_inputs_are_left_alone(op, backend, sample):
    args, kwargs = samples(op).inputs(sample, torch.float32, device(backend))
    before = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    call(op, backend, args, kwargs)
    for a, b in zip(tree_flatten((args, kwargs))[0], tree_flatten(before)[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("op", [op for op in REGISTRY.values() if op.differentiable], ids=lambda op: op.name)
def test_gradcheck_of_the_reference(op):
    for sample in small(op):
        args, kwargs = samples(op).inputs(sample, torch.float64, "cpu")
        leaves, tree = tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

        def function(*tensors, leaves=leaves, tree=tree, where=where):
            filled = list(leaves)
            for i, tensor in zip(where, tensors, strict=True):
                filled[i] = tensor
            args, kwargs = tree.unflatten(filled)
            result = public(op)(*args, **kwargs)
            if not hasattr(samples(op), "smooth"):
                return result
            # The op rounds: its gradient is that of what it rounds. Values of the one, gradient of the other.
            rounded = next(t for t in tree_flatten(result)[0] if is_float(t))
            return rounded + (samples(op).smooth(*args, **kwargs) - rounded).detach()

        inputs = [leaves[i].detach().requires_grad_() for i in where]
        with vlkern.backend(f"{op.name}=reference"):
            assert torch.autograd.gradcheck(function, inputs, fast_mode=sum(t.numel() for t in inputs) > 100)


@pytest.mark.parametrize("op", [op for op in REGISTRY.values() if not op.differentiable], ids=lambda op: op.name)
def test_a_gradient_that_does_not_exist_is_refused(op):
    args, kwargs = samples(op).inputs(small(op)[-1], torch.float32, "cpu")
    for i in (i for i, leaf in enumerate(args) if is_float(leaf)):
        asking = [leaf.detach().clone().requires_grad_() if i == j else leaf for j, leaf in enumerate(args)]
        with pytest.raises(ValueError, match="must not require a gradient"):
            public(op)(*asking, **kwargs)
        with torch.no_grad():
            public(op)(*asking, **kwargs)


@every_room
def test_samples_hold_the_required_kinds(op):
    names = [sample.name for sample in samples(op).SAMPLES]
    assert len(set(names)) == len(names)
    assert "one" in names
    assert any(name.startswith("below_") for name in names) and any(name.startswith("above_") for name in names)
    assert any(sample.bench for sample in samples(op).SAMPLES)
    strided = 0
    for sample in small(op):
        leaves = tree_flatten(samples(op).inputs(sample, torch.float32, "cpu"))[0]
        strided += any(isinstance(leaf, torch.Tensor) and not leaf.is_contiguous() for leaf in leaves)
    assert strided, "no sample has a non-contiguous input"


@every_room
def test_empty_input_is_a_sample_or_an_error(op):
    """N = 0 either works, and then it is a sample, or it is refused in words."""
    by_name = {sample.name: sample for sample in small(op)}
    if "empty" in by_name:
        args, _ = samples(op).inputs(by_name["empty"], torch.float32, "cpu")
        assert args[0].numel() == 0
        return
    args, kwargs = samples(op).inputs(by_name["one"], torch.float32, "cpu")
    args = tree_map(lambda leaf: leaf[:0] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf, args)
    with pytest.raises(ValueError, match="at least one"):
        public(op)(*args, **kwargs)


@every_room
def test_same_samples_on_every_machine(op):
    for sample in small(op):
        one, two = (tree_flatten(samples(op).inputs(sample, torch.float32, "cpu"))[0] for _ in range(2))
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))


@every_room
def test_work_counts_every_sample(op):
    for sample in small(op):
        args, kwargs = samples(op).inputs(sample, torch.float32, "cpu")
        explained = vlkern.explain(op.public, *args, **kwargs)
        elements = args[0].numel()
        if op.name == "gmm_sample":  # reads the logits and one component of a token's mixture
            elements = kwargs["noise"][1].numel()
        assert explained.flops >= elements and explained.bytes >= 4 * elements


@every_room
def test_room_has_the_same_doors(op):
    room = ROOT / "kernels" / op.name
    readme = (room / "README.md").read_text()
    for heading in ("Definition", "Gradient", "Cost", "Limits"):
        assert f"\n## {heading}\n" in readme, f"{room / 'README.md'} lacks the heading {heading}"
    for door in ("__init__.py", "reference.py", "samples.py"):
        assert (room / door).is_file()
    sources = {"cpu": "cpu.cpp", "triton": "triton.py", "cuda": "cuda.cu"}
    for backend, source in sources.items():
        assert (room / source).is_file() == (backend in op.backends), f"{room / source}"


@every_room
def test_public_function_is_documented(op):
    function = public(op)
    doc = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
        assert section in doc, f"the docstring of {op.public} lacks {section}"
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert f"{name}:" in doc, f"the docstring of {op.public} does not explain {name}"


def test_every_folder_is_a_room_on_the_menu():
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    assert folders == set(REGISTRY)
    assert {op.public for op in REGISTRY.values()} <= set(vlkern.ops.__all__)
