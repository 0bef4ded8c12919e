"""PaliGemma against the papers' JAX code: image tokens, logits, loss, gradients, and decoding from a prompt."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import Golden, assert_close, assert_gradients, vision_config
from test_golden import _renamed

from vlkern import models
from vlkern.errors import UserError
from vlkern.interop import paligemma_jax
from vlkern.models.gemma import GemmaConfig
from vlkern.models.paligemma import PaliGemma, PaliGemmaConfig

NAMES = ("paligemma1", "paligemma2", "paligemma_video")


def config_of(golden):
    c, llm = golden.config, golden.config["llm"]
    language = GemmaConfig(
        width=llm["width"], depth=llm["depth"], heads=llm["num_heads"], kv_heads=llm["num_kv_heads"],
        head_dim=llm["head_dim"], mlp=llm["mlp_dim"], query_scalar=llm["head_dim"],
        version=2 if llm.get("post_norms") else 1, vocabulary=llm["vocab_size"], context=64,
        attention_softcap=llm.get("attn_logits_softcap"), final_softcap=llm.get("final_logits_softcap"),
    )  # fmt: skip
    return PaliGemmaConfig(vision_config(c["img"], tuple(c["hw"])), language, language.vocabulary, language.vocabulary)


def golden_of(name):
    """The file; fixed sines and cosines stand where our encoder has a table."""
    golden = Golden(name)
    if golden.config["img"].get("posemb") == "sincos2d":
        vision = config_of(golden).vision
        rows, columns = np.mgrid[: vision.grid[0], : vision.grid[1]].reshape(2, -1)
        omega = 1e4 ** -np.linspace(0, 1, vision.width // 4)
        angles = [axis[:, None] * omega for axis in (columns, rows)]
        table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], 1)
        golden.arrays["params/img/pos_embedding"] = table[None].astype(np.float32)
        golden.arrays["grad/params/img/pos_embedding"] = np.zeros_like(table[None], dtype=np.float32)
    return golden


#: Channels of a head that the attention takes: a head of 10 lies in one of 16, its halves in the halves.
def _channels(c):
    half = c.head_dim // 2
    wide = -(-c.head_dim // 8) * 8
    return torch.cat([torch.arange(half), torch.arange(half) + wide // 2]), wide


def widened(c):
    """The same model with heads of a multiple of 8: RoPE's base makes up for the channels that are zero."""
    wide = _channels(c.language)[1]
    base = c.language.rope_base ** (wide / c.language.head_dim)
    return replace(c, language=replace(c.language, head_dim=wide, rope_base=base))


def _heads(name):
    """The axis of heads and channels of a projection, if it has one."""
    projections = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
    return projections.get(name.split(".")[-2]) if name.startswith("language_model.") else None


def widen(state, c):
    at, wide = _channels(c)
    out = dict(state)
    for name, p in state.items():
        if (axis := _heads(name)) is not None:
            heads = p.movedim(axis, 0).unflatten(0, (-1, c.head_dim))
            new = torch.zeros(len(heads), wide, *heads.shape[2:])
            new[:, at] = heads
            out[name] = new.flatten(0, 1).movedim(0, axis)
    return out


def load(golden):
    c = config_of(golden)
    sources = paligemma_jax.sources({k: torch.from_numpy(a) for k, a in golden.arrays.items()}, c, "params/")
    like = PaliGemma(c)
    model = PaliGemma(widened(c))
    model.load_state_dict(widen(golden.state("params/", sources, like), c.language))
    gradients = widen(golden.state("grad/params/", _renamed(sources), like), c.language)
    return model.eval(), gradients


def inputs(golden, model, text, prefix):
    """ids [B, L] with placeholders in front, pixels of all, and the prefix of each row."""
    image = golden["in/image"]
    frames = image.reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2)
    count = model.config.image_tokens * (len(frames) // len(image))
    places = torch.full((len(text), count), model.config.image_token)
    return torch.cat([places, text], 1), frames, prefix + count, count


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    golden = golden_of(name)
    model, gradients = load(golden)
    text = golden["in/text"].long()
    prefix = (golden["in/mask_ar"][:, :-1] == 0).sum(1)
    ids, pixels, prefix, count = inputs(golden, model, text[:, :-1], prefix)
    batch, length = ids.shape
    cu = torch.arange(batch + 1, dtype=torch.int32) * length
    x = model.embed(ids.flatten(), pixels)
    assert_close(model.image_tokens(pixels).reshape(batch, count, -1), golden["out/zimg"], 2e-5)
    assert_close(x.unflatten(0, (batch, length))[:, count:], golden["out/ztxt"], 2e-5)
    hidden = model.hidden(x, cu, until=model.until(ids.flatten(), cu, prefix)).unflatten(0, (batch, length))
    assert_close(hidden, golden["out/pre_logits"], 2e-5)
    assert_close(model.logits(hidden), golden["out/llm_logits_softcapped"], 2e-5)
    logits = hidden[:, count:] @ model.language.model.embed_tokens.weight.T
    assert_close(logits, golden["out/text_logits"], 2e-5)

    smoothing, size = golden.config["label_smoothing"], logits.shape[-1]
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, text[:, 1:, None])[..., 0]
    losses = -(1 - smoothing) * own - smoothing / (size - 1) * (log_p.sum(-1) - own)
    mask = golden["in/mask_loss"][:, 1:]
    loss = ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    assert_close(loss, golden["out/loss"], 2e-5)
    loss.backward()
    if golden.config["img"].get("posemb") == "sincos2d":
        model.vision.embeddings.position_embedding.weight.grad.zero_()  # theirs are fixed
    narrow = PaliGemma(config_of(golden))
    real = widen({k: torch.ones_like(p) for k, p in narrow.named_parameters()}, narrow.config.language)
    for parameter, p in model.named_parameters():
        p.grad.mul_(real[parameter])  # what lies beside the real channels of a head is not theirs
    assert_gradients({"model": model}, {"model": gradients})


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_golden_decoding(name):
    """Prompts of different lengths, then forced tokens: the first logits are those without softcap."""
    golden = golden_of(name)
    model, _ = load(golden)
    valid = golden["in/decode/mask_input"]
    ids, pixels, prefix, _ = inputs(golden, model, golden["in/decode/prompt"].long(), valid.sum(1))
    rows = [row[: int(n)] for row, n in zip(ids, prefix, strict=True)]
    flat = torch.cat(rows)
    cu = torch.nn.functional.pad(prefix.cumsum(0), (1, 0)).int()
    caches = model.new_caches(len(rows), 40)
    hidden = model.extend(model.embed(flat, pixels), caches.chunk(cu, model.until(flat, cu)), caches)[cu[1:].long() - 1]
    table = model.language.model.embed_tokens.weight
    assert_close(hidden @ table.T, golden["out/decode_logits"][:, 0], 2e-5)
    forced = golden["in/decode/forced_tokens"].long()
    for step in range(1, golden["out/decode_logits"].shape[1]):
        hidden = model.extend(model.embed(forced[:, step - 1]), caches.step(), caches)
        assert_close(model.logits(hidden), golden["out/decode_logits"][:, step], 2e-5)
    for row, n in zip(valid, valid.sum(1), strict=True):
        assert row[: int(n)].all()


def test_npz(tmp_path):
    """A file of big_vision's, with the optimiser's state beside the parameters."""
    golden = Golden("paligemma1")
    path = tmp_path / "paligemma.npz"
    params = {k: a for k, a in golden.arrays.items() if k.startswith("params/")}
    np.savez(path, **params, **{"opt/count": np.array(3)})
    model = models.load_pretrained(path, config=config_of(golden))
    assert isinstance(model, PaliGemma)
    expected, _ = load(golden)
    for name, p in model.state_dict().items():
        assert torch.equal(p, expected.state_dict()[name]), name
    bfloat16 = models.load_pretrained(path, config=config_of(golden), dtype=torch.bfloat16)
    assert {p.dtype for p in bfloat16.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="config must be a PaliGemmaConfig, got GemmaConfig"):
        models.load_pretrained(path, config=config_of(golden).language)
    del params["params/img/head/bias"]
    np.savez(path, **params, **{"params/more": np.zeros(2, np.float32)})
    missing = r"missing multi_modal_projector\.linear\.bias \[24\] \(from params/img/head/bias\)"
    with pytest.raises(UserError, match=rf"2 tensors do not fit.*{missing}.*unexpected params/more"):
        models.load_pretrained(path, config=config_of(golden))


def test_sizes_come_from_the_shapes(tmp_path):
    """They are those of a preset of Gemma, or the user says what they are."""
    golden = Golden("paligemma2")
    params = {k: a for k, a in golden.arrays.items() if k.startswith("params/")}
    np.savez(tmp_path / "a.npz", **params)
    with pytest.raises(UserError, match=r"no preset has Gemma 2's layers with width 24, depth 2.*pass config="):
        models.load_pretrained(tmp_path / "a.npz")
