"""The bits of symbols under mixtures on an emulated GPU (emulator/): every sample, symbols of every dtype, extremes."""

import math

import pytest
import torch
from emulation import DTYPES, compare, run

from vlkern._op import REGISTRY
from vlkern.kernels.mixture_bits import samples


def agrees(symbols, params):
    """Forward and backward."""
    args = REGISTRY["mixture_bits"].bind(symbols, params)
    compare("mixture_bits", "mixture_bits", args)
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(7))
    magnitudes = samples.magnitudes(grad, *args)
    compare("mixture_bits", "mixture_bits_backward", (grad, *args), gradients=True, magnitudes=magnitudes)


@DTYPES
@pytest.mark.parametrize("sample", [s for s in samples.SAMPLES if not s.bench], ids=lambda s: s.name)
def test_mixture_bits_on_its_samples(emulated, sample, dtype):
    (symbols, params), _ = samples.inputs(sample, dtype, "cpu")
    agrees(symbols, params)


@DTYPES
def test_symbols_have_a_dtype_of_their_own(emulated, dtype):
    """Several blocks, the last of them not full."""
    (symbols, params), _ = samples.inputs(samples.Sample("", (9,), 2, 40), torch.float16, "cpu")
    agrees(symbols.to(dtype), params)


def test_extreme_arguments_and_nan(emulated):
    sizes = torch.tensor([0.0, 1.0, 1e4, 1e18, 3e38])
    grid = torch.cartesian_prod(*[torch.cat([sizes, -sizes])] * 3).T
    symbols, params = grid[0, None], torch.stack([torch.zeros_like(grid), grid], 1)[None, [0, 1, 2]]
    found = (
        *run("mixture_bits", "mixture_bits", "cuda", symbols, params),
        *run("mixture_bits", "mixture_bits_backward", "cuda", torch.ones_like(symbols), symbols, params),
    )
    assert all(t.isfinite().all() for t in found)
    for where in (symbols[0], params[0, 0, 0], params[0, 1, 1], params[0, 2, 0]):
        before = where[5].item()
        where[5] = math.nan
        bits, d_params = (
            run("mixture_bits", "mixture_bits", "cuda", symbols, params)[0],
            run("mixture_bits", "mixture_bits_backward", "cuda", torch.ones_like(symbols), symbols, params)[1],
        )
        where[5] = before
        assert bits[0, 5].isnan() and bits[0, 6:].isfinite().all()
        assert d_params[..., 5].isnan().any() and d_params[..., 6:].isfinite().all()


def test_launches_check_what_they_are_given(emulated):
    symbols, params = torch.ones(2, 4), torch.ones(2, 3, 5, 4)
    for args, message in (
        ((symbols[:1], params), r"params \[N, 3, K, C\]"),
        ((symbols.int(), params), "symbols must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run("mixture_bits", "mixture_bits", "cuda", *args)
    with pytest.raises(RuntimeError, match="grad must be float32"):
        run("mixture_bits", "mixture_bits_backward", "cuda", symbols.half(), symbols, params)
