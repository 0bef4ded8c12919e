"""The choice of a backend: parsing, scope, explicit choices that never fall back, and what explain says."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from rooms import KERNELS, device
from torch._dynamo.testing import CompileCounterWithBackend

import vlkern
from vlkern._op import BACKENDS, REGISTRY
from vlkern.backends import parse
from vlkern.ops import rms_norm, sigmoid_contrastive_loss
from vlkern.testing import record

OP = REGISTRY["rms_norm"]


def inputs(backend="cpu", dtype=torch.float32, grad=True):
    x, weight = torch.randn(5, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    return tuple(t.to(device(backend)).requires_grad_(grad) for t in (x, weight))


def python(code, **environment):
    """A fresh process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLKERN_", "TRITON_INTERPRET"))}
    return subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("choice", "table"),
    [
        ("triton", {"*": "triton"}),
        ("auto", {"*": "auto"}),
        ("rms_norm=triton,*=auto", {"rms_norm": "triton", "*": "auto"}),
        (" rms_norm=cpu , sigmoid_loss=reference ", {"rms_norm": "cpu", "sigmoid_loss": "reference"}),
    ],
)
def test_parse(choice, table):
    assert parse(choice) == table


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("gpu", "backend must be one of reference, cpu, triton, cuda or auto, got 'gpu'"),
        ("", "backend must be one of .* got ''"),
        ("rms_norm=", "backend must be one of .* got ''"),
        ("cpu,", "backend must be one of .* got ''"),
        (
            "rms_nrom=cpu",
            "backend names the op 'rms_nrom'; the ops are .*interval_attention, linear, .*rms_norm, .*sigmoid_loss$",
        ),
        ("Triton", "got 'Triton'"),
    ],
)
def test_bad_choice(choice, message):
    with pytest.raises(ValueError, match=message):
        vlkern.backend(choice)


def test_contexts_nest_and_end():
    assert OP.forced is None
    with vlkern.backend("reference"):
        assert OP.forced == "reference" and REGISTRY["sigmoid_loss"].forced == "reference"
        with vlkern.backend("rms_norm=cpu"):
            assert OP.forced == "cpu" and REGISTRY["sigmoid_loss"].forced == "reference"
            with vlkern.backend("auto"):
                assert OP.forced is None
            assert OP.forced == "cpu"
        assert OP.forced == "reference"
    assert OP.forced is None


def test_context_ends_after_an_exception():
    with pytest.raises(KeyError), vlkern.backend("reference"):
        raise KeyError
    assert OP.forced is None


def test_a_call_takes_effect_at_once():
    setting = vlkern.backend("reference")
    try:
        assert OP.forced == "reference"
    finally:
        setting.__exit__(None, None, None)
    assert OP.forced is None


def test_a_bad_choice_changes_nothing():
    with vlkern.backend("reference"):
        with pytest.raises(ValueError):
            vlkern.backend("rms_norm=cpu,*=nothing")
        assert OP.forced == "reference"


def test_explicit_choice_never_falls_back():
    x, weight = inputs(dtype=torch.float64)
    assert vlkern.explain(rms_norm, x, weight).backend == "reference"
    with vlkern.backend("cpu"), pytest.raises(RuntimeError, match=r"rms_norm: .*'cpu' was chosen.*not torch\.float64"):
        rms_norm(x, weight)
    with vlkern.backend("cpu"), pytest.raises(RuntimeError, match="the tensors are on meta"):
        rms_norm(x.to("meta"), weight.to("meta"))
    with (
        vlkern.backend("cuda"),
        pytest.raises(RuntimeError, match="rms_norm: backend 'cuda' was chosen and cannot run"),
    ):
        rms_norm(*inputs())


@pytest.mark.parametrize("name", ["reference", *KERNELS])
def test_the_choice_is_what_runs(name):
    x, weight = inputs(name)
    with record() as calls, vlkern.backend(name):
        rms_norm(x, weight)
    assert [call.backend for call in calls] == [name]


@pytest.mark.parametrize("name", ["reference", *KERNELS])
@pytest.mark.parametrize("thread", [False, True])
def test_backward_keeps_the_backend_of_its_forward(name, thread):
    """Also when the context has ended, another one is active, or the backward runs in another thread."""
    x, weight = inputs(name)
    with vlkern.backend(name):
        y = rms_norm(x, weight)
    calls = []

    def backward():
        with record() as seen:
            y.sum().backward()
        calls.extend(seen)

    with vlkern.backend("cpu" if name == "reference" else "reference"):
        if thread:
            worker = threading.Thread(target=backward)
            worker.start()
            worker.join()
        else:
            backward()
    assert [call.backend for call in calls] == [name]
    assert x.grad is not None and weight.grad is not None


def test_a_compiled_function_follows_the_choice():
    """Choosing anew recompiles; the old choice is found again without compiling."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, backend=counter)
    x, weight = inputs(KERNELS[0], grad=False)
    for name in ("reference", KERNELS[0], "reference", KERNELS[0]):
        with vlkern.backend(name):
            compiled(x, weight)
    targets = [
        str(node.target) for graph in counter.graphs for node in graph.graph.nodes if "vlkern" in str(node.target)
    ]
    assert targets == ["vlkern.rms_norm.default", f"vlkern.rms_norm.{KERNELS[0]}"]


def test_explain_says_what_runs_and_why_not_the_others():
    x, weight = inputs()
    found = vlkern.explain(rms_norm, x, weight)
    with record() as calls:
        rms_norm(x, weight)
    assert found.backend == calls[0].backend
    assert found.op == "rms_norm" and found.flops == 4 * 40 and found.bytes == 2 * 40 * 4 + 8 * 4
    assert set(found.refused) == set(BACKENDS) - {found.backend}
    assert all(found.refused.values())
    text = str(found)
    assert text.startswith(f"rms_norm: {found.backend}") and all(f"not {name}: " in text for name in found.refused)
    with vlkern.backend("reference"):
        found = vlkern.explain("rms_norm", x, weight)
    assert found.backend == "reference" and found.refused["cpu"] == "reference was chosen explicitly"


def test_explain_takes_the_function_and_both_names():
    image = torch.eye(3, 4)
    for op in (sigmoid_contrastive_loss, "sigmoid_contrastive_loss", "sigmoid_loss"):
        assert vlkern.explain(op, image, image, 10.0, -10.0).op == "sigmoid_contrastive_loss"
    with pytest.raises(ValueError, match=r"op must be a function of vlkern\.ops or the name of one, got 'norm'"):
        vlkern.explain("norm", image)


def test_explain_checks_its_arguments_and_runs_nothing():
    with pytest.raises(ValueError, match="weight must have shape"):
        vlkern.explain(rms_norm, torch.ones(2, 3), torch.ones(4))
    with record() as calls:
        vlkern.explain(rms_norm, *inputs())
    assert not calls


def test_values_are_read_under_compile_only_when_asked():
    """A check of values waits for the device, so it is off where the user cannot see it, unless validate asks."""
    image, nan = torch.eye(3, 4), torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        sigmoid_contrastive_loss(image, image.clone(), nan, 0.0)
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_contrastive_loss, fullgraph=True, backend="eager")
    assert compiled(image, image.clone(), nan, 0.0).isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_validate_reads_values_on_a_gpu():
    image, nan = torch.eye(3, 4, device="cuda"), torch.tensor(float("nan"), device="cuda")
    assert sigmoid_contrastive_loss(image, image.clone(), nan, 0.0).isnan()
    with vlkern.validate(True), pytest.raises(ValueError, match="scale must be finite"):
        sigmoid_contrastive_loss(image, image.clone(), nan, 0.0)


def test_validate_nests_and_ends():
    from vlkern._checks import SETTINGS

    with vlkern.validate(True):
        with vlkern.validate(False):
            assert not SETTINGS.validate
        assert SETTINGS.validate
    assert not SETTINGS.validate


def test_environment_chooses_for_the_process():
    code = "import torch, vlkern; x = torch.ones(2, 3); "
    code += "print(vlkern.explain('rms_norm', x, x[0]).backend, vlkern.explain('linear', x, x).backend)"
    assert python(code, VLKERN_BACKEND="rms_norm=reference,*=auto").stdout.split() == ["reference", "cpu"]


def test_bad_environment_is_named():
    result = python("import vlkern", VLKERN_BACKEND="tritn")
    assert result.returncode != 0
    assert "ValueError: VLKERN_BACKEND: backend must be one of" in result.stderr and "'tritn'" in result.stderr
