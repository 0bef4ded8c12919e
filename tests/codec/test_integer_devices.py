"""The whole-number transformer on a GPU: what can be known without one, and what is tried where there is one."""

import copy

import numpy as np
import pytest
import torch
from test_integer import CONFIGS, latents, random_weights, same
from tiny import exact, picture
from torch.utils._python_dispatch import TorchDispatchMode

from vlkern import codec
from vlkern.codec.decompress import decode_symbols
from vlkern.codec.format import read
from vlkern.codec.integer import IntegerEntropy, arithmetic
from vlkern.codec.integer.measure import mixtures_of

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Products(TorchDispatchMode):
    """Notes what kinds of numbers are multiplied as matrices."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.matmul):
            self.dtypes += [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
        return func(*args, **(kwargs or {}))


def test_everything_stays_on_its_device(monkeypatch):
    """A device without numbers: what meets a tensor of another device raises, and so does what looks at a value."""
    config = CONFIGS["odd"]
    entropy = IntegerEntropy(config, random_weights(config, 5), device="meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    with Products() as products:
        found = mixtures_of(entropy, latents(config, 2, 6))
    assert all(part.is_meta and part.shape[:2] == (2, config.tokens) for part in found)
    assert set(products.dtypes) == {torch.float64}  # GPUs multiply no matrices of integers
    assert len(products.dtypes) >= 2 * 6 * config.depth * len(config.groups)


@pytest.mark.parametrize("extreme", [False, True], ids=["typical", "extreme"])
def test_the_order_of_summation_does_not_matter(extreme, monkeypatch):
    """Whatever a library does: parts of any length, in any order, each by itself."""
    config = CONFIGS["odd"]
    entropy = IntegerEntropy(config, random_weights(config, 5, extreme), backend="reference")
    sample = latents(config, 2, 6, size=2**31 - 1 if extreme else 40)
    wanted = mixtures_of(entropy, sample)

    def in_parts(a_MK, b_KN):
        order = torch.randperm(a_MK.shape[-1], generator=torch.Generator().manual_seed(a_MK.shape[-1]))
        parts = [a_MK[..., k].double() @ b_KN[..., k, :].double() for k in order.split(3)]
        return torch.stack(parts).cumsum(0)[-1].long()

    monkeypatch.setattr(arithmetic, "product", in_parts)
    same(mixtures_of(entropy, sample), wanted)
    monkeypatch.setattr(arithmetic, "product", lambda a_MK, b_KN: a_MK.long() @ b_KN.long())
    same(mixtures_of(entropy, sample), wanted)


@NEEDS_GPU
@pytest.mark.parametrize("extreme", [False, True], ids=["typical", "extreme"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_finds_the_same_mixtures(name, extreme):
    config = CONFIGS[name]
    weights, sample = random_weights(config, 5, extreme), latents(config, 70, 6, size=2**31 - 1 if extreme else 40)
    wanted = mixtures_of(IntegerEntropy(config, weights), sample)
    same(mixtures_of(IntegerEntropy(config, weights, device="cuda"), sample), wanted)


@NEEDS_GPU
@pytest.mark.parametrize("batch", [1, 5])
def test_files_pass_between_cpu_and_gpu(batch):
    """Made on one and read on the other: the same bytes, symbols and, to rounding, pictures."""
    here = exact()
    there = codec.Codec(copy.deepcopy(here.model), here._integer, device="cuda")
    pixels = picture(150, 70)
    for maker, reader in ((here, there), (there, here)):
        data = codec.compress(pixels, codec=maker, exact="integer", batch=batch)
        symbols = decode_symbols(maker, *read(data), lambda done: None)
        assert torch.equal(decode_symbols(reader, *read(data), lambda done: None), symbols)
        ours, theirs = (np.asarray(codec.decompress(data, codec=of)).astype(int) for of in (maker, reader))
        assert np.abs(ours - theirs).max() <= 2
