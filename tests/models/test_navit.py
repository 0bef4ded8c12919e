"""NaViT: what is packed together does not matter, positions, pooling, pads and slots, sizes, files, bad input."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from peers import randomize

from vlkern import data, models, ops
from vlkern.data.dropping import keep
from vlkern.layers.positions import COORDINATES, FAMILIES, Positions
from vlkern.models import navit
from vlkern.models.navit import Navit, NavitClassifier, NavitConfig, TextConfig, VisionConfig, sigmoid_cross_entropy
from vlkern.packing import Example, PackedBatch, check_isolation

PATCH = 4
CONFIG = NavitConfig(
    VisionConfig(width=48, depth=2, heads=3, mlp=64, patch=PATCH, grid=12),
    TextConfig(width=32, depth=2, heads=2, mlp=48, vocabulary=50, length=7),
)
GRIDS = [(3, 5), (1, 1), (2, 9), (6, 2), (4, 4)]
LENGTHS = [3, 7, 1, 5, 2]


def pictures(grids=GRIDS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h * PATCH, w * PATCH, generator=generator) for h, w in grids]


def pack(grids=GRIDS, **more):
    return data.pack_images(pictures(grids), PATCH, **more)


def texts(lengths=LENGTHS):
    ids = torch.randint(2, 50, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return data.PackedTexts(ids, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))


def model(**vision):
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, **vision))
    return randomize(Navit(config))


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_is_each_image_alone(family, coordinates):
    """In any order, with dropped patches or without."""
    net = model(positions=family, coordinates=coordinates, qk_norm="rms" if family == "fourier" else "layer")
    counts = torch.tensor([h * w for h, w in GRIDS])
    kept = keep(counts, torch.tensor([0.4, 0.0, 0.7, 0.2, 0.5]), torch.Generator().manual_seed(0))
    parts = torch.tensor_split(kept.numbers, kept.cu_seqlens[1:-1].long())
    starts = (counts.cumsum(0) - counts).tolist()
    dropped = [part - start for part, start in zip(parts, starts, strict=True)]
    for stay in (None, dropped):
        alone = [
            net.encode_image(*data.pack_images([picture], PATCH, kept=stay and [stay[i]]))
            for i, picture in enumerate(pictures())
        ]
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 1, 3]):
            packed = data.pack_images([pictures()[i] for i in order], PATCH, kept=stay and [stay[i] for i in order])
            together = net.encode_image(*packed)
            torch.testing.assert_close(together, torch.cat([alone[i] for i in order]), rtol=1e-5, atol=1e-5)
    assert min(float(a @ b.T) for a, b in itertools.combinations(alone, 2)) < 0.999


@torch.no_grad()
def test_patches_may_come_in_any_order():
    """Positions travel with the patches."""
    net, packed = model(), pack([(3, 5)])
    mixed = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    moved = packed._replace(patches=packed.patches[mixed], yx=packed.yx[mixed])
    torch.testing.assert_close(net.encode_image(*moved), net.encode_image(*packed), rtol=1e-5, atol=1e-5)
    elsewhere = packed._replace(patches=packed.patches[mixed])
    assert (net.encode_image(*elsewhere) - net.encode_image(*packed)).abs().max() > 1e-3


@torch.no_grad()
def test_packed_texts_are_each_text_alone():
    net, packed = model(), texts()
    together = net.encode_text(*packed)
    for i, part in enumerate(torch.split(packed.ids, LENGTHS)):
        alone = net.encode_text(part, torch.tensor([0, len(part)], dtype=torch.int32))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


def test_no_gradient_crosses_images():
    """Exactly none: not a rounding, in either tower."""
    net, packed = model(), pack()
    patches = packed.patches.requires_grad_()
    cu = packed.cu_seqlens.tolist()
    out = net.vision_model(*packed)
    for i in range(len(GRIDS)):
        (grad,) = torch.autograd.grad(out[i].square().sum(), patches, retain_graph=True)
        own = torch.zeros(len(patches), dtype=torch.bool)
        own[cu[i] : cu[i + 1]] = True
        assert bool((grad[~own] == 0).all()) and bool((grad[own].abs().amax(1) > 0).all())


def test_the_leak_detector_finds_nothing():
    net, packed = model(), pack()
    parts = zip(
        *(t.split(packed.cu_seqlens.diff().tolist()) for t in (packed.patches, packed.yx)), packed.hw, strict=True
    )
    batch = PackedBatch.of([Example({"patches": p, "yx": yx}, values={"hw": hw}) for p, yx, hw in parts])
    check_isolation(
        lambda b: net.encode_image(b.tokens["patches"], b.cu_seqlens, b.tokens["yx"], b.values["hw"]),
        batch,
        fields=["patches"],
    )


def test_compiled_without_a_break():
    """As one graph, for batches of any sizes."""
    net = model(depth=1)
    compiled = torch.compile(net.encode_image, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for grids in (GRIDS, GRIDS[:3]):
            torch.testing.assert_close(compiled(*pack(grids)), net.encode_image(*pack(grids)))


def test_shapes_alone():
    with torch.device("meta"):
        net = Navit(CONFIG)
        integers = [torch.empty(*shape, dtype=torch.int32) for shape in ((4,), (20, 2), (3, 2))]
        assert net.encode_image(torch.empty(20, 48), *integers).shape == (3, 48)


def slots(net, made, paired):
    """Embeddings of slots and texts."""
    return net(*made.images, *data.texts_of(paired, made.order))


def test_pads_and_empty_slots():
    """Sequences of one length: valid slots are the images alone, whatever lies in the pads; never NaN."""
    net, packed, paired = model(), pack(), texts()
    made = data.sequences(packed, length=24, slots=3, count=5)
    assert len(made.images.patches) == 5 * 24 and len(made.order) == 5 * 4
    assert not len(made.left_out) and int((~made.valid[16:]).sum()) == 4  # the last sequence is only pads
    image, text = slots(net, made, paired)
    assert bool(image.isfinite().all() and text.isfinite().all())
    want_image, want_text = net(*packed, *paired)
    order = made.order[made.valid]
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(image[made.valid], want_image[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text[made.valid], want_text[order], rtol=1e-5, atol=1e-5)

    pad = torch.zeros(len(made.images.patches), dtype=torch.bool)
    cu = made.images.cu_seqlens.tolist()
    for s in range(5):
        pad[cu[4 * s + 3] : cu[4 * s + 4]] = True
    assert int(pad.sum()) == 5 * 24 - len(packed.patches)
    other = made._replace(images=made.images._replace(patches=made.images.patches.masked_fill(pad[:, None], 7.0)))
    assert torch.equal(slots(net, other, paired)[0][made.valid], image[made.valid])

    loss = [
        ops.sigmoid_contrastive_loss(*pair, net.logit_scale.exp(), net.logit_bias, valid=valid)
        for pair, valid in (((image, text), made.valid), ((want_image, want_text), None))
    ]
    torch.testing.assert_close(*loss)
    grads = [torch.autograd.grad(value, list(net.parameters()), allow_unused=True) for value in loss]
    for (name, _), ours, theirs in zip(net.named_parameters(), *grads, strict=True):
        assert ours is not None and theirs is not None, name
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_more_images_than_slots():
    """The extras are left out, always the same, and told; so are images behind the last sequence."""
    packed = pack([(1, 1)] * 7 + [(4, 4)])
    made = data.sequences(packed, length=20, slots=3)
    assert made.left_out.tolist() == [3, 4, 5, 6] and made.order.tolist() == [0, 1, 2, -1, 7, -1, -1, -1]
    assert data.sequences(packed, length=20, slots=3, count=1).left_out.tolist() == [3, 4, 5, 6, 7]
    assert torch.equal(data.sequences(packed, length=20, slots=3).images.patches, made.images.patches)
    with pytest.raises(ValueError, match=r"lengths must be between 1 and the capacity, 12, got lengths\[7\] = 16"):
        data.sequences(packed, length=12, slots=3)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        data.sequences(packed, length=20, slots=0)


def test_positions_by_the_definition():
    yx = torch.tensor([[0, 0], [1, 2], [2, 1], [3, 5]])
    hw = torch.tensor([4, 6]).expand(4, 2)
    width, grid = 8, 7
    stretched = {
        "absolute": yx.double(),
        "fractional": yx.double() / torch.tensor([4, 6]) * (grid - 1),
        "aspect": yx.double() / 6 * (grid - 1),
    }
    for family, coordinates in itertools.product(FAMILIES, COORDINATES):
        torch.manual_seed(0)
        positions = Positions(width, grid, family, coordinates)
        got = positions(yx, hw)
        for row, (y, x) in zip(got, stretched[coordinates].tolist(), strict=True):
            if family == "learned":
                want = torch.zeros(width)
                for table, t in ((positions.row_embedding, y), (positions.column_embedding, x)):
                    low, part = int(t), t - int(t)
                    want += (1 - part) * table[low] + (part * table[low + 1] if part else 0)
            elif family == "fourier":
                phase = positions.frequencies @ torch.tensor([y, x])
                want = torch.cat([phase.sin(), phase.cos()])
            else:
                parts = [[f(t * 10_000 ** (-k / 2)) for f in (math.sin, math.cos) for k in (0, 1)] for t in (y, x)]
                want = torch.tensor(parts[0] + parts[1])
            torch.testing.assert_close(row, want, rtol=1e-5, atol=1e-5)
        assert (got[1] - got[2]).abs().max() > 0.1  # (1, 2) is not (2, 1)
    assert FAMILIES[1] == "sinusoidal" and not list(Positions(8, 7, "sinusoidal", "absolute").parameters())


@torch.no_grad()
def test_tower_by_the_definition():
    """One image against attention and pooling written out, with queries and keys normalised and no bias in q, k, v."""
    net = model()
    tower, packed = net.vision_model, pack([(3, 5)])
    x = tower.embeddings(*packed)

    def norm(x, weight):
        return F.layer_norm(x, x.shape[-1:], weight, None, 1e-6)

    for block in tower.encoder.layers:
        attention, y = block.self_attn, norm(x, block.layer_norm1.weight)
        q, k, v = (y @ p.weight.T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        heads = []
        for c in range(0, 48, 16):
            one_q = norm(q[:, c : c + 16], attention.q_norm.weight)
            one_k = norm(k[:, c : c + 16], attention.k_norm.weight)
            heads.append((one_q @ one_k.T / 4).softmax(1) @ v[:, c : c + 16])
        x = x + torch.cat(heads, 1) @ attention.out_proj.weight.T + attention.out_proj.bias
        y, mlp = norm(x, block.layer_norm2.weight), block.mlp
        x = x + mlp.fc2(F.gelu(F.linear(y, mlp.fc1.weight, mlp.fc1.bias), approximate="tanh"))
    x = norm(x, tower.post_layernorm.weight)
    torch.testing.assert_close(tower.tokens(*packed), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tower(*packed), tower.head(x, packed.cu_seqlens), rtol=1e-4, atol=1e-4)


def test_parts_without_bias():
    """As in ViT-22B: LayerNorms, also of queries and keys, and the projections to q, k and v."""
    names = {name for name, _ in model().named_parameters()}
    assert not [n for n in names if n.endswith("bias") and ("norm" in n or "q_proj" in n or "k_proj" in n)
                and not n.startswith(("vision_model.head.", "text_model.pooling."))]  # fmt: skip
    assert "vision_model.encoder.layers.0.self_attn.out_proj.bias" in names


def tower_size(width, depth, mlp):
    """Blocks, final LN and MAP head."""
    head = width // {192: 3, 256: 4, 768: 12, 1024: 16}[width]
    block = 4 * width**2 + width + 2 * width * mlp + width + mlp + 2 * width + 2 * head
    pooling = width + 4 * width**2 + 4 * width + 2 * width + 2 * width * mlp + width + mlp
    return depth * block + width + pooling


@pytest.mark.parametrize(
    ("name", "width", "depth", "mlp", "patch", "vocabulary", "length", "text_depth"),
    [
        ("navit-base-patch32", 768, 12, 3072, 32, 32_000, 24, 12),
        ("navit-base-patch16", 768, 12, 3072, 16, 32_000, 24, 12),
        ("navit-large-patch16", 1024, 24, 4096, 16, 32_000, 24, 24),
        ("navit-large-patch14", 1024, 24, 4096, 14, 32_000, 24, 24),
        ("navit-tiny", 192, 4, 768, 8, 2048, 16, 2),
        ("navit-small", 256, 6, 1024, 8, 2048, 16, 4),
    ],
)
def test_number_of_parameters(name, width, depth, mlp, patch, vocabulary, length, text_depth):
    with torch.device("meta"):
        net = models.create(name)
    image = tower_size(width, depth, mlp) + 3 * patch**2 * width + width + 2 * 64 * width
    text = tower_size(width, text_depth, mlp) + (vocabulary + length) * width + width**2 + width
    assert sum(p.numel() for p in net.vision_model.parameters()) == image
    assert sum(p.numel() for p in net.parameters()) == image + text + 2
    assert {n for n in models.list_models() if n.startswith("navit")} == set(navit.PRESETS)


def test_the_papers_sizes():
    """ViT-B and ViT-L have 86 and 304 million; a MAP head instead of a class token adds 7.1 and 12.6."""
    with torch.device("meta"):
        for name, millions in (("navit-base-patch16", 86 + 7.1), ("navit-large-patch16", 304 + 12.6)):
            count = sum(p.numel() for p in models.create(name).vision_model.parameters()) / 1e6
            assert count == pytest.approx(millions, rel=0.01)


def test_classifier():
    torch.manual_seed(0)
    net = NavitClassifier(CONFIG.vision, classes=5)
    packed, targets = pack(), torch.eye(5)
    logits = net(*packed)
    torch.testing.assert_close(logits, torch.full((5, 5), -math.log(5)))
    want = sum(
        -math.log(p if t else 1 - p)
        for p, t in zip(logits.sigmoid().flatten().tolist(), targets.flatten().tolist(), strict=True)
    )
    assert sigmoid_cross_entropy(logits, targets).item() == pytest.approx(want / 5, rel=1e-6)
    valid = torch.tensor([True, False, True, True, False])
    spoiled = logits.detach().masked_fill(~valid[:, None], math.nan).requires_grad_()
    loss = sigmoid_cross_entropy(spoiled, targets, valid)
    assert loss.item() == pytest.approx(sigmoid_cross_entropy(logits[valid], targets[valid]).item())
    assert sigmoid_cross_entropy(logits, targets, torch.zeros(5, dtype=torch.bool)).item() == 0

    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    first = sigmoid_cross_entropy(logits, targets).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = sigmoid_cross_entropy(net(*packed), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2
    with pytest.raises(ValueError, match="classes must be a positive integer, got 0"):
        NavitClassifier(CONFIG.vision, 0)
    with pytest.raises(ValueError, match=r"logits and targets must have shape .*, got \[5, 5\] and \[5\]"):
        sigmoid_cross_entropy(logits, targets[0])
    with pytest.raises(ValueError, match=r"valid must be bool of shape \[5\], got torch.float32 of \[5\]"):
        sigmoid_cross_entropy(logits, targets, torch.ones(5))


def test_bfloat16_and_autocast():
    net, packed, paired = model().requires_grad_(False), pack(), texts()
    want = net(*packed, *paired)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(*packed, *paired)
    narrow = randomize(Navit(CONFIG)).requires_grad_(False).bfloat16()(*packed, *paired)
    for got in (*mixed, *narrow):
        assert got.dtype == torch.float32
    for got, exact in zip((*mixed, *narrow), (*want, *want), strict=True):
        assert float((got * exact).sum(1).min()) > 0.98


@pytest.mark.parametrize("net", ["towers", "classifier"])
def test_files(net, tmp_path):
    vision = dataclasses.replace(CONFIG.vision, positions="fourier", coordinates="aspect", qk_norm="rms")
    made = Navit(dataclasses.replace(CONFIG, vision=vision)) if net == "towers" else NavitClassifier(vision, 3)
    models.save_pretrained(randomize(made), tmp_path)
    read = models.load_pretrained(tmp_path)
    assert type(read) is type(made) and read.config == made.config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "navit"
    ours, theirs = made.state_dict(), read.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {p.dtype for p in models.load_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"image_size must be None: .* is a NaViT, for pictures of any shape"):
        models.load_pretrained(tmp_path, image_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "no sizes of a NaViT"),
        ({"head": 3}, "expected vision and text, or vision and classes, got head, text, vision"),
        ({"vision": {"width": 48}}, r"no sizes of a NaViT \(.*missing .*'depth'"),
        ({"vision": {**dataclasses.asdict(CONFIG.vision), "colour": 1}}, "no sizes of a NaViT .*'colour'"),
        ({"vision": {**dataclasses.asdict(CONFIG.vision), "heads": 5}}, "width must be a multiple of heads"),
        ({"vision": {**dataclasses.asdict(CONFIG.vision), "mlp": 63}}, "wrong shape vision_model.encoder.layers.0.mlp"),
        ({"vision": {**dataclasses.asdict(CONFIG.vision), "positions": "fourier"}}, "missing .*frequencies"),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    models.save_pretrained(Navit(CONFIG), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as error:
        models.load_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches": torch.zeros(50, 48, dtype=torch.uint8)}, r"patches must be floating-point .*, got torch.uint8"),
        ({"patches": torch.zeros(50, 12)}, r"patches must have shape \[T, 48\], got \[50, 12\]"),
        ({"patches": torch.zeros(49, 48)}, "cu_seqlens must go from 0 to the number of tokens, 49, got 0 to 62"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, "at least one sequence, got"),
        ({"cu_seqlens": torch.tensor([0, 62])}, "cu_seqlens must be int32, got torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, 9, 9, 62], dtype=torch.int32)}, "must rise, got 9 and then 8"),
        ({"yx": torch.zeros(62, 3, dtype=torch.int32)}, r"yx must have shape \[62, 2\], got \[62, 3\]"),
        ({"yx": torch.zeros(62, 2)}, "yx must be int32 or int64, got torch.float32"),
        ({"yx": torch.ones(62, 2).int()}, r"inside its image, got \[1, 1\] for token 15 of an image of \[1, 1\]"),
        ({"yx": torch.zeros(62, 2, device="meta").int()}, "yx must be on the device of patches, cpu, got meta"),
        ({"hw": torch.ones(4, 2, dtype=torch.int32)}, r"hw must have shape \[5, 2\], got \[4, 2\]"),
        ({"hw": torch.tensor([[3, 5], [1, 1], [2, 9], [6, 0], [4, 4]])}, r"hw must be at least 1 row and 1 column, got "
         r"\[6, 0\] for image 3"),
    ],
)  # fmt: skip
def test_bad_images(change, message):
    packed = pack()._replace(**change)
    with pytest.raises((ValueError, TypeError), match=message):
        model().encode_image(*packed)


def test_an_image_beyond_the_table():
    wide = pack([(1, 13)])
    with pytest.raises(ValueError, match="yx must be below the 12 positions of the model, got 12"):
        model().encode_image(*wide)
    model(coordinates="fractional").encode_image(*wide)


@pytest.mark.parametrize(
    ("ids", "cu", "message"),
    [
        (torch.zeros(3), [0, 3], "ids must be int32 or int64, got torch.float32"),
        (torch.zeros(3, 2, dtype=torch.long), [0, 3], r"ids must have shape \[3\], got \[3, 2\]"),
        (torch.zeros(3, dtype=torch.long), [0, 2], "number of tokens, 3, got 0 to 2"),
        (torch.zeros(9, dtype=torch.long), [0, 1, 9], "texts must have at most 7 tokens, got 8"),
        (torch.full((3,), 50), [0, 3], "ids must be from 0 to 49, got 50"),
    ],
)
def test_bad_texts(ids, cu, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model().encode_text(ids, torch.tensor(cu, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "fixed"}, "positions must be one of learned, sinusoidal, fourier, got 'fixed'"),
        ({"coordinates": "relative"}, "coordinates must be one of absolute, fractional, aspect, got 'relative'"),
        ({"qk_norm": "batch"}, "qk_norm must be one of layer, rms, got 'batch'"),
        ({"grid": 0}, "grid must be a positive integer, got 0"),
        ({"heads": 4}, "heads must share the width in parts of a multiple of 8 up to 256, got 4 heads of width 48"),
        ({"patch": 2.5}, "patch must be a positive integer, got 2.5"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG.vision, **change)
