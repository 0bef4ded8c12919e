"""The sigmoid contrastive loss: golden values, properties, bad input. What all rooms share is in test_contract.py."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rooms import KERNELS, agree, device, dtypes

import vlkern
from vlkern._op import REGISTRY
from vlkern.ops import sigmoid_contrastive_loss
from vlkern.testing import differentiate, in_float64

OP = REGISTRY["sigmoid_loss"]
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("siglip_loss_*.npz"))
every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
every_kernel = pytest.mark.parametrize("name", KERNELS)


def pairs(b, d, dtype=torch.float32, seed=0, noise=1.0, where="cpu"):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(b, d, generator=g, dtype=torch.float64)
    text = image + noise * torch.randn(b, d, generator=g, dtype=torch.float64)
    return tuple(F.normalize(t, dim=-1).to(where, dtype) for t in (image, text))


def scalars(*values, where="cpu"):
    return tuple(torch.tensor(v, device=where) for v in values)


def run(name, *args, **kwargs):
    with vlkern.backend(f"sigmoid_loss={name}"):
        return differentiate(sigmoid_contrastive_loss, args, kwargs, cotangents=[torch.ones(())])


@every_backend
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(name, path):
    """Values and gradients of the published JAX implementation, through exp and the logarithm of the temperature.

    Tolerances as the files' authors give them: 2e-5 for values; for gradients 5e-5, at temperature 100 2e-4, relative
    to the largest gradient of the file.
    """
    z = {key: torch.from_numpy(value) for key, value in np.load(path).items() if value.dtype.kind == "f"}
    where = device(name)
    image, text, log_scale, bias = (
        z[key].to(where).requires_grad_() for key in ("out/zimg", "out/ztxt", "params/t", "params/b")
    )
    with vlkern.backend(name):
        scale = log_scale.exp()
        loss = sigmoid_contrastive_loss(image, text, scale, bias)
        found = torch.autograd.grad(loss, (image, text, log_scale, bias, scale))
        with torch.no_grad():
            forward_only = sigmoid_contrastive_loss(image, text, scale, bias)
    expected = [z[f"ref64/grad/{key}"] for key in ("zimg", "ztxt", "t", "b", "tprime")]
    for value in (loss, forward_only):
        assert value.shape == () and value.dtype == torch.float32
        torch.testing.assert_close(value.detach().cpu().double(), z["ref64/loss"], rtol=2e-5, atol=0)
    largest = max(g.abs().max() for g in expected)
    tolerance = (2e-4 if "extreme" in path.stem else 5e-5) * largest
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours.cpu().double() - exact).abs().max() <= tolerance


@every_backend
@pytest.mark.parametrize("b", [1, 8, 200])
def test_known_value_at_the_start_of_training(name, b):
    """Orthogonal embeddings, scale 10, bias -10: softplus(10) for the positive, softplus(-10) for each negative."""
    where = device(name)
    basis = torch.eye(2 * b, device=where)
    with vlkern.backend(name):
        loss = sigmoid_contrastive_loss(basis[:b], basis[b:], 10.0, -10.0)
    expected = math.log1p(math.exp(10)) + (b - 1) * math.log1p(math.exp(-10))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@every_backend
def test_scalars_may_be_numbers_or_tensors(name):
    where = device(name)
    image, text = pairs(9, 16, where=where)
    tensor, one = torch.tensor(7.5, device=where), torch.tensor([-3.0], device=where)
    low, whole = torch.tensor(7.5, dtype=torch.bfloat16, device=where), -3
    with vlkern.backend(name):
        results = [sigmoid_contrastive_loss(image, text, s, b) for s, b in ((7.5, -3.0), (tensor, one), (low, whole))]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert all(r.shape == () for r in results)
    one.requires_grad_()
    with vlkern.backend(name):
        sigmoid_contrastive_loss(image, text, 7.5, one).backward()
    assert one.grad.shape == (1,)


@every_backend
def test_permuting_the_pairs_leaves_the_loss(name):
    where = device(name)
    image, text = pairs(130, 48, where=where)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0)).to(where)
    scale, bias = scalars(12.0, -9.0, where=where)
    plain, mixed = run(name, image, text, scale, bias), run(name, image[order], text[order], scale, bias)
    torch.testing.assert_close(mixed.outputs[0], plain.outputs[0], rtol=1e-6, atol=0)
    for i in (0, 1):
        torch.testing.assert_close(mixed.gradients[i], plain.gradients[i][order], rtol=1e-5, atol=1e-6)
    for i in (2, 3):
        torch.testing.assert_close(mixed.gradients[i], plain.gradients[i], rtol=1e-5, atol=1e-6)


@every_backend
def test_swapping_the_towers_swaps_the_gradients(name):
    where = device(name)
    image, text = pairs(70, 40, where=where)
    one, other = (run(name, *two, *scalars(8.0, -4.0, where=where)) for two in ((image, text), (text, image)))
    torch.testing.assert_close(one.outputs[0], other.outputs[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(one.gradients[0], other.gradients[1], rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_empty_slots_equal_a_smaller_batch(name, dtype):
    """`valid` gives what taking the rows out gives, whatever lies in the empty slots, and those get zero gradients."""
    if name in KERNELS and dtype not in dtypes(name):
        pytest.skip("Triton's interpreter has no bfloat16 dot")
    where = device(name)
    image, text = pairs(90, 40, dtype, where=where)
    valid = (torch.arange(90) % 4 != 2).to(where)
    scalar = scalars(10.0, -6.0, where=where)
    small = run(name, image[valid], text[valid], *scalar)
    image[~valid], text[~valid] = math.nan, math.inf
    masked = run(name, image, text, *scalar, valid=valid)
    tight = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4e-6}
    torch.testing.assert_close(masked.outputs[0], small.outputs[0], rtol=1e-5, atol=0)
    for i in (0, 1):
        assert not masked.gradients[i][~valid].any()
        torch.testing.assert_close(masked.gradients[i][valid], small.gradients[i], **tight)
    for i in (2, 3):
        torch.testing.assert_close(masked.gradients[i], small.gradients[i], rtol=1e-4, atol=1e-5)


@every_backend
def test_rows_and_columns_can_be_masked_apart(name):
    """The sum over valid rows and columns, divided by the number of valid rows."""
    where = device(name)
    image, text = pairs(40, 24, where=where)
    rows, columns = (torch.arange(40) % 3 != 0).to(where), (torch.arange(40) % 5 != 1).to(where)
    logits = 6.0 * image.double() @ text.double().T - 2.0
    z = 2 * torch.eye(40, dtype=torch.float64, device=where) - 1
    expected = F.softplus(-z * logits)[rows][:, columns].sum() / rows.sum()
    with vlkern.backend(name):
        loss = sigmoid_contrastive_loss(image, text, 6.0, -2.0, valid=(rows, columns))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@every_backend
def test_a_batch_of_empty_slots_has_no_loss(name):
    where = device(name)
    image, text = (torch.full((5, 8), math.nan, device=where) for _ in range(2))
    result = run(
        name, image, text, *scalars(10.0, -10.0, where=where), valid=torch.zeros(5, dtype=torch.bool).to(where)
    )
    assert result.outputs[0].item() == 0
    assert not any(g.any() for g in result.gradients)


@every_backend
@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (1e4, 0.0), (0.0, -1e4), (-50.0, 1e4), (1e30, 1e30)])
def test_finite_at_any_temperature(name, scale, bias):
    for dtype in dtypes(name):
        image, text = pairs(37, 20, dtype, where=device(name))
        result = run(name, image, text, *scalars(scale, bias, where=device(name)))
        assert result.outputs[0].isfinite()
        if dtype != torch.float16 or abs(scale) < 1e4:  # float16 cannot hold a gradient of that size
            assert all(g.isfinite().all() for g in result.gradients)


@every_kernel
@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (1e4, 3.0), (0.0, -7.0), (-5.0, 0.5)])
def test_extreme_temperatures_agree(name, scale, bias):
    for dtype in dtypes(name):
        if dtype != torch.float16 or abs(scale) < 1e4:
            scalar = scalars(scale, bias, where=device(name))
            agree(OP, name, [((*pairs(61, 40, dtype, seed, where=device(name)), *scalar), {}) for seed in range(16)])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_is_not_swallowed(name, dtype):
    """A model that has diverged must show in the loss and in every gradient that saw the NaN."""
    if name in KERNELS and dtype not in dtypes(name):
        pytest.skip("Triton's interpreter has no bfloat16 dot")
    where = device(name)
    image, text = pairs(70, 40, dtype, where=where)
    text[66, 3] = math.nan
    args = (image, text, *scalars(10.0, -10.0, where=where))
    result = run(name, *args)
    with vlkern.backend(name):
        assert sigmoid_contrastive_loss(*args).isnan()
    d_image, d_text, d_scale, d_bias = result.gradients
    assert result.outputs[0].isnan() and d_scale.isnan() and d_bias.isnan()
    assert d_image.isnan().all() and d_text[66].isnan().all()


@every_backend
def test_float16_keeps_small_gradients(name):
    """Well separated pairs have gradients below float16's range; a loss scale saves them, if nothing rounds before."""
    where, loss_scale = device(name), 65536.0
    basis = torch.eye(64, dtype=torch.float16, device=where)
    args = (basis, basis.clone(), *scalars(30.0, -15.0, where=where))
    with vlkern.backend(name):
        sent = [torch.tensor(loss_scale)]
        ours = differentiate(sigmoid_contrastive_loss, args, {}, cotangents=sent)
    exact, unscaled = run("reference", *in_float64(args)), run(name, *args)
    for i in (0, 1):
        wanted = exact.gradients[i]
        assert wanted.abs().max() < torch.finfo(torch.float16).smallest_normal
        kept, lost = ours.gradients[i].double() / loss_scale, unscaled.gradients[i].double()
        assert (kept - wanted).norm() <= 0.001 * wanted.norm()
        assert (lost - wanted).norm() >= 0.01 * wanted.norm()


@every_backend
def test_bfloat16_logits_are_not_rounded(name):
    """Rounding the logits to bfloat16, as eager PyTorch does, costs far more accuracy than rounding the embeddings."""
    if name in KERNELS and torch.bfloat16 not in dtypes(name):
        pytest.skip("Triton's interpreter has no bfloat16 dot")
    where = device(name)
    image, text = pairs(256, 64, torch.bfloat16, where=where)
    exact = run("reference", *in_float64((image, text, *scalars(100.0, -10.0, where=where))))
    ours = run(name, image, text, *scalars(100.0, -10.0, where=where))
    logits = 100.0 * image @ text.T - 10.0
    z = 2 * torch.eye(256, dtype=torch.bfloat16, device=where) - 1
    eager = -F.logsigmoid(z * logits).sum() / 256
    our_error, eager_error = (abs(loss.item() - exact.outputs[0].item()) for loss in (ours.outputs[0], eager))
    assert our_error * 100 < eager_error


@every_backend
def test_autocast_casts_the_embeddings_only(name):
    where, lower = device(name), dtypes(name if name in KERNELS else "cpu")[-1]
    image, text = pairs(33, 24, where=where)
    scale, bias = scalars(10.1, -9.9, where=where)
    with vlkern.backend(name):
        with torch.autocast(where, lower):
            inside = differentiate(sigmoid_contrastive_loss, (image, text, scale, bias), {})
        outside = sigmoid_contrastive_loss(image.to(lower), text.to(lower), scale, bias)
    assert inside.outputs[0].dtype == torch.float32 and torch.equal(inside.outputs[0], outside)
    assert all(g.dtype == torch.float32 for g in inside.gradients)


@every_backend
def test_compiles_with_the_same_tensor_twice(name):
    """One mask for rows and columns, or one tensor for both towers, reach the autograd.Function as two inputs."""
    where = device(name)
    x, _ = pairs(12, 8, where=where)
    mask = torch.arange(12, device=where) % 2 == 0

    def function(x, valid):
        return sigmoid_contrastive_loss(x, x, 10.0, -10.0, valid=valid)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with vlkern.backend(name):
        for valid in (mask, (mask, mask)):
            eager, traced = (differentiate(f, (x, valid), {}) for f in (function, compiled))
            assert torch.equal(eager.outputs[0], traced.outputs[0])
            torch.testing.assert_close(eager.gradients[0], traced.gradients[0])


@every_backend
def test_many_chunks_equal_one_matrix(name):
    """A batch well beyond any tile, against the [B, B] matrix in float64."""
    where, b = device(name), 700
    image, text = pairs(b, 32, where=where)
    result = run(name, image, text, *scalars(15.0, -8.0, where=where))
    x, y, t, c = (v.double().requires_grad_() for v in (image, text, *scalars(15.0, -8.0, where=where)))
    z = 2 * torch.eye(b, dtype=torch.float64, device=where) - 1
    loss = F.softplus(-z * (t * x @ y.T + c)).sum() / b
    torch.testing.assert_close(result.outputs[0].double(), loss.detach(), rtol=1e-6, atol=0)
    for ours, exact in zip(result.gradients, torch.autograd.grad(loss, (x, y, t, c)), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


X, Y = torch.eye(4, 8), torch.eye(4, 8)
V = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "image must be a tensor, got ndarray", (X.numpy(), Y, 1.0, 0.0), {}),
        (TypeError, "image must be float.*got torch.int64", (X.long(), Y, 1.0, 0.0), {}),
        (TypeError, "text must be float.*got torch.bool", (X, Y.bool(), 1.0, 0.0), {}),
        (TypeError, "text must have the dtype of image, torch.float32, got torch.float16", (X, Y.half(), 1.0, 0.0), {}),
        (ValueError, r"image must have shape \[B, D\], got \[\]", (torch.tensor(1.0), torch.tensor(1.0), 1.0, 0.0), {}),
        (ValueError, r"image must have shape \[B, D\], got \[8\]", (X[0], Y[0], 1.0, 0.0), {}),
        (ValueError, r"image must have shape \[B, D\], got \[1, 4, 8\]", (X[None], Y[None], 1.0, 0.0), {}),
        (ValueError, r"image must .* at least one pair .*got shape \[0, 8\]", (X[:0], Y[:0], 1.0, 0.0), {}),
        (ValueError, r"image must .* one channel, got shape \[4, 0\]", (X[:, :0], Y[:, :0], 1.0, 0.0), {}),
        (ValueError, r"text must have shape \[4, 8\], got \[3, 8\]", (X, Y[:3], 1.0, 0.0), {}),
        (ValueError, r"text must have shape \[4, 8\], got \[4, 7\]", (X, Y[:, :7], 1.0, 0.0), {}),
        (ValueError, "text must be on the device of image, cpu, got meta", (X, Y.to("meta"), 1.0, 0.0), {}),
        (ValueError, "scale must be on the device of image, meta, got cpu",
         (X.to("meta"), Y.to("meta"), torch.tensor(1.0), 0.0), {}),
        (ValueError, "scale must be a finite number, got nan", (X, Y, math.nan, 0.0), {}),
        (ValueError, "scale must be finite, got nan", (X, Y, torch.tensor(math.nan), 0.0), {}),
        (ValueError, "bias must be a finite number, got inf", (X, Y, 1.0, math.inf), {}),
        (ValueError, "bias must be finite, got -inf", (X, Y, 1.0, torch.tensor([-math.inf])), {}),
        (TypeError, "scale must be a number, got bool", (X, Y, True, 0.0), {}),
        (TypeError, "scale must be a number, got str", (X, Y, "10", 0.0), {}),
        (TypeError, "scale must be float.*got torch.int64", (X, Y, torch.tensor(10), 0.0), {}),
        (TypeError, "bias must be a number, got NoneType", (X, Y, 1.0, None), {}),
        (ValueError, r"scale must be a number or have one element, got shape \[4\]", (X, Y, torch.ones(4), 0.0), {}),
        (ValueError, r"bias must be a number or have one element, got shape \[0\]", (X, Y, 1.0, torch.ones(0)), {}),
        (TypeError, "valid must be bool, got torch.float32", (X, Y, 1.0, 0.0), {"valid": V.float()}),
        (TypeError, "valid must be a tensor, got list", (X, Y, 1.0, 0.0), {"valid": [True] * 4}),
        (ValueError, r"valid must have shape \[4\], got \[3\]", (X, Y, 1.0, 0.0), {"valid": V[:3]}),
        (ValueError, r"valid must have shape \[4\], got \[4, 4\]", (X, Y, 1.0, 0.0), {"valid": V[None] & V[:, None]}),
        (ValueError, "valid must be on the device of image, cpu, got meta", (X, Y, 1.0, 0.0), {"valid": V.to("meta")}),
        (ValueError, "valid must be one mask or a pair .* got 3 masks", (X, Y, 1.0, 0.0), {"valid": (V, V, V)}),
        (TypeError, "valid must be a tensor, got NoneType", (X, Y, 1.0, 0.0), {"valid": (V, None)}),
    ],
)  # fmt: skip
def test_bad_input(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        sigmoid_contrastive_loss(*args, **kwargs)
