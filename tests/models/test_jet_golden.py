"""Jet against arrays of its authors: outputs, log-determinants, inverses, bits, gradients, and the layout of files."""

import dataclasses

import numpy as np
import pytest
import torch
from goldens import Golden, assert_close

from vlkern import flows, models
from vlkern.errors import UserError
from vlkern.interop import jet_jax
from vlkern.layers.flow import token_order
from vlkern.models.jet import Jet, JetConfig
from vlkern.models.state import NpzFile, collect


def _config(c) -> JetConfig:
    return JetConfig(
        c["hw"],
        c["ps"],
        channels=c["C"],
        depth=c["depth"],
        block_depth=c["block_depth"],
        width=c["emb_dim"],
        heads=c["num_heads"],
        kinds=tuple(c["kinds"]),
        splits=tuple(c.get("spatial_coupling_projs", ["checkerboard"])),
        max_scale=c.get("scale_factor", 2.0),
        context=c["context"] and c["context"][1],
    )


def _write(path, arrays, root="params/"):
    np.savez(path, **{name: array for name, array in arrays.items() if name.startswith(root)})


def _load(name, tmp_path) -> tuple[Golden, Jet]:
    golden = Golden(name)
    _write(tmp_path / "a.npz", golden.arrays)
    return golden, models.load_pretrained(tmp_path / "a.npz", config=_config(golden.config))


def _pixels(golden, key):
    return golden[key].permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["jet_channels_ctx", "jet_channels_spatial", "jet_spatial_kinds"])
@pytest.mark.parametrize("invertible", [False, True])
def test_flow(name, invertible, tmp_path):
    golden, loaded = _load(name, tmp_path)
    model = Jet(dataclasses.replace(loaded.config, invertible=invertible))
    model.load_state_dict(loaded.state_dict())
    context = golden["in/context"] if "in/context" in golden.arrays else None
    image = _pixels(golden, "in/image")
    z, logdet = model(model.tokens(image), context)
    assert_close(model.pixels(z), _pixels(golden, "out/z"), 1e-5)
    assert_close(logdet, golden["out/logdet"], 1e-5)
    with torch.no_grad():
        back, undone = model.inverse_with_logdet(z.detach(), context)
        assert_close(model.pixels(back), _pixels(golden, "out/inverse_of_forward"), 1e-5)
        assert_close(undone, golden["out/inverse_of_forward_logdet"], 1e-5)
        back, undone = model.inverse_with_logdet(model.tokens(_pixels(golden, "in/latent")), context)
        assert_close(model.pixels(back), _pixels(golden, "out/inverse"), 1e-5)
        assert_close(undone, golden["out/inverse_logdet"], 1e-5)

    pixels = (image + _pixels(golden, "in/dequant_noise")).requires_grad_()
    z, logdet = model(model.tokens(pixels), context)
    bits = flows.bits_per_dim(z, logdet)
    assert_close(bits, golden["out/bits_per_example"], 1e-5)
    assert_close(flows.bits_per_dim(z, 0 * logdet), golden["out/nll_per_example"], 1e-5)
    assert_close(bits.mean(), golden["out/loss_bits"], 1e-5)
    bits.mean().backward()
    _write(tmp_path / "g.npz", golden.arrays, "grad/params/")
    arrays = {name.removeprefix("grad/"): array for name, array in np.load(tmp_path / "g.npz").items()}
    # Gradients of the constant matrices, which are no permutations: their own take their place.
    constants = {name: array for name, array in golden.arrays.items() if name.endswith("-FREEZE_ME")}
    np.savez(tmp_path / "g.npz", **(arrays | {name: a for name, a in constants.items() if name.startswith("params/")}))
    orders = jet_jax.Orders(NpzFile(tmp_path / "g.npz"))
    expected = collect(orders, model.state_dict(), jet_jax.sources(model.config, "params/"))
    span = max(float(expected[name].abs().max()) for name, _ in model.named_parameters())
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name], 2e-5, span)
    assert_close(pixels.grad, _pixels(golden, "grad/image"), 2e-5)


@pytest.mark.parametrize("name", ["jet_channels_ctx", "jet_channels_spatial"])
def test_logdet_is_that_of_the_jacobian(name, tmp_path):
    golden, model = _load(name, tmp_path)
    model = model.double()
    context = golden["in/context"][:1].double() if "in/context" in golden.arrays else None
    x = model.tokens(_pixels(golden, "in/image")[:1].double())
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, context)[0], x)
    exact = jacobian.reshape(x.numel(), x.numel()).slogdet().logabsdet
    logdet = model(x, context)[1].detach()
    assert abs(float(logdet - exact)) < 1e-5 * abs(float(exact))
    assert abs(float(exact - golden["out/jacobian_logdet_example0"])) < 1e-5 * abs(float(exact))


def test_orders_of_tokens():
    golden = Golden("jet_spatial_masks")
    for height, width, patch, split in golden.config["specs"]:
        matrix = golden[f"out/h{height}_w{width}_ps{patch}_{split}"]
        assert torch.equal(token_order(height // patch, width // patch, split), matrix.argmax(0).int())


def test_file_tells_its_config(tmp_path):
    golden, model = _load("jet_channels_spatial", tmp_path)
    found, given = models.load_pretrained(tmp_path / "a.npz").config, model.config
    # Four couplings draw one way to split tokens: the file cannot tell of the second.
    assert found == dataclasses.replace(given, splits=given.splits[:1])
    assert [found.kind(i) for i in range(4)] == [given.kind(i) for i in range(4)]
    broken = {name: array.copy() for name, array in golden.arrays.items() if name.startswith("params/")}
    broken[f"params/{jet_jax.CHANNELS}"][1, 0, 0] += 1
    _write(tmp_path / "b.npz", broken)
    with pytest.raises(UserError, match=r"channel_coupling_masks-FREEZE_ME\[1\] must be a permutation or zero"):
        models.load_pretrained(tmp_path / "b.npz", config=model.config)
    del broken["params/couplings/dnn/posemb"]
    _write(tmp_path / "c.npz", broken)
    with pytest.raises(UserError, match=r"missing .*posemb"):
        models.load_pretrained(tmp_path / "c.npz")
