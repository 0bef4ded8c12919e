"""JetFormer against the JAX code of its authors: outputs, losses, gradients, sampling from caches; patch PCA."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import Golden, assert_close, assert_gradients

from vlkern import models, ops
from vlkern.generation import jetformer as sampling
from vlkern.interop import jet_jax, jetformer_jax
from vlkern.layers.rope_memory import Rows
from vlkern.models.jet import JetConfig
from vlkern.models.jetformer import JetFormerConfig
from vlkern.models.patch_pca import PatchPca, PatchPcaConfig
from vlkern.models.state import Source
from vlkern.recipes.jetformer import Objective, add_noise, noise_scale

NAMES = ["jetformer_classcond", "jetformer_imgtxt", "jetformer_imgtxt_noise_drop"]


def config_of(c) -> JetFormerConfig:
    jet, patch = c["jet"], c["ps"]
    flow = JetConfig(
        c["hw"] // patch, 1, 3 * patch**2, depth=jet["depth"], block_depth=jet["block_depth"], width=jet["emb_dim"],
        heads=jet["num_heads"], kinds=tuple(jet["kinds"]),
    )  # fmt: skip
    assert c["bos_id"] == c["vocab_size"] - 3 and c["boi_id"] in (None, c["vocab_size"] - 2)
    return JetFormerConfig(
        flow, patch, c["out_dim"], c["num_mixtures"], width=c["width"], depth=c["depth"], heads=c["num_heads"],
        head_dim=c["head_dim"], mlp=c["mlp_dim"], vocabulary=c["vocab_size"], text_length=c["T"],
        repeats=c.get("num_vocab_repeats", 1), boi_token=c["boi_id"] is not None,
        tied=not c.get("untie_output_vocab", False), causal_prefix=c.get("causal_mask_on_prefix", True),
        shared_norm=not c.get("per_modality_final_norm", False),
    )  # fmt: skip


class Case:
    """A file, its model and its batch."""

    def __init__(self, name, tmp_path):
        self.golden = golden = Golden(name)
        params = {key: array for key, array in golden.arrays.items() if key.startswith("params/")}
        np.savez(tmp_path / "a.npz", **params)
        self.model = models.load_pretrained(tmp_path / "a.npz", config=config_of(golden.config))
        self.ids, self.valid = golden.ids(), golden["in/text_mask"].bool()
        self.lengths = self.valid.sum(1)
        assert torch.equal(self.valid, golden["in/text_loss"].bool())
        self.text_first, self.drop = golden["in/text_first_mask"].bool(), golden["in/drop_prefix"].bool()
        self.dequantisation = golden["in/dequant_noise"].permute(0, 3, 1, 2)
        # Rows without a label are as long as rows can be.
        self.dropped_ids = torch.where(self.drop[:, None], self.model.unlabelled(1), self.ids)
        self.dropped_lengths = torch.where(self.drop, self.ids.shape[1], self.lengths)
        if golden.config["boi_id"] is None:
            self._see_pads()

    def _see_pads(self):
        """Without a boi, the JAX code predicts the first token of a picture from the place before it, which may be a
        pad. Nothing sees that pad, it sees its text: a query without a key. Here it is computed beside the rows."""
        model, gemma = self.model, self.model.language
        plain = gemma.hidden

        def hidden(x_TD, cu_seqlens, *, until):
            out = plain(x_TD, cu_seqlens, until=until)
            rows = [b for b in range(len(self.ids)) if self.text_first[b] and self.now[b] < self.ids.shape[1]]
            for b in rows:
                first, n = int(cu_seqlens[b]), int(self.now[b])
                row = torch.cat([x_TD[first : int(cu_seqlens[b + 1])], model.embed(self.ids[b, -1:])])
                last = len(row) - 1
                place = torch.arange(last, dtype=torch.int32)
                stop = torch.where(place <= n, n + 1, place + 1)
                start, stop = torch.zeros(last + 1), torch.cat([stop, torch.tensor([n + 1])])
                positions = torch.cat([place, torch.tensor([n])]).int()
                memory = Rows(start.int(), stop.int())
                pad = gemma.model(row, positions, [memory] * model.config.depth)[last]
                out = torch.cat([out[: first + n], pad[None], out[first + n + 1 :]])
            return out

        gemma.hidden = hidden

    def tokens(self, pixels):
        return self.model.encode(pixels + self.dequantisation)

    def outputs(self, soft, ids, lengths):
        self.now = lengths
        return self.model.outputs(soft, ids, lengths, self.text_first)


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name, tmp_path):
    """Noise-free: tokens, log-determinants, logits and parameters of the mixtures, likelihoods."""
    case = Case(name, tmp_path)
    golden, model, c = case.golden, case.model, case.model.config
    with torch.no_grad():
        tokens, logdet = case.tokens(golden.pixels())
        assert_close(tokens, golden["out/image_tokens"], 2e-5)
        assert_close(logdet, golden["out/jet_logdet"], 2e-5)
        soft = tokens[..., : c.modelled]
        out = case.outputs(soft, case.dropped_ids, case.dropped_lengths)
        # There, the picture of a marked row that begins with it is left out as well; in no loss, and not here.
        rows = case.text_first | ~case.drop
        params, logits = model.mixture(out.image)[rows], model.text_logits(out.text)
        assert_close(params, golden["out/image_logits"][rows], 2e-5)
        inside = (case.valid | case.drop[:, None]) & rows[:, None]
        assert_close(logits[inside], golden["out/text_logits"][inside], 2e-5)
        nll = ops.gmm_nll(params, soft[rows])
        assert_close(-nll, golden["out/image_log_prob"][rows], 2e-5)
        nats = F.cross_entropy(logits.transpose(1, 2), case.ids, reduction="none")
        assert_close(-nats[inside], golden["out/text_log_prob"][inside], 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name, tmp_path):
    """With all noise, texts left out, a gradient that stops: the objective, and every parameter's gradient."""
    case = Case(name, tmp_path)
    golden, model = case.golden, case.model
    options = golden.config["loss_cfg"]
    pixels = golden.pixels()
    if golden.config["noise_scale"]:
        pixels = add_noise(pixels, golden["in/rgb_noise"].permute(0, 3, 1, 2), golden.config["noise_scale"])
    ids = torch.where(case.text_first[:, None], case.dropped_ids, case.ids)
    case.now = torch.where(case.text_first, case.dropped_lengths, case.lengths)
    if options["loss_on_prefix"]:  # the sum of both modalities, of all rows
        tokens, logdet = case.tokens(pixels)
        out = case.outputs(tokens[..., : model.config.modelled], ids, case.now)
        bits, nats = model.image_bits(out.image, tokens, logdet), model.text_nats(out.text, ids, case.now)
        assert_close(bits.mean(), golden["out/metrics/nll_image"], 2e-5)
        assert_close(nats.mean(), golden["out/metrics/nll_text"], 2e-5)
        loss = bits.mean() + options["text_loss_weight"] * nats.mean()
    else:
        noise = torch.zeros(len(pixels), model.config.tokens, model.config.modelled)
        if "input_noise_std" in options:
            noise = golden["in/input_noise"] * golden["in/input_noise_std_sample"]
        objective = Objective(
            model, text_weight=options.get("text_loss_weight", 1.0), stop=options.get("stop_grad_nvp_prefix", False)
        )
        loss = objective(pixels + case.dequantisation, ids, noise, case.text_first, case.now)
    assert_close(loss, golden["out/loss"], 2e-5)
    loss.backward()
    arrays = {key: array for key, array in golden.arrays.items() if key.startswith("grad/params/")}
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused <= {"text_head.weight", "text_head.bias", "text_norm.weight"}
    sources = jetformer_jax.sources(
        {key[5:]: torch.from_numpy(a) for key, a in arrays.items()}, model.config, "params/"
    )
    sources = {
        name: Source(tuple(f"grad/{part}" for part in source.names if not part.endswith(jet_jax.TOKENS)), source.make)
        for name, source in sources.items()
        if not name.endswith(".order") and name not in unused
    }
    assert_gradients({"model": model}, {"model": golden.state("grad/params/", sources, model)})


def _modes(chosen):
    """In place of `gmm_sample`: the mean of the heaviest component; keeps the parameters."""

    def draw(params, *, dims, mixture_temperature, **_):
        chosen.append(params)
        k = params.shape[-1] // (1 + 2 * dims)
        best = (params[..., :k] * mixture_temperature).argmax(-1)
        return params[..., k:].unflatten(-1, (k, 2, dims))[torch.arange(len(params)), best, 0]

    return draw


@pytest.mark.parametrize("name", NAMES)
def test_sampling(name, tmp_path, monkeypatch):
    """Pictures of texts of any lengths, token by token on caches: draws, outputs, and the likelihood of whole rows."""
    case = Case(name, tmp_path)
    golden, model, c = case.golden, case.model, case.model.config
    chosen: list[torch.Tensor] = []
    monkeypatch.setattr(ops, "gmm_sample", _modes(chosen))
    case.now = lengths = golden["in/sample_text_mask"].sum(1)
    tokens = sampling.sample_tokens(model, case.ids, lengths, temperature=0.94, mixture_temperature=1.2)
    soft = tokens[..., : c.modelled]
    assert_close(soft, golden["out/sample_image/tokens"], 2e-4)
    with torch.no_grad():
        params = torch.stack(chosen, 1)
        expected = model.normed(golden["out/sample_image/prelogits"], "image")
        assert_close(params, model.mixture(expected), 2e-4)
        assert_close(model.mixture(model.outputs(soft, case.ids, lengths).image), params, 2e-5)
    k = c.mixtures
    weights, rest = params[..., :k] * 1.2, params[..., k:].unflatten(-1, (k, 2, c.modelled))
    scale = (rest[..., 1, :] + (rest[..., 1, :] ** 2 + 4).sqrt()) / 2 * 0.94
    each = torch.distributions.Normal(rest[..., 0, :], scale).log_prob(soft[:, :, None]).sum(-1)
    assert_close((weights.log_softmax(-1) + each).logsumexp(-1), golden["out/sample_image/logp"], 2e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_captions(name, tmp_path):
    """Greedy texts of pictures from caches, with more words than a text has."""
    case = Case(name, tmp_path)
    golden = case.golden
    pixels = golden.pixels() + case.dequantisation
    expected = golden["out/sample_text_greedy/tokens"].long()
    found = sampling.caption(case.model, pixels, expected.shape[1])
    assert torch.equal(found, expected)


def test_right_aligned_rows_are_packed_rows():
    """The JAX code moves valid elements to the end; here the others do not exist. The same elements see each other."""
    golden = Golden("jetformer_right_align")
    for i in range(len(golden.config["shapes"])):
        before, after = golden[f"in/input_mask{i}"].bool(), golden[f"out/input_mask{i}"].bool()
        x, moved = golden[f"in/x{i}"], golden[f"out/x{i}"]
        assert torch.equal(x[before], moved[after])
        for row in range(len(x)):
            inside, there = before[row], after[row]
            sees = golden[f"in/attn_mask{i}"][row].bool()[inside][:, inside]
            assert torch.equal(sees, golden[f"out/attn_mask{i}"][row].bool()[there][:, there])


def test_noise_schedule():
    golden = Golden("jetformer_rgb_noise")
    for first, last in golden.config["points"]:
        got = torch.tensor([noise_scale(i / 10, first, last) for i in range(11)])
        assert_close(got, golden[f"out/scale{first:.0f}_min{last:.0f}"], 1e-6)


@pytest.mark.parametrize("name", ["jetformer_patch_pca", "jetformer_patch_pca_d2s"])
def test_patch_pca(name):
    golden = Golden(name)
    c = golden.config
    pca = PatchPca(
        PatchPcaConfig(
            tuple(c["patch"]), c["K"], whiten=c["whiten"], groups=c["depth_to_seq"], noise_std=c.get("noise_std", 0.01)
        )
    )
    arrays = ("components_", "explained_variance_", "mean_")
    pca.load_state_dict({key[:-1]: golden[f"params/{key}"] for key in arrays})
    mean, logvar = pca.encode(golden.pixels())
    assert_close(mean, golden["out/mu"], 2e-5)
    assert torch.allclose(logvar, golden["out/logvar"])
    for codes, decoded in ((golden["in/latent"], "decoded"), (golden["out/mu"], "decoded_mu")):
        assert_close(pca.decode(codes, *c["hw"]).permute(0, 2, 3, 1), golden[f"out/{decoded}"], 2e-5)
