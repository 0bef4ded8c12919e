"""Gemma 1, 2 and 3 against transformers, with random weights: whole rows, chunks and single steps on caches."""

import copy
from dataclasses import replace

import pytest
import torch
from gemmas import CONFIGS, pair, rows, starts
from peers import randomize

from vlkern import models
from vlkern.models.gemma import PRESETS, Gemma, GemmaConfig
from vlkern.testing import assert_as_good, direction, record

EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def _theirs(model, texts):
    """Logits of every token of every row, each row by itself."""
    return torch.cat([model(text[None]).logits[0] for text in texts])


def _ours(model, texts):
    hidden = model.hidden(model.embed(torch.cat(texts)), starts([len(text) for text in texts]))
    return model.logits(hidden)


def _run(model, call, texts):
    """Logits, and the gradients of a sum that weighs each of them differently."""
    logits = call(model, texts)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6))
    (logits.double() * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def _close(got, expected, tolerance):
    span = float(expected.abs().max())
    error = float((got - expected).abs().max())
    assert error <= tolerance * span, f"error {error:.3e} exceeds {tolerance} * {span:.3e}"


@EACH
def test_forward_and_gradients(config):
    """Rows of different lengths in one sequence against each row alone; bfloat16 errs no more than transformers'."""
    ours, theirs = pair(config)
    low_ours, low_theirs = copy.deepcopy(ours).bfloat16(), copy.deepcopy(theirs).bfloat16()
    texts = rows(config)
    exact, exact_gradients = _run(theirs, _theirs, texts)
    got, gradients = _run(ours, _ours, texts)
    assert got.dtype == torch.float32
    _close(got, exact, 1e-5)
    assert gradients.keys() == exact_gradients.keys()
    largest = max(g.abs().max() for g in exact_gradients.values())
    for name, gradient in exact_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=2e-5 * float(largest), msg=name)

    low, low_gradients = _run(low_theirs, _theirs, texts)
    got, gradients = _run(low_ours, _ours, texts)
    assert got.dtype == torch.float32
    assert_as_good(got.bfloat16(), low, exact)
    # In bfloat16 the gradient of one small parameter is a matter of luck; that of all of them is not.
    whole = [torch.cat([g[name].flatten().double() for name in gradients]) for g in (gradients, low_gradients)]
    exact_whole = torch.cat([exact_gradients[name].flatten() for name in gradients]).double()
    error, unavoidable = ((g - exact_whole).norm() / exact_whole.norm() for g in whole)
    assert error <= 2 * unavoidable
    assert abs(direction(whole[0], exact_whole)[1]) < 0.02


def test_autocast():
    """A float32 model computes in bfloat16 no worse than a bfloat16 model, and every parameter gets its gradient."""
    ours, _ = pair(CONFIGS["gemma3"])
    texts = rows(ours.config)
    with torch.no_grad():
        exact, low = _ours(ours, texts), _ours(copy.deepcopy(ours).bfloat16(), texts)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = _run(ours, _ours, texts)
    assert logits.dtype == torch.float32
    assert 1e-5 < (logits - exact).norm() / (low - exact).norm() <= 1.5
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients.values())


@torch.no_grad()
def _cached(model, texts, chunks, dtype=None):
    """Logits of every token: the prompts in chunks of these sizes, the rest token by token, rows side by side.

    A row that has ended sits out.
    """
    caches = model.new_caches(len(texts), max(map(len, texts)), dtype=dtype)
    logits = [[] for _ in texts]
    for sizes in chunks:
        at = caches.length.tolist()
        pieces = [text[a : a + n] for text, a, n in zip(texts, at, sizes, strict=True)]
        hidden = model.extend(model.embed(torch.cat(pieces)), caches.chunk(starts(sizes)), caches)
        for row, piece in zip(logits, model.logits(hidden).split(sizes), strict=True):
            row.append(piece)
    while (lengths := caches.length.tolist()) != [len(text) for text in texts]:
        active = torch.tensor([length < len(text) for length, text in zip(lengths, texts, strict=True)])
        tokens = torch.stack([text[min(a, len(text) - 1)] for text, a in zip(texts, lengths, strict=True)])
        step = model.logits(model.extend(model.embed(tokens), caches.step(active=active), caches))
        for row, on, last in zip(logits, active, step, strict=True):
            if on:
                row.append(last[None])
    return torch.cat([torch.cat(row) for row in logits])


@EACH
@pytest.mark.parametrize(
    "chunks",
    [((1, 1, 1),), ((6, 2, 9),), ((3, 1, 0), (4, 0, 7), (1, 2, 1))],
    ids=["steps", "prompts", "chunks"],
)
def test_cached(config, chunks):
    """Windows are shorter than the prompts and the chunks, rows have different lengths, nothing is padded."""
    ours, theirs = pair(config)
    texts = rows(config)
    with torch.no_grad():
        exact = _theirs(theirs, texts)
    _close(_cached(ours, texts, chunks), exact, 1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_cached_bfloat16(name):
    config = CONFIGS[name]
    ours, theirs = pair(config)
    texts, chunks = rows(config), ((6, 2, 3),)
    with torch.no_grad():
        exact = _theirs(theirs, texts)
        low = _theirs(theirs.bfloat16(), texts)
    got = _cached(ours.bfloat16(), texts, chunks)
    assert_as_good(got.bfloat16(), low, exact)
    # Eight bits instead of bfloat16's eight: rounding keys and values costs about as much as computing in bfloat16.
    assert_as_good(_cached(ours, texts, chunks, dtype=torch.int8).bfloat16(), low, exact, slack=4.0)


@torch.no_grad()
def test_what_a_token_sees():
    """`until` opens a block; the same from a cache, into which it comes as a whole."""
    model = randomize(Gemma(CONFIGS["gemma3"]))
    texts = rows(model.config, (12, 7))
    until = torch.arange(12).repeat(2)[:19]
    until[12:] = torch.arange(7)
    until[2:6], until[12:15] = 5, 2  # an image in the first row, a prefix of the second
    until = until.int()
    x, cu = model.embed(torch.cat(texts)), starts((12, 7))
    expected = model.hidden(x, cu, until=until)
    plain = model.hidden(x, cu)
    for changed, same in ((slice(2, 5), slice(0, 2)), (slice(12, 14), slice(0, 2))):
        assert not torch.isclose(expected[changed], plain[changed], atol=1e-3).all(1).any()
        assert torch.equal(expected[same], plain[same])
    # A later token changes nothing before the block that sees it.
    other = x.clone()
    other[5] += 1
    assert torch.equal(model.hidden(other, cu, until=until)[:2], expected[:2])
    assert not torch.isclose(model.hidden(other, cu, until=until)[2], expected[2], atol=1e-3).all()
    assert torch.equal(model.hidden(other, cu, until=until)[12:], expected[12:])

    caches = model.new_caches(2, 12)
    got = torch.empty_like(expected)
    for sizes in ((1, 3), (7, 0), (4, 4)):
        index = torch.cat(
            [torch.arange(n) + a + b for n, a, b in zip(sizes, caches.length.tolist(), (0, 12), strict=True)]
        )
        got[index] = model.extend(x[index], caches.chunk(starts(sizes), until[index]), caches)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rolling_back():
    """Rejected tokens leave no trace, as far as the slack goes."""
    model = randomize(Gemma(CONFIGS["gemma3"]))
    (text,) = rows(model.config, (16,))
    caches = model.new_caches(1, 16, slack=3)
    assert [cache.slots for cache in caches.layers] == [7, 7, 16, 7, 7]
    expected = model(text[None])[0]
    model.extend(model.embed(text[:9]), caches.step(9), caches)
    model.extend(model.embed(text[:3]), caches.step(3), caches)
    caches.rollback(3)
    logits = [model.logits(model.extend(model.embed(text[i : i + 1]), caches.step(), caches)) for i in range(9, 16)]
    torch.testing.assert_close(torch.cat(logits), expected[9:], rtol=1e-4, atol=1e-4)


def test_caches():
    """A local layer has a ring, and no more slots than there are tokens."""
    c = PRESETS["gemma-3-1b"]
    with torch.device("meta"):
        model = Gemma(c)
        caches = model.new_caches(2, 32_768, dtype=torch.bfloat16)
        assert [cache.slots for cache in caches.layers] == [512 if kind == "L" else 32_768 for kind in c.kinds]
        assert sum(cache.nbytes for cache in caches.layers) == 2 * 139 * 2**20
        short = model.new_caches(1, 100, slack=5)
        assert {cache.slots for cache in short.layers} == {100} and not any(cache.wraps for cache in short.layers)
        assert {cache.slots for cache in model.new_caches(1, 514, slack=5).layers} == {514}


@torch.no_grad()
def test_empty():
    model = Gemma(CONFIGS["gemma3"])
    assert model(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 83)
    texts = rows(model.config, (3, 2))
    hidden = model.hidden(model.embed(torch.cat(texts)), torch.tensor([0, 0, 3, 3, 5], dtype=torch.int32))
    torch.testing.assert_close(hidden, model.hidden(model.embed(torch.cat(texts)), starts((3, 2))))


def test_embedding_scale():
    """The factor is rounded to the dtype in which the model runs: 25.25 for sqrt(640) in bfloat16, not 25.298."""
    config = GemmaConfig(640, 1, 1, 1, 8, 8, 8, version=3, vocabulary=3, context=8)
    model = Gemma(config).bfloat16()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)
        assert model.embed(torch.tensor([1])).unique().item() == 25.25
        assert model.float().embed(torch.tensor([1])).unique().item() == pytest.approx(640**0.5)


def test_bad_input():
    model = Gemma(CONFIGS["gemma2"])
    x, cu = torch.zeros(5, 36), starts((3, 2))
    with pytest.raises(ValueError, match=r"ids must have shape \[B, L\], got \[3\]"):
        model(torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match="ids must be int32 or int64, got"):
        model(torch.zeros(2, 3))
    for bad in (-1, 83):
        with pytest.raises(ValueError, match=f"ids must be from 0 to 82, got {bad}"):
            model.embed(torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="cu_seqlens must go from 0 to the number of tokens, 5"):
        model.hidden(x, starts((3, 1)))
    with pytest.raises(TypeError, match="until must be int32, got"):
        model.hidden(x, cu, until=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"until must have shape \[5\], got \[4\]"):
        model.hidden(x, cu, until=torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"until must lie inside the row, 2 tokens, got until\[3\] = 2"):
        model.hidden(x, cu, until=torch.tensor([0, 1, 2, 2, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="the chunk must fit the capacity of 4 tokens: row 0 has 0 and would get 5"):
        model.new_caches(1, 4).chunk(starts((5,)))
    caches = model.new_caches(1, 4)
    with pytest.raises(ValueError, match=r"x_TD must have shape \[4, 36\], got \[5, 36\]"):
        model.extend(x, caches.chunk(starts((4,))), caches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"depth": 2.0}, "depth must be a positive integer, got 2.0"),
        ({"version": 4}, "version must be 1, 2 or 3, got 4"),
        ({"kv_heads": 4}, "heads must be a multiple of kv_heads, got 6 and 4"),
        ({"head_dim": 7}, "head_dim must be even, as RoPE rotates halves of it, got 7"),
        ({"pattern": "LX"}, "pattern must consist of L for local and G for global layers, got 'LX'"),
        ({"window": None}, "window must be given for local layers, got None"),
        ({"window": 0}, "window must be a positive integer, got 0"),
        ({"attention_softcap": -1.0}, "attention_softcap must be a positive number, got -1.0"),
        ({"query_scalar": "8"}, "query_scalar must be a positive number, got '8'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_config(change, message):
    config = CONFIGS["gemma2"]
    with pytest.raises(ValueError) as caught:
        replace(config, **change)
    assert str(caught.value) == message


@torch.no_grad()
def test_compiled():
    """One graph, with a step of decoding on caches that it changes in place."""
    model = randomize(Gemma(replace(CONFIGS["gemma3"], depth=2, pattern="LG")))
    expected, compiled = (model.new_caches(2, 16) for _ in range(2))

    def step(tokens, caches):
        return model.logits(model.extend(model.embed(tokens), caches.step(), caches))

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in torch.randint(83, (6, 2)):  # past the window
        torch.testing.assert_close(fast(tokens, compiled), step(tokens, expected))
    assert compiled.length.tolist() == [6, 6]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_a_step_calls_modules_that_are_watched_or_replaced(name):
    """A few tokens take a shorter way past the modules; not where that would be noticed."""
    model = randomize(Gemma(replace(CONFIGS[name], depth=1, pattern="G", window=None)))
    layer = model.model.layers[0]

    def step():
        caches = model.new_caches(1, 1)
        return model.extend(model.embed(torch.tensor([5])), caches.step(), caches)

    with record() as calls:
        expected = step()
    assert sum("decode_linear" in call.op._schema.name for call in calls) == 4
    for part in (layer.self_attn.k_proj, layer.mlp.down_proj, layer.input_layernorm, layer.self_attn, layer.mlp):
        seen = []
        handle = part.register_forward_hook(lambda module, x, y, seen=seen: seen.append(y))
        torch.testing.assert_close(step(), expected)
        handle.remove()
        assert len(seen) == 1
    layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)
    torch.testing.assert_close(step(), expected)


def test_tiny_preset_has_every_kind_of_layer():
    config = models.create("gemma3-tiny").config
    assert set(config.kinds) == {"L", "G"} and config.window < config.context and config.kv_heads < config.heads
