"""Affine couplings: what they are, the inverse, memory, extreme values and bad input. What all rooms share is in
test_contract.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from rooms import KERNELS, device, dtypes

import vlkern
from vlkern.kernels.coupling import samples
from vlkern.ops import affine_coupling, affine_coupling_inverse
from vlkern.testing import assert_as_good, differentiate, in_float64

every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
PARTS = [s for s in samples.SAMPLES if not s.bench]
every_sample = pytest.mark.parametrize("sample", PARTS, ids=lambda s: s.name)


def chosen(name):
    return vlkern.backend(f"coupling={name}")


def formula(x, shift, raw_scale, tokens=None, channels=None, max_scale=2.0):
    """The lines of a model file."""
    tokens = torch.arange(x.shape[1], device=x.device) if tokens is None else tokens
    channels = torch.arange(x.shape[2], device=x.device) if channels is None else channels
    at = (slice(None), *torch.meshgrid(tokens.long(), channels.long(), indexing="ij"))
    scale = torch.sigmoid(raw_scale) * max_scale
    y = x.clone()
    y[at] = (x[at] + shift) * scale
    return y, (F.logsigmoid(raw_scale) + math.log(max_scale)).sum((1, 2))


@every_backend
@pytest.mark.parametrize("sample", [s for s in PARTS if len(s.shape) == 3], ids=lambda s: s.name)
def test_it_is_the_formula(name, sample):
    args, options = samples.inputs(sample, torch.float32, device(name))
    options["max_scale"] = 1.5
    with chosen(name):
        ours = differentiate(affine_coupling, args, options)
    theirs = differentiate(formula, args, options, cotangents=ours.cotangents)
    for a, b in zip(ours.outputs + ours.gradients, theirs.outputs + theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@every_backend
def test_logdet_is_that_of_the_jacobian(name):
    args, options = samples.inputs(samples.Sample("toy", (1, 3, 4), tokens=True, channels=True), torch.float32, "cpu")
    x, shift, raw = (t.to(device(name)) for t in args)
    options = {k: t.to(device(name)) for k, t in options.items()}
    with chosen(name):
        columns = []
        for i in range(x.numel()):  # the op has first derivatives only: a row of the Jacobian each
            one = torch.zeros_like(x).view(-1)
            one[i] = 1
            leaf = x.clone().requires_grad_()
            y, logdet = affine_coupling(leaf, shift, raw, **options)
            columns.append(torch.autograd.grad(y, leaf, one.view_as(x))[0].flatten())
    expected = torch.linalg.slogdet(torch.stack(columns).double()).logabsdet
    assert logdet.item() == pytest.approx(expected.item(), abs=1e-5)


@every_backend
@every_sample
def test_the_inverse_of_y_is_x(name, sample):
    """To the rounding of y, divided by the scale again: |x2 + shift| of the dtype's epsilon."""
    for dtype in dtypes(name):
        args, options = samples.inputs(sample, dtype, device(name))
        x, shift, raw = args
        with chosen(name):
            y, logdet = affine_coupling(*args, **options)
            back, minus_logdet = affine_coupling_inverse(y, shift, raw, **options)
        assert torch.equal(minus_logdet, -logdet) and back.dtype == dtype
        largest = float(x.float().abs().amax() + shift.float().abs().amax()) if x.numel() else 0.0
        error = float((back.float() - x.float()).abs().max()) if x.numel() else 0.0
        smallest = torch.finfo(dtype).smallest_normal / float(2 * torch.sigmoid(raw.float()).min()) if x.numel() else 0
        assert error <= 2 * torch.finfo(dtype).eps * largest + smallest


@every_backend
@every_sample
def test_inverse_is_as_good_as_the_reference(name, sample):
    for dtype in dtypes(name):
        args, options = samples.inputs(sample, dtype, device(name))
        with chosen(name):
            ours = affine_coupling_inverse(*args, **options)
        with chosen("reference"):
            low = affine_coupling_inverse(*args, **options)
            exact = affine_coupling_inverse(*in_float64(args), **options)
        for results in zip(ours, low, exact, strict=True):
            assert_as_good(*results)


@every_backend
def test_the_rest_of_x_passes_bit_by_bit(name):
    args, options = samples.inputs(next(s for s in PARTS if s.name == "both"), torch.float32, device(name))
    with chosen(name):
        y, _ = affine_coupling(*args, **options)
    changed = torch.zeros_like(y, dtype=torch.bool)
    rows, columns = torch.meshgrid(options["tokens"].long(), options["channels"].long(), indexing="ij")
    changed[:, rows, columns] = True
    assert torch.equal(y[~changed], args[0][~changed]) and not (y == args[0])[changed].any()


@every_backend
def test_all_indices_are_no_indices(name):
    (x, shift, raw), _ = samples.inputs(
        next(s for s in PARTS if s.name == "below_a_vector"), torch.float32, device(name)
    )
    tokens, channels = (torch.arange(n, dtype=torch.int32, device=x.device) for n in x.shape[1:])
    none = torch.arange(0, dtype=torch.int32, device=x.device)
    with chosen(name):
        y, logdet = affine_coupling(x, shift, raw)
        for options in ({"tokens": tokens}, {"channels": channels}, {"tokens": tokens, "channels": channels}):
            same, same_logdet = affine_coupling(x, shift, raw, **options)
            assert torch.equal(same, y)
            torch.testing.assert_close(same_logdet, logdet, rtol=1e-6, atol=1e-4)
        y, logdet = affine_coupling(x, shift[:, :0], raw[:, :0], tokens=none)
        assert torch.equal(y, x) and not logdet.any()


def kept(function, *args, **options):
    """Bytes that autograd keeps for the backward, each memory once."""
    memory = {}

    def pack(t):
        memory[t.data_ptr()] = t.nbytes
        return t

    inputs = [t.detach().requires_grad_() for t in args]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs, **options)
    return sum(memory.values())


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_tensors_are_kept_where_eager_keeps_five(name, dtype):
    """Of 16-bit inputs eager keeps them in float32, as it must for the same accuracy."""

    def eager(x, shift, raw):
        x, shift, raw = x.float(), shift.float(), raw.float()
        return (x + shift) * (torch.sigmoid(raw) * 2.0), (F.logsigmoid(raw) + math.log(2.0)).sum((1, 2))

    x, shift, raw = torch.randn(3, 4, 16, 32, device=device(name)).to(dtype).unbind()
    channels = torch.arange(32, dtype=torch.int32, device=x.device)
    with chosen(name):
        ours = kept(affine_coupling, x, shift, raw)
        assert ours == 2 * x.nbytes
        of_part = kept(affine_coupling, torch.cat([x, x], 2), shift, raw, channels=channels)
        assert of_part == 2 * x.nbytes + channels.nbytes
    theirs = kept(eager, x, shift, raw)
    assert ours <= (2 / 4 if x.is_cuda else 2 / 5 if dtype == torch.float32 else 1 / 5) * theirs


@every_backend
def test_extreme_scales_are_finite(name):
    raw = torch.tensor([0.0, 80, -80, 88, -88, 103, -103, 150, -150, 1e4, -1e4], device=device(name)).expand(2, 1, -1)
    x, shift = torch.full_like(raw, 3.0), torch.full_like(raw, -1.0)
    with chosen(name):
        run = differentiate(affine_coupling, (x, shift, raw), {})
        y, logdet = run.outputs
        back, _ = affine_coupling_inverse(y, shift, raw)
    assert all(t.isfinite().all() for t in (*run.outputs, *run.gradients, back))
    exact = (F.logsigmoid(raw.double()) + math.log(2.0)).sum((1, 2))
    torch.testing.assert_close(logdet.double(), exact, rtol=1e-6, atol=0)
    slope = run.cotangents[1].view(-1, 1, 1) * torch.sigmoid(-raw)
    torch.testing.assert_close(run.gradients[2][raw < -80], slope[raw < -80])  # y is 0 there, the logdet is not


def test_autocast_computes_in_float32():
    x, shift, raw = torch.randn(3, 2, 5, 8, device=device(KERNELS[0])).bfloat16().unbind()
    with torch.autocast(x.device.type, torch.bfloat16):
        y, logdet = affine_coupling(x.float(), shift, raw)
    assert y.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(y, affine_coupling(x.float(), shift.float(), raw.float())[0], rtol=0, atol=0)


X, PART = torch.ones(2, 6, 4), torch.ones(2, 3, 4)


def index(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("function", [affine_coupling, affine_coupling_inverse])
@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((1, PART, PART), {}, TypeError, "must be a tensor, got int"),
        ((X.int(), X, X), {}, TypeError, "must be float64, float32, bfloat16 or float16, got torch.int32"),
        ((X, X.half(), X), {}, TypeError, "shift must have the dtype of ., torch.float32, got torch.float16"),
        ((X, X, X.half()), {}, TypeError, "raw_scale must have the dtype of ., torch.float32, got torch.float16"),
        ((torch.ones(3), torch.ones(3), torch.ones(3)), {}, ValueError, "two dimensions or more, got \\[3\\]"),
        ((X, PART, X), {}, ValueError, "shift must have shape \\[2, 6, 4\\], got \\[2, 3, 4\\]"),
        ((X, X, PART), {}, ValueError, "raw_scale must have shape \\[2, 6, 4\\], got \\[2, 3, 4\\]"),
        ((X, X, X), {"channels": index(0, 2)}, ValueError, "shift must have shape \\[2, 6, 2\\], got \\[2, 6, 4\\]"),
        ((X, X, X), {"max_scale": 0}, ValueError, "max_scale must be a positive finite number, got 0"),
        ((X, X, X), {"max_scale": -1.0}, ValueError, "max_scale must be a positive finite number, got -1.0"),
        ((X, X, X), {"max_scale": float("nan")}, ValueError, "max_scale must be a positive finite number, got nan"),
        ((X, X, X), {"max_scale": "2"}, TypeError, "max_scale must be a number, got str"),
        ((X, PART, PART), {"tokens": [0, 1, 2]}, TypeError, "tokens must be a tensor, got list"),
        ((X, PART, PART), {"tokens": index(0, 1, 2).long()}, TypeError, "tokens must be int32, got torch.int64"),
        ((X, PART, PART), {"tokens": index(0, 1, 6)}, ValueError, "tokens must lie in \\[0, 6\\), got 0 to 6"),
        ((X, PART, PART), {"tokens": index(-1, 1, 2)}, ValueError, "tokens must lie in \\[0, 6\\), got -1 to 2"),
        ((X, PART, PART), {"tokens": index(1, 2, 1)}, ValueError, "tokens must not repeat an index, got \\[1, 2, 1\\]"),
        ((X, PART, PART), {"tokens": index(1)[None]}, ValueError, "tokens must have shape \\[n\\] with n <= 6"),
        ((X, X, X), {"channels": index(0, 1, 2, 3, 0)}, ValueError, "channels must have shape \\[n\\] with n <= 4"),
        ((X[0], X[0], X[0]), {"channels": index(0)}, ValueError, "channels must be None unless . has shape"),
    ],
)  # fmt: skip
def test_bad_input(function, args, options, error, message):
    with pytest.raises(error, match=message):
        function(*args, **options)


def test_indices_are_looked_at_on_request_only():
    x, part = X.to("meta"), PART.to("meta")
    affine_coupling(x, part, part, tokens=index(1, 2, 1).to("meta"))  # no values to look at
    with vlkern.validate(True), pytest.raises(ValueError, match="must not repeat"):
        affine_coupling(X, PART, PART, tokens=index(1, 2, 1))


def test_the_inverse_has_no_gradient():
    with pytest.raises(ValueError, match="raw_scale must not require a gradient"):
        affine_coupling_inverse(X, X, X.clone().requires_grad_())
