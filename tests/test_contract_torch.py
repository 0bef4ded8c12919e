"""Every room inside PyTorch's own machinery: opcheck, compile, export, checkpointing, meta tensors."""

import copy
import inspect
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from rooms import KERNELS, device, dtypes, each, light, public, run, samples, skip_unsupported
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint

import vlkern
from vlkern._op import REGISTRY
from vlkern.testing import differentiate, is_float, record


class Graphs:
    """A compiler that only keeps what it was given: fast, and shows which kernels a compiled function calls."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.compile = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    @staticmethod
    def _keep(graphs):
        def compiler(graph, inputs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    def kernels(self):
        """The backends that the captured graphs call."""
        nodes = [node for graph in self.forward + self.backward for node in graph.graph.nodes]
        # An op that works in place is an argument of the op that makes it work on copies.
        called = [called for node in nodes for called in (node.target, *node.args[:1])]
        return {op._overloadname for op in called if getattr(op, "namespace", None) == "vlkern"}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def chosen(op, backend):
    return vlkern.backend(f"{op.name}={backend}")


def case(op, backend, dtype=torch.float32, sample=None):
    args, kwargs = samples(op).inputs(sample or light(op)[-1], dtype, device(backend))
    skip_unsupported(op, backend, args, kwargs)
    return args, kwargs


def assert_same_run(one, other):
    for a, b in zip(one.outputs + one.gradients, other.outputs + other.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each(reference=True)
def test_opcheck(op, backend):
    """On the raw overloads, with inputs that need no grad: gradients belong to the public function.

    What it checks hardly depends on the sizes, and tracing takes seconds, so that is done once for each overload.
    """
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    traced = set()
    for sample in light(op)[::-3]:
        args, kwargs = case(op, backend, sample=sample)
        with record() as calls, chosen(op, backend):
            run(op, public(op), args, kwargs)
            public(op)(*args, **kwargs)
        assert calls
        for call in {call.op: call for call in calls}.values():
            arguments = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, (call.args, call.kwargs))
            checks = quick if call.op in traced else (*quick, "test_aot_dispatch_dynamic")
            torch.library.opcheck(call.op, *arguments, test_utils=checks)
            traced.add(call.op)


@each(reference=True)
def test_compiles_in_one_graph_with_its_backward(op, backend):
    """Of the chosen kernel."""
    args, kwargs = case(op, backend)
    graphs = Graphs()
    with chosen(op, backend):
        eager = run(op, public(op), args, kwargs)
        compiled = torch.compile(public(op), fullgraph=True, backend=graphs.compile)
        assert_same_run(run(op, compiled, args, kwargs), eager)
    assert len(graphs.forward) == 1 and len(graphs.backward) == op.differentiable
    assert graphs.kernels() == {"default" if backend == "reference" else backend}


@pytest.mark.parametrize("name", ["rms_norm", "interval_attention"])
def test_inductor_calls_the_kernel(name):
    """A small one, and one with two results and strided inputs: to the compiler all are calls of something opaque."""
    op, backend = REGISTRY[name], KERNELS[0]
    args, kwargs = case(op, backend)
    with chosen(op, backend):
        eager = run(op, public(op), args, kwargs)
        assert_same_run(run(op, torch.compile(public(op), fullgraph=True), args, kwargs), eager)


def unlike_in_size_only(op):
    """Two calls that one graph must serve: ranks, strides, the sizes 0 and 1 and equal sizes may each cost a graph."""

    def shape(sample):
        leaves, tree = tree_flatten(samples(op).inputs(sample, torch.float32, "cpu"))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        rest = [t.is_contiguous() if isinstance(t, torch.Tensor) else t for t in leaves]
        return [n for t in tensors for n in t.shape], (tree, [t.dim() for t in tensors], rest)

    for one, other in itertools.permutations(reversed(light(op)), 2):
        (sizes, rest), (others, other_rest) = shape(one), shape(other)
        paired = list(zip(sizes, others, strict=False))
        same = all(m == n for (i, m), (j, n) in itertools.combinations(paired, 2) if i == j)
        if rest == other_rest and sizes != others and same and all((i == j) or min(i, j) > 1 for i, j in paired):
            return one, other
    raise AssertionError(f"{op.name} needs two samples that differ in nothing but their sizes")


@each()
def test_one_graph_serves_many_sizes(op, backend):
    graphs = Graphs()
    compiled = torch.compile(public(op), fullgraph=True, dynamic=True, backend=graphs.compile)
    scale = inspect.signature(public(op)).parameters.get("scale")
    for sample in unlike_in_size_only(op):
        args, kwargs = case(op, backend, sample=sample)
        if scale and scale.default is None:
            kwargs = {**kwargs, "scale": 0.25}  # by default one over the root of a size, a constant of the graph
        with chosen(op, backend):
            assert_same_run(run(op, compiled, args, kwargs), run(op, public(op), args, kwargs))
    assert len(graphs.forward) == 1 and len(graphs.backward) == op.differentiable


@each()
def test_exports(op, backend):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return public(op)(*args, **kwargs)

    args, kwargs = case(op, backend)
    with chosen(op, backend):
        program = torch.export.export(Module(), args)
        result = program.module()(*args)
        torch.testing.assert_close(result, public(op)(*args, **kwargs))
    targets = {node.target for node in program.graph.nodes}
    assert any(target in {raw[backend] for raw in op.raw.values()} for target in targets)


@each(dtype=True, reference=True)
def test_autocast_stops_at_the_kernel(op, backend, dtype):
    """The public function casts; a matmul inside a raw op computes in the precision that the op was written for."""
    lower = torch.bfloat16 if torch.bfloat16 in dtypes(backend) else torch.float16
    args, kwargs = case(op, backend, dtype)
    with chosen(op, backend), torch.autocast(device(backend), lower), record() as calls:
        run(op, public(op), args, kwargs)
    assert calls
    for call in calls:
        arguments = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, (call.args, call.kwargs))
        with torch.autocast(device(backend), lower):
            inside = call.op(*arguments[0], **arguments[1])
        outside = call.op(*arguments[0], **arguments[1])
        for a, b in zip(tree_flatten(inside)[0], tree_flatten(outside)[0], strict=True):
            assert torch.equal(a, b)


@each(reference=True, differentiable=True)
def test_activation_checkpointing_gives_the_same_gradients(op, backend):
    args, kwargs = case(op, backend)
    with chosen(op, backend):
        plain = run(op, public(op), args, kwargs)
        again = differentiate(lambda *a, **k: checkpoint(public(op), *a, use_reentrant=False, **k), args, kwargs)
    for a, b in zip(plain.outputs + plain.gradients, again.outputs + again.gradients, strict=True):
        assert torch.equal(a, b)


@each(differentiable=True)
def test_nothing_is_kept_without_grad(op, backend):
    args, kwargs = case(op, backend)
    tracked = tree_map(lambda t: t.detach().requires_grad_() if is_float(t) else t, args)
    with chosen(op, backend):
        with torch.no_grad():
            unrecorded = tree_flatten(public(op)(*tracked, **kwargs))[0]
        plain = tree_flatten(public(op)(*args, **kwargs))[0]
    for a, b in zip(unrecorded, plain, strict=True):
        assert not a.requires_grad and a.grad_fn is None and torch.equal(a, b)


@each(reference=True, differentiable=True)
def test_only_first_derivatives(op, backend):
    """A second derivative raises instead of being silently wrong."""
    args, kwargs = case(op, backend)
    inputs = [t.detach().requires_grad_() if is_float(t) else t for t in args]
    with chosen(op, backend):
        outputs = [t for t in tree_flatten(public(op)(*inputs, **kwargs))[0] if is_float(t)]
        cotangents = [torch.ones_like(t, requires_grad=True) for t in outputs]
        first = torch.autograd.grad(outputs, [t for t in inputs if is_float(t)], cotangents, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(g.sum() for g in first).backward()


@each(dtype=True)
def test_meta_tensors_have_the_same_shapes(op, backend, dtype):
    for sample in light(op):
        args, kwargs = samples(op).inputs(sample, dtype, "cpu")
        real = run(op, public(op), args, kwargs)
        meta_args, meta_kwargs = tree_map(
            lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, copy.copy((args, kwargs))
        )
        meta = run(op, public(op), meta_args, meta_kwargs, cotangents=[t.to("meta") for t in real.cotangents])
        for a, b in zip(real.outputs + real.gradients, meta.outputs + meta.gradients, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype) and b.is_meta
