"""Gemma against the JAX code of its authors: logits, gradients, caches, and the layouts of its checkpoints."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gemmas import starts
from goldens import Golden, assert_close, assert_gradients

import vlkern
from vlkern import models, ops
from vlkern.interop import gemma_jax
from vlkern.layers.rope import Rope
from vlkern.layers.rope_memory import Rows
from vlkern.models.gemma import Gemma, GemmaConfig
from vlkern.models.state import Source


@pytest.fixture(autouse=True)
def any_head_dim(monkeypatch):
    """The ops take heads of a multiple of 8 channels, these files have 6, 10 and 12: zeros change no dot product."""

    def padded(op):
        def call(q, k, v, *args, **options):
            wide = [F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v)]
            return op(*wide, *args, **options)[..., : v.shape[-1]]

        return call

    for name in ("interval_attention", "decode_attention"):
        monkeypatch.setattr(vlkern.ops, name, padded(getattr(ops, name)))


def _config(c) -> GemmaConfig:
    scalar = c["width"] // c["num_heads"] if c.get("query_pre_attn_norm") == "rsqrt_emb_per_head" else c["head_dim"]
    return GemmaConfig(
        width=c["width"],
        depth=c.get("depth") or len(c["pattern"]),
        heads=c["num_heads"],
        kv_heads=c["num_kv_heads"],
        head_dim=c["head_dim"],
        mlp=c["mlp_dim"],
        query_scalar=c["query_scale"] ** -2 if "query_scale" in c else scalar,
        version=3 if c.get("qk_norm") else 2 if c.get("post_norms") else 1,
        vocabulary=c["vocab_size"],
        context=100,
        pattern=c.get("pattern", "G"),
        window=c.get("sliding_window"),
        attention_softcap=c.get("attn_logits_softcap", c.get("attn_softcap")),
        final_softcap=c.get("final_logits_softcap", c.get("final_softcap")),
        rope_base=c.get("global_base", c.get("rope_base")),
        rope_factor=c.get("global_scale", 1.0),
        local_rope_base=c.get("local_base", 10_000),
    )


def _load(name, tmp_path) -> tuple[Golden, Gemma]:
    golden = Golden(name)
    np.savez(tmp_path / "a.npz", **{k: a for k, a in golden.arrays.items() if k.startswith("params/")})
    return golden, models.load_pretrained(tmp_path / "a.npz", config=_config(golden.config))


def _uncapped(model, hidden):
    return hidden @ model.model.embed_tokens.weight.T


def _assert_gradients(golden, model, loss):
    assert_close(loss, golden["out/loss"], 2e-5)
    loss.backward()
    shapes = {name.removeprefix("grad/"): torch.from_numpy(a) for name, a in golden.arrays.items() if "grad/" in name}
    sources = gemma_jax.sources(shapes, model.config, "params/")
    sources = {name: Source(tuple(f"grad/{part}" for part in s.names), s.make) for name, s in sources.items()}
    assert_gradients({"model": model}, {"model": golden.state("grad/params/", sources, model)})


@pytest.mark.parametrize("name", ["gemma1_mha", "gemma1_mqa", "gemma2_gqa", "gemma2_gqa_std"])
def test_rows(name, tmp_path):
    """big_vision's files: causal rows with gradients, then prefixes, at given positions too."""
    golden, model = _load(name, tmp_path)
    ids = golden["in/tokens"].long()
    batch, length = ids.shape
    x = model.embed(ids.flatten())
    assert_close(x.unflatten(0, ids.shape), golden["out/embedded"], 2e-5)
    hidden = model.hidden(x, starts([length] * batch)).unflatten(0, ids.shape)
    assert_close(hidden, golden["out/causal/pre_logits"], 2e-5)
    assert_close(_uncapped(model, hidden), golden["out/causal/logits_before_softcap"], 2e-5)
    logits = model(ids)
    assert_close(logits, golden["out/causal/logits"], 2e-5)
    _assert_gradients(golden, model, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    valid = golden["in/input_mask"].bool()
    lengths = valid.sum(1).tolist()
    prefix = torch.tensor(golden.config["n_prefix"])
    until = (prefix[:, None] - 1).expand(batch, length)[valid].int()
    got = model.logits(model.hidden(model.embed(ids[valid]), starts(lengths), until=until))
    assert_close(got, golden["out/prefix_lm/logits"][valid], 2e-5)
    first = starts(lengths)[:-1].repeat_interleave(torch.tensor(lengths))
    i = torch.arange(len(until), dtype=torch.int32)
    rows = Rows(first, torch.maximum(i, first + until) + 1)
    hidden = model.model(model.embed(ids[valid]), golden["in/positions"][valid], [rows] * model.config.depth)
    assert_close(model.logits(hidden), golden["out/prefix_lm_positions/logits"][valid], 2e-5)


@pytest.mark.parametrize("name", ["gemma2_sliding", "gemma3_text", "gemma3_scaled_bidir"])
def test_windows(name, tmp_path):
    """google-deepmind/gemma's blocks: windows, norms of queries and keys, two bases, image blocks, caches."""
    golden, model = _load(name, tmp_path)
    ids, valid = golden["in/tokens"].long(), golden["in/input_mask"].bool()
    lengths, tokens = valid.sum(1).tolist(), golden["in/tokens"].long()[valid]
    cu = starts(lengths)
    x = model.embed(tokens)
    plain = model.logits(model.hidden(x, cu))
    assert_close(plain, golden["out/full_causal_logits"][valid], 2e-5)
    if golden.config["img_span"] is None:
        logits = plain
    else:
        # The JAX code ends a local layer's view of an image a window ahead, too; real images are shorter than that.
        first = cu[:-1].repeat_interleave(cu.diff())
        i = torch.arange(len(tokens), dtype=torch.int32)
        ends = torch.tensor([stop for _, stop in golden.config["img_span"]], dtype=torch.int32)
        ends = ends.repeat_interleave(cu.diff()) + first
        stop = torch.where(golden["in/bidirectional_mask"].bool()[valid], ends, i + 1)
        window = model.config.window
        local = Rows(torch.maximum(first, i - window + 1), torch.minimum(stop, i + window))
        memories = [local if kind == "L" else Rows(first, stop) for kind in model.config.kinds]
        logits = model.logits(model.model(x, i - first, memories))
    assert_close(logits, golden["out/logits"][valid], 2e-5)
    last = cu[1:].long() - 1
    inside = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, last, False)
    _assert_gradients(golden, model, F.cross_entropy(logits[inside], tokens[1:][inside[:-1]]))

    with torch.no_grad():
        caches = model.new_caches(len(lengths), max(lengths))
        n = golden.config["prefill"]
        got = [
            model.logits(model.extend(model.embed(ids[:, :n].flatten()), caches.step(n), caches)).unflatten(0, (-1, n))
        ]
        for step in ids[:, n:].T:
            got.append(model.logits(model.extend(model.embed(step), caches.step(), caches))[:, None])
    assert_close(torch.cat(got, 1)[valid], golden["out/cached_logits"][valid], 2e-5)


@pytest.mark.parametrize("name", ["gemma1_cache", "gemma2_cache"])
@torch.no_grad()
def test_caches(name, tmp_path):
    """Prompts of different lengths, parts of them prefixes, then single tokens; what lies in the caches, too."""
    golden, model = _load(name, tmp_path)
    valid, lengths = golden["in/input_mask"].bool(), golden.config["n_valid"]
    tokens, prefix = golden["in/tokens"].long()[valid], torch.tensor(golden.config["n_prefix"])
    until = (prefix[:, None] - 1).expand(valid.shape)[valid].int()
    caches = model.new_caches(len(lengths), golden.config["cache_size"])
    hidden = model.extend(model.embed(tokens), caches.chunk(starts(lengths), until), caches)
    last = starts(lengths)[1:] - 1
    assert_close(_uncapped(model, hidden[last])[:, None], golden["out/prefill_logits_uncapped"], 2e-5)
    steps = [
        model.logits(model.extend(model.embed(new), caches.step(), caches)) for new in golden["in/new_tokens"].long().T
    ]
    assert_close(torch.stack(steps, 1), golden["out/extend_logits"], 2e-5)
    # There, prompts end at column N - 1; here they begin at slot 0.
    n, steps = golden.config["N"], golden.config["steps"]
    for row, length in enumerate(lengths):
        columns = slice(n - length, n + steps)
        for i, layer in enumerate(caches.layers):
            for mine, theirs in ((layer.k, "k"), (layer.v, "v")):
                expected = golden[f"out/final_cache/layers/attn/{theirs}_cache"][row, i, columns]
                assert_close(mine[row, : length + steps], expected, 2e-5)


def test_rope():
    golden = Golden("rope")
    for i, spec in enumerate(golden.config["specs"]):
        cos, sin = Rope(spec["D"], spec["base"], spec["scale"])(golden[f"in/pos{i}"].flatten())
        got = ops.norm_rope(golden[f"in/x{i}"].flatten(0, 1), cos, sin)
        assert_close(got, golden[f"out/y{i}_f64"].flatten(0, 1).float(), 1e-6)
