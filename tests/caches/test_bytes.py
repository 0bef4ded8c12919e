"""Every byte of the caches of every Gemma 3, against the formula; on the meta device."""

from types import SimpleNamespace

import pytest
import torch

from vlkern.models.gemma import PRESETS, Gemma

MIB = 1 << 20
#: MiB in bfloat16 at 32k and 128k tokens, slack 0: global layers * T + local layers * window, times the elements.
GEMMA3 = {
    "gemma-3-270m": (103.5, 391.5),
    "gemma-3-1b": (139, 523),
    "gemma-3-4b-text": (756, 2676),
    "gemma-3-12b-text": (2368, 8512),
    "gemma-3-27b-text": (2976, 10656),
}


def new_caches(name, *args, **kwargs):
    weight = torch.empty(0, dtype=torch.bfloat16, device="meta")
    model = SimpleNamespace(config=PRESETS[name], model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight)))
    return Gemma.new_caches(model, *args, **kwargs)


def counted(caches):
    """Bytes of the storages behind all tensors, each once."""
    tensors = [t for layer in caches.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    tensors += [t for t in vars(caches).values() if isinstance(t, torch.Tensor)]
    assert all(t.is_meta for t in tensors)
    return sum({id(t): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", GEMMA3)
@pytest.mark.parametrize("tokens", [32768, 131072])
@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, 2), (torch.int8, 1), (torch.float32, 4)])
@pytest.mark.parametrize(("batch", "slack"), [(1, 0), (3, 16)])
def test_bytes_are_those_of_the_formula(name, tokens, dtype, element, batch, slack):
    config = PRESETS[name]
    caches = new_caches(name, batch, tokens, slack=slack, dtype=dtype)
    local = config.kinds.count("L")
    slots = (config.depth - local) * tokens + local * (config.window + slack)
    scales = 2 * config.kv_heads * 4 if dtype == torch.int8 else 0
    positions = 2 * 4 * batch  # length and high
    expected = batch * slots * (2 * config.kv_heads * config.head_dim * element + scales) + positions
    assert counted(caches) == caches.nbytes == expected


@pytest.mark.parametrize("name", GEMMA3)
def test_bytes_are_those_of_the_paper_s_arithmetic(name):
    for tokens, mebibytes in zip((32768, 131072), GEMMA3[name], strict=True):
        assert new_caches(name, 1, tokens).nbytes / MIB == pytest.approx(mebibytes, rel=1e-5)
        assert new_caches(name, 1, tokens, dtype=torch.int8).nbytes / MIB == pytest.approx(mebibytes / 2, rel=0.04)
