"""Masks as sixteen tokens, against the papers' own code, and in their place on a picture."""

import numpy as np
import pytest
import torch
from rooms import ROOT

from vlkern import boxes
from vlkern.boxes import Detection, MaskVae
from vlkern.errors import UserError


def arrays():
    """The golden file, which is kept in four parts because of its size."""
    found = {}
    for part in ("encoder", "decoder_a", "decoder_b", "decoder_c"):
        with np.load(ROOT / f"tests/golden/segmentation_{part}.npz") as file:
            found |= {name: file[name] for name in file.files}
    return found


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The arrays, and the file with the weights as they are released: names without a prefix, averages left over."""
    found = arrays()
    path = tmp_path_factory.mktemp("vae") / "vae.npz"
    weights = {name.removeprefix("params/"): array for name, array in found.items() if name.startswith("params/")}
    np.savez(path, **weights, **{"_vq_vae._ema_w": weights["_vq_vae._embedding"]})
    return found, path


def test_golden(golden):
    found, path = golden
    vae = boxes.load_mask_vae(path)
    masks = torch.from_numpy(found["in/masks64"]).permute(0, 3, 1, 2) * 2 - 1
    z = vae.encoder(masks).permute(0, 2, 3, 1)
    torch.testing.assert_close(z, torch.from_numpy(found["out/enc_pre_quant"]), rtol=0, atol=2e-5)
    codes = vae.encode(masks)
    assert torch.equal(codes, torch.from_numpy(found["out/indices"]).long())
    decoded = vae.decode(torch.from_numpy(found["in/decode_indices"]))
    expected = torch.from_numpy(found["out/decoded_masks"])[..., 0]
    assert (decoded - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("number", range(3))
def test_golden_mask_to_text(golden, number):
    """From a picture's mask and box to the whole answer."""
    found, path = golden
    vae = boxes.load_mask_vae(path)
    box = tuple(found[f"in/bbox{number}"].tolist())
    cropped = boxes.crop_mask(torch.from_numpy(found[f"in/mask{number}"]) / 255, box)
    assert float((cropped[0] - torch.from_numpy(found["in/masks64"][number, ..., 0]) * 2 + 1).abs().max()) < 1e-5
    codes = tuple(vae.encode(cropped[None])[0].tolist())
    text = boxes.to_text([Detection(box, "", codes)])
    assert text == str(found[f"out/suffix{number}"])
    assert boxes.parse(text).objects[0].codes == codes


def test_paste():
    """A mask that is its upper left quarter, in a box of an odd picture: exactly those pixels, and none outside."""
    mask = torch.full((64, 64), -1.0)
    mask[:32, :32] = 1
    box = (2 / 11, 3 / 17, 10 / 11, 15 / 17)
    picture = boxes.paste_mask(mask, box, 11, 17)
    assert picture.shape == (11, 17)
    expected = torch.zeros(11, 17, dtype=torch.bool)
    expected[2:6, 3:9] = True
    assert torch.equal(picture, expected)
    assert not boxes.paste_mask(mask, (0.5, 0.5, 0.5, 1.0), 11, 17).any()
    assert boxes.paste_mask(torch.ones(64, 64), (0.0, 0.0, 1.0, 1.0), 200, 3).all()


def test_paste_undoes_crop():
    """A smooth shape, cut out of its box at 64 x 64 and put back, covers nearly the same pixels."""
    y, x = torch.meshgrid(torch.arange(90), torch.arange(120), indexing="ij")
    mask = ((y - 40) ** 2 / 900 + (x - 70) ** 2 / 1600) < 1
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    box = (int(rows[0]) / 90, int(columns[0]) / 120, (int(rows[-1]) + 1) / 90, (int(columns[-1]) + 1) / 120)
    back = boxes.paste_mask(boxes.crop_mask(mask, box)[0], box, 90, 120)
    assert float((back & mask).sum() / (back | mask).sum()) > 0.98


def test_masks_of_objects():
    vae = MaskVae((2, 2, 2, 2), 4)
    objects = [Detection((0.0, 0.0, 1.0, 0.5), "cat"), Detection((0.0, 0.5, 1.0, 1.0), "dog", tuple(range(16)))]
    none, mask = vae.masks(objects, 20, 30)
    assert none is None
    assert mask.shape == (20, 30)
    assert not mask[:, :15].any()
    assert vae.masks(objects[:1], 20, 30) == [None]


def test_bad_files(golden, tmp_path):
    found, _ = golden
    weights = {name: array for name, array in found.items() if name.startswith("params/")}
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in weights.items() if name != "params/encoder.4.weight"})
    with pytest.raises(UserError, match=r"encoder\.4\.weight is missing"):
        boxes.load_mask_vae(path)
    np.savez(path, **weights | {"params/decoder.0.weight": weights["params/decoder.0.weight"][:5]}, more=np.zeros(2))
    with pytest.raises(UserError, match=r"2 tensors do not fit.*unexpected more.*wrong shape decoder\.0\.weight"):
        boxes.load_mask_vae(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole"):
        boxes.load_mask_vae(path)


def test_bad_input():
    vae = MaskVae((2, 2, 2, 2), 4)
    with pytest.raises(ValueError, match=r"masks must have shape \[N, 1, 64, 64\]"):
        vae.encode(torch.zeros(1, 64, 64))
    with pytest.raises(TypeError, match="masks must be float"):
        vae.encode(torch.zeros(1, 1, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes must have shape \[N, 16\]"):
        vae.decode(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="int32 or int64"):
        vae.decode(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="between 0 and 127, got 0 to 128"):
        vae.decode(torch.tensor([[0] * 15 + [128]]))
    with pytest.raises(ValueError, match="cover a pixel"):
        boxes.crop_mask(torch.ones(10, 10), (0.5, 0.5, 0.5, 0.6))
    with pytest.raises(ValueError, match=r"shape \[height, width\]"):
        boxes.crop_mask(torch.ones(1, 10, 10), (0.0, 0.0, 1.0, 1.0))
