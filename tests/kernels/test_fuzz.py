"""Random shapes, strides, dtypes and scales: every kernel stays as good as the reference."""

from dataclasses import replace

import pytest
import torch
from rooms import KERNELS, agree, device, dtypes, skip_unsupported

from vlkern._native import TRITON_INTERPRETS
from vlkern._op import REGISTRY
from vlkern.kernels.decode_attention import samples as decode_attention
from vlkern.kernels.geglu import samples as geglu
from vlkern.kernels.interval_attention import samples as interval_attention
from vlkern.kernels.linear import samples as linear
from vlkern.kernels.norm_rope import samples as norm_rope
from vlkern.kernels.rms_norm import samples as rms_norm
from vlkern.kernels.rope_append import samples as rope_append
from vlkern.kernels.sigmoid_loss import samples as sigmoid_loss

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

every_kernel = pytest.mark.parametrize("name", KERNELS)
#: The same examples every time; a single number's error needs many draws to be comparable. The interpreter is slow.
EXAMPLES, SEEDS = (5, range(2)) if TRITON_INTERPRETS else (24, range(16))
fuzz = hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
brief = hypothesis.settings(fuzz, max_examples=max(2, EXAMPLES // 4))


@every_kernel
@fuzz
@hypothesis.given(data=st.data())
def test_rms_norm(name, data):
    sample = rms_norm.Sample(
        "random",
        lead=(data.draw(st.integers(0, 70)),),
        n=data.draw(st.integers(2, 300)),
        offset=data.draw(st.sampled_from([0.0, 1.0, -0.5])),
        contiguous=data.draw(st.booleans()),
    )
    dtype, scale = data.draw(st.sampled_from(dtypes(name))), 10.0 ** data.draw(st.integers(-3, 3))
    eps, wide_weight = 10.0 ** data.draw(st.integers(-8, -2)), data.draw(st.booleans())
    calls = []
    for seed in SEEDS:
        (x, weight), kwargs = rms_norm.inputs(sample, dtype, device(name), seed)
        calls.append(((x * scale, weight.float() if wide_weight else weight), {**kwargs, "eps": eps}))
    agree(REGISTRY["rms_norm"], name, calls)


@every_kernel
@fuzz
@hypothesis.given(data=st.data())
def test_geglu(name, data):
    sample = geglu.Sample(
        "random",
        (data.draw(st.integers(0, 9)), data.draw(st.integers(1, 900))),
        contiguous=data.draw(st.booleans()),
    )
    dtype, scale = data.draw(st.sampled_from(dtypes(name))), 10.0 ** data.draw(st.integers(-2, 2))
    calls = []
    for seed in SEEDS:
        (gate, up), kwargs = geglu.inputs(sample, dtype, device(name), seed)
        calls.append(((gate * scale, up), kwargs))
    agree(REGISTRY["geglu"], name, calls)


@every_kernel
@fuzz
@hypothesis.given(data=st.data())
def test_sigmoid_loss(name, data):
    sample = sigmoid_loss.Sample(
        "random",
        b=data.draw(st.integers(1, 150)),
        d=data.draw(st.integers(1, 100)),
        scale=data.draw(st.floats(0.125, 64, width=16)),
        bias=data.draw(st.floats(-16, 16, width=16)),
        contiguous=data.draw(st.booleans()),
    )
    dtype, share = data.draw(st.sampled_from(dtypes(name))), data.draw(st.none() | st.floats(0, 1))
    calls = []
    for seed in SEEDS:
        args, kwargs = sigmoid_loss.inputs(sample, dtype, device(name), seed)
        if share is not None:
            masks = torch.rand(2, sample.b, generator=torch.Generator().manual_seed(seed)) < share
            kwargs = {"valid": tuple(masks.to(device(name)))}
        calls.append((args, kwargs))
    agree(REGISTRY["sigmoid_loss"], name, calls)


@pytest.mark.parametrize("name", [name for name in KERNELS if name in REGISTRY["linear"].backends])
@fuzz
@hypothesis.given(data=st.data())
def test_linear(name, data):
    sample = linear.Sample(
        "random",
        lead=(data.draw(st.integers(0, 90)),),
        k=data.draw(st.integers(1, 120)),
        n=data.draw(st.integers(1, 120)),
        gelu=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        contiguous=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(dtypes(name)))
    calls = [linear.inputs(sample, dtype, device(name), seed) for seed in SEEDS]
    skip_unsupported(REGISTRY["linear"], name, *calls[0])
    agree(REGISTRY["linear"], name, calls)


@pytest.mark.parametrize("name", [name for name in KERNELS if name in REGISTRY["interval_attention"].backends])
@fuzz
@hypothesis.given(data=st.data())
def test_interval_attention(name, data):
    """Documents under every mask, and any intervals: in no order, overlapping, empty, beyond the keys."""
    hkv, widths = data.draw(st.integers(1, 2)), st.integers(1, 32) if data.draw(st.booleans()) else st.integers(1, 8)
    sample = interval_attention.Sample(
        "random",
        lengths=tuple(data.draw(st.lists(st.integers(1, 70), max_size=2))),
        hq=hkv * data.draw(st.integers(1, 4)),
        hkv=hkv,
        d=8 * data.draw(widths),
        mask=data.draw(st.sampled_from(["random", "random", "full", "causal", "window", "prefix", "cross"])),
        window=data.draw(st.integers(1, 50)),
        softcap=data.draw(st.none() | st.sampled_from([0.5, 5.0, 50.0])),
    )
    if data.draw(st.booleans()):
        sample = replace(sample, dv=8 * data.draw(widths))
    dtype, scale = (
        data.draw(st.sampled_from(dtypes(name))),
        data.draw(st.sampled_from([None, 4.0, 1.0, 0.1, 0.01, -0.1])),
    )
    calls = []
    for seed in SEEDS:
        args, kwargs = interval_attention.inputs(sample, dtype, device(name), seed)
        calls.append((args, {**kwargs, "scale": scale}))
    agree(REGISTRY["interval_attention"], name, calls)


@every_kernel
@fuzz
@hypothesis.given(data=st.data())
def test_decode_attention(name, data):
    """Rows of any length in rings and linear caches, with and without a window, in any dtype of the cache."""
    tokens, window = data.draw(st.integers(1, 16)), data.draw(st.none() | st.integers(1, 40))
    slots = (window or 60) + tokens - 1 + data.draw(st.integers(0, 9))
    longest = slots if window is None else 3 * slots
    kh = data.draw(st.integers(1, 3))
    sample = decode_attention.Sample(
        "random",
        lengths=tuple(data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=3))),
        slots=slots,
        tokens=tokens,
        h=kh * data.draw(st.integers(1, 5)),
        kh=kh,
        c=8 * data.draw(st.integers(1, 32)),
        cv=8 * data.draw(st.integers(1, 32)),
        window=window,
        softcap=data.draw(st.none() | st.sampled_from([0.5, 30.0])),
        int8=data.draw(st.booleans()),
        contiguous=data.draw(st.booleans()),
    )
    sample = sample if sample.contiguous else replace(sample, cv=sample.c, int8=False)
    dtype = data.draw(st.sampled_from(dtypes(name)))
    calls = [decode_attention.inputs(sample, dtype, device(name), seed) for seed in SEEDS[:2]]
    agree(REGISTRY["decode_attention"], name, calls)


@every_kernel
@brief
@hypothesis.given(data=st.data())
def test_norm_rope(name, data):
    sample = norm_rope.Sample(
        "random",
        t=data.draw(st.integers(0, 40)),
        h=data.draw(st.integers(1, 5)),
        c=2 * data.draw(st.integers(1, 70)),
        norm=data.draw(st.booleans()),
        offset=data.draw(st.sampled_from([0.0, 1.0])),
        contiguous=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(dtypes(name)))
    agree(REGISTRY["norm_rope"], name, [norm_rope.inputs(sample, dtype, device(name), seed) for seed in SEEDS])


@every_kernel
@brief
@hypothesis.given(data=st.data())
def test_rope_append(name, data):
    """Rows whose tokens lie anywhere, next to each other or not, but in slots of their own; some sit out."""
    slots, positions = data.draw(st.integers(1, 30)), []
    for _ in range(data.draw(st.integers(0, 4))):
        own = data.draw(st.lists(st.integers(0, slots - 1), max_size=8, unique=True))
        turns = [data.draw(st.integers(-1, 3)) for _ in own]
        positions.append(tuple(slot + slots * turn if turn >= 0 else -1 for slot, turn in zip(own, turns, strict=True)))
    sample = rope_append.Sample(
        "random",
        tuple(positions),
        slots,
        h=data.draw(st.integers(1, 5)),
        kh=data.draw(st.integers(1, 3)),
        c=2 * data.draw(st.integers(1, 40)),
        cv=2 * data.draw(st.integers(1, 40)),
        norm=data.draw(st.booleans()),
        int8=data.draw(st.booleans()),
        contiguous=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(dtypes(name)))
    agree(REGISTRY["rope_append"], name, [rope_append.inputs(sample, dtype, device(name), seed) for seed in SEEDS])
