"""GIVT's autoencoders against arrays of its authors: latents, reconstructions, losses, gradients, and files."""

import dataclasses

import numpy as np
import pytest
from goldens import Golden, assert_close

from vlkern import models
from vlkern.errors import UserError
from vlkern.interop import givt_vae_jax
from vlkern.models import vae, vit_vae
from vlkern.models.conv_autoencoder import ConvConfig
from vlkern.models.vae import VaeConfig, kl_divergence, with_noise
from vlkern.models.vit_vae import Labels, VitVaeConfig
from vlkern.recipes.vae import label_loss, picture_loss

CONV = ["givt_cnn_vae", "givt_cnn_vae_convdown_ps2"]
VIT = ["givt_vit_vae", "givt_vit_vae_onehot", "givt_vit_vae_resize"]


def _config(c) -> VaeConfig | VitVaeConfig:
    if c["case"] == "givt_vae_cnn":
        return VaeConfig(
            c["codeword_dim"],
            c["hw"][0],
            tuple(c.get("pixel_shuffle_patch_size", (1, 1))),
            unit_range=c.get("malib_ckpt", False),
            network=ConvConfig(
                c["filters"],
                tuple(c["channel_multipliers"]),
                c["num_res_blocks"],
                downsample="conv" if c.get("conv_downsample") else "mean",
                skip="result",
            ),
        )
    return VitVaeConfig(
        tuple(c["input_size"]),
        c["patch_size"][0],
        c["width"],
        c["num_heads"],
        c["mlp_dim"],
        (c["enc_depth"], c["dec_depth"]),
        tokens=c["code_len"],
        dim=c["codeword_dim"],
        resize=c.get("bottleneck_resize", False),
        labels=tuple(Labels(name, *entry) for name, entry in c.get("inout_specs", {}).items()),
    )


@pytest.fixture
def load(tmp_path):
    def from_file(name, config=None):
        golden = Golden(name)
        arrays = {key: array for key, array in golden.arrays.items() if key.startswith("params/")}
        if name == "givt_cnn_vae":  # its parameters are in two files of their own
            for side in ("encoder", "decoder"):
                with np.load(golden.path.with_name(f"{name}_{side}.npz")) as file:
                    arrays |= {key: file[key] for key in file.files}
        np.savez(tmp_path / "a.npz", **arrays)
        return golden, models.load_pretrained(tmp_path / "a.npz", config=config or _config(golden.config))

    return from_file


def _close(got, golden, key):
    if isinstance(got, dict):
        assert got.keys() == {name.rpartition("/")[2] for name in golden.arrays if name.startswith(f"{key}/")}
        for name, part in got.items():
            _close(part, golden, f"{key}/{name}")
    else:
        assert_close(got.permute(0, 2, 3, 1), golden[key], 2e-5)


@pytest.mark.parametrize("name", [*CONV, *VIT])
def test_outputs_losses_and_gradients(name, load):
    golden, model = load(name)
    inputs = golden.pixels()
    if inputs.is_floating_point():
        inputs.requires_grad_()
    mean, logvar = model.encode(inputs)
    z = with_noise(mean, logvar, golden["in/eps"])
    for key, got in (("mu", mean), ("logvar", logvar), ("z_sampled", z)):
        assert_close(got, golden[f"out/{key}"], 2e-5)
    _close(model.decode(mean), golden, "out/reconstruction_from_mu")
    again = model.decode(z)
    _close(again, golden, "out/reconstruction_sampled")

    rec = label_loss(inputs, again, model.config.labels) if name in VIT and model.config.labels else None
    rec, kl = (picture_loss(inputs, again) if rec is None else rec).mean(), kl_divergence(mean, logvar).mean()
    loss = rec + golden.config["beta"] * kl
    for key, got in (("loss_rec", rec), ("loss_kl", kl), ("loss", loss)):
        assert_close(got, golden[f"out/{key}"], 2e-5)

    loss.backward()
    gradients = {key.removeprefix("grad/"): golden[key] for key in golden.arrays if key.startswith("grad/params/")}
    span = max(float(gradient.abs().max()) for gradient in gradients.values())
    sources = givt_vae_jax.sources(model, "params/")
    assert {source.names[0] for source in sources.values()} == gradients.keys()
    for ours, parameter in model.named_parameters():
        expected = sources[ours].make(gradients[sources[ours].names[0]])
        # Of convolutions every eighth channel of the output was kept.
        got = parameter.grad[::8] if parameter.dim() == 4 else parameter.grad
        assert_close(got, expected, 5e-5, span)
    if inputs.is_floating_point():
        assert_close(inputs.grad.permute(0, 2, 3, 1), golden["grad/image"], 5e-5)


def test_presets_are_found_by_shapes(load, tmp_path, monkeypatch):
    """And files whose shapes no preset has are refused, as is a configuration of the wrong kind."""
    for name, presets, other in (
        ("givt_cnn_vae_convdown_ps2", vae.PRESETS, vit_vae.PRESETS["givt-vae-depth"]),
        ("givt_vit_vae", vit_vae.PRESETS, vae.PRESETS["vae-tiny"]),
    ):
        _, model = load(name)
        with pytest.raises(UserError, match="no preset has its shapes: pass a V"):
            models.load_pretrained(tmp_path / "a.npz")
        with pytest.raises(UserError, match=f"config must be a {type(model.config).__name__}, got"):
            models.load_pretrained(tmp_path / "a.npz", config=other)
        monkeypatch.setitem(presets, "test", model.config)
        assert models.load_pretrained(tmp_path / "a.npz").config == model.config


def test_arrays_that_do_not_fit(load):
    config = _config(Golden("givt_cnn_vae_convdown_ps2").config)
    deeper = dataclasses.replace(config, network=dataclasses.replace(config.network, blocks=2))
    with pytest.raises(UserError, match=r"missing encoder\.middle\.1\.conv1\.weight"):
        load("givt_cnn_vae_convdown_ps2", deeper)
