"""Sheets of pictures, lossless files, the curve of a run, and what the commands refuse."""

import io
import json

import pytest
import torch
from PIL import Image

from vlkern import models
from vlkern.cli import main
from vlkern.errors import UserError
from vlkern.models.elic import ElicConfig
from vlkern.models.m2t import M2T, M2TConfig
from vlkern.painting import Measures, Options, lossless, painter_of
from vlkern.painting.page import curve, page
from vlkern.painting.sheet import GAP, SIDE, png, sheet, to_bytes


def test_a_sheet_holds_every_picture_in_its_place():
    """Ten pictures of 32 pixels in rows of eight, each enlarged three times."""
    pictures = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 32, 32)
    image = sheet(pictures)
    assert image.size == (8 * (96 + GAP) + GAP, 2 * (96 + GAP) + GAP)
    for number in range(10):
        left, top = GAP + number % 8 * (96 + GAP), GAP + number // 8 * (96 + GAP)
        for x, y in ((left, top), (left + 95, top + 95)):
            assert image.getpixel((x, y)) == (number,) * 3
    assert image.getpixel((GAP - 1, GAP - 1)) == (230, 230, 230)
    assert Image.open(io.BytesIO(png(pictures[:1, :, :8, :8]))).size == (SIDE + 2 * GAP, SIDE + 2 * GAP)
    with pytest.raises(ValueError, match="pictures must be"):
        sheet(torch.zeros(2, 3, 8, 8))


def test_pixels_become_bytes():
    assert to_bytes(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_lossless_files_are_measured_with_everything_in_them():
    noise = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = lossless.bits(noise)
    out = io.BytesIO()
    Image.fromarray(noise[0].permute(1, 2, 0).contiguous().numpy()).save(out, "PNG", optimize=True)
    assert lossless.bits(noise[:1])["PNG"] == 8 * out.tell() / noise[0].numel()
    assert found["PNG"] > 8 and found["lossless WebP"] > 8  # noise cannot be compressed, and there is a header
    assert lossless.bits(torch.zeros_like(noise))["lossless WebP"] < 1


def test_the_page_tells_figures_pictures_and_the_curve(tmp_path):
    assert curve(tmp_path) == []
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": s, "loss": 5 / s}) + "\n" for s in (1, 2, 3)))
    measures = Measures({"PSNR, dB": 21.5}, {"a <title>": torch.zeros(3, 3, 8, 8, dtype=torch.uint8)}, bits=3.25)
    text = page({"model": "Jet"}, measures, {"PNG": 4.5, "lossless WebP": 3.1}, curve(tmp_path))
    for part in (
        "<dt>PSNR, dB</dt><dd>21.5</dd>",
        "a &lt;title&gt;",
        ">3.25<",
        ">4.50<",
        "data:image/png;base64,",
        "Loss",
    ):
        assert part in text
    assert "sub-pixel" not in page({}, Measures(), {}, [])


def test_options_that_a_model_has_no_use_for_are_refused():
    options = Options(1, torch.Generator(), label="cats", steps=3)
    options.only("a model", "label", "steps")
    with pytest.raises(UserError, match="--class: a Jet has no use for it"):
        options.only("a Jet", "steps")
    with pytest.raises(UserError, match=r"expected a model that makes pictures .*, got Linear"):
        painter_of(torch.nn.Linear(1, 1))


@pytest.fixture
def fails(capfd):
    def call(*words):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, words)])
        assert stopped.value.code == 2
        return capfd.readouterr().err

    return call


def test_the_commands_refuse_what_does_not_fit(tmp_path, fails):
    folder = tmp_path / "model"
    torch.manual_seed(0)
    models.save_pretrained(models.create("fsq-tiny"), folder)
    asked = ["generate", "--model", folder]
    assert "--out: expected the name of a file that ends in .png, got none" in fails(*asked)
    assert "--out: expected the name" in fails(*asked, "--out", tmp_path / "a.jpg")
    asked += ["--out", tmp_path / "a.png"]
    assert "--max-new-tokens: only for models that write texts" in fails(*asked, "--max-new-tokens", 3)
    assert "--temperature must be at least 0" in fails(*asked, "--temperature", -1)
    assert "--image " in (said := fails(*asked, "--image", tmp_path / "no.png")) and "cannot read" in said
    assert "--image: expected one picture, got 2" in fails(*asked, "--image", "a", "--image", "b")
    assert not (tmp_path / "a.png").exists()
    text = tmp_path / "gemma"
    models.save_pretrained(models.create("gemma3-tiny"), text)
    said = fails("generate", "--model", text, "--prompt", "a", "--tokenizer", "bytes", "--out", "a.png")
    assert "--out: only for models that make pictures" in said
    coder = tmp_path / "coder"  # has a configuration of its own, without a size of pictures
    network = ElicConfig((8, 12, 16), (1, 1, 1), attention=False)
    models.save_pretrained(M2T(M2TConfig(channels=8, width=16, depth=1, heads=1, mlp=16, tile=6, steps=4,
                                         lambdas=(0.01, 0.02), transforms=network)), coder)  # fmt: skip
    said = fails("generate", "--model", coder, "--out", tmp_path / "a.png")
    assert "--model: expected a model that makes pictures" in said and "got M2T" in said
    said = fails("eval", "pictures", "--model", text, "--data", tmp_path)
    assert "expected a model that makes pictures" in said
