"""What int8 costs: bounded, and about as much as docs/caches.md says."""

import pytest
import torch
from decoder import HEAD_DIM, HEADS, KV_HEADS, Layer

from vlkern.caches import Caches, LinearCache, RingCache

SIZES = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def filled(cache, counts=(40,)):
    layer, caches = Layer(cache.batch, 64, seed=3), Caches([cache])
    for tokens in counts:
        layer.extend(caches, [tokens] * cache.batch)
    return layer, caches


def keys(layer):
    return layer._turned(layer.k.double(), layer.k_weight)


def test_elements_are_within_half_a_step():
    layer, caches = filled(LinearCache(2, 64, **SIZES, dtype=torch.int8))
    cache = caches.layers[0]
    for stored, scale, exact in ((cache.k, cache.k_scale, keys(layer)), (cache.v, cache.v_scale, layer.v.double())):
        error = (stored[:, :40] * scale[:, :40, :, None] - exact[:, :40]).abs()
        assert (error <= scale[:, :40, :, None] * 0.5001).all()
        torch.testing.assert_close(scale[:, :40] * 127, exact[:, :40].abs().amax(-1).float())
        assert not scale[:, 40:].any()


def test_logits_are_within_the_bound_and_as_close_as_reported():
    """|logit error| <= scale of attention * scale of the key / 2 * sum |q|; typically a tenth of that."""
    layer, caches = filled(LinearCache(2, 64, **SIZES, dtype=torch.int8))
    cache, attention_scale = caches.layers[0], HEAD_DIM**-0.5
    q = layer._turned(layer.q.double(), layer.q_weight)[:, :40].unflatten(2, (KV_HEADS, HEADS // KV_HEADS))
    read = cache.k[:, :40].double() * cache.k_scale[:, :40, :, None]
    error = torch.einsum("bikgc,bjkc->bkgij", q, read - keys(layer)[:, :40]).abs() * attention_scale
    steps = cache.k_scale[:, :40].double().permute(0, 2, 1)[:, :, None, None] / 2
    bound = attention_scale * q.abs().sum(-1).permute(0, 2, 3, 1)[..., None] * steps
    assert (error <= bound * 1.001).all()
    assert error.square().mean().sqrt() < bound.mean() / 4
    assert error.square().mean().sqrt() < 0.01


@pytest.mark.parametrize("counts", [(40,), (3, 1, 1, 20, 15), (1,) * 40])
def test_chunking_makes_no_difference(counts):
    """Every query sees keys as they are stored, those of its own chunk too."""
    expected, _ = filled(LinearCache(2, 64, window=9, **SIZES, dtype=torch.int8))
    for cache in (RingCache(2, 9, **SIZES, dtype=torch.int8), LinearCache(2, 64, window=9, **SIZES, dtype=torch.int8)):
        layer, _ = filled(cache, counts)
        torch.testing.assert_close(layer.out[:, :40], expected.out[:, :40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_close(dtype):
    layer, caches = Layer(2, 64, dtype), Caches([RingCache(2, 9, **SIZES, dtype=torch.int8)])
    for tokens in (20, 1, 19):
        layer.extend(caches, [tokens, tokens])
    assert layer.out.dtype == dtype
    error = (layer.out - layer.oracle(9))[:, :40].double()
    assert error.abs().max() < 0.05 and error.square().mean().sqrt() < 0.006


def test_a_head_of_zeros_and_one_of_tiny_numbers():
    for size in (0.0, 1e-35, 1e-38):
        layer = Layer(1, 8)
        layer.v.fill_(size)
        layer.k.fill_(size)
        caches = Caches([LinearCache(1, 8, **SIZES, dtype=torch.int8)])
        layer.extend(caches, [3])
        layer.extend(caches, [1])
        assert not layer.out[:, :4].any()
