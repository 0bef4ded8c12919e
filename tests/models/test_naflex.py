"""NaFlex models: against big_vision's arrays and transformers, pictures in packs, and what does not fit."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import Golden, assert_close, assert_gradients
from peers import load, randomize, transformers_config

import vlkern
from vlkern import models
from vlkern.interop import big_vision
from vlkern.layers.patches import from_padded, pack_pictures, places, to_padded
from vlkern.models import resize
from vlkern.models.naflex import PRESETS, Naflex, NaflexConfig, NaflexVisionConfig, NaflexVisionTower, from_siglip
from vlkern.models.siglip import Siglip, SiglipConfig, TextConfig, VisionConfig
from vlkern.packing import Example, IsolationError, PackedBatch, check_isolation

CONFIGS = {
    "small": NaflexConfig(NaflexVisionConfig(16, 2, 2, 32, patch=2, side=4), TextConfig(16, 2, 2, 32, 30, 7)),
    # Widths differ between the towers, heads of 24 and 8 channels, a grid that most shapes shrink.
    "odd": NaflexConfig(NaflexVisionConfig(72, 3, 3, 50, patch=5, side=7), TextConfig(24, 1, 3, 33, 19, 5)),
}
SHAPES = [[3, 5], [7, 2], [1, 1], [7, 7], [1, 23], [12, 2], [4, 4]]
GRIDS = [[16, 16], [8, 8], [24, 12], [7, 33], [1, 50], [5, 3], [40, 2], [17, 15], [64, 64]]


def _batch(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(SHAPES, dtype=torch.int32)
    patches = torch.rand(int(shapes.prod(1).sum()), 3 * config.vision.patch**2, generator=generator) * 2 - 1
    ids = torch.randint(config.text.vocabulary, (len(SHAPES), config.text.length), generator=generator)
    return patches, shapes, ids


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return randomize(Naflex(config))


def test_positions_of_all_grids_at_once():
    golden = Golden("naflex_posemb_resize")
    table = golden["in/pos_emb"].flatten(0, 1).requires_grad_()
    shapes = torch.tensor(GRIDS)
    lengths = shapes.prod(1).tolist()
    got = resize.positions_of(table, 16, places(shapes, sum(lengths))).split(lengths)
    for (h, w), positions in zip(GRIDS, got, strict=True):
        key = f"h{h}_w{w}"
        assert_close(positions.unflatten(0, (h, w)), golden[f"out/{key}"], 2e-5)
        loss = (positions.unflatten(0, (h, w)) * golden[f"in/cotangent_{key}"]).sum()
        (gradient,) = torch.autograd.grad(loss, table, retain_graph=True)
        assert_close(gradient.unflatten(0, (16, 16)), golden[f"grad/{key}"], 5e-5)


def test_grids_have_no_largest_side():
    """big_vision knows a fixed number of rows, here 6, and gives NaN from there on; what is before is the same."""
    golden = Golden("naflex_posemb_resize_nan")
    table, shapes = golden["in/pos_emb"].flatten(0, 1), torch.tensor([[4, 6], [7, 5]])
    for (h, w), got in zip(
        shapes.tolist(), resize.positions_of(table, 4, places(shapes, 59)).split([24, 35]), strict=True
    ):
        want = golden[f"out/h{h}_w{w}"]
        assert got.isfinite().all()
        assert_close(got.unflatten(0, (h, w))[:6], want[:6], 2e-5)
        assert want[6:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_as_pytorch_resizes_them(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randint(1, 40, (30, 2), generator=generator)
    table = torch.randn(9**2, 6, generator=generator).to(dtype)
    lengths = shapes.prod(1).tolist()
    got = resize.positions_of(table, 9, places(shapes, sum(lengths))).split(lengths)
    grid = table.float().T.reshape(1, 6, 9, 9)
    for (h, w), positions in zip(shapes.tolist(), got, strict=True):
        want = F.interpolate(grid, (h, w), mode="bilinear", antialias=True)[0].flatten(1).T
        assert positions.dtype == dtype
        torch.testing.assert_close(positions, want.to(dtype), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_the_grid_itself_is_not_changed():
    table = torch.randn(25, 8)
    assert torch.equal(resize.positions_of(table, 5, places(torch.tensor([[5, 5]]), 25)), table)


def _golden_tower():
    golden = Golden("naflex_map")
    c = golden.config
    sizes = (c["width"], c["depth"], c["num_heads"], c["mlp_dim"])
    tower = NaflexVisionTower(NaflexVisionConfig(*sizes, patch=c["patch"][0], side=c["nposemb"]))
    return golden, tower, big_vision.image_sources(tower.config, "params/", stacked=False)


def test_image_tower_of_big_vision():
    golden, tower, sources = _golden_tower()
    tower.load_state_dict(golden.state("params/", sources, tower))
    valid = golden["in/ptype"] == 1
    patches = golden["in/patches"][valid].requires_grad_()
    shapes = torch.tensor(golden.config["grids"])
    tokens = tower.tokens(patches, shapes)
    assert_close(tokens, golden["out/encoded"][valid], 2e-5)
    pooled = tower(patches, shapes)
    assert_close(pooled, golden["out/result"], 2e-5)
    (pooled * golden["in/cotangent"]).sum().backward()
    assert_close(patches.grad, golden["grad/patches"][valid], 5e-5)
    gradients = {k: type(s)(tuple(f"grad/{n}" for n in s.names), s.make) for k, s in sources.items()}
    assert_gradients({"tower": tower}, {"tower": golden.state("grad/params/", gradients, tower)})


def test_file_of_big_vision(tmp_path):
    golden, tower, sources = _golden_tower()
    tower.load_state_dict(golden.state("params/", sources, tower))
    path = tmp_path / "naflex.npz"
    np.savez(path, **{k: a for k, a in golden.arrays.items() if k.startswith("params/")})
    loaded = models.load_pretrained(path)
    assert loaded.config == tower.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tower.parameters(), strict=True))

    both = {f"params/img/{k[7:]}": a for k, a in golden.arrays.items() if k.startswith("params/")}
    text = Golden("two_towers_siglip")
    both |= {k: a for k, a in text.arrays.items() if k.startswith(("params/txt/", "params/t", "params/b"))}
    width = tower.config.width
    both |= {"params/txt/head/kernel": np.ones((24, width), np.float32), "params/txt/head/bias": np.zeros(width)}
    np.savez(path, **both)
    model = models.load_pretrained(path, dtype=torch.float32)
    assert isinstance(model, Naflex) and model.config.vision == tower.config
    assert all(torch.equal(a, b) for a, b in zip(model.vision_model.parameters(), tower.parameters(), strict=True))
    assert_close(model.text_model.tokens(text.ids()), text["out/txt/transformed"], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_gives_the_same(config, model, dtype):
    transformers = load("transformers")
    theirs = transformers.Siglip2Model(transformers_config(config)).eval()
    theirs.load_state_dict(model.state_dict())
    model, theirs = model.to(dtype), theirs.to(dtype)
    patches, shapes, ids = _batch(config)
    values, mask, spatial = to_padded(patches.to(dtype), shapes, 55)
    want = theirs(input_ids=ids, pixel_values=values, pixel_attention_mask=mask, spatial_shapes=spatial)
    tokens = model.vision_model.tokens(patches.to(dtype), shapes)
    exact = dtype == torch.float32
    their_tokens, _ = from_padded(want.vision_model_output.last_hidden_state, mask, spatial)
    span = float(their_tokens.detach().abs().max())
    torch.testing.assert_close(tokens, their_tokens, rtol=0, atol=span * (1e-5 if exact else 0.05))
    image, text = model(patches.to(dtype), shapes, ids)
    torch.testing.assert_close(image, want.image_embeds.float(), rtol=0, atol=1e-5 if exact else 0.03)
    torch.testing.assert_close(text, want.text_embeds.float(), rtol=0, atol=1e-5 if exact else 0.03)
    if not exact:
        return
    y, z = torch.randn_like(image), torch.randn_like(text)
    ((image * y).sum() + (text * z).sum()).backward()
    ((want.image_embeds * y).sum() + (want.text_embeds * z).sum()).backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    span = max(float(g.abs().max()) for g in wanted.values())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, wanted.pop(name), 5e-5, span)
    assert not wanted


def test_timm_gives_the_same(config, model):
    """timm's NaFlexVit with a bilinear, antialiased table: its own models interpolate bicubically."""
    naflexvit = load("timm").models.naflexvit
    c = config.vision
    theirs = naflexvit.NaFlexVit(
        patch_size=c.patch, embed_dim=c.width, depth=c.depth, num_heads=c.heads, mlp_ratio=c.mlp / c.width,
        num_classes=0, global_pool="map", class_token=False, reg_tokens=0, pos_embed="learned",
        pos_embed_grid_size=(c.side, c.side), pos_embed_interp_mode="bilinear", pos_embed_use_grid_sample=False,
        act_layer="gelu_tanh", fc_norm=False,
    ).eval()  # fmt: skip
    state, ours = theirs.state_dict(), model.vision_model.state_dict()

    def put(name, value):
        assert state[name].numel() == value.numel(), name
        state[name] = value.reshape(state[name].shape)

    for kind in ("weight", "bias"):
        put(f"embeds.proj.{kind}", ours[f"embeddings.patch_embedding.{kind}"])
        put(f"norm.{kind}", ours[f"post_layernorm.{kind}"])
        for i in range(c.depth):
            layer, block = f"encoder.layers.{i}.", f"blocks.{i}."
            put(f"{block}norm1.{kind}", ours[f"{layer}layer_norm1.{kind}"])
            put(f"{block}norm2.{kind}", ours[f"{layer}layer_norm2.{kind}"])
            qkv = torch.cat([ours[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"])
            put(f"{block}attn.qkv.{kind}", qkv)
            put(f"{block}attn.proj.{kind}", ours[f"{layer}self_attn.out_proj.{kind}"])
            put(f"{block}mlp.fc1.{kind}", ours[f"{layer}mlp.fc1.{kind}"])
            put(f"{block}mlp.fc2.{kind}", ours[f"{layer}mlp.fc2.{kind}"])
        q, k, v = ours[f"head.attention.in_proj_{kind}"].chunk(3)
        put(f"attn_pool.q.{kind}", q)
        put(f"attn_pool.kv.{kind}", torch.cat([k, v]))
        put(f"attn_pool.proj.{kind}", ours[f"head.attention.out_proj.{kind}"])
        put(f"attn_pool.norm.{kind}", ours[f"head.layernorm.{kind}"])
        put(f"attn_pool.mlp.fc1.{kind}", ours[f"head.mlp.fc1.{kind}"])
        put(f"attn_pool.mlp.fc2.{kind}", ours[f"head.mlp.fc2.{kind}"])
    put("embeds.pos_embed", ours["embeddings.position_embedding.weight"])
    put("attn_pool.latent", ours["head.probe"])
    theirs.load_state_dict(state)
    patches, shapes, _ = _batch(config)
    values, mask, _ = to_padded(patches, shapes, 55)
    at = places(shapes, len(patches))
    coordinates, _, _ = to_padded(torch.stack([at.row, at.column], 1).long(), shapes, 55)
    with torch.no_grad():
        want = theirs({"patches": values, "patch_coord": coordinates, "patch_valid": mask.bool()})
        torch.testing.assert_close(model.vision_model(patches, shapes), want, rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_depend_on_its_neighbours(config, model):
    patches, shapes, _ = _batch(config)
    parts = patches.split(shapes.prod(1).tolist())
    with torch.no_grad():
        together = model.encode_image(patches, shapes)
        alone = torch.cat([model.encode_image(p, s[None]) for p, s in zip(parts, shapes, strict=True)])
        order = [4, 2, 6, 0, 1, 5, 3]
        shuffled = model.encode_image(torch.cat([parts[i] for i in order]), shapes[order])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=2e-6)


def test_nothing_leaks_between_pictures(config, model):
    """No gradient of one picture's vector reaches another's patches."""
    patches, shapes, _ = _batch(config)
    patches.requires_grad_()
    lengths = shapes.prod(1).tolist()
    for i, vector in enumerate(model.vision_model(patches, shapes)):
        (gradient,) = torch.autograd.grad(vector.sum(), patches, retain_graph=True)
        reached = [bool(part.any()) for part in gradient.split(lengths)]
        assert reached == [j == i for j in range(len(lengths))]


def test_pictures_as_they_are():
    from PIL import Image

    torch.manual_seed(0)
    model = models.create("naflex-tiny").eval()
    wide, tall = (torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((21, 90), (64, 24)))
    with torch.no_grad():
        both = model.encode_pictures([wide, Image.fromarray(tall.permute(1, 2, 0).numpy())])
        alone = torch.cat([model.encode_pictures([wide]), model.encode_pictures([tall])])
        fewer = model.encode_pictures([wide, tall], max_patches=4)
    torch.testing.assert_close(both, alone, rtol=0, atol=2e-6)
    assert both.norm(dim=1).allclose(torch.ones(2)) and (fewer - both).abs().max() > 1e-3
    with pytest.raises(ValueError, match="pictures must be at least one"):
        model.encode_pictures([])
    with pytest.raises(TypeError, match=r"pictures\[1\] must be a uint8 tensor .*, got a torch.float32 tensor"):
        model.encode_pictures([wide, wide.float()])
    with pytest.raises(TypeError, match=r"pictures\[0\] must be a uint8 tensor .*, got str"):
        model.encode_pictures(["cat.png"])
    with pytest.raises(ValueError, match="not empty"):
        model.encode_pictures([torch.zeros(3, 0, 5, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="max_patches must be a whole number above 0, got 0"):
        model.encode_pictures([wide], max_patches=0)


def test_autocast_keeps_the_residual_stream():
    torch.manual_seed(0)
    model = models.create("naflex-tiny")
    patches, shapes, ids = _batch(model.config)
    want = model(patches, shapes, ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(patches, shapes, ids)
        assert model.vision_model.tokens(patches, shapes).dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)


def test_compiles_without_a_break():
    torch.manual_seed(0)
    model = Naflex(dataclasses.replace(CONFIGS["small"], vision=NaflexVisionConfig(16, 1, 2, 32, patch=2, side=4)))
    patches, shapes, _ = _batch(model.config)
    compiled = torch.compile(model.encode_image, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(patches, shapes), model.encode_image(patches, shapes))


def test_forward_on_the_meta_device():
    with torch.device("meta"):
        model = models.create("siglip2-so400m-patch16-naflex")
        image, text = model(
            torch.empty(256 + 77, 768), torch.empty(2, 2, dtype=torch.int32), torch.empty(2, 64, dtype=torch.long)
        )
    assert image.shape == text.shape == (2, 1152)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_through_transformers(config, model, dtype, tmp_path):
    transformers = load("transformers")
    model = model.to(dtype)
    models.save_pretrained(model, tmp_path / "a")
    again = models.load_pretrained(tmp_path / "a")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "a")
    assert type(theirs).__name__ == "Siglip2Model" and theirs.dtype == dtype
    theirs.save_pretrained(tmp_path / "b")
    back = models.load_pretrained(tmp_path / "b")
    want = model.state_dict()
    for other in (again, theirs, back):
        state = other.state_dict()
        assert state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)
    assert again.config == back.config == config


def test_image_tower_of_transformers(config, tmp_path):
    transformers = load("transformers")
    theirs = randomize(transformers.Siglip2VisionModel(transformers_config(config).vision_config))
    theirs.save_pretrained(tmp_path)
    ours = models.load_pretrained(tmp_path)
    assert isinstance(ours, NaflexVisionTower) and ours.config == config.vision
    patches, shapes, _ = _batch(config)
    with torch.no_grad():
        values, mask, spatial = to_padded(patches, shapes, 49)
        torch.testing.assert_close(ours(patches, shapes), theirs(values, mask, spatial).pooler_output)


def test_shapes_tell_the_rest(tmp_path):
    """Without config.json the heads come from a preset of the same width."""
    model = models.create("naflex-tiny")
    models.save_pretrained(model, tmp_path)
    (tmp_path / "config.json").unlink()
    assert models.load_pretrained(tmp_path).config == PRESETS["naflex-tiny"]
    with pytest.raises(vlkern.errors.UserError, match="wrong shape"):
        models.load_pretrained(tmp_path, config=CONFIGS["small"])


@pytest.mark.parametrize(
    ("patches", "shapes", "kind", "message"),
    [
        (torch.zeros(6, 191), [[2, 3]], ValueError, r"patches must have shape \[T, 192\], got \[6, 191\]"),
        (torch.zeros(192), [[1, 1]], ValueError, r"patches must have shape \[T, 192\], got \[192\]"),
        (torch.zeros(6, 192, dtype=torch.uint8), [[2, 3]], TypeError, "patches must be float64, .* got torch.uint8"),
        (torch.zeros(6, 192), [[2, 2]], ValueError, "as many patches as there are, 6, got 4 in 1 pictures"),
        (torch.zeros(6, 192), [[2, 3], [3, 0]], ValueError, r"at least 1 x 1 patch, got \[3, 0\] for picture 1"),
        (torch.zeros(0, 192), torch.zeros(0, 2, dtype=torch.int32), ValueError, "at least one picture"),
    ],
)
def test_batches_that_do_not_fit(patches, shapes, kind, message):
    model = models.create("naflex-tiny")
    with pytest.raises(kind, match=message):
        model.encode_image(patches, torch.as_tensor(shapes))
    with pytest.raises(kind, match=message):
        model.vision_model.tokens(patches, torch.as_tensor(shapes))


def test_sizes_that_no_model_has():
    with pytest.raises(ValueError, match="side must be a positive integer, got 0"):
        NaflexVisionConfig(16, 1, 2, 32, patch=2, side=0)
    with pytest.raises(ValueError, match="multiple of 8 up to 256, got 3 heads of width 39"):
        NaflexVisionConfig(39, 1, 3, 32, patch=2, side=4)


@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_a_model_of_fixed_size_gives_the_same(size):
    torch.manual_seed(0)
    fixed = randomize(Siglip(SiglipConfig(VisionConfig(16, 2, 2, 32, size, 4), TextConfig(16, 2, 2, 32, 30, 7))))
    flexible = from_siglip(fixed)
    side = max(fixed.config.vision.grid)
    assert flexible.config.vision == NaflexVisionConfig(16, 2, 2, 32, patch=4, side=side)
    assert not flexible.training and flexible.train().training
    pixels, ids = torch.rand(3, 3, *size) * 2 - 1, torch.randint(30, (3, 7))
    with torch.no_grad():
        want = fixed(pixels, ids)
        got = flexible(*pack_pictures(list(pixels), 4), ids)
    torch.testing.assert_close(got[1], want[1])
    if size[0] == size[1]:
        torch.testing.assert_close(got[0], want[0])
    else:  # positions were interpolated to a square grid, and back
        assert F.cosine_similarity(got[0], want[0]).min() > 0.5
    flexible.vision_model.head.probe.data.zero_()
    assert fixed.vision_model.head.probe.any()


def test_a_model_with_other_heads_stays_fixed():
    fixed = Siglip(SiglipConfig(VisionConfig(39, 1, 3, 32, (8, 8), 4), TextConfig(16, 1, 2, 32, 30, 7)))
    with pytest.raises(ValueError, match="multiple of 8 up to 256, got 3 heads of width 39"):
        from_siglip(fixed)


def test_the_leak_detector_finds_nothing(config, model):
    patches, shapes, _ = _batch(config)
    parts = patches.split(shapes.prod(1).tolist())
    batch = PackedBatch.of([Example({"patches": part}) for part in parts])
    check_isolation(lambda batch: model.encode_image(batch.tokens["patches"], shapes), batch)
    # Without their borders, two pictures are one.
    together = torch.tensor([[len(parts[0]) + len(parts[1]), 1], *SHAPES[2:]])
    with pytest.raises(IsolationError, match="changing document 0 changes 1 "):
        check_isolation(lambda batch: model.vision_model.tokens(batch.tokens["patches"], together), batch)
