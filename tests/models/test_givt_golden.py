"""GIVT against arrays of its authors: densities, losses, gradients, cached and parallel decoding, files, adaptor."""

import numpy as np
import pytest
import torch
from goldens import Golden, assert_close, assert_gradients

from vlkern import models
from vlkern.generation import givt as causal
from vlkern.generation import masked_givt as masked
from vlkern.interop import givt_jax
from vlkern.models.adaptor import AdaptorConfig
from vlkern.models.givt import Givt, GivtConfig
from vlkern.models.siglip import VisionConfig
from vlkern.models.state import NpzFile, Source

LAYOUTS = {"joint": "joint", "perchan": "per_channel", "multi": "multivariate"}
CAUSAL = ["givt_ar_joint_gmm", "givt_ar_multivariate", "givt_ar_perchannel", "givt_encdec"]
MASKED = ["givt_masked_concat", "givt_masked_replace"]


def _config(c) -> GivtConfig:
    encoder = None
    if c.get("num_layers"):
        sizes = c["emb_dim"], c["num_layers"], c["num_heads"], c["mlp_dim"]
        encoder = VisionConfig(*sizes, image_size=tuple(c["hw"]), patch=c["patches"][0])
    return GivtConfig(
        c["emb_dim"], c["num_decoder_layers"], c["num_heads"], c["mlp_dim"], length=c["seq_len"], channels=c["out_dim"],
        components=c["num_mixtures"], layout=LAYOUTS[c["kind"]],
        style="masked" if c.get("style") == "masked" else "causal", mask=c.get("mask_style", "replace"),
        labels=c["num_labels"] or 0, unlabelled="nolabel" in c["special_labels"], encoder=encoder,
        legacy_scale=not c.get("fix_square_plus", False),
    )  # fmt: skip


def _load(name, tmp_path) -> tuple[Golden, Givt]:
    golden = Golden(name)
    path = tmp_path / "givt.npz"
    np.savez(path, **{key: array for key, array in golden.arrays.items() if key.startswith("params/")})
    return golden, models.load_pretrained(path, config=_config(golden.config))


def _given(golden, model):
    """Tokens, labels or None, and the rest of what the model takes."""
    more = {}
    if "in/input_mask" in golden.arrays:
        more["mask"] = golden["in/input_mask"]
    if "in/image" in golden.arrays:
        more["encoded"] = model.encode(golden.pixels())
    labels = golden["in/labels"] if "in/labels" in golden.arrays else None
    return golden["in/sequence"].requires_grad_(), labels, more


@pytest.mark.parametrize("name", CAUSAL + MASKED)
def test_densities_and_gradients(name, tmp_path):
    golden, model = _load(name, tmp_path)
    tokens, labels, more = _given(golden, model)
    if "encoded" in more:
        assert_close(more["encoded"], golden["out/encoded"], 2e-5)
    params = model(tokens, labels, **more)
    assert_close(params, golden["out/logits"], 2e-5)
    head, z = model.head, tokens.detach()
    assert_close(head.log_prob(params, z), golden["out/log_prob"], 2e-5)
    for key in golden.arrays:
        warm = {"temperature": 0.9, **({"mixture_temperature": 1.3} if key.endswith("tprob1.3") else {})}
        if key.startswith("out/log_prob_tscale0.9"):
            assert_close(head.log_prob(params, z, **warm), golden[key], 2e-5)
        elif key.startswith("out/log_prob_logits"):  # scales that are tiny, or at the floor
            moved = params * 6 if key.endswith("x6") else params - 1
            assert_close(head.log_prob(moved, z).double(), golden[f"ref64{key[3:]}"], 1e-4)
    if "in/drop_labels" in golden.arrays:
        dropped = model(tokens, labels, drop=golden["in/drop_labels"], **more)
        assert_close(dropped, golden["out/logits_drop"], 2e-5)
    loss = model.loss(tokens, labels, **more)
    assert_close(loss, golden["out/loss"], 2e-5)
    loss.backward()
    assert_close(tokens.grad, golden["grad/sequence"], 2e-4)
    renamed = {
        key: Source(tuple(f"grad/{part}" for part in source.names), source.make)
        for key, source in givt_jax.sources(model.config, "params/", stacked=False).items()
    }
    assert_gradients({"model": model}, {"model": golden.state("grad/params/", renamed, model)})


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_cached_decoding(name, tmp_path):
    golden, model = _load(name, tmp_path)
    tokens, labels, more = _given(golden, model)
    batch, length = tokens.shape[:2]
    labels = batch if labels is None else labels
    for key, drop in (("out/logits_cached", None), ("out/logits_cached_uncond", torch.ones(batch, dtype=torch.bool))):
        if key not in golden.arrays:
            continue
        caches, seen, got = model.new_caches(batch), model.see(more.get("encoded"), 1), []
        x = model.begin(labels, drop)
        for i in range(length):
            got.append(model.head(model.extend(x, caches, seen)))
            x = model.embed(tokens[:, i])
        assert_close(torch.stack(got, 1), golden[key], 2e-5)
    means = causal.sample(model, labels, encoded=more.get("encoded"), draw=lambda params, _: model.head.mode(params))
    assert_close(means, golden["out/generate_mode_tokens"], 2e-4)


@torch.no_grad()
def test_features(tmp_path):
    """What linear probes see: means over the places."""
    golden, model = _load("givt_ar_joint_gmm", tmp_path)
    seen = []
    for module in (*model.layers, model.final_layer_norm):
        module.register_forward_hook(lambda module, given, out: seen.append(out))
    model(golden["in/sequence"])
    for out, key in zip(seen, ("block0_rep", "block1_rep", "pre_logits"), strict=True):
        assert_close(out.unflatten(0, (2, -1)).mean(1), golden[f"out/reps/{key}"], 2e-5)


@pytest.mark.parametrize("name", MASKED)
def test_parallel_decoding(name, tmp_path):
    golden, model = _load(name, tmp_path)
    runs = {key.split("/")[1] for key in golden.arrays if key.startswith("out/decode_")}
    assert len(runs) == 2
    for run in runs:
        _, count, schedule = run.split("_")
        done = masked.steps(
            model, golden["in/labels"], count=int(count), schedule=schedule.replace("pow", "pow:"),
            choice_temperature=float(golden[f"in/{run}/choice_temperature"]),
            annealed=bool(golden[f"in/{run}/anneal"]), draw=lambda params, _: model.head.mode(params),
            gumbel=lambda: golden["in/gumbel"],
        )  # fmt: skip
        before = torch.ones_like(golden["in/input_mask"])
        for i, step in enumerate(done):
            assert_close(step.tokens, golden[f"out/{run}/inputs"][i + 1], 2e-4)
            assert_close(step.params, golden[f"out/{run}/logits"][i], 2e-4)
            assert_close(step.log_prob.exp(), golden[f"out/{run}/prob"][i], 2e-4)
            assert torch.equal(before & ~step.hidden, golden[f"out/{run}/uncovered"][i])
            before = step.hidden
        assert i + 1 == int(count) and not before.any()


def test_schedules():
    golden = Golden("givt_schedules")
    for schedule in ("cosine", "pow1.0", "pow2.0", "pow3.5", "pow0.5"):
        ratio = masked.masked_ratio(golden["in/ratios"], schedule.replace("pow", "pow:"))
        assert_close(ratio, golden[f"out/mask_ratio_{schedule}"], 1e-6)
    for length, count, schedule in golden.config["specs"]:
        hidden, lengths = torch.tensor([length]), []
        for step in range(1, count + 1):
            hidden = masked.hidden_again(hidden, length, step / count, schedule)
            lengths.append(int(hidden))
        key = f"out/mask_len_S{length}_steps{count}_{schedule.replace(':', '')}"
        assert lengths == golden[key].tolist()
    for tau in (0.0, 0.7, 2.0):
        score = golden["in/topk_probs"].log() + tau * golden["in/topk_gumbel"]
        again = masked.least_confident(score, golden["in/topk_mask_len"][:, 0])
        assert torch.equal(again, golden[f"out/topk_mask_t{tau}"])
    keep = golden["in/train_keep"]
    assert_close(masked.masked_ratio(keep), golden["out/train_mask_ratio_cosine"], 1e-6)
    mask = masked.training_mask(keep, torch.rand(len(keep), 37))
    assert torch.equal(mask.sum(1).int(), golden["out/train_mask_count_S37"])


def test_stacked_layers(tmp_path):
    golden, model = _load("scan_givt", tmp_path)
    tokens, labels, _ = _given(golden, model)
    params = model(tokens, labels)
    assert_close(params, golden["out/logits"], 2e-5)
    assert_close(model.head.log_prob(params, tokens), golden["out/log_prob"], 2e-5)


@pytest.mark.parametrize("name", ["givt_adaptor", "givt_adaptor_bottleneck_ps2"])
def test_adaptor(name, tmp_path):
    golden = Golden(name)
    c, path = golden.config, tmp_path / "adaptor.npz"
    np.savez(path, **{key: array for key, array in golden.arrays.items() if key.startswith("params/")})
    side = round(c["n"] ** 0.5)
    config = AdaptorConfig(c["num_channels"], (side, side), c["num_blocks"], c.get("num_channels_bottleneck"))
    adaptor = givt_jax.load_adaptor(path, config).requires_grad_()
    x = golden["in/x"].requires_grad_()
    y = adaptor(x)
    assert_close(y, golden["out/forward"], 2e-5)
    assert_close(adaptor.inverse(y), golden["out/inverse_of_forward"], 2e-5)
    assert_close(adaptor.inverse(golden["in/y"]), golden["out/inverse"], 2e-5)
    (y * golden["in/cotangent"]).sum().backward()
    assert_close(x.grad, golden["grad/x"], 5e-5)
    sources = givt_jax.adaptor_sources(config, "grad/params/")
    assert_gradients({"adaptor": adaptor}, {"adaptor": golden.state("grad/params/", sources, adaptor)})


def test_a_preset_tells_what_outputs_mean(tmp_path):
    """The sizes of a file are those of a preset, or the file is refused by name."""
    shapes = NpzFile(_write(tmp_path, layers=2)).shapes
    assert givt_jax.knows(shapes, {})
    with pytest.raises(ValueError, match="no preset has width 1024, 2 layers of 16 heads and 4096 units, 256 places"):
        models.load_pretrained(tmp_path / "givt.npz")
    wide = models.givt.PRESETS["givt-causal-256"]
    with pytest.raises(ValueError, match=r"decoder/EncDecBlock2/.*missing|missing .*EncDecBlock2"):
        models.load_pretrained(tmp_path / "givt.npz", config=wide)


def _write(tmp_path, layers):
    """A file with the shapes of the 256 pixel model, but fewer layers and one number behind each array."""
    zero = np.zeros((), np.float32)

    def zeros(*shape):
        return np.lib.stride_tricks.as_strided(zero, shape, [0] * len(shape))

    arrays = {
        "EmbedLabels/embedding": zeros(1001, 1024), "EmbedTargets/kernel": zeros(16, 1024),
        "EmbedTargets/bias": zeros(1024), "decoder/pos_emb": zeros(1, 256, 1024),
        "decoder/LogitsDense/kernel": zeros(1024, 528), "decoder/LogitsDense/bias": zeros(528),
    }  # fmt: skip
    for i in range(layers):
        arrays[f"decoder/EncDecBlock{i}/SelfAttn/query/kernel"] = zeros(1024, 16, 64)
        arrays[f"decoder/EncDecBlock{i}/MLP/Dense_0/kernel"] = zeros(1024, 4096)
    np.savez_compressed(tmp_path / "givt.npz", **{f"params/{name}": array for name, array in arrays.items()})
    return tmp_path / "givt.npz"
